"""A detector file in the format of NVIDIA's inception-2015-12-05.pt: TorchScript, two entrances, 2048 features."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn


class SmallInception(nn.Module):
    """As the real one: bytes of any size in, resized inside; `layers` for what is resized and normalised already."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 9, stride=8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(256, 2048),
        )

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        resized = nn.functional.interpolate(img.to(torch.float32), size=(299, 299), mode="bilinear")
        features = self.layers((resized - 128) / 128)
        if return_features:
            return features
        return features.softmax(dim=1)


def write_detector(folder: Path, seed: int = 0) -> tuple[Path, str]:
    """The file and its SHA-256."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SmallInception().eval()
    # spread over the directions, so that covariances are not those of one feature
    net.layers[4].weight.data *= 4.0
    file = folder / "inception-2015-12-05.pt"
    torch.jit.script(net).save(str(file))
    return file, hashlib.sha256(file.read_bytes()).hexdigest()
