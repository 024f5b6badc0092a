"""The shipped detector: which coloured shapes does a scene show, and in which features is toyfid taken?

`SceneNet` is a small convolutional net trained by `jobs/train_scene_net.py` on the scenes of
`raydistill.data.scenes`. It is to the embedded data what Inception is to natural images: its pooled features
feed the Frechet distance, its presence logits feed the prompt accuracy. Only torch is needed to use it.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raydistill.errors import DataError

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
IMAGE_SIZE = 32
NUM_FEATURES = 64
SCENE_NET_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "scene_net"


class SceneNet(nn.Module):
    """Features and object presence of drawn scenes; images are uint8 [B, 3, 32, 32], as files hold them.

    Two coordinate channels are appended to the image, so that the pooled features know where things are and
    the Frechet distance notices a wrong layout, which plain average pooling would hide.
    """

    coordinates: Tensor
    feature_scale: Tensor

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        line = torch.linspace(-1.0, 1.0, IMAGE_SIZE)
        self.register_buffer("coordinates", torch.stack(torch.meshgrid(line, line, indexing="xy"))[None])
        self.register_buffer("feature_scale", torch.ones(()))
        self.trunk = nn.Sequential(
            _block(5, width, stride=1),
            _block(width, 2 * width, stride=2),
            _block(2 * width, 2 * width, stride=1),
            _block(2 * width, 3 * width, stride=2),
            _block(3 * width, 3 * width, stride=1),
            _block(3 * width, NUM_FEATURES, stride=1),
        )
        self.presence = nn.Conv2d(NUM_FEATURES, len(COLOURS) * len(SHAPES), 1)

    def maps(self, images: Tensor) -> Tensor:
        """Feature maps [B, 64, 8, 8] of uint8 images [B, 3, 32, 32]; raises DataError for anything else."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise DataError(
                f"SceneNet takes uint8 images [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {images.dtype} "
                f"{list(images.shape)}; toyfid is for the embedded scenes alone (evaluator.enabled=false)"
            )
        return self.maps_of_floats(images.to(self.feature_scale.dtype) / 127.5 - 1.0)

    def maps_of_floats(self, images: Tensor) -> Tensor:
        """As `maps`, for float images [B, 3, 32, 32] in [-1, 1], to which training adds noise."""
        coordinates = self.coordinates.expand(images.shape[0], -1, -1, -1)
        return self.trunk(torch.cat([images, coordinates], dim=1))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features [B, 64], scaled so that their variances sum to 64 over the validation images."""
        return self.pool(self.maps(images))

    def pool(self, maps: Tensor) -> Tensor:
        return maps.mean(dim=(2, 3)) * self.feature_scale

    def objects(self, images: Tensor) -> Tensor:
        """Presence logits [B, colours, shapes]: above 0 where the scene shows that shape in that colour."""
        return self.presence_of_maps(self.maps(images))

    def presence_of_maps(self, maps: Tensor) -> Tensor:
        return self.presence(maps).amax(dim=(2, 3)).unflatten(1, (len(COLOURS), len(SHAPES)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, 64], presence logits [B, colours, shapes]) from one pass."""
        maps = self.maps(images)
        return self.pool(maps), self.presence_of_maps(maps)


def _block(num_in: int, num_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(num_out),
        nn.SiLU(),
    )


def load_scene_net(path: str | Path | None = None) -> SceneNet:
    """The trained net, frozen; `path` is a folder with scene_net.safetensors and scene_net.json.

    Without a path the net that the package ships is loaded. Raises DataError where a file is missing or where
    the weights are not the ones that the JSON file describes.
    """
    folder = Path(path) if path is not None else SCENE_NET_FOLDER
    weights_file, about_file = folder / "scene_net.safetensors", folder / "scene_net.json"
    for file in (weights_file, about_file):
        if not file.is_file():
            raise DataError(
                f"SceneNet file missing: {file}; make it with: python jobs/train_scene_net.py --out {folder}"
            )
    about = json.loads(about_file.read_text())
    sha256 = scene_net_sha256(folder)
    if about["sha256"] != sha256:
        raise DataError(f"{weights_file} has sha256 {sha256}, but {about_file} describes {about['sha256']}")
    if about["colours"] != list(COLOURS) or about["shapes"] != list(SHAPES):
        raise DataError(
            f"{about_file} names other colours or shapes than this version of the package: {about}"
        )
    net = SceneNet(width=about["width"])
    net.load_state_dict(load_file(str(weights_file)))
    return net.eval().requires_grad_(False)


def scene_net_sha256(path: str | Path | None = None) -> str:
    """Sha256 of the weights file: what an evaluation protocol records as its detector."""
    folder = Path(path) if path is not None else SCENE_NET_FOLDER
    return hashlib.sha256((folder / "scene_net.safetensors").read_bytes()).hexdigest()
