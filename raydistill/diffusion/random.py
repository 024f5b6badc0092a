"""Which random numbers does sample n of step k get? The same ones, whatever batch, rank or process asks.

Every draw of a run goes through `Draws`. It is counter-based: Philox4x64-10 (Salmon et al., SC 2011,
doi:10.1145/2063384.2063405) keyed by (seed, purpose), its 256-bit counter starting at

    word 0: 0, advanced by the generator    word 1: position    word 2: step    word 3: kind of draw

so each (seed, purpose, kind, step, position) owns a stream of 2^64 blocks and no state is ever carried or
saved. Resuming is asking again; numpy's and torch's global generators are neither read nor moved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Positions: TypeAlias = Sequence[int] | range | np.ndarray | Tensor

# The kind of a draw is part of its counter: a purpose may be drawn from in two ways without the two being
# correlated.
_NORMAL, _UNIFORM, _INTEGERS, _SHARED, _PERMUTATION = range(5)


class Draws:
    """All randomness of a run, as a pure function of what it is for.

    `purpose` is a short string that names the use ("generator/noise"), `step` the update it belongs to and
    `positions` the global indices of the samples. Two calls with equal arguments give equal numbers; calls
    that differ in seed, purpose, step, position or method are independent.
    """

    def __init__(self, seed: int):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be an int, got {seed!r}")
        self.seed = seed

    def normal(self, purpose: str, step: int, positions: Positions, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers [len(positions), *shape], float32 on the CPU."""
        index = _as_positions(positions)
        out = np.empty((len(index), *shape), dtype=np.float32)
        for row, generator in enumerate(self._generators(purpose, _NORMAL, step, index)):
            out[row] = generator.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(out)

    def uniform(self, purpose: str, step: int, positions: Positions) -> Tensor:
        """One number in [0, 1) per position: [len(positions)], float64 on the CPU."""
        index = _as_positions(positions)
        generators = self._generators(purpose, _UNIFORM, step, index)
        return torch.from_numpy(np.fromiter((g.random() for g in generators), np.float64, len(index)))

    def integers(self, purpose: str, step: int, positions: Positions, low: int, high: int) -> Tensor:
        """One integer in [low, high) per position: [len(positions)], int64. ValueError if low >= high."""
        index = _as_positions(positions)
        generators = self._generators(purpose, _INTEGERS, step, index)
        return torch.from_numpy(
            np.fromiter((g.integers(low, high) for g in generators), np.int64, len(index))
        )

    def shared_integer(self, purpose: str, step: int, low: int, high: int) -> int:
        """One integer in [low, high) for the whole step, on all ranks. ValueError if low >= high."""
        (generator,) = self._generators(purpose, _SHARED, step, np.zeros(1, np.uint64))
        return int(generator.integers(low, high))

    def permutation(self, purpose: str, step: int, n: int) -> np.ndarray:
        """A random order of range(n), int64."""
        (generator,) = self._generators(purpose, _PERMUTATION, step, np.zeros(1, np.uint64))
        return generator.permutation(n)

    def _generators(
        self, purpose: str, kind: int, step: int, index: np.ndarray
    ) -> Iterator[np.random.Generator]:
        """One generator per position; each is valid until the next is asked for."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        digest = hashlib.blake2b(f"{self.seed}/{purpose}".encode(), digest_size=16).digest()
        bits = np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))
        # Setting the counter of one generator costs 2 us, building a new one 13 us.
        state = bits.state
        counter = state["state"]["counter"]
        generator = np.random.Generator(bits)
        for position in index:
            counter[:] = (0, position, step, kind)
            bits.state = state
            yield generator


def _as_positions(positions: Positions) -> np.ndarray:
    index = positions.cpu().numpy() if isinstance(positions, Tensor) else np.asarray(positions)
    if index.ndim != 1:
        raise ValueError(f"positions must be one-dimensional, got shape {index.shape}")
    if len(index) == 0:
        return np.zeros(0, np.uint64)
    if index.dtype.kind not in "iu":
        raise TypeError(f"positions must be integers, got {index.dtype}")
    if index.min() < 0:
        raise ValueError(f"positions must be at least 0, got {index.min()}")
    return index.astype(np.uint64)
