"""One micro-batch, filled sample by sample straight from the shards' bytes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydistill.data.images import UNDECODABLE, decode_pixels, first_line, to_signed
from raydistill.data.shard_file import RejectedSample, ShardFile
from raydistill.data.shards import ShardIndex


@dataclass(frozen=True)
class Batch:
    """A micro-batch; all arrays float32 on the CPU, whatever they are stored as."""

    positions: np.ndarray
    """[B] int64, places in the endless stream."""
    keys: list[str]
    captions: list[str]
    """One caption per sample, chosen by position."""
    images: Tensor | None
    """[B, 3, H, W] in [-1, 1]."""
    latents: Tensor | None
    """[B, C, h, w] scaled."""
    text: dict[str, Tensor] | None
    """Embeddings of the chosen captions: {"text": [B, L, D]}."""


class Rows:
    """A micro-batch being filled; a refused sample leaves its row to be filled again."""

    def __init__(self, index: ShardIndex, fields: Sequence[str], images: PixelCache, size: int):
        dtype = np.dtype(index.array_dtype)
        self._images = images
        self.keys = [""] * size
        self.captions = [""] * size
        self.latents: np.ndarray | None = None
        self.pixels: np.ndarray | None = None
        self.text: dict[str, np.ndarray] | None = None
        if "latent" in fields:
            assert index.latent_shape is not None
            self.latents = np.empty((size, *index.latent_shape), dtype)
        if "text" in fields:
            self.text = {name: np.empty((size, *shape), dtype) for name, shape in index.text_shapes.items()}
        if "image" in fields:
            assert index.image_shape is not None
            channels, height, width = index.image_shape
            self.pixels = np.empty((size, height, width, channels), np.uint8)

    def fill(self, row: int, shard: ShardFile, sample: int, choice: float) -> None:
        """choice: in [0, 1), picks the caption. Raises RejectedSample."""
        captions = shard.captions(sample)
        picked = int(choice * len(captions))
        if self.latents is not None:
            shard.read_array(sample, "latent", self.latents[row])
        if self.text is not None:
            for name, array in self.text.items():
                shard.read_array(sample, name, array[row], row=picked, rows=len(captions))
        if self.pixels is not None:
            pixels = self._images.get(shard, sample)
            if pixels.shape != self.pixels.shape[1:]:
                raise RejectedSample("image_shape", f"{pixels.shape}, not {self.pixels.shape[1:]}")
            self.pixels[row] = pixels
        self.keys[row] = shard.key(sample)
        self.captions[row] = captions[picked]

    def batch(self, positions: np.ndarray) -> Batch:
        text = None
        if self.text is not None:
            text = {name: _to_tensor(array) for name, array in self.text.items()}
        return Batch(
            positions=positions,
            keys=self.keys,
            captions=self.captions,
            images=None if self.pixels is None else to_signed(self.pixels),
            latents=None if self.latents is None else _to_tensor(self.latents),
            text=text,
        )


class PixelCache:
    """Decoded images up to a bound in bytes; what came first stays.

    The stream visits each sample once an epoch, so evicting the oldest would evict just what comes next.
    """

    def __init__(self, max_bytes: int):
        self.decoded = 0
        self._free = max_bytes
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def get(self, shard: ShardFile, sample: int) -> np.ndarray:
        """Pixels [H, W, 3] uint8. Raises RejectedSample."""
        known = self._kept.get((shard.url, sample))
        if known is not None:
            return known
        data = shard.image(sample)
        try:
            pixels = decode_pixels(data)
        except UNDECODABLE as error:
            raise RejectedSample("image_undecodable", first_line(error)) from None
        with self._lock:
            self.decoded += 1
            if pixels.nbytes <= self._free and (shard.url, sample) not in self._kept:
                self._kept[shard.url, sample] = pixels
                self._free -= pixels.nbytes
        return pixels


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    """float32; converted by numpy, since a torch operation in a reader's thread would start an OpenMP team of its own
    there, and with more OpenMP threads than cores the trainer's barriers stop spinning and sleep."""
    return torch.from_numpy(array.astype(np.float32, copy=False))
