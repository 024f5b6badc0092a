"""What a method may ask of its surroundings and must answer. No Ray, no I/O, no other method.

One generator update has two halves, so that the runtime may let the networks live elsewhere and overlap their work:

    x = generator(...)            graph kept by the generator's process
    queries = method.queries(x)   "teacher's x0 at this x_t, t, cond", "critic's logit at that one", ...
    answers                       ordinary tensors; where x_t carries a gradient, so does the answer (its backward is
                                  the network's vector-Jacobian product, local or remote)
    losses = method.generator_losses(x, queries, answers)
    x.backward(d losses / d x)

Everything a method draws comes from `PhaseDraws`, keyed by seed, phase, step and global sample index.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raydistill.diffusion.random import Draws
from raydistill.diffusion.samplers import few_step
from raydistill.diffusion.schedules import NoiseSchedule
from raydistill.diffusion.times import TimeSampler
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser

Access = Literal["none", "score", "vjp", "parameters"]
"""How a method uses a network beside the generator: not at all, its output, also gradients to its input, or also to its
weights, which only a network in the same process can give."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method (as configured) needs from the other roles."""

    teacher: Access
    critic: Access
    real_data: bool
    gan_head: bool = False


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question to one network: a pure function of its fields, so it may be retried, re-routed and cached."""

    network: Literal["teacher", "critic"]
    want: Literal["x0", "features", "logit"]
    x_t: Tensor
    """[B, C, H, W]; the answer is differentiable with respect to it exactly if it requires a gradient."""
    t: Tensor
    """[B], schedule units."""
    cond: Cond
    guidance_scale: float = 1.0


@dataclass(frozen=True)
class Losses:
    """Named weighted losses, whose sum is minimised, and scalars for the log."""

    terms: dict[str, Tensor]
    scalars: dict[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True)
class RealBatch:
    """Clean real samples [B, C, H, W] with their own conditions."""

    x0: Tensor
    cond: Cond


class PhaseDraws:
    """The draws of one micro-batch of one optimiser step of one phase."""

    def __init__(
        self,
        draws: Draws,
        phase: str,
        step: int,
        positions: Sequence[int] | np.ndarray,
        device: torch.device | str,
    ):
        """positions: global indices of the samples in this step's batch. step: counts this phase's optimiser steps."""
        self._draws = draws
        self._phase = phase
        self.step = step
        self._positions = positions
        self._device = device

    @property
    def batch_size(self) -> int:
        return len(self._positions)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """[B, *shape] float32."""
        noise = self._draws.normal(f"{self._phase}/{name}", self.step, self._positions, tuple(shape))
        return noise.to(self._device)

    def times(self, name: str, sampler: TimeSampler) -> Tensor:
        """[B] float32 noise levels."""
        t = sampler.sample(self._draws, f"{self._phase}/{name}", self.step, self._positions)
        return t.to(self._device)

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """[B] int64 in [low, high)."""
        drawn = self._draws.integers(f"{self._phase}/{name}", self.step, self._positions, low, high)
        return drawn.to(self._device)

    def shared_integer(self, name: str, low: int, high: int) -> int:
        """One integer in [low, high), the same for the whole global batch and on every rank."""
        return self._draws.shared_integer(f"{self._phase}/{name}", self.step, low, high)


class Method(ABC):
    """A distillation method as pure functions of networks, batches and draws."""

    schedule: NoiseSchedule
    """The teacher's, which generator and critic share."""
    needs: Needs
    critic_updates_per_generator: int
    """R: critic optimiser steps for each generator optimiser step."""
    starts_from_real: bool = False
    """Whether `generator_input` noises real samples; their captions then condition the generator."""
    sampling_times: tuple[float, ...]
    """Descending noise levels at which the generator is run to make an image."""

    @abstractmethod
    def pure_noise(self, noise: Tensor) -> Tensor:
        """What the generator starts from, given unit normal noise [B, C, H, W]."""

    @torch.no_grad()
    def sample(
        self, generator: Denoiser, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]
    ) -> Tensor:
        """Generated samples as at inference, [B, C, H, W].

        noise: unit normal [B, C, H, W]; renoise(n): fresh noise of that shape, put on the x0 of step n.
        """
        return few_step(
            lambda x_t, t: generator(x_t, t, cond),
            self.schedule,
            self.sampling_times,
            self.pure_noise(noise),
            noise=renoise,
        )

    @abstractmethod
    def gan_on(self, generator_update: int) -> bool:
        """Whether adversarial terms take part in this update (stage 2)."""

    @abstractmethod
    def generator_input(
        self, generator: Denoiser, cond: Cond, shape: Sequence[int], real: RealBatch | None, draws: PhaseDraws
    ) -> tuple[Tensor, Tensor]:
        """(x_in [B, *shape], t_in [B]) of the generator call that gets the gradient; no graph."""

    @abstractmethod
    def queries(self, x: Tensor, cond: Cond, draws: PhaseDraws) -> dict[str, Query]:
        """What the losses at the generated samples x need from the other networks."""

    @abstractmethod
    def generator_losses(
        self, x: Tensor, queries: Mapping[str, Query], answers: Mapping[str, Tensor]
    ) -> Losses:
        """Losses as functions of x (a leaf that requires a gradient) and the answers."""

    @abstractmethod
    def critic_losses(
        self, critic: Critic, x: Tensor, cond: Cond, real: RealBatch | None, draws: PhaseDraws
    ) -> Losses:
        """Losses of the critic on detached generated samples x and, where needed, real ones."""
