"""What a method may ask of its surroundings and must answer. No Ray, no I/O, no other method.

One generator update has two halves, so that the runtime may let the networks live elsewhere and overlap their work:

    x = generator(...)            graph kept by the generator's process
    queries = method.queries(x)   "teacher's x0 at this x_t, t, cond", "critic's logit at that one", ...
    answers                       ordinary tensors; where x_t carries a gradient, so does the answer (its backward is
                                  the network's vector-Jacobian product, local or remote)
    losses = method.generator_losses(x, queries, answers)
    x.backward(d losses / d x)

Everything a method draws comes from `PhaseDraws`, keyed by seed, phase, step and global sample index: what was drawn
for one half of an update can be drawn again for the other.
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
from raydistill.errors import ConfigError
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser

Access = Literal["none", "score", "vjp"]
"""How a method uses a network beside the generator: not at all, its output, or also gradients to its input."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What every method's settings have; a method's own class names it by `kind` and states its defaults."""

    kind: str
    """Name of the method."""
    critic_updates_per_generator: int = 1
    """R, critic optimiser steps for each generator optimiser step."""

    @property
    def label(self) -> str:
        """Name of the method as configured, for tables."""
        return self.kind

    def __post_init__(self) -> None:
        if self.critic_updates_per_generator < 1:
            raise ConfigError(
                f"method.critic_updates_per_generator={self.critic_updates_per_generator} must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method (as configured) needs from the other roles."""

    teacher: Access
    critic: Access
    real_data: bool
    gan_head: bool = False
    """Whether the critic has a head of its own on bottleneck features."""
    head_features: Literal["critic", "teacher"] = "critic"
    """Whose features the head reads."""
    teacher_for_critic: bool = False
    """Whether the critic's losses ask the teacher too."""
    instant_critic: Literal["identity", "adam"] | None = None
    """Preconditioner of a critic that is the teacher itself, one infinitesimal step away (moment matching without a
    network of its own): its update keeps a direction in the space of weights, along which it answers. None: the critic
    is trained."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a batch costs in each phase, in forward passes through the whole network (a backward pass is 2 of them)."""

    rollout: float = 0.0
    """Passes without a graph that make the generator's input."""
    critic_answer: float
    """The critic's answers to a generator update, gradients to its input included."""
    critic_update: float
    """One critic update, backward pass included."""
    teacher_answer: float
    """The teacher's answers to a generator update."""
    teacher_for_critic: float = 0.0
    """The teacher's answers to one critic update, or the passes through it that a critic update makes."""
    critic_graphs: float = 1.0
    """Activations of the critic that are alive together, in those of one pass."""
    teacher_graphs: float = 0.0
    """Likewise of a teacher that is differentiated through."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """One question to one network: a pure function of its fields, so it may be retried, re-routed and cached."""

    network: Literal["teacher", "critic"]
    want: Literal["x0", "features", "logit", "logit_map", "tangent", "sample"]
    """x0 [B, C, H, W]; bottleneck features [B, D, h, w]; the head's logit [B]; the mean of the features over their
    channels, a discriminator without weights of its own [B, h, w]; the change of x0 along an instant critic's direction
    [B, C, H, W]; the network's own sample by DDIM from the noise x_t [B, C, H, W]."""
    x_t: Tensor
    """[B, C, H, W]; the answer is differentiable with respect to it exactly if it requires a gradient."""
    t: Tensor
    """[B], schedule units."""
    cond: Cond
    guidance_scale: float = 1.0
    """Of x0 and samples, teacher's or critic's."""
    steps: int = 0
    """Of a sample."""


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

    def uniform(self, name: str) -> Tensor:
        """[B] in [0, 1), float64."""
        return self._draws.uniform(f"{self._phase}/{name}", self.step, self._positions).to(self._device)

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
    critic_first: bool = False
    """The order of a window. False: the generator's update, then R critic updates, the first of them on the very
    samples of the generator's update. True: R critic updates, each on fresh samples, then the generator's on others."""
    starts_from_real: bool = False
    """Whether `generator_input` noises real samples; their captions then condition the generator."""
    sampling_times: tuple[float, ...]
    """Descending noise levels at which the generator is run to make an image."""
    sampler: str = "few_step"
    """How `sample` goes from one of them to the next: a function of `diffusion.samplers`."""

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

    def gan_on(self, generator_update: int) -> bool:
        """Whether adversarial terms take part in this update of the generator (stage 2)."""
        return False

    def reads_real(self, generator_update: int) -> bool:
        """Whether the window of this update reads real batches."""
        return self.starts_from_real or self.gan_on(generator_update)

    def generator_rests(self, generator_update: int) -> bool:
        """Whether the generator's optimiser step is left out of this update, so that only the critic learns."""
        return False

    @abstractmethod
    def generator_input(
        self, generator: Denoiser, cond: Cond, shape: Sequence[int], real: RealBatch | None, draws: PhaseDraws
    ) -> tuple[Tensor, Tensor]:
        """(x_in [B, *shape], t_in [B]) of the generator call that gets the gradient; no graph."""

    @abstractmethod
    def queries(self, x: Tensor, cond: Cond, real: RealBatch | None, draws: PhaseDraws) -> dict[str, Query]:
        """What the losses at the generated samples x need from the other networks.

        real: what `generator_input` started from, None unless `starts_from_real`.
        """

    @abstractmethod
    def generator_losses(
        self, x: Tensor, queries: Mapping[str, Query], answers: Mapping[str, Tensor]
    ) -> Losses:
        """Losses as functions of x (a leaf that requires a gradient) and the answers."""

    def critic_queries(
        self, x: Tensor, cond: Cond, real: RealBatch | None, draws: PhaseDraws
    ) -> dict[str, Query]:
        """What the critic's losses at detached generated samples x need from the teacher."""
        return {}

    @abstractmethod
    def critic_losses(
        self,
        critic: Critic,
        x: Tensor,
        cond: Cond,
        real: RealBatch | None,
        draws: PhaseDraws,
        answers: Mapping[str, Tensor],
    ) -> Losses:
        """Losses of the critic on detached generated samples x and, where needed, real ones.

        answers: to `critic_queries`, without a graph.
        """

    @abstractmethod
    def work(self, *, encoder_share: float, backward: float, guided: bool) -> Work:
        """What the phases cost.

        encoder_share: of a forward pass, what bottleneck features cost. backward: of a pass with weight gradients, in
        forward passes. guided: whether the teacher makes two passes for an answer.
        """
