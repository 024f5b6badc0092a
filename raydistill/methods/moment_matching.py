"""Multistep distillation by moment matching. Salimans et al., NeurIPS 2024, arXiv:2406.04103.

Symbols: k number of the generator's steps; s <= t a pair of noise levels at most 1/k apart on a unit time; z_t a noised
real sample; x~ = g_eta(z_t, t) the generator's sample; z_s ~ q(z_s | z_t, x~) the stochastic ancestral step, through
which no gradient flows; g_theta teacher, g_phi auxiliary denoiser (the critic), all predicting x0; w(s) a weight.

    alternating (algorithm 2)
        critic      L(phi) = w(s) { |sg(x~) - g_phi(z_s)|^2 + |g_theta(z_s) - g_phi(z_s)|^2 }
        generator   L(eta) = w(s) x~^T sg[ g_phi(z_s) - g_theta(z_s) ]
    instant, in the space of parameters (algorithm 3), without a network of its own
        critic      nu = -Lambda grad_theta w(s) |sg(x~) - g_theta(z_s)|^2
        generator   L(eta) = w(s) x~^T sg[ J_theta(z_s) nu ]

The two updates alternate on different batches. Sums over pixels are means here, as in every loss of this package. The
value of L(eta) is no distance: only its gradient has a meaning. With the second term of L(phi) the critic's optimum is
half-way between E[x~|z_s] and the teacher, so the generator's gradient is half of the plain one's. At t of pure noise
and without that term this is un-normalised DMD.

The paper's dropout in the generator, with masks shared by critic and teacher, is left out: networks here have no
dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from raydistill.diffusion.random import Draws, Positions
from raydistill.diffusion.samplers import ancestral, posterior
from raydistill.diffusion.schedules import EDMSchedule, NoiseSchedule, VPDiscreteSchedule, expand
from raydistill.diffusion.times import PairedTimes, karras_sigma
from raydistill.errors import ConfigError
from raydistill.methods.method import Losses, Method, MethodConfig, Needs, PhaseDraws, Query, RealBatch, Work
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser

_MAX_STEPS = 64
_RHO = 7.0  # of the Karras curve, arXiv:2206.00364
_TANGENT_PASSES = 3.0  # a linear layer's output, its change with the weights and its change with the input


@dataclass(frozen=True, kw_only=True)
class MomentMatchingConfig(MethodConfig):
    """Settings of moment matching. No official code exists: what is marked unverified was not found in the paper's text
    by us (methods.md 3.4 and E)."""

    kind: Literal["moment_matching"] = "moment_matching"
    """Name of the method."""
    critic_updates_per_generator: int = 1
    """R, critic optimiser steps per generator step. The paper alternates 1:1, on different batches."""
    num_steps: int = 8
    """k, steps of the generator, 1 to 64: 1, 2, 4 and 8 in the paper (unverified, recalled)."""
    variant: Literal["alternating", "instant"] = "alternating"
    """With an auxiliary denoiser (algorithm 2), or in the space of the teacher's parameters without one (algorithm 3,
    known from one re-implementation)."""
    weighting: Literal["edm", "sqrt_edm", "snr", "truncated_snr", "uniform"] = "edm"
    """w(s) by the SNR of z_s: SNR + sigma_data^-2, its square root, SNR, max(SNR, 1), or 1. The paper's is unverified
    (of the family of its teacher's training weight, recalled); this menu and its default are a re-implementation's, but
    for the square root, which is ours: on the digits one step came to a toyfid of 0.76 with it after 600 updates, with
    edm to 5.6 after 500 (details alone are seen) and with 1 to 1.5 (details are not seen)."""
    sigma_data: float = 0.5
    """Data standard deviation in the weight "edm": 0.5 for pixels in [-1, 1] (arXiv:2206.00364); 1, for latents of unit
    variance, makes it the weight of the v error."""
    teacher_regularised: bool = True
    """Whether the critic is also drawn to the teacher, as in algorithm 2; false is the plain critic, for comparisons.
    Without meaning for the instant variant."""
    preconditioner: Literal["identity", "adam"] = "adam"
    """Lambda of the instant variant: 1 / (sqrt(v) + eps) with v a running second moment of the gradients that the run
    itself sees, or 1. The paper takes Adam's second moments from the teacher's training (unverified, recalled), which
    released teachers do not carry. Without meaning for the alternating variant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_steps <= _MAX_STEPS:
            raise ConfigError(f"method.num_steps={self.num_steps} must lie in 1..{_MAX_STEPS}")
        if not self.sigma_data > 0:
            raise ConfigError(f"method.sigma_data={self.sigma_data} must be positive")
        if self.variant == "instant":
            if self.critic_updates_per_generator != 1:
                raise ConfigError(
                    f"method.critic_updates_per_generator={self.critic_updates_per_generator} must be 1 with "
                    "method.variant=instant, where each update uses one direction"
                )
            if not self.teacher_regularised:
                raise ConfigError(
                    "method.teacher_regularised=false has no meaning with method.variant=instant, whose critic is the "
                    "teacher: leave it out"
                )
        elif self.preconditioner != "adam":
            raise ConfigError(
                f"method.preconditioner={self.preconditioner} has no meaning with method.variant=alternating: "
                "leave it out"
            )


class MomentMatching(Method):
    """Matches E[x~ | z_s] to the teacher's E[x | z_s] along its own ancestral sampler."""

    critic_first = True
    starts_from_real = True
    sampler = "ancestral"

    def __init__(self, config: MomentMatchingConfig, schedule: NoiseSchedule, guidance_scale: float):
        """Raises ConfigError for a schedule or a guidance scale that the method is not specified for."""
        if not isinstance(schedule, EDMSchedule | VPDiscreteSchedule):
            raise ConfigError(
                "moment matching is implemented for EDM and discrete schedules, not for "
                f"{type(schedule).__name__} (teacher.path)"
            )
        self._instant = config.variant == "instant"
        if self._instant and guidance_scale != 1.0:
            raise ConfigError(
                f"teacher.guidance_scale={guidance_scale} must be 1 with method.variant=instant, which asks no teacher"
            )
        self.config = config
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.critic_updates_per_generator = config.critic_updates_per_generator
        k = config.num_steps
        levels = _level(schedule, 1 - torch.arange(k, dtype=torch.float64) / k)
        if not (levels.diff() < 0).all():
            raise ConfigError(f"method.num_steps={k} is more than the teacher's schedule has noise levels")
        self.sampling_times = tuple(levels.tolist())
        self._ask_for_critic = config.teacher_regularised and not self._instant
        self.needs = Needs(
            teacher="none" if self._instant else "score",
            critic="score",
            real_data=True,
            teacher_for_critic=self._ask_for_critic,
            instant_critic=config.preconditioner if self._instant else None,
        )
        self._pairs = _PairedLevels(num_steps=k, schedule=schedule)

    def pure_noise(self, noise: Tensor) -> Tensor:
        """The sampler's start: sigma_max z for EDM, whose share of signal there is negligible, unit variance for VP."""
        return noise * self.schedule.t_max if isinstance(self.schedule, EDMSchedule) else noise

    @torch.no_grad()
    def sample(
        self, generator: Denoiser, cond: Cond, noise: Tensor, renoise: Callable[[int], Tensor]
    ) -> Tensor:
        """By the k-step ancestral sampler: z_s ~ q(z_s | z_t, g_eta(z_t)), and the last step's x0."""
        return ancestral(
            lambda z_t, t: generator(z_t, t, cond),
            self.schedule,
            [*self.sampling_times, self.schedule.t_clean],
            self.pure_noise(noise),
            noise=renoise,
        )

    def generator_input(
        self, generator: Denoiser, cond: Cond, shape: Sequence[int], real: RealBatch | None, draws: PhaseDraws
    ) -> tuple[Tensor, Tensor]:
        z_t, t, _ = self._noised(real, draws)
        return z_t, t

    def queries(self, x: Tensor, cond: Cond, real: RealBatch | None, draws: PhaseDraws) -> dict[str, Query]:
        z_s, s = self._stepped(x, real, draws)
        if self._instant:
            return {"tangent": Query(network="critic", want="tangent", x_t=z_s, t=s, cond=cond)}
        return {
            "real": self._ask_teacher(z_s, s, cond),
            "fake": Query(network="critic", want="x0", x_t=z_s, t=s, cond=cond),
        }

    def generator_losses(
        self, x: Tensor, queries: Mapping[str, Query], answers: Mapping[str, Tensor]
    ) -> Losses:
        gap = answers["tangent"] if self._instant else answers["fake"] - answers["real"]
        s = queries["tangent" if self._instant else "fake"].t
        scalars: dict[str, Tensor] = {}
        if not self._instant:
            scalars["critic/lag"] = gap.detach().abs().mean()
        return Losses({"moment": (self._weight(s, x) * x * gap.detach()).mean()}, scalars)

    def critic_queries(
        self, x: Tensor, cond: Cond, real: RealBatch | None, draws: PhaseDraws
    ) -> dict[str, Query]:
        if not self._ask_for_critic:
            return {}
        z_s, s = self._stepped(x, real, draws)
        return {"real": self._ask_teacher(z_s, s, cond)}

    def critic_losses(
        self,
        critic: Critic,
        x: Tensor,
        cond: Cond,
        real: RealBatch | None,
        draws: PhaseDraws,
        answers: Mapping[str, Tensor],
    ) -> Losses:
        z_s, s = self._stepped(x, real, draws)
        x0 = critic(z_s, s, cond)
        weight = self._weight(s, x)
        terms = {"dsm": (weight * (x.detach() - x0) ** 2).mean()}
        if self._ask_for_critic:
            terms["teacher"] = (weight * (answers["real"].detach() - x0) ** 2).mean()
        return Losses(terms)

    def work(self, *, encoder_share: float, backward: float, guided: bool) -> Work:
        teacher = 0.0 if self._instant else 2.0 if guided else 1.0
        return Work(
            critic_answer=_TANGENT_PASSES if self._instant else 1.0,
            critic_update=1 + backward,
            teacher_answer=teacher,
            teacher_for_critic=teacher if self._ask_for_critic else 0.0,
        )

    def _ask_teacher(self, z_s: Tensor, s: Tensor, cond: Cond) -> Query:
        return Query(
            network="teacher", want="x0", x_t=z_s, t=s, cond=cond, guidance_scale=self.guidance_scale
        )

    def _noised(self, real: RealBatch | None, draws: PhaseDraws) -> tuple[Tensor, Tensor, Tensor]:
        """(z_t [B, C, H, W], t [B], s [B])."""
        assert real is not None
        t, s = draws.times("pair", self._pairs)
        return self.schedule.add_noise(real.x0, t, draws.normal("forward/noise", real.x0.shape[1:])), t, s

    def _stepped(self, x: Tensor, real: RealBatch | None, draws: PhaseDraws) -> tuple[Tensor, Tensor]:
        """(z_s [B, C, H, W], s [B]): the ancestral step from z_t by x~, with its own noise and no gradient."""
        z_t, t, s = self._noised(real, draws)
        mean, variance = posterior(z_t, x.detach(), t, s, self.schedule)
        return mean + variance.sqrt() * draws.normal("posterior/noise", x.shape[1:]), s

    def _weight(self, s: Tensor, like: Tensor) -> Tensor:
        """w(s) for s [B], in `like`'s dtype and number of dimensions."""
        snr = self.schedule.edm_sigma(s) ** -2
        weight = {
            "edm": snr + self.config.sigma_data**-2,
            "sqrt_edm": (snr + self.config.sigma_data**-2).sqrt(),
            "snr": snr,
            "truncated_snr": snr.clamp(min=1.0),
            "uniform": torch.ones_like(snr),
        }[self.config.weighting]
        return expand(weight, like).to(like.dtype)


@dataclass(frozen=True)
class _PairedLevels:
    """`PairedTimes` of the unit time, on a schedule."""

    num_steps: int
    schedule: NoiseSchedule

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> Tensor:
        """t and s, s <= t: [2, len(positions)], float32 on the CPU."""
        t, s = PairedTimes(self.num_steps).sample(draws, purpose, step, positions)
        return _level(self.schedule, torch.stack([t, s]))


def _level(schedule: NoiseSchedule, u: Tensor) -> Tensor:
    """The schedule's time at unit time u, any shape, float32.

    EDM: the Karras curve. Discrete: the nearest of its timesteps, at u = i/k those of `trailing_times`.
    """
    if isinstance(schedule, EDMSchedule):
        return karras_sigma(u, schedule.sigma_min, schedule.sigma_max, _RHO).float()
    assert isinstance(schedule, VPDiscreteSchedule)
    return ((u.double() * schedule.num_train_timesteps).round() - 1).clamp(min=0).float()
