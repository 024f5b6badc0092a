"""How bytes of an image become what Inception is given: one named chain for real and generated images alike.

Which filter at which step moves FID by several points (arXiv:2104.11222), so a chain's name is part of the protocol.
clean-fid's own resizer makes the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydistill.errors import ConfigError, DataError
from raydistill.torchvision_ops import ensure_torchvision_importable

DETECTOR_SIZE = 299


@dataclass(frozen=True)
class Chain:
    """From pixels to the detector's input."""

    name: str
    prepare: Callable[[Image.Image], Image.Image] | None
    """Crop and resize, before clean-fid's resizer; None: the detector resizes bytes of any size itself."""

    @property
    def inside(self) -> bool:
        """Whether the detector resizes by itself, as TensorFlow's graph does (clean-fid's legacy_tensorflow)."""
        return self.prepare is None

    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Pixels [H, W, 3] uint8 -> uint8 [B, 3, H, W] where the detector resizes, else float32 [B, 3, 299, 299] from
        0 to 255.

        Raises DataError for images of different sizes where the detector resizes.
        """
        if self.prepare is None:
            if len({picture.shape for picture in pictures}) > 1:
                raise DataError(
                    f"images of {len({picture.shape for picture in pictures})} sizes can't be judged together by this "
                    "protocol: the reference (evaluator.reference) must have the size of the generated images"
                )
            return torch.from_numpy(np.stack(pictures)).movedim(-1, 1)
        resize = _clean()
        prepared = [np.asarray(self.prepare(Image.fromarray(picture))) for picture in pictures]
        return torch.from_numpy(np.stack([resize(picture) for picture in prepared])).movedim(-1, 1)


def crop_to_short_edge(image: Image.Image) -> Image.Image:
    """The largest centred square, its corner rounded as torchvision's center_crop does."""
    return _centre_crop(image, min(image.size))


def _centre_crop(image: Image.Image, edge: int) -> Image.Image:
    # to the nearest even integer where the margin is odd, which is where // would differ
    left, top = round((image.width - edge) / 2.0), round((image.height - edge) / 2.0)
    return image.crop((left, top, left + edge, top + edge))


def _crop_and_lanczos(edge: int) -> Callable[[Image.Image], Image.Image]:
    def prepare(image: Image.Image) -> Image.Image:
        return crop_to_short_edge(image).resize((edge, edge), Image.Resampling.LANCZOS)

    return prepare


def _patch(image: Image.Image) -> Image.Image:
    """The centred patch; an image that is smaller stays whole."""
    return _centre_crop(image, DETECTOR_SIZE) if min(image.size) >= DETECTOR_SIZE else image


lanczos256 = _crop_and_lanczos(256)
CHAINS = {
    chain.name: chain
    for chain in (
        Chain("inside", None),
        Chain("crop-lanczos256-clean299", lanczos256),
        Chain("crop-lanczos512-clean299", _crop_and_lanczos(512)),
        Chain("patch299-clean299", _patch),
    )
}


def chain(name: str) -> Chain:
    """The chain of that name. Raises ConfigError for another."""
    if name not in CHAINS:
        raise ConfigError(f"resize is {name!r}; the chains are {', '.join(CHAINS)}")
    return CHAINS[name]


@cache
def _clean() -> Callable[[np.ndarray], np.ndarray]:
    ensure_torchvision_importable()
    from cleanfid.resize import build_resizer

    resizer: Callable[[np.ndarray], np.ndarray] = build_resizer("clean")
    return resizer
