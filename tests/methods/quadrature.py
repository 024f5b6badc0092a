"""Expectations over normal noise as sums over points, and draws that are those points."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from raydistill.diffusion.random import Draws
from raydistill.diffusion.schedules import NoiseSchedule
from raydistill.diffusion.times import TimeSampler
from raydistill.methods.method import PhaseDraws
from raydistill.models.denoiser import Cond, Denoiser

NO_COND = Cond({})


def cubature(n: int) -> Tensor:
    """Points [2n, n] whose plain mean is the expectation over N(0, I) of every polynomial of degree 3 or less."""
    corners = n**0.5 * torch.eye(n, dtype=torch.float64)
    return torch.cat([corners, -corners])


def gauss_hermite(n: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Points [nodes^n, n] and weights [nodes^n] of the product rule for N(0, I)."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = np.stack([axis.ravel() for axis in np.meshgrid(*[x] * n, indexing="ij")], axis=-1)
    weights = np.stack([axis.ravel() for axis in np.meshgrid(*[w / w.sum()] * n, indexing="ij")]).prod(axis=0)
    return torch.tensor(points), torch.tensor(weights)


def images(points: Tensor) -> Tensor:
    """[B, D] -> [B, D, 1, 1]."""
    return points[:, :, None, None]


class FixedDraws(PhaseDraws):
    """Draws whose noise and noise levels are given by name, in float64."""

    def __init__(self, noise: Mapping[str, Tensor], times: Mapping[str, Tensor], step: int = 0):
        super().__init__(Draws(0), "fixed", step, range(len(next(iter(noise.values())))), "cpu")
        self._noise, self._times = noise, times

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        assert self._noise[name].shape[1:] == tuple(shape)
        return self._noise[name]

    def times(self, name: str, sampler: TimeSampler) -> Tensor:
        return self._times[name]


class AffineDenoiser(Denoiser):
    """x0 = intercept + slope x_t at every noise level, for x_t [B, D, 1, 1]."""

    def __init__(self, schedule: NoiseSchedule, slope: Tensor, intercept: Tensor):
        """slope [D, D], intercept [D]."""
        super().__init__()
        self.schedule = schedule
        self.slope = torch.nn.Parameter(slope.clone())
        self.intercept = torch.nn.Parameter(intercept.clone())

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return images(x_t.flatten(1) @ self.slope.T + self.intercept)
