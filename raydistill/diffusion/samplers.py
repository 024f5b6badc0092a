"""How is a sample drawn with a denoiser? ODE samplers, the ancestral one and the few-step one.

Each takes `denoise(x_t [B, ...], t [B]) -> x0 [B, ...]`, the schedule, descending `times` and x_T at the
first of them, and returns x at the last, in x_T's dtype. End `times` with `schedule.t_clean` for a clean
sample. The state is kept in float64; the denoiser sees x_t in x_T's dtype and t in float32, and the
coefficients are those of that float32 t. Times that don't descend, or lie outside the schedule, raise
ConfigError.

The probability-flow ODE (Song et al., arXiv:2011.13456) is solved as `dx = x0 d(alpha) + eps d(sigma)` with
`eps = (x - alpha x0)/sigma`: no derivatives, the same for every choice of time, and finite at alpha = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from raydistill.diffusion.noise_schedule import NoiseSchedule, expand
from raydistill.errors import ConfigError

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Noise: TypeAlias = Callable[[int], Tensor]
"""Standard normal noise of x_T's shape for the step from times[i] to times[i + 1]."""


def euler(denoise: Denoise, schedule: NoiseSchedule, times: Sequence[float], x_T: Tensor) -> Tensor:
    """First order: x_s = x_t + x0 (alpha_s - alpha_t) + eps (sigma_s - sigma_t).

    It is Euler in t for EDM (arXiv:2206.00364) and for linear flow, and Euler in sigma/alpha for any
    schedule, and for all of them the DDIM step, which is how it is computed.
    """
    return ddim(denoise, schedule, times, x_T)


def heun(denoise: Denoise, schedule: NoiseSchedule, times: Sequence[float], x_T: Tensor) -> Tensor:
    """Second order: the trapezoidal rule, with the Euler step as its first guess. Two network calls a step.

    For EDM this is its algorithm 1 (arXiv:2206.00364), for linear flow it is Heun in t. A step to clean data
    is an Euler step, as eps has no value at sigma = 0.
    """
    x = x_T.double()
    for step in _steps(times, schedule, x_T):
        x0, eps = _directions(denoise, schedule, x, step.t, x_T.dtype)
        guess = ddim_step(x, x0, step.t, step.s, schedule)
        if step.to_clean:
            x = guess
            continue
        x0_s, eps_s = _directions(denoise, schedule, guess, step.s, x_T.dtype)
        d_alpha = expand(schedule.alpha(step.s) - schedule.alpha(step.t), x)
        d_sigma = expand(schedule.sigma(step.s) - schedule.sigma(step.t), x)
        x = x + (x0 + x0_s) / 2 * d_alpha + (eps + eps_s) / 2 * d_sigma
    return x.to(x_T.dtype)


def ddim(denoise: Denoise, schedule: NoiseSchedule, times: Sequence[float], x_T: Tensor) -> Tensor:
    """Deterministic DDIM, eta = 0. Song et al., arXiv:2010.02502, eq. 12."""
    x = x_T.double()
    for step in _steps(times, schedule, x_T):
        x0 = denoise(x.to(x_T.dtype), step.t).double()
        x = ddim_step(x, x0, step.t, step.s, schedule)
    return x.to(x_T.dtype)


def ancestral(
    denoise: Denoise, schedule: NoiseSchedule, times: Sequence[float], x_T: Tensor, noise: Noise
) -> Tensor:
    """Each x_s is drawn from q(x_s | x_t, x0), see `posterior`: DDIM with eta = 1.

    `noise` isn't asked for a step to clean data, which has no variance.
    """
    x = x_T.double()
    for step in _steps(times, schedule, x_T):
        x0 = denoise(x.to(x_T.dtype), step.t).double()
        x, variance = posterior(x, x0, step.t, step.s, schedule)
        if not step.to_clean:
            x = x + variance.sqrt() * noise(step.number).to(x)
    return x.to(x_T.dtype)


def few_step(
    denoise: Denoise, schedule: NoiseSchedule, times: Sequence[float], x_T: Tensor, noise: Noise
) -> Tensor:
    """The sampler of few-step generators: x0 at each time, put back to the next with fresh noise.

    Consistency models' algorithm 1 (arXiv:2303.01469). Returns the x0 of the last time, so `times` needs no
    clean end; one that is there is left out. One time is one step.
    """
    times = list(times)
    if len(times) > 1 and times[-1] == schedule.t_clean:
        times.pop()
    levels = _levels(times, schedule, x_T, fewest=1)
    x = x_T
    for index, t in enumerate(levels):
        x0 = denoise(x, t)
        if index + 1 < len(levels):
            x = schedule.add_noise(x0, levels[index + 1], noise(index).to(x0)).to(x_T.dtype)
    return x0


