"""Standard-normal samples with standard-normal conditions in place of data, for benchmarks and tests.

A condition that is one number is a class, and always the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from raydistill.data.reader import Batch
from raydistill.diffusion.random import Draws


class NormalSource:
    """Batches as a `ShardReader` gives them, a pure function of the global position, on any number of ranks."""

    def __init__(
        self,
        purpose: str,
        fields: tuple[str, ...],
        batch_size: int,
        micro_batch_size: int,
        *,
        latent_shape: tuple[int, ...],
        cond_shapes: Mapping[str, tuple[int, ...]],
        rank: int = 0,
        world_size: int = 1,
    ):
        """latent_shape, cond_shapes: of one sample."""
        self.purpose, self.fields = purpose, fields
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.latent_shape, self.cond_shapes = latent_shape, cond_shapes
        self.rank, self.world_size = rank, world_size
        self.counters: dict[str, int] = {}
        self._draws = Draws(7)

    def batch(self, index: int) -> Iterator[Batch]:
        """This rank's micro-batches of a global batch."""
        share = self.batch_size // self.world_size
        first = index * self.batch_size + self.rank * share
        for start in range(first, first + share, self.micro_batch_size):
            positions = np.arange(start, start + self.micro_batch_size)
            text = {
                name: self._draws.normal(f"{self.purpose}/{name}", 0, positions, shape)
                if shape
                else torch.zeros(len(positions))
                for name, shape in self.cond_shapes.items()
            }
            latents = (
                self._draws.normal(self.purpose, 0, positions, self.latent_shape)
                if "latent" in self.fields
                else None
            )
            yield Batch(positions, [], [""] * len(positions), None, latents, text)
