"""DDPM's discrete variance-preserving schedule, the one of Stable Diffusion, made continuous in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from raydistill.diffusion.noise_schedule import NoiseSchedule
from raydistill.errors import ConfigError

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "trained"]
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "trained")


@dataclass(frozen=True, kw_only=True)
class VPDiscreteSchedule(NoiseSchedule):
    """DDPM's table of betas: alpha^2 = abar_t = prod_{i<=t} (1 - beta_i), sigma^2 = 1 - abar_t.

    Ho et al., arXiv:2006.11239; t runs over 0..num_train_timesteps-1; the default betas are Stable
    Diffusion's. Between the integers the log-SNR is linear in t, so the derivatives jump at them: there they
    are those of the interval above (at the last, of the one below). Two intervals have an infinite end, where
    that can't hold: below t = 0, sigma runs linearly to 0 at t_clean = -1 (abar_{-1} = 1, the end of a DDIM
    trajectory); with zero terminal SNR, alpha runs linearly to 0 over the last interval, and edm_sigma(t_max)
    is infinite.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    """With beta_schedule="trained": the table itself, num_train_timesteps numbers."""
    rescale_betas_zero_snr: bool = False
    """Shift and scale sqrt(abar) so that its last value is 0. Lin et al., arXiv:2305.08891, algorithm 1."""

    name: ClassVar[str] = "vp_discrete"

    def __post_init__(self) -> None:
        if self.beta_schedule not in BETA_SCHEDULES:
            raise ConfigError(
                f"beta_schedule={self.beta_schedule!r} is not one of {', '.join(BETA_SCHEDULES)}"
            )
        if self.num_train_timesteps < 2:
            raise ConfigError(f"num_train_timesteps={self.num_train_timesteps} is less than 2")
        if (self.beta_schedule == "trained") != (self.trained_betas is not None):
            raise ConfigError(
                f"trained_betas go with beta_schedule='trained' only, not with {self.beta_schedule!r}"
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ConfigError(
                f"trained_betas has {len(self.trained_betas)} values, "
                f"num_train_timesteps={self.num_train_timesteps}"
            )
        betas = self._betas()
        # A beta of exactly 1 wipes out the signal, which only the last step may do.
        if not (np.all(betas > 0) and np.all(betas[:-1] < 1) and betas[-1] <= 1):
            raise ConfigError(
                f"betas must lie in (0, 1), the last in (0, 1], got {betas.min():g} to {betas.max():g}: "
                "check beta_start, beta_end and trained_betas"
            )

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | np.ndarray | Tensor) -> VPDiscreteSchedule:
        """The schedule with this table of abar_t [T], falling within (0, 1); its last value may be 0."""
        abar = np.asarray(alphas_cumprod, dtype=np.float64)
        if (
            abar.ndim != 1
            or len(abar) < 2
            or not (abar[0] < 1 and np.all(np.diff(abar) < 0) and abar[-1] >= 0)
        ):
            raise ConfigError("alphas_cumprod must be at least two numbers that fall strictly within (0, 1)")
        betas = 1 - abar / np.concatenate([[1.0], abar[:-1]])
        return cls(
            num_train_timesteps=len(abar), beta_schedule="trained", trained_betas=tuple(betas.tolist())
        )

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return float(self.num_train_timesteps - 1)

    @property
    def t_clean(self) -> float:
        return -1.0

    @property
    def t_end(self) -> float:
        return self.t_max

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """abar_t [num_train_timesteps], float64."""
        abar = np.cumprod(1 - self._betas())
        if self.rescale_betas_zero_snr:
            root = np.sqrt(abar)
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return abar

    def alpha(self, t: Tensor) -> Tensor:
        return self._coefficients(t).alpha

    def sigma(self, t: Tensor) -> Tensor:
        return self._coefficients(t).sigma

    def d_alpha(self, t: Tensor) -> Tensor:
        return self._coefficients(t).d_alpha

    def d_sigma(self, t: Tensor) -> Tensor:
        return self._coefficients(t).d_sigma

    def t_from_edm_sigma(self, edm_sigma: Tensor) -> Tensor:
        edm_sigma = edm_sigma.double()
        table = _vp_table(self, edm_sigma.device)
        log_snr = -2 * edm_sigma.log()
        upper = torch.searchsorted(-table.log_snr, -log_snr).clamp(2, len(table.log_snr) - 1 - table.zero_snr)
        above, below = table.log_snr[upper - 1], table.log_snr[upper]
        t = upper - 2 + (log_snr - above) / (below - above)
        sigma, alpha = 1 / (1 + edm_sigma**-2).sqrt(), 1 / (1 + edm_sigma**2).sqrt()
        t = torch.where(log_snr > table.log_snr[1], sigma / table.sigma_first - 1, t)
        if table.zero_snr:
            t = torch.where(log_snr < table.log_snr[-2], self.t_max - alpha / table.alpha_before_last, t)
        # sigma/alpha at t_max, rounded to float32 on its way here, may lie a hair beyond the table.
        t = torch.where((t > self.t_max) & (t < self.t_max + 1e-4), self.t_max, t)
        return self._checked(t)

    def _betas(self) -> np.ndarray:
        steps = self.num_train_timesteps
        match self.beta_schedule:
            case "linear":
                return np.linspace(self.beta_start, self.beta_end, steps)
            case "scaled_linear":
                return np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
            case "squaredcos_cap_v2":  # arXiv:2102.09672, eq. 17, betas capped at 0.999
                abar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
                return np.minimum(1 - abar[1:] / abar[:-1], 0.999)
            case "trained":
                return np.asarray(self.trained_betas, dtype=np.float64)

    def _coefficients(self, t: Tensor) -> _Coefficients:
        t = self._checked(t)
        table = _vp_table(self, t.device)
        # NaN, the answer to an out-of-range time on an accelerator, has no integer part to index with.
        lower = t.nan_to_num(0.0).floor().clamp(max=self.num_train_timesteps - 2)
        part, row = t - lower, lower.long() + 1
        slope = table.log_snr[row + 1] - table.log_snr[row]
        log_snr = table.log_snr[row] + part * slope
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        inner = _Coefficients(alpha, sigma, alpha * sigma**2 * slope / 2, -sigma * alpha**2 * slope / 2)

        sigma = part * table.sigma_first
        alpha = (1 - sigma**2).sqrt()
        head = _Coefficients(alpha, sigma, -sigma * table.sigma_first / alpha, table.sigma_first.expand_as(t))
        inner = _Coefficients(*(torch.where(lower < 0, h, i) for h, i in zip(head, inner, strict=True)))
        if not table.zero_snr:
            return inner

        alpha = (1 - part) * table.alpha_before_last
        sigma = (1 - alpha**2).sqrt()
        tail = _Coefficients(
            alpha, sigma, -table.alpha_before_last.expand_as(t), alpha * table.alpha_before_last / sigma
        )
        last = lower == self.num_train_timesteps - 2
        return _Coefficients(*(torch.where(last, e, i) for e, i in zip(tail, inner, strict=True)))


class _Coefficients(NamedTuple):
    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class _VPTable(NamedTuple):
    log_snr: Tensor  # [T + 1], at t = -1..T-1: +inf first, -inf last where the terminal SNR is zero
    sigma_first: Tensor  # sigma(0)
    alpha_before_last: Tensor  # alpha(T - 2)
    zero_snr: bool


@lru_cache(maxsize=32)
def _vp_table(schedule: VPDiscreteSchedule, device: torch.device) -> _VPTable:
    abar = torch.from_numpy(schedule.alphas_cumprod)
    log_snr = torch.cat([torch.tensor([math.inf], dtype=torch.float64), abar.log() - (1 - abar).log()])
    return _VPTable(
        log_snr.to(device), (1 - abar[0]).sqrt().to(device), abar[-2].sqrt().to(device), bool(abar[-1] == 0)
    )
