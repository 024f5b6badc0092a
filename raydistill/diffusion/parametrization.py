"""What does a network's output say about x0? Conversions of x0, eps, v and flow; score; EDM preconditioning.

With a = alpha(t), s = sigma(t) and `x_t = a x0 + s eps`, for every schedule:

    eps                             Ho et al., arXiv:2006.11239
    v    = a eps - s x0             Salimans & Ho, arXiv:2202.00512, appendix D
    flow = a' x0 + s' eps           dx_t/dt, Lipman et al., arXiv:2210.02747; eps - x0 for linear flow

Coefficients are float64, results have x_t's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from raydistill.diffusion.noise_schedule import NoiseSchedule, expand
from raydistill.errors import ConfigError

Prediction: TypeAlias = Literal["x0", "eps", "v", "flow"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def to_x0(output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """x0 [B, ...] from a network's output [B, ...] at x_t [B, ...] and t [B].

    Not finite where the output doesn't determine x0: eps at alpha = 0. Raises ConfigError for an unknown
    prediction.
    """
    x, y = x_t.double(), output.double()
    if prediction == "x0":
        return output.to(x_t.dtype)
    a, s = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    if prediction == "eps":
        x0 = (x - s * y) / a
    elif prediction == "v":
        x0 = (a * x - s * y) / (a**2 + s**2)
    elif prediction == "flow":
        da, ds = expand(schedule.d_alpha(t), x_t), expand(schedule.d_sigma(t), x_t)
        x0 = (ds * x - s * y) / (a * ds - s * da)
    else:
        raise _unknown(prediction)
    return x0.to(x_t.dtype)


def from_x0(x0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """The inverse of `to_x0`: what a network of this kind puts out when it means x0.

    Not finite at sigma = 0, where x_t holds no noise. Raises ConfigError for an unknown prediction.
    """
    if prediction == "x0":
        return x0.to(x_t.dtype)
    x, d = x_t.double(), x0.double()
    a, s = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    eps = (x - a * d) / s
    if prediction == "eps":
        output = eps
    elif prediction == "v":
        output = a * eps - s * d
    elif prediction == "flow":
        output = expand(schedule.d_alpha(t), x_t) * d + expand(schedule.d_sigma(t), x_t) * eps
    else:
        raise _unknown(prediction)
    return output.to(x_t.dtype)


def score(x0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """grad log p_t(x_t) = (a x0 - x_t)/s^2, where x0 = E[x0|x_t]. Not finite at sigma = 0."""
    a, s = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    return ((a * x0.double() - x_t.double()) / s**2).to(x_t.dtype)


@dataclass(frozen=True)
class EDMPreconditioner:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise). Karras et al., arXiv:2206.00364, table 1.

    All take sigma of any shape and answer in float64.
    """

    sigma_data: float = 0.5
    """Standard deviation of the data; 0.5 for pixels in [-1, 1]."""

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ConfigError(f"sigma_data must be positive, got {self.sigma_data:g}")

    def c_skip(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma.double() ** 2 + self.sigma_data**2)

    def c_out(self, sigma: Tensor) -> Tensor:
        return sigma.double() * self.sigma_data * self.c_in(sigma)

    def c_in(self, sigma: Tensor) -> Tensor:
        return (sigma.double() ** 2 + self.sigma_data**2).rsqrt()

    def c_noise(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma.double()) / 4

    def weight(self, sigma: Tensor) -> Tensor:
        """Weight of |D - x0|^2 that makes F's squared error count alike at every level: 1/c_out^2."""
        return sigma.double() ** -2 + self.sigma_data**-2


def _unknown(prediction: str) -> ConfigError:
    return ConfigError(f"prediction={prediction!r} is not one of {', '.join(PREDICTIONS)}")
