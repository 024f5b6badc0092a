"""DMD2: improved distribution matching distillation. Yin et al., NeurIPS 2024, arXiv:2405.14867.

Symbols: x generated sample, x_t its noised version, D_r teacher's and D_f critic's posterior mean of x0, l logit of
the GAN head h on the critic's bottleneck, R critic updates per generator update.

    generator   g = (D_f(x_t) - D_r(x_t)) / mean_CHW |x - D_r(x_t)|                  (eq. 2 with DMD's normaliser)
                L_G = 1/2 mse(x, sg(x - g)) + lambda_g softplus(-l(x_t'))            (eq. 4)
    critic      L_C = DSM of D_f on sg(x) + lambda_d [softplus(l(x_t)) + softplus(-l(x_real,t))]

R > 1 (two time-scale update rule, section 4.2) makes up for a regression loss. Guidance acts on D_r only.
Few-step generators are trained on what they see at inference ("backward simulation", section 4.5): the generator is
rolled out without gradient to a step index shared by the whole batch, its x0 is noised to that step's time again, and
the output at that step is judged as a clean sample.
A one-step generator that starts far below the teacher's last timestep (SDXL at t = 399) is first regressed onto the
teacher's guided samples from the same noise: for `regression_updates`, L_G = mse(x, teacher's sample). The published
warm-up compares decoded images by LPIPS on 10k stored pairs; here it is latents, and pairs are made as they are used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistill.diffusion.schedules import EDMSchedule, NoiseSchedule, VPDiscreteSchedule, expand
from raydistill.diffusion.times import DiscreteUniform, KarrasIndexUniform, TimeSampler
from raydistill.errors import ConfigError
from raydistill.methods.method import Losses, Method, MethodConfig, Needs, PhaseDraws, Query, RealBatch, Work
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser

_NUM_LEVELS = 1000  # both published grids, SD's timesteps and EDM's Karras grid, have 1000 levels


@dataclass(frozen=True, kw_only=True)
class DMD2Config(MethodConfig):
    """Settings of DMD2; defaults are the SD1.5 recipe's (methods.md 1.6) unless said otherwise."""

    kind: Literal["dmd2"] = "dmd2"
    """Name of the method."""
    critic_updates_per_generator: int = 5
    """R, critic optimiser steps per generator step: 5 for ImageNet-64 and SDXL, 10 for SD1.5 (DMD2's "5" is 5:1;
    FastGen's student_update_freq=5 is 4 here)."""
    timesteps: tuple[float, ...] = (999.0,)
    """Noise levels of the generator's steps, descending, schedule units: 999 for one step, 999,749,499,249 for four."""
    rollout: Literal["backward_simulation", "real_data"] = "backward_simulation"
    """What a few-step generator is trained on: its own rollout, or noised real samples (the paper's ablation)."""
    gan_weight_generator: float = 1e-3
    """lambda_g, relative to the per-element mean of the distribution-matching loss; 0 switches the GAN off."""
    gan_weight_critic: float = 1e-2
    """lambda_d, in every published configuration."""
    gan_start_update: int = 0
    """Generator update at which stage 2 begins, i.e. the GAN is switched on (SD1.5: 4k)."""
    gan_features: Literal["critic", "teacher"] = "critic"
    """Whose bottleneck feeds the GAN head: the critic's (paper and official code) or the frozen teacher's (FastGen)."""
    dm_min_level: float = 0.02
    """Lower end of the noise levels of the distribution-matching loss, as a share of the 1000 levels."""
    dm_max_level: float = 0.98
    """Upper end, likewise."""
    regression_updates: int = 0
    """Generator updates at the start that regress onto the teacher's samples from the same noise instead (one-step
    SDXL: 2000). For one step only; gan_start_update=regression_updates gives them a learning rate of their own."""
    regression_teacher_steps: int = 25
    """Guided DDIM steps of those samples."""
    critic_weighting: Literal["published", "snr_plus_one"] = "published"
    """Weight of the critic's squared x0 error. published: EDM's for EDM schedules, for others the SNR (the eps error).
    snr_plus_one (the v error) also teaches the critic what only high noise levels show, such as how often each kind of
    background comes; with the SNR alone it follows the generator there with a long lag."""
    sigma_data: float = 0.5
    """Data standard deviation in EDM's critic weight sigma^-2 + sigma_data^-2; unused by other schedules."""

    def __post_init__(self) -> None:
        super().__post_init__()
        times = self.timesteps
        if not times or any(a <= b for a, b in pairwise(times)):
            raise ConfigError(
                f"method.timesteps={times} must be descending noise levels, e.g. 999,749,499,249"
            )
        if not 0 <= self.dm_min_level < self.dm_max_level <= 1:
            raise ConfigError(
                f"method.dm_min_level={self.dm_min_level} and method.dm_max_level={self.dm_max_level} "
                "must satisfy 0 <= min < max <= 1"
            )
        for name in ("gan_weight_generator", "gan_weight_critic"):
            if getattr(self, name) < 0:
                raise ConfigError(f"method.{name}={getattr(self, name)} must not be negative")
        if self.regression_updates < 0 or self.regression_teacher_steps < 1:
            raise ConfigError(
                f"method.regression_updates={self.regression_updates} must not be negative and "
                f"method.regression_teacher_steps={self.regression_teacher_steps} at least 1"
            )
        if self.regression_updates and len(times) > 1:
            raise ConfigError(
                f"method.regression_updates={self.regression_updates} is for one step: method.timesteps={times} has "
                f"{len(times)}"
            )
        if (self.gan_weight_generator == 0) != (self.gan_weight_critic == 0):
            raise ConfigError(
                "method.gan_weight_generator and method.gan_weight_critic must both be 0 (no GAN) or both be positive"
            )


