"""SiD: score identity distillation. Zhou et al., ICML 2024, arXiv:2404.04057.

Two settings of it: SiD-LSG for guided text-to-image teachers (Zhou et al., arXiv:2406.01561) and SiDA with a
discriminator (Zhou et al., arXiv:2410.14919).

Symbols: x_g generated sample, x_t = a x_g + s e its noised version, f_p teacher's and f_q critic's posterior mean of
x0 at x_t, l the discriminator's logits there, BCE(l, y) binary cross-entropy, kappa guidance scales.

    generator   L_G = c_g w sum_CHW (f_p - f_q) ((f_p - x_g) - alpha (f_p - f_q)),   w = 1 / sg(mean_CHW |x_g - f_p|)
    critic      L_C = c_c w_t sum_CHW (f_q - sg(x_g))^2,   w_t = 1/s^2 + 1/sigma_data^2 (EDM) or (a/s)^2 (VP: eps error)
    SiDA        L_G' = 1/2 L_G + 1/2 lambda_g C H W w BCE(clamp(l, -10, 10), 1)
                L_C' = L_C + lambda_d w_t 1/2 (BCE(l_real, 1) + BCE(l_fake, 0))

For w = 1 and the exact f_q, E L_G = (1 - alpha) F with the Fisher divergence F = E|f_p - f_q|^2. The gradient runs
through x_g and through x_t into both networks, not into their weights. At alpha = 1/2 it is half of F's, at alpha = 1
half of F's with the distribution of x_t held; alpha = 1.2 goes beyond both (methods.md D.3). Without the path through
x_t it would be DMD's.

The critic learns first, on samples of its own, then the generator, one update each. Both papers' Adam has no first
moment (betas 0 and 0.999) and no weight decay, and the generator's EMA is what is evaluated. Their augmentation of the
critic's samples is left out, and so is SiDA's clipping of the critic's gradients, value by value, at 1; a sample with
NaN stops the run here, where their code drops it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raydistill.diffusion.schedules import EDMSchedule, NoiseSchedule, VPDiscreteSchedule
from raydistill.diffusion.times import DiscreteUniform, KarrasUniform, LogNormal, TimeSampler
from raydistill.errors import ConfigError
from raydistill.methods.method import Losses, Method, MethodConfig, Needs, PhaseDraws, Query, RealBatch, Work
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser

_MIN_DISTANCE = 1e-5  # of a sample to the teacher's answer, in w
_MAX_LOGIT = 10.0  # of the discriminator, in the generator's loss


@dataclass(frozen=True, kw_only=True)
class SiDConfig(MethodConfig):
    """Settings of SiD, SiD-LSG and SiDA; defaults are SiD's on CIFAR-10 (methods.md 2.3) unless said otherwise."""

    kind: Literal["sid"] = "sid"
    """Name of the method."""
    alpha: float = 1.2
    """Weight of |f_p - f_q|^2: 1.2 for SiD (AFHQ: 1.0), 1.0 for LSG and SiDA. 0 and below is the paper's ablation."""
    generator_loss_scale: float = 100.0
    """c_g, of the generator's loss: 100 for SiD and SiDA, 1 for LSG."""
    critic_loss_scale: float = 1.0
    """c_c, of the critic's squared error, which is summed over a sample's elements."""
    sigma_init: float = 2.5
    """EDM teachers: noise level of the generator's input sigma_init z, and the level it is told."""
    init_timestep: float = 625.0
    """Discrete teachers: timestep of the generator's input sigma(t) z, and the one it is told. For Stable Diffusion's
    schedule 625 has sigma/alpha 2.5 (LSG)."""
    u_max: float = 0.8
    """EDM teachers: the generator's loss sees levels uniform in u < u_max on the Karras curve; 0.8 is sigma 24.4."""
    critic_log_sigma_mean: float = -1.2
    """EDM teachers: mean of ln sigma in the critic's loss (SiDA on EDM2: -0.4)."""
    critic_log_sigma_std: float = 1.2
    """EDM teachers: its standard deviation (SiDA on EDM2: 1.0)."""
    min_timestep: int = 20
    """Discrete teachers: lowest timestep in both losses (LSG)."""
    max_timestep: int = 979
    """Discrete teachers: highest timestep in both losses, included (LSG)."""
    sigma_data: float = 0.5
    """Data standard deviation in EDM's critic weight sigma^-2 + sigma_data^-2; unused by other schedules."""
    guidance_scale_critic_training: float = 1.0
    """kappa_1: the critic is trained as uncond + kappa_1 (cond - uncond), gradients through both (LSG: 1.5 to 4.5)."""
    guidance_scale_critic: float = 1.0
    """kappa_2 = kappa_3: of the critic in the generator's loss. kappa_4 is teacher.guidance_scale; LSG: all equal."""
    prompt_dropout: float = 0.1
    """Share of a critic update's samples with the null condition, where kappa_1 or kappa_2 is not 1 (LSG: 0.1). LSG's
    code generates these from the empty prompt too; here they come from their prompts, so that the null condition stands
    for the mixture of all prompts."""
    gan_weight_critic: float = 0.0
    """lambda_d: 1 for SiDA on EDM teachers, 100 on EDM2's; 0, with the next, is SiD without real data."""
    gan_weight_generator: float = 0.0
    """lambda_g: 0.01 for SiDA."""
    gan_start_update: int = 0
    """Generator update from which on the generator's loss has its adversarial term (SiDA: after 200k images); the
    discriminator learns from the first update on."""
    generator_rest_updates: int = 0
    """Updates at the start in which the critic learns and the generator rests (SiDA: 100k images)."""

    @property
    def label(self) -> str:
        if self.gan_weight_generator > 0:
            return "sida"
        return "sid" if self.guidance_scale_critic == 1 else "sid_lsg"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.alpha <= 2:
            raise ConfigError(f"method.alpha={self.alpha} must lie in -1 to 2; the papers have 1 and 1.2")
        if not 0 < self.u_max <= 1:
            raise ConfigError(f"method.u_max={self.u_max} must be above 0 and at most 1")
        if not 0 <= self.prompt_dropout < 1:
            raise ConfigError(f"method.prompt_dropout={self.prompt_dropout} must be at least 0 and below 1")
        for name in (
            "generator_loss_scale",
            "critic_loss_scale",
            "sigma_init",
            "critic_log_sigma_std",
            "sigma_data",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"method.{name}={getattr(self, name)} must be positive and finite")
        for name in (
            "guidance_scale_critic_training",
            "guidance_scale_critic",
            "gan_weight_critic",
            "gan_weight_generator",
            "gan_start_update",
            "generator_rest_updates",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"method.{name}={getattr(self, name)} must be finite and not negative")
        if (self.gan_weight_generator == 0) != (self.gan_weight_critic == 0):
            raise ConfigError(
                "method.gan_weight_generator and method.gan_weight_critic must both be 0 (no GAN) or both be positive"
            )


