"""What a shard holds of each image: its pixels as a file, its captions, and what an encoder makes of both."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydistill.data.images import square, to_signed
from raydistill.data.sources import Sample
from raydistill.errors import DataError

Shapes = dict[str, list[int] | None]
"""Shape of one sample's image, latent and caption arrays by name; None where samples differ."""


class Encoder(Protocol):
    """What makes latents and embeddings; both results are batch first."""

    fingerprint: str

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w]."""
        ...

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """Captions -> named arrays, e.g. {"text": [B, L, D]}."""
        ...


@dataclass(frozen=True)
class Picture:
    """A sample with the file that a shard keeps of its image; pixels are [H, W, 3] uint8, None without an image."""

    sample: Sample
    suffix: str
    data: bytes
    pixels: np.ndarray | None


def stored_picture(sample: Sample, image_size: int | None) -> Picture:
    """The file as it is where it has the wanted size already, a PNG otherwise. Raises one of UNDECODABLE."""
    data = sample.image
    if data is None:
        return Picture(sample, "", b"", None)
    with Image.open(io.BytesIO(data)) as picture:
        has_size = image_size is None or picture.size == (image_size, image_size)
        if picture.format in ("JPEG", "PNG") and picture.mode == "RGB" and has_size:
            return Picture(sample, "jpg" if picture.format == "JPEG" else "png", data, np.array(picture))
        changed = picture.convert("RGB") if image_size is None else square(picture, image_size)
    buffer = io.BytesIO()
    # lossless: a second JPEG compression would show in every figure that compares pixels
    changed.save(buffer, "PNG")
    return Picture(sample, "png", buffer.getvalue(), np.array(changed))


def entries(
    pictures: Sequence[Picture], encoder: Encoder | None, array_dtype: str, shapes: Shapes
) -> Iterator[dict[str, Any]]:
    """The pictures as webdataset entries; their shapes are joined to `shapes`.

    Raises DataError where the encoder's results are not finite in `array_dtype` or differ in shape.
    """
    arrays = [{} for _ in pictures] if encoder is None else _encoded(pictures, encoder, array_dtype)
    for picture, named in zip(pictures, arrays, strict=True):
        sample = picture.sample
        entry: dict[str, Any] = {"__key__": sample.key}
        if picture.pixels is not None:
            height, width, channels = picture.pixels.shape
            join_shape(shapes, "image", [channels, height, width])
            entry[picture.suffix] = picture.data
        about = {"captions": sample.captions, **sample.about}
        entry["json"] = json.dumps(about, ensure_ascii=False).encode()
        for name, array in named.items():
            if not np.isfinite(array).all():
                raise DataError(
                    f"the encoder's {name} of {sample.where} is not finite as {array_dtype} "
                    "(--array-dtype float32 has a wider range)"
                )
            join_shape(shapes, name, list(array.shape if name == "latent" else array.shape[1:]))
            entry[f"{name}.npy"] = _npy(array)
        yield entry


def join_shape(shapes: Shapes, name: str, shape: list[int] | None) -> None:
    """Note one more shape. Raises DataError if an array differs; images may."""
    if shapes.setdefault(name, shape) != shape:
        if name != "image":
            raise DataError(
                f"the encoder's {name} is {shape} for one image and {shapes[name]} for another: "
                "give --image-size"
            )
        shapes[name] = None


def _encoded(pictures: Sequence[Picture], encoder: Encoder, array_dtype: str) -> list[dict[str, np.ndarray]]:
    """Per picture its latent [C, h, w], where it has pixels, and its captions' arrays [captions, ...]."""
    pixels = [picture.pixels for picture in pictures if picture.pixels is not None]
    if len({each.shape for each in pixels}) > 1:
        raise DataError("images of different sizes can't be encoded together: give --image-size")

    def array(tensor: Tensor) -> np.ndarray:
        # an overflow becomes infinite here and is refused when it is written
        with np.errstate(over="ignore"):
            return tensor.float().cpu().numpy().astype(array_dtype)

    unique = list(dict.fromkeys(caption for picture in pictures for caption in picture.sample.captions))
    place = {caption: number for number, caption in enumerate(unique)}
    with torch.inference_mode():
        latents = array(encoder.encode_images(to_signed(np.stack(pixels)))) if pixels else None
        texts = {name: array(tensor) for name, tensor in encoder.encode_text(unique).items()}
    return [
        ({} if latents is None else {"latent": latents[number]})
        | {
            name: rows[[place[caption] for caption in picture.sample.captions]]
            for name, rows in texts.items()
        }
        for number, picture in enumerate(pictures)
    ]


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
