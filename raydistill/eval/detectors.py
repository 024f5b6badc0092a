"""Which network judges a run's images? Features for the distances, and whether an image shows what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from raydistill.errors import ConfigError
from raydistill.eval import digit_net, features
from raydistill.eval.prompt_accuracy import prompt_accuracy

DetectorName = Literal["scenes", "digits"]


class Detector(Protocol):
    """A frozen network that is part of a protocol: figures of different detectors never share an axis."""

    name: str
    sha256: str
    """Of its weights file."""
    image_size: int
    """Edge of the square images in pixels."""
    accuracy_metric: str
    """Name of what `accuracy` gives, without N."""

    def to(self, device: torch.device | str) -> Self: ...

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, D], what the images show [B, ...]) of uint8 images [B, 3, image_size, image_size].

        Raises DataError for images of another type or size.
        """
        ...

    def accuracy(self, shown: Tensor, captions: Sequence[str]) -> float:
        """Share of images that show what their captions name; raises DataError for a caption that names nothing."""
        ...


class SceneDetector:
    """SceneNet: coloured shapes."""

    name = "SceneNet"
    image_size = features.IMAGE_SIZE
    accuracy_metric = "prompt_accuracy"

    def __init__(self) -> None:
        self._net = features.load_scene_net()
        self.sha256 = features.scene_net_sha256()

    def to(self, device: torch.device | str) -> Self:
        self._net.to(device)
        return self

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, 64], presence logits [B, colours, shapes])."""
        drawn: tuple[Tensor, Tensor] = self._net(images)
        return drawn

    def accuracy(self, shown: Tensor, captions: Sequence[str]) -> float:
        return prompt_accuracy(shown, captions)


class DigitDetector:
    """DigitNet: handwritten digits."""

    name = "DigitNet"
    image_size = digit_net.IMAGE_SIZE
    accuracy_metric = "label_accuracy"

    def __init__(self) -> None:
        self._net = digit_net.load_digit_net()
        self.sha256 = digit_net.digit_net_sha256()

    def to(self, device: torch.device | str) -> Self:
        self._net.to(device)
        return self

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, 32], logits [B, 10])."""
        drawn: tuple[Tensor, Tensor] = self._net(images)
        return drawn

    def accuracy(self, shown: Tensor, captions: Sequence[str]) -> float:
        return digit_net.label_accuracy(shown, captions)


DETECTORS: dict[str, type[SceneDetector] | type[DigitDetector]] = {
    "scenes": SceneDetector,
    "digits": DigitDetector,
}


def detector_for(name: str) -> Detector:
    """The shipped detector of that kind of images, on the CPU. Raises ConfigError for another name."""
    if name not in DETECTORS:
        raise ConfigError(f"evaluator.detector={name!r} is not one of {', '.join(DETECTORS)}")
    return DETECTORS[name]()
