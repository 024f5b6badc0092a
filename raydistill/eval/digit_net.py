"""The shipped detector of handwritten digits: which one does an image show, and in which features is toyfid taken?

`DigitNet` is trained by `jobs/train_digit_net.py` on the digits of `raydistill.data.digits`; it is to them what
SceneNet is to the scenes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raydistill.errors import DataError

IMAGE_SIZE = 8
NUM_CLASSES = 10
NUM_FEATURES = 32
DIGIT_NET_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "digit_net"


class DigitNet(nn.Module):
    """Features and class of digits; images are uint8 [B, 3, 8, 8], as files hold them.

    The features are a linear map of all positions, no average over them: at 8x8 pixels a digit's form is where its
    strokes are.
    """

    feature_scale: Tensor

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.register_buffer("feature_scale", torch.ones(()))
        self.trunk = nn.Sequential(
            *_block(3, width, stride=1),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 2 * width, stride=1),
            nn.Flatten(),
            nn.Linear(2 * width * (IMAGE_SIZE // 2) ** 2, NUM_FEATURES),
        )
        self.classes = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def embed(self, images: Tensor) -> Tensor:
        """What the logits are made from [B, 32], of float images [B, 3, 8, 8] in [-1, 1]."""
        return self.trunk(images)

    def features(self, images: Tensor) -> Tensor:
        """Features [B, 32], scaled so that their variances sum to 32 over the real digits; else as `forward`."""
        return self(images)[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, 32], logits [B, 10]) of uint8 images [B, 3, 8, 8]; raises DataError for anything else."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise DataError(
                f"DigitNet takes uint8 images [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {images.dtype} "
                f"{list(images.shape)}; it is for the embedded digits alone (evaluator.detector)"
            )
        embedded = self.embed(images.to(self.feature_scale.dtype) / 127.5 - 1.0)
        return embedded * self.feature_scale, self.classes(embedded)


def _block(num_in: int, num_out: int, stride: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    return (
        nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(num_out),
        nn.SiLU(),
    )


def load_digit_net(path: str | Path | None = None) -> DigitNet:
    """The trained net, frozen; `path` is a folder with digit_net.safetensors and digit_net.json.

    Without a path the net that the package ships is loaded. Raises DataError where a file is missing or where the
    weights are not the ones that the JSON file describes.
    """
    folder = Path(path) if path is not None else DIGIT_NET_FOLDER
    weights_file, about_file = folder / "digit_net.safetensors", folder / "digit_net.json"
    for file in (weights_file, about_file):
        if not file.is_file():
            raise DataError(
                f"DigitNet file missing: {file}; make it with: python jobs/train_digit_net.py --out {folder}"
            )
    about = json.loads(about_file.read_text())
    sha256 = digit_net_sha256(folder)
    if about["sha256"] != sha256:
        raise DataError(f"{weights_file} has sha256 {sha256}, but {about_file} describes {about['sha256']}")
    net = DigitNet(width=about["width"])
    net.load_state_dict(load_file(str(weights_file)))
    return net.eval().requires_grad_(False)


def digit_net_sha256(path: str | Path | None = None) -> str:
    """Sha256 of the weights file: what an evaluation protocol records as its detector."""
    folder = Path(path) if path is not None else DIGIT_NET_FOLDER
    return hashlib.sha256((folder / "digit_net.safetensors").read_bytes()).hexdigest()


def label_accuracy(logits: Tensor, captions: Sequence[str]) -> float:
    """Share of images whose largest logit [B, 10] is that of the class that their caption names by its number.

    Raises DataError without images, for counts that differ, or for a caption that is no class's number.
    """
    if not captions or logits.shape != (len(captions), NUM_CLASSES):
        raise DataError(
            f"logits have shape {tuple(logits.shape)}; expected ({len(captions)} captions, {NUM_CLASSES} classes)"
        )
    numbers = {str(number): number for number in range(NUM_CLASSES)}
    if unknown := [caption for caption in captions if caption.strip() not in numbers]:
        raise DataError(f"caption {unknown[0]!r} names no digit; label accuracy knows 0 to {NUM_CLASSES - 1}")
    labels = torch.tensor([numbers[caption.strip()] for caption in captions])
    return (logits.detach().cpu().argmax(dim=1) == labels).double().mean().item()
