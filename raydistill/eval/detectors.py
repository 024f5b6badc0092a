"""Which network judges a run's images? Features for the distances, and whether an image shows what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from raydistill.errors import ConfigError
from raydistill.eval import digit_net, features
from raydistill.eval.digit_net import DigitNet, digit_net_sha256, label_accuracy, load_digit_net
from raydistill.eval.features import SceneNet, load_scene_net, scene_net_sha256
from raydistill.eval.prompt_accuracy import prompt_accuracy

DetectorName = Literal["scenes", "digits"]


@dataclass(frozen=True)
class Detector:
    """A frozen network that is part of a protocol: figures of different detectors never share an axis."""

    name: str
    net: SceneNet | DigitNet
    sha256: str
    """Of its weights file."""
    image_size: int
    """Edge of the square images in pixels."""
    accuracy_metric: str
    """Name of what `accuracy` gives, without N."""
    accuracy: Callable[[Tensor, Sequence[str]], float]
    """Share of images that show what their captions name, of what `__call__` found in them; raises DataError for a
    caption that names nothing."""

    def to(self, device: torch.device | str) -> Self:
        self.net.to(device)
        return self

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, D], what the images show [B, ...]) of uint8 images [B, 3, image_size, image_size].

        Raises DataError for images of another type or size.
        """
        drawn: tuple[Tensor, Tensor] = self.net(images)
        return drawn


ACCURACY = {"scenes": "prompt_accuracy", "digits": "label_accuracy"}
"""Name of each detector's accuracy metric, without N."""


def detector_for(name: str) -> Detector:
    """The shipped detector of that kind of images, on the CPU. Raises ConfigError for another name."""
    if name not in ACCURACY:
        raise ConfigError(f"evaluator.detector={name!r} is not one of {', '.join(ACCURACY)}")
    measured = ACCURACY[name]
    if name == "digits":
        digits = load_digit_net(), digit_net_sha256(), digit_net.IMAGE_SIZE
        return Detector("DigitNet", *digits, measured, label_accuracy)
    scenes = load_scene_net(), scene_net_sha256(), features.IMAGE_SIZE
    return Detector("SceneNet", *scenes, measured, prompt_accuracy)