def ddim_step(x_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_s = alpha_s x0 + (sigma_s/sigma_t)(x_t - alpha_t x0) for t and s [B], in x_t's dtype.

    Song et al., arXiv:2010.02502, eq. 12. Not finite at sigma_t = 0.
    """
    a_t, a_s = expand(schedule.alpha(t), x_t), expand(schedule.alpha(s), x_t)
    ratio = expand(schedule.sigma(s) / schedule.sigma(t), x_t)
    x0 = x0.double()
    return (a_s * x0 + ratio * (x_t.double() - a_t * x0)).to(x_t.dtype)


def posterior(
    z_t: Tensor, x0: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and variance [B, 1, ...] of q(z_s | z_t, x0), s <= t [B], in z_t's dtype.

    With r = SNR_t/SNR_s: mean r (alpha_s/alpha_t) z_t + (1 - r) alpha_s x0, variance sigma_s^2 (1 - r). Ho et
    al., arXiv:2006.11239, eq. 7; Kingma et al., arXiv:2107.00630, eq. 25-27. The variance is NaN where s > t,
    which is not a step towards data.
    """
    a_t, a_s = schedule.alpha(t), schedule.alpha(s)
    s_t, s_s = schedule.sigma(t), schedule.sigma(s)
    # At s = t the ratios are 1 by continuity, also where alpha or sigma is 0.
    same = s == t
    a_ratio = torch.where(same, 1.0, a_t / a_s)
    s_ratio = torch.where(same, 1.0, s_s / s_t)
    r = (a_ratio * s_ratio) ** 2
    mean = expand(a_ratio * s_ratio**2, z_t) * z_t.double() + expand((1 - r) * a_s, z_t) * x0.double()
    variance = torch.where(s > t, torch.nan, s_s**2 * (1 - r))
    return mean.to(z_t.dtype), expand(variance, z_t).to(z_t.dtype)


def karras_times(n: int, schedule: NoiseSchedule, rho: float = 7.0) -> list[float]:
    """n times from t_max down to t_min, even in (sigma/alpha)^(1/rho). arXiv:2206.00364, eq. 5.

    The clean end isn't included: append `schedule.t_clean`. Raises ConfigError if n < 1 or sigma/alpha is
    infinite at t_max.
    """
    if n < 1:
        raise ConfigError(f"the number of sampling steps must be at least 1, got {n}")
    ends = schedule.edm_sigma(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    if not ends.isfinite().all():
        raise ConfigError(
            f"the {schedule.name} schedule has no signal left at t_max={schedule.t_max:g}, so Karras times "
            "have no upper end: lower t_max, or use evenly spaced times"
        )
    high, low = (ends ** (1 / rho)).tolist()
    grid = torch.linspace(high, low, n, dtype=torch.float64) ** rho
    times: list[float] = schedule.t_from_edm_sigma(grid[1:-1]).tolist()
    # The ends are known; through the inverse they would be off by a rounding error.
    return [schedule.t_max, *times, schedule.t_min][:n]


def trailing_times(n: int, T: int = 1000) -> list[float]:
    """n of the timesteps 0..T-1, evenly spaced from the last down: 4 of 1000 are 999, 749, 499, 249.

    Lin et al., arXiv:2305.08891, table 2. The clean end isn't included: append `schedule.t_clean`. Raises
    ConfigError unless 1 <= n <= T.
    """
    if not 1 <= n <= T:
        raise ConfigError(f"the number of sampling steps must lie in 1..{T}, got {n}")
    return [float(t) for t in np.round(T - np.arange(n) * (T / n)) - 1]


class _Step(NamedTuple):
    number: int
    t: Tensor  # [B] float32
    s: Tensor  # [B] float32
    to_clean: bool


def _steps(times: Sequence[float], schedule: NoiseSchedule, x_T: Tensor) -> Iterator[_Step]:
    levels = _levels(times, schedule, x_T, fewest=2)
    for number, (t, s) in enumerate(pairwise(levels)):
        yield _Step(number, t, s, to_clean=times[number + 1] == schedule.t_clean)


def _levels(times: Sequence[float], schedule: NoiseSchedule, x_T: Tensor, fewest: int) -> list[Tensor]:
    """Each time as [B] float32 on x_T's device. Raises ConfigError for times that can't be sampled."""
    levels = torch.tensor(times, dtype=torch.float32)
    if len(levels) < fewest:
        raise ConfigError(f"a sampler needs at least {fewest} times, got {list(times)}")
    if not (levels.diff() < 0).all():
        raise ConfigError(f"sampling times must descend strictly, got {list(times)}")
    schedule.alpha(levels)  # on the CPU this raises for a time outside the schedule
    return [level.expand(x_T.shape[0]) for level in levels.to(x_T.device)]


def _directions(
    denoise: Denoise, schedule: NoiseSchedule, x: Tensor, t: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x0 and eps at x, in float64."""
    x0 = denoise(x.to(dtype), t).double()
    return x0, (x - expand(schedule.alpha(t), x) * x0) / expand(schedule.sigma(t), x)