class DMD2(Method):
    """Distribution matching with a two time-scale critic and a GAN head on its bottleneck."""

    def __init__(self, config: DMD2Config, schedule: NoiseSchedule, guidance_scale: float):
        """Raises ConfigError when a generator timestep lies outside the schedule."""
        self.config = config
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.critic_updates_per_generator = config.critic_updates_per_generator
        self.sampling_times = config.timesteps
        if not schedule.t_min <= config.timesteps[-1] <= config.timesteps[0] <= schedule.t_max:
            raise ConfigError(
                f"method.timesteps={config.timesteps} must lie within the teacher's schedule, "
                f"{schedule.t_min} to {schedule.t_max}"
            )
        if config.regression_updates and not isinstance(schedule, VPDiscreteSchedule):
            raise ConfigError(
                f"method.regression_updates={config.regression_updates} samples the teacher by DDIM, which needs one "
                "with discrete timesteps (teacher.path)"
            )
        self.starts_from_real = len(config.timesteps) > 1 and config.rollout == "real_data"
        self._gan = config.gan_weight_generator > 0
        self.needs = Needs(
            teacher="vjp" if self._gan and config.gan_features == "teacher" else "score",
            critic="vjp" if self._gan else "score",
            real_data=self._gan or self.starts_from_real,
            gan_head=self._gan,
            head_features=config.gan_features,
        )
        self._dm_times = _level_sampler(
            schedule,
            int(config.dm_min_level * _NUM_LEVELS),
            min(int(config.dm_max_level * _NUM_LEVELS), _NUM_LEVELS - 1),
        )
        self._all_times = _level_sampler(schedule, 0, _NUM_LEVELS - 1)

    def gan_on(self, generator_update: int) -> bool:
        """Whether stage 2 has begun."""
        return self._gan and generator_update >= self.config.gan_start_update

    def generator_input(
        self, generator: Denoiser, cond: Cond, shape: Sequence[int], real: RealBatch | None, draws: PhaseDraws
    ) -> tuple[Tensor, Tensor]:
        times = self.config.timesteps
        if self.config.rollout == "real_data" and len(times) > 1:
            assert real is not None
            index = draws.integers("rollout/step", 0, len(times))
            t = torch.tensor(times, dtype=torch.float32, device=index.device)[index]
            noise = draws.normal("rollout/noise", shape)
            # the first step sees at inference what is pure noise, not a noised sample
            first = (index == 0).reshape(-1, *[1] * len(shape))
            return torch.where(first, self.pure_noise(noise), self.schedule.add_noise(real.x0, t, noise)), t
        last = draws.shared_integer("rollout/step", 0, len(times))
        x_in = self.pure_noise(draws.normal("rollout/noise", shape))
        with torch.no_grad():
            for step in range(last):
                x0 = generator(x_in, torch.full((len(x_in),), times[step], device=x_in.device), cond)
                noise = draws.normal(f"rollout/renoise_{step}", shape)
                t = torch.full((len(x_in),), times[step + 1], device=x_in.device)
                x_in = self.schedule.add_noise(x0, t, noise)
        return x_in, torch.full((len(x_in),), times[last], device=x_in.device)

    def pure_noise(self, noise: Tensor) -> Tensor:
        """The generator's first input: unit variance for VP schedules (also at t=399), sigma z for EDM's."""
        if isinstance(self.schedule, EDMSchedule):
            return noise * self.config.timesteps[0]
        return noise

    def queries(self, x: Tensor, cond: Cond, real: RealBatch | None, draws: PhaseDraws) -> dict[str, Query]:
        if draws.step < self.config.regression_updates:
            noise = draws.normal("rollout/noise", x.shape[1:])  # what the generator was given
            start = torch.full((len(x),), self.schedule.t_max, device=x.device)
            sample = Query(
                network="teacher", want="sample", x_t=noise, t=start, cond=cond,
                guidance_scale=self.guidance_scale, steps=self.config.regression_teacher_steps,
            )  # fmt: skip
            return {"sample": sample}
        t = draws.times("dm/t", self._dm_times)
        x_t = self.schedule.add_noise(x.detach(), t, draws.normal("dm/noise", x.shape[1:]))
        asked = {
            "real": Query(
                network="teacher", want="x0", x_t=x_t, t=t, cond=cond, guidance_scale=self.guidance_scale
            ),
            "fake": Query(network="critic", want="x0", x_t=x_t, t=t, cond=cond),
        }
        if self.gan_on(draws.step):
            t_gan = draws.times("gan/t", self._all_times)
            noised = self.schedule.add_noise(x, t_gan, draws.normal("gan/noise", x.shape[1:]))
            asked["logit"] = Query(network="critic", want="logit", x_t=noised, t=t_gan, cond=cond)
        return asked

    def generator_losses(
        self, x: Tensor, queries: Mapping[str, Query], answers: Mapping[str, Tensor]
    ) -> Losses:
        if "sample" in answers:
            return Losses({"regression": F.mse_loss(x, answers["sample"])})
        g = distribution_matching_gradient(x.detach(), answers["real"], answers["fake"])
        terms = {"dm": 0.5 * F.mse_loss(x, (x - g).detach())}
        scalars = {
            "critic/lag": (answers["fake"] - answers["real"]).abs().mean(),
        }
        if "logit" in answers:
            terms["gan_generator"] = self.config.gan_weight_generator * F.softplus(-answers["logit"]).mean()
        return Losses(terms, scalars)

    def critic_losses(
        self,
        critic: Critic,
        x: Tensor,
        cond: Cond,
        real: RealBatch | None,
        draws: PhaseDraws,
        answers: Mapping[str, Tensor],
    ) -> Losses:
        t = draws.times("dsm/t", self._all_times)
        x_t = self.schedule.add_noise(x, t, draws.normal("dsm/noise", x.shape[1:]))
        weight = expand(self._dsm_weight(t), x).to(x.dtype)
        terms = {"dsm": (weight * (critic(x_t, t, cond) - x) ** 2).mean()}
        scalars: dict[str, Tensor] = {}
        if self.gan_on(draws.step // self.critic_updates_per_generator):
            assert real is not None
            t_both = torch.cat(
                [draws.times("gan_fake/t", self._all_times), draws.times("gan_real/t", self._all_times)]
            )
            noise = torch.cat([draws.normal(f"gan_{side}/noise", x.shape[1:]) for side in ("fake", "real")])
            noised = self.schedule.add_noise(torch.cat([x, real.x0]), t_both, noise)
            fake, true = critic.logits(noised, t_both, Cond.cat([cond, real.cond])).chunk(2)
            terms["gan_critic"] = (
                self.config.gan_weight_critic * (F.softplus(fake) + F.softplus(-true)).mean()
            )
            scalars["critic/fake_accuracy"] = (fake < 0).float().mean()
            scalars["critic/real_accuracy"] = (true > 0).float().mean()
        return Losses(terms, scalars)

    def work(self, *, encoder_share: float, backward: float, guided: bool) -> Work:
        own_features = self._gan and self.config.gan_features == "critic"
        gan_generator = 2 * encoder_share if self._gan else 0.0
        features = 2 * encoder_share * (1 + backward if own_features else 1.0) if self._gan else 0.0
        rollout = (len(self.config.timesteps) - 1) / 2
        return Work(
            rollout=rollout if self.config.rollout == "backward_simulation" else 0.0,
            critic_answer=1 + (gan_generator if own_features else 0.0),
            critic_update=1 + backward + (features if own_features else 0.0),
            teacher_answer=(2 if guided else 1) + (0.0 if own_features else gan_generator),
            teacher_for_critic=0.0 if own_features else features,
            # the DSM's and the GAN's graphs are alive together; the GAN's batch holds fake and real samples
            critic_graphs=1 + (2 * encoder_share if own_features else 0.0),
            teacher_graphs=encoder_share if self._gan and not own_features else 0.0,
        )

    def _dsm_weight(self, t: Tensor) -> Tensor:
        """Weight of the squared x0 error at t [B], [B]."""
        sigma = self.schedule.edm_sigma(t)
        if self.config.critic_weighting == "snr_plus_one":
            return sigma**-2 + 1.0
        if isinstance(self.schedule, EDMSchedule):
            return sigma**-2 + self.config.sigma_data**-2
        return sigma**-2


def distribution_matching_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """g = (D_f - D_r) / mean_CHW |x - D_r|, all [B, C, H, W]; without the normaliser it is sigma^2 grad KL (D.2).

    A sample that the teacher returns unchanged has no finite normaliser; the run then stops at the loss.
    """
    normaliser = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)  # [B, 1, 1, 1]
    return (x0_fake - x0_real) / normaliser


def _level_sampler(schedule: NoiseSchedule, low: int, high: int) -> TimeSampler:
    """Uniform over levels low..high, both included, of 1000: SD's timesteps or EDM's ascending Karras grid."""
    if isinstance(schedule, EDMSchedule):
        return KarrasIndexUniform(
            num=_NUM_LEVELS, low=low, high=high, sigma_min=schedule.sigma_min, sigma_max=schedule.sigma_max
        )
    if schedule.t_max != _NUM_LEVELS - 1:
        raise ConfigError(
            f"DMD2 is specified for EDM and 1000-step discrete schedules, not for {type(schedule).__name__} "
            f"with t up to {schedule.t_max} (teacher.path)"
        )
    return DiscreteUniform(low=low, high=high)
