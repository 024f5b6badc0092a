"""How is a sample drawn with a denoiser? Deterministic ODE samplers, the ancestral one and the few-step one.

Each takes `denoise(x_t [B, ...], t [B]) -> x0 [B, ...]`, the schedule, descending `times` and x_T at the first of them,
and returns x at the last, in x_T's dtype. End `times` with `schedule.t_clean` for a clean sample. The state is kept in
float64; the denoiser sees x_t in x_T's dtype and t in float32, and the coefficients are those of the float32 t.

The probability-flow ODE (Song et al., arXiv:2011.13456) is used as `dx = x0 d(alpha) + eps d(sigma)` with
`eps = (x - alpha x0)/sigma`: no derivatives, the same for every choice of time, and finite at alpha = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from raydistill.diffusion.noise_schedule import NoiseSchedule, expand
from raydistill.errors import ConfigError

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int], Tensor]


def euler(denoise: Denoise, schedule: NoiseSchedule, times: Sequence[float], x_T: Tensor) -> Tensor:
    """First order: x_s = x_t + x0 (alpha_s - alpha_t) + eps (sigma_s - sigma_t), which is the DDIM step.

    It is Euler in t for EDM (arXiv:2206.00364) and for linear flow, and in sigma/alpha for all schedules.
    Raises ConfigError for fewer than two times or times that don't descend.
    """
    return ddim(denoise, schedule, times, x_T)


def heun(denoise: Denoise, schedule: NoiseSchedule, times: Sequence[float], x_T: Tensor) -> Tensor:
    """Second order: the trapezoidal rule, whose first guess is the Euler step. Two network calls per step.

    For EDM this is its algorithm 1 (arXiv:2206.00364) and for linear flow Heun in t. A step to sigma = 0 is an
    Euler step, as eps has no value there. Raises ConfigError as `euler`.
    """
    x = x_T.double()
    for t, s in _steps(times, x_T):
        d_alpha = expand(schedule.alpha(s) - schedule.alpha(t), x)
        d_sigma = expand(schedule.sigma(s) - schedule.sigma(t), x)
        x0, eps = _directions(denoise, schedule, x, t, x_T.dtype)
        guess = ddim_step(x, x0, t, s, schedule)
        if s[0] == schedule.t_clean:
            x = guess
            continue
        x0_s, eps_s = _directions(denoise, schedule, guess, s, x_T.dtype)
        x = x + (x0 + x0_s) / 2 * d_alpha + (eps + eps_s) / 2 * d_sigma
    return x.to(x_T.dtype)