class SiD(Method):
    """One-step generators from a score identity loss that differentiates through teacher and critic."""

    critic_first = True

    def __init__(self, config: SiDConfig, schedule: NoiseSchedule, guidance_scale: float):
        """guidance_scale: kappa_4, the teacher's.

        Raises ConfigError for schedules that SiD is not specified for, and for noise levels outside the schedule.
        """
        self.config = config
        self.schedule = schedule
        self.guidance_scale = guidance_scale
        self.critic_updates_per_generator = config.critic_updates_per_generator
        self._gan = config.gan_weight_generator > 0
        self.needs = Needs(teacher="vjp", critic="vjp", real_data=self._gan)
        self._generator_times, self._critic_times = _time_laws(config, schedule)
        edm = isinstance(schedule, EDMSchedule)
        name, start = ("sigma_init", config.sigma_init) if edm else ("init_timestep", config.init_timestep)
        if not schedule.t_min <= start <= schedule.t_max:
            raise ConfigError(
                f"method.{name}={start} must lie within the teacher's schedule, {schedule.t_min} to {schedule.t_max}"
            )
        self.sampling_times = (start,)
        guided = config.guidance_scale_critic_training != 1 or config.guidance_scale_critic != 1
        self._prompt_dropout = config.prompt_dropout if guided else 0.0

    def gan_on(self, generator_update: int) -> bool:
        return self._gan and generator_update >= self.config.gan_start_update

    def reads_real(self, generator_update: int) -> bool:
        """With SiDA always: its discriminator learns from the first update on."""
        return self._gan

    def generator_rests(self, generator_update: int) -> bool:
        """During the first `generator_rest_updates`."""
        return generator_update < self.config.generator_rest_updates

    def pure_noise(self, noise: Tensor) -> Tensor:
        """sigma(t) z at the generator's level: noised zeros, not unit noise."""
        t = torch.full((len(noise),), self.sampling_times[0], device=noise.device)
        return self.schedule.add_noise(torch.zeros_like(noise), t, noise)

    def generator_input(
        self, generator: Denoiser, cond: Cond, shape: Sequence[int], real: RealBatch | None, draws: PhaseDraws
    ) -> tuple[Tensor, Tensor]:
        x_in = self.pure_noise(draws.normal("rollout/noise", shape))
        return x_in, torch.full((len(x_in),), self.sampling_times[0], device=x_in.device)

    def queries(self, x: Tensor, cond: Cond, real: RealBatch | None, draws: PhaseDraws) -> dict[str, Query]:
        t = draws.times("sid/t", self._generator_times)
        x_t = self.schedule.add_noise(x, t, draws.normal("sid/noise", x.shape[1:]))

        def ask(
            network: Literal["teacher", "critic"],
            want: Literal["x0", "logit_map"] = "x0",
            guidance_scale: float = 1.0,
        ) -> Query:
            # a node of its own, so that each network's uses of x_t are added up by themselves: in the same order
            # wherever the network is
            own = x_t.view_as(x_t)
            return Query(network=network, want=want, x_t=own, t=t, cond=cond, guidance_scale=guidance_scale)

        asked = {
            "real": ask("teacher", guidance_scale=self.guidance_scale),
            "fake": ask("critic", guidance_scale=self.config.guidance_scale_critic),
        }
        if self.gan_on(draws.step):
            asked["logit_map"] = ask("critic", "logit_map")
        return asked

    def generator_losses(
        self, x: Tensor, queries: Mapping[str, Query], answers: Mapping[str, Tensor]
    ) -> Losses:
        config, real, fake = self.config, answers["real"], answers["fake"]
        weight = sid_weight(x, real)
        terms = {"sid": config.generator_loss_scale * (weight * sid_loss(x, real, fake, config.alpha)).mean()}
        if "logit_map" in answers:
            gan = config.gan_weight_generator * gan_loss_of_generator(
                answers["logit_map"], weight, x[0].numel()
            )
            terms = {"sid": 0.5 * terms["sid"], "gan_generator": 0.5 * gan}
        scalars = {
            "critic/lag": (fake - real).detach().abs().mean(),
        }
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
        t = draws.times("dsm/t", self._critic_times)
        noise = draws.normal("dsm/noise", x.shape[1:])
        x_t = self.schedule.add_noise(x, t, noise)
        weight = self._dsm_weight(t).to(x.dtype)
        seen = cond
        if self._prompt_dropout > 0:
            seen = critic.drop_cond(cond, draws.uniform("prompt_dropout") < self._prompt_dropout)
        x0 = critic(x_t, t, seen, self.config.guidance_scale_critic_training)
        error = (x0 - x).square().flatten(1).sum(1)  # [B]
        terms = {"dsm": self.config.critic_loss_scale * (weight * error).mean()}
        scalars: dict[str, Tensor] = {}
        if self._gan:
            assert real is not None
            # generated and real samples share level and noise; each has its own condition
            both = torch.cat([x_t, self.schedule.add_noise(real.x0, t, noise)])
            fake, true = critic.logit_map(both, torch.cat([t, t]), Cond.cat([cond, real.cond])).chunk(2)
            terms["gan_critic"] = self.config.gan_weight_critic * gan_loss_of_critic(fake, true, weight)
            scalars["critic/fake_accuracy"] = (fake < 0).float().mean()
            scalars["critic/real_accuracy"] = (true > 0).float().mean()
        return Losses(terms, scalars)

    def work(self, *, encoder_share: float, backward: float, guided: bool) -> Work:
        # a backward pass with frozen weights costs one forward pass less: with the forward pass it is `backward`
        logits = encoder_share if self._gan else 0.0
        in_training = 2 if self.config.guidance_scale_critic_training != 1 else 1
        in_answers = 2 if self.config.guidance_scale_critic != 1 else 1
        return Work(
            critic_answer=(in_answers + logits) * backward,
            critic_update=(in_training + 2 * logits) * (1 + backward),
            teacher_answer=2 * (2 if guided else 1),
            critic_graphs=max(in_training + 2 * logits, in_answers + logits),
            teacher_graphs=2 if guided else 1,
        )

    def _dsm_weight(self, t: Tensor) -> Tensor:
        """Weight w_t of the squared x0 error at t [B], [B].

        For VP schedules it makes the eps error, also of networks that predict v: LSG's code weights their v error with
        snr / (snr + 1), which is the same.
        """
        sigma = self.schedule.edm_sigma(t)
        if isinstance(self.schedule, EDMSchedule):
            return sigma**-2 + self.config.sigma_data**-2
        return sigma**-2


