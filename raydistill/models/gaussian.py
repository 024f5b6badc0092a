"""Test teachers whose every answer is known: Gaussian and Gaussian-mixture data with exact posterior means.

For x0 ~ N(m, diag(c^2)) and y = x_t / alpha = x0 + s e, s = sigma/alpha (methods.md D.0):
`E[x0|x_t] = m + c^2/(c^2 + s^2) (y - m)`; a mixture weighs its components' answers by the responsibilities
`r_i(y) ~ w_i N(y; mu_i, S_i + s^2)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raydistill.diffusion.schedules import NoiseSchedule, expand
from raydistill.models.denoiser import Cond, Denoiser


class GaussianDenoiser(Denoiser):
    """Exact denoiser of N(mean, diag(std^2)); both are parameters, so that it can serve as a critic to be trained."""

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, std: Tensor):
        """mean and std broadcast against [B, C, H, W]."""
        super().__init__()
        self.schedule = schedule
        self.mean = nn.Parameter(mean.clone())
        self.std = nn.Parameter(std.clone())

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha = expand(self.schedule.alpha(t), x_t)
        s2 = expand(self.schedule.edm_sigma(t), x_t) ** 2
        c2 = self.std.double() ** 2
        x0 = self.mean.double() + c2 / (c2 + s2) * (x_t.double() / alpha - self.mean.double())
        return x0.to(x_t.dtype)


class GaussianMixtureDenoiser(Denoiser):
    """Exact denoiser of sum_i w_i N(mu_i, std_i^2 I) over [C, H, W]."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __init__(self, schedule: NoiseSchedule, weights: Tensor, means: Tensor, stds: Tensor):
        """weights [K], means [K, C, H, W], stds [K]."""
        super().__init__()
        self.schedule = schedule
        self.register_buffer("weights", weights.double() / weights.sum())
        self.register_buffer("means", means.double())
        self.register_buffer("stds", stds.double())

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha = expand(self.schedule.alpha(t), x_t)
        s2 = self.schedule.edm_sigma(t).reshape(-1, 1) ** 2  # [B, 1]
        y = (x_t.double() / alpha).flatten(1)  # [B, D]
        means = self.means.flatten(1)  # [K, D]
        variance = self.stds**2 + s2  # [B, K]
        distance = ((y[:, None] - means) ** 2).sum(-1)  # [B, K]
        log_r = self.weights.log() - 0.5 * distance / variance - 0.5 * means.shape[1] * variance.log()
        r = torch.softmax(log_r, dim=1)
        gain = self.stds**2 / variance  # [B, K]
        x0 = means + gain[..., None] * (y[:, None] - means)  # [B, K, D]
        return (r[..., None] * x0).sum(1).reshape(x_t.shape).to(x_t.dtype)


class AffineGenerator(Denoiser):
    """G(z) = b + a z, the generator family of methods.md D.1; as a `Denoiser` it ignores t."""

    def __init__(self, schedule: NoiseSchedule, scale: Tensor, shift: Tensor):
        super().__init__()
        self.schedule = schedule
        self.scale = nn.Parameter(scale.clone())
        self.shift = nn.Parameter(shift.clone())

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.shift + self.scale * x_t
