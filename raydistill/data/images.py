"""How a picture file becomes pixels: one crop, one resampling and one range wherever images are read."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydistill.errors import DataError

# What PIL raises for files that are cut off, corrupt, not images at all, or large enough to be an attack.
UNDECODABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def decode_pixels(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> RGB pixels [H, W, 3] uint8. Raises one of UNDECODABLE."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def square(image: Image.Image, size: int) -> Image.Image:
    """RGB, the largest centred square cut out and resampled (Lanczos, antialiased) to size x size pixels."""
    image = image.convert("RGB")
    if image.size == (size, size):
        return image
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    box = (left, top, left + edge, top + edge)
    # resize(box=...) would let the filter reach beyond the square
    return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def to_signed(pixels: np.ndarray) -> Tensor:
    """uint8 pixels [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).movedim(-1, -3).contiguous().float().div_(127.5).sub_(1.0)


def load_image(path: str | Path, image_size: int) -> Tensor:
    """The image file as [3, image_size, image_size] float32 in [-1, 1]; raises DataError if unreadable."""
    try:
        with Image.open(path) as image:
            return to_signed(np.array(square(image, image_size)))
    except UNDECODABLE as error:
        raise DataError(f"image {path} can't be read: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def progress_interval_s() -> float:
    """Seconds between redraws of a progress bar: a log file gets a line now and then, a terminal a moving bar."""
    return 0.2 if sys.stderr.isatty() else 10.0