def sid_loss(x: Tensor, x0_real: Tensor, x0_fake: Tensor, alpha: float) -> Tensor:
    """sum_CHW (f_p - f_q) ((f_p - x_g) - alpha (f_p - f_q)) of each sample, [B], from [B, C, H, W] each.

    arXiv:2404.04057 in x0 form, without its weight (methods.md 2.1). x0_real and x0_fake must carry their graphs to x.
    """
    apart = x0_real - x0_fake
    return (apart * ((x0_real - x) - alpha * apart)).flatten(1).sum(1)


def sid_weight(x: Tensor, x0_real: Tensor) -> Tensor:
    """w = 1 / mean_CHW |x_g - f_p| of each sample, the distance at least 1e-5; [B], without a graph."""
    distance = (x - x0_real).detach().abs().flatten(1).mean(1)
    return 1 / distance.clamp(min=_MIN_DISTANCE)


def gan_loss_of_generator(logits: Tensor, weight: Tensor, numel: int) -> Tensor:
    """C H W w BCE(clamp(l, -10, 10), 1), mean over the batch, a scalar. arXiv:2410.14919 and its code.

    logits [B, h, w]; weight [B] of `sid_weight`; numel: C H W of a sample. The cross-entropy is one mean over the
    micro-batch's logits before the samples' weights multiply it, as in the official code: samples are coupled, and the
    value depends on how a batch is split.
    """
    return numel * (F.softplus(-logits.clamp(-_MAX_LOGIT, _MAX_LOGIT)).mean() * weight).mean()


