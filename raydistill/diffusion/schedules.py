"""Which noise schedules are there, and how are they read from JSON and from diffusers?

Each gives alpha, sigma, their derivatives and the inverse of its EDM level sigma/alpha; everything else in
the package follows from these. Coefficients are float64. Outside its range a schedule raises on the CPU; on
an accelerator, where a check would stall the step, it answers NaN, which stops the run at the next
finite-loss check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from raydistill.diffusion.noise_schedule import NoiseSchedule, expand
from raydistill.diffusion.vp_discrete import BETA_SCHEDULES, BetaSchedule, VPDiscreteSchedule
from raydistill.errors import ConfigError

if TYPE_CHECKING:
    from raydistill.diffusion.parametrization import Prediction

__all__ = [
    "SCHEDULES",
    "EDMSchedule",
    "LinearFlowSchedule",
    "NoiseSchedule",
    "VPCosineSchedule",
    "VPDiscreteSchedule",
    "expand",
    "schedule_from_config",
    "schedule_from_diffusers",
]


@dataclass(frozen=True, kw_only=True)
class EDMSchedule(NoiseSchedule):
    """Variance exploding, with the noise level as time: alpha = 1, sigma = t. arXiv:2206.00364."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    name: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ConfigError(
                f"need 0 < sigma_min < sigma_max, got {self.sigma_min:g} and {self.sigma_max:g}"
            )

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def t_end(self) -> float:
        # EDM's log-normal training law reaches beyond sigma_max, which bounds sampling only.
        return math.inf

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(self._checked(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self._checked(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(self._checked(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(self._checked(t))

    def t_from_edm_sigma(self, edm_sigma: Tensor) -> Tensor:
        return self._checked(edm_sigma)


@dataclass(frozen=True, kw_only=True)
class VPCosineSchedule(NoiseSchedule):
    """alpha = cos(pi t/2), sigma = sin(pi t/2) on 0..1. arXiv:2102.09672, eq. 17 without its offset.

    t_min and t_max are where the log-SNR reaches its bounds, +-20 in progressive distillation
    (arXiv:2202.00512).
    """

    log_snr_min: float = -20.0
    log_snr_max: float = 20.0

    name: ClassVar[str] = "vp_cosine"

    def __post_init__(self) -> None:
        if not self.log_snr_min < self.log_snr_max:
            raise ConfigError(
                f"need log_snr_min < log_snr_max, got {self.log_snr_min:g} and {self.log_snr_max:g}"
            )

    @property
    def t_min(self) -> float:
        return 2 / math.pi * math.atan(math.exp(-self.log_snr_max / 2))

    @property
    def t_max(self) -> float:
        return 2 / math.pi * math.atan(math.exp(-self.log_snr_min / 2))

    @property
    def t_end(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * self._checked(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * self._checked(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)

    def t_from_edm_sigma(self, edm_sigma: Tensor) -> Tensor:
        return self._checked(2 / math.pi * torch.atan(edm_sigma.double()))


@dataclass(frozen=True, kw_only=True)
class LinearFlowSchedule(NoiseSchedule):
    """alpha = 1 - t, sigma = t. Rectified flow, arXiv:2209.03003, with data at t = 0 (theirs is at 1)."""

    t_min: float = 0.001
    t_max: float = 1.0

    name: ClassVar[str] = "linear_flow"

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ConfigError(f"need 0 <= t_min < t_max <= 1, got {self.t_min:g} and {self.t_max:g}")

    @property
    def t_end(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self._checked(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._checked(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(self._checked(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(self._checked(t))

    def t_from_edm_sigma(self, edm_sigma: Tensor) -> Tensor:
        return self._checked(1 / (1 + 1 / edm_sigma.double()))


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    schedule.name: schedule
    for schedule in (EDMSchedule, VPDiscreteSchedule, VPCosineSchedule, LinearFlowSchedule)
}


def schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule that `to_config` described. Raises ConfigError for an unknown name, setting or value."""
    values = dict(config)
    name = values.pop("name", None)
    if name not in SCHEDULES:
        raise ConfigError(f"schedule.name={name!r} is not one of {', '.join(SCHEDULES)}")
    known = [field.name for field in fields(SCHEDULES[name])]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(
                f"schedule.{key} is not a setting of the {name} schedule, which has {', '.join(known)}"
            )
        values[key] = tuple(value) if isinstance(value, list) else value
    return SCHEDULES[name](**values)


_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def schedule_from_diffusers(config: Mapping[str, Any]) -> tuple[NoiseSchedule, Prediction]:
    """Schedule and prediction type stated by a diffusers `scheduler_config.json`.

    Its times are the integer timesteps that the network is called with. Raises ConfigError, naming the key,
    for prediction types, beta schedules and noise processes that this package has no schedule for, for betas
    that the file leaves to diffusers' defaults (which differ between scheduler classes), and for an eps
    prediction with zero terminal SNR, where the network's answer at the last timestep says nothing about x0.
    """
    # Stable Diffusion 1's configuration doesn't state it.
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in _PREDICTIONS:
        raise ConfigError(
            f"prediction_type={prediction_type!r} in the scheduler configuration is not one of "
            f"{', '.join(_PREDICTIONS)}"
        )
    prediction = _PREDICTIONS[prediction_type]
    if config.get("timestep_type", "discrete") != "discrete":
        raise ConfigError(
            f"timestep_type={config['timestep_type']!r} in the scheduler configuration is not 'discrete'"
        )
    if config.get("use_flow_sigmas"):
        raise ConfigError(
            "use_flow_sigmas=true in the scheduler configuration: flow models are not read from diffusers yet"
        )
    rescale = bool(config.get("rescale_betas_zero_snr", False))
    if rescale and prediction == "eps":
        raise ConfigError(
            "rescale_betas_zero_snr=true in the scheduler configuration needs prediction_type "
            f"v_prediction or sample, not {prediction_type}"
        )
    num_train_timesteps = int(config.get("num_train_timesteps", 1000))
    trained = config.get("trained_betas")
    if trained is not None:
        return VPDiscreteSchedule(
            num_train_timesteps=len(trained),
            beta_schedule="trained",
            trained_betas=tuple(float(beta) for beta in trained),
            rescale_betas_zero_snr=rescale,
        ), prediction
    beta_schedule = config.get("beta_schedule")
    if beta_schedule not in BETA_SCHEDULES[:3]:
        raise ConfigError(
            f"beta_schedule={beta_schedule!r} in the scheduler configuration (_class_name="
            f"{config.get('_class_name')!r}) is not one of {', '.join(BETA_SCHEDULES[:3])}"
        )
    schedule = VPDiscreteSchedule(
        num_train_timesteps=num_train_timesteps,
        beta_schedule=cast(BetaSchedule, beta_schedule),
        rescale_betas_zero_snr=rescale,
    )
    if beta_schedule == "squaredcos_cap_v2":
        return schedule, prediction
    for key in ("beta_start", "beta_end"):
        if config.get(key) is None:
            raise ConfigError(
                f"{key} is missing in the scheduler configuration: state it beside beta_schedule"
            )
    return replace(
        schedule, beta_start=float(config["beta_start"]), beta_end=float(config["beta_end"])
    ), prediction
