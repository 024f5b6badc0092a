"""Which noise and which label does sample n of an evaluation get? The rules of the protocols.

`counter-based` is this project's own (`raydistill.diffusion.random`). `generator-per-image` is EDM's (arXiv:2206.00364,
generate.py): sample n has a torch generator seeded with n, which draws its initial noise, then its label, then the
noise between its steps. Torch's generators differ between CPU and GPU: the device's type is part of that rule's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from raydistill.diffusion.random import Draws


class Seeds(Protocol):
    """Draws of samples by their numbers; none depends on which others are asked for."""

    name: str
    """As a protocol records it."""

    def noise(self, purpose: str, again: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
        """[len(indices), *shape] float32; again: 0 for the initial noise, k for the k-th between steps.

        purpose: keeps counter-based draws for different uses apart.
        """

    def label(self, index: int, shape: tuple[int, int, int]) -> int:
        """Sample `index`'s class, where the protocol draws it; shape: of its noise."""


class CounterBased:
    """Philox keyed by seed, purpose and sample."""

    name = "counter-based"

    def __init__(self, seed: int, num_classes: int = 0):
        self._draws = Draws(seed)
        self._num_classes = num_classes

    def noise(self, purpose: str, again: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
        return self._draws.normal(purpose, 0, indices, shape)

    def label(self, index: int, shape: tuple[int, int, int]) -> int:
        return int(self._draws.integers("eval/label", 0, [index], 0, self._num_classes))


class GeneratorPerImage:
    """EDM's rule; the label is drawn between the initial noise and what follows."""

    def __init__(self, seed: int, num_classes: int, device: torch.device | str):
        """seed: added to every sample's number. num_classes: 0 without labels, for which none is drawn."""
        self._seed = seed
        self._num_classes = num_classes
        self._device = torch.device(device)
        self.name = f"generator-per-image on {self._device.type}"

    def noise(self, purpose: str, again: int, indices: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
        return torch.stack([self._one(index, again, shape) for index in indices])

    def label(self, index: int, shape: tuple[int, int, int]) -> int:
        generator = self._generator(index)
        torch.randn(shape, generator=generator, device=self._device)
        return self._draw_label(generator)

    def _one(self, index: int, again: int, shape: tuple[int, int, int]) -> Tensor:
        generator = self._generator(index)
        drawn = torch.randn(shape, generator=generator, device=self._device)
        if again and self._num_classes:
            self._draw_label(generator)
        for _ in range(again):
            drawn = torch.randn(shape, generator=generator, device=self._device)
        return drawn

    def _generator(self, index: int) -> torch.Generator:
        return torch.Generator(self._device).manual_seed((self._seed + index) % (1 << 32))

    def _draw_label(self, generator: torch.Generator) -> int:
        return int(torch.randint(self._num_classes, size=[], generator=generator, device=self._device))