def gan_loss_of_critic(fake: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    """w_t (BCE(l_real, 1) + BCE(l_fake, 0)) / 2, mean over the batch, a scalar; logits [B, h, w], weight w_t [B].

    As in `gan_loss_of_generator`, each cross-entropy is one mean over the micro-batch.
    """
    return (weight * (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2).mean()


def _time_laws(config: SiDConfig, schedule: NoiseSchedule) -> tuple[TimeSampler, TimeSampler]:
    """Noise levels of the generator's and the critic's loss. Raises ConfigError where the schedule has none."""
    if isinstance(schedule, EDMSchedule):
        karras = KarrasUniform(u_max=config.u_max, sigma_min=schedule.sigma_min, sigma_max=schedule.sigma_max)
        return karras, LogNormal(mean=config.critic_log_sigma_mean, std=config.critic_log_sigma_std)
    if not isinstance(schedule, VPDiscreteSchedule):
        raise ConfigError(
            f"SiD is specified for EDM and discrete VP schedules, not for {type(schedule).__name__} (teacher.path)"
        )
    if not 0 <= config.min_timestep <= config.max_timestep <= schedule.t_max:
        raise ConfigError(
            f"method.min_timestep={config.min_timestep} and method.max_timestep={config.max_timestep} must satisfy "
            f"0 <= min <= max <= {schedule.t_max:g}, the teacher's last timestep"
        )
    uniform = DiscreteUniform(low=config.min_timestep, high=config.max_timestep)
    return uniform, uniform
