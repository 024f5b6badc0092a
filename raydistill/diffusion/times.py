"""At which noise levels is a network trained? The laws that the methods name, drawn through `Draws`.

Each `sample` gives one float32 level per position, in the units of the schedule that the law is meant for,
and depends on (seed, purpose, step, position) only: a batch can be split at will.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raydistill.diffusion.random import Draws, Positions
from raydistill.errors import ConfigError


class TimeSampler(Protocol):
    """A law of noise levels."""

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> Tensor:
        """One level per position: [len(positions)], float32 on the CPU."""
        ...


def karras_sigma(u: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """EDM level at u in [0, 1], from sigma_min up to sigma_max, float64. arXiv:2206.00364, eq. 5."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u.double() * (high - low)) ** rho


@dataclass(frozen=True)
class DiscreteUniform:
    """Uniform over the integer timesteps low..high, both included.

    DMD2 (arXiv:2405.14867): 20..980 for the generator's loss, 0..999 for the critic's.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        _require(0 <= self.low <= self.high, f"need 0 <= low <= high, got {self.low} and {self.high}")

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> Tensor:
        return draws.integers(purpose, step, positions, self.low, self.high + 1).float()


@dataclass(frozen=True)
class KarrasIndexUniform:
    """EDM levels at indices low..high (both included, uniform) of an ascending Karras grid of `num` levels.

    DMD2 on EDM teachers (arXiv:2405.14867): num 1000, indices 20..980 for the generator and 0..999 for the
    critic.
    """

    num: int
    low: int
    high: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _require(
            0 <= self.low <= self.high < self.num and self.num >= 2,
            f"need 0 <= low <= high < num and num >= 2, got {self.low}, {self.high} and {self.num}",
        )
        _check_karras(self.sigma_min, self.sigma_max, self.rho)

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> Tensor:
        index = draws.integers(purpose, step, positions, self.low, self.high + 1)
        return karras_sigma(index.double() / (self.num - 1), self.sigma_min, self.sigma_max, self.rho).float()


@dataclass(frozen=True)
class KarrasUniform:
    """EDM levels at u uniform in [0, u_max) on the Karras curve. SiD (arXiv:2404.04057): u_max 0.8."""

    u_max: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        _require(0 < self.u_max <= 1, f"u_max must lie in (0, 1], got {self.u_max:g}")
        _check_karras(self.sigma_min, self.sigma_max, self.rho)

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> Tensor:
        u = draws.uniform(purpose, step, positions) * self.u_max
        return karras_sigma(u, self.sigma_min, self.sigma_max, self.rho).float()


@dataclass(frozen=True)
class LogNormal:
    """EDM levels with ln sigma ~ N(mean, std^2). arXiv:2206.00364, table 1, has -1.2 and 1.2."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _require(self.std > 0, f"std must be positive, got {self.std:g}")

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> Tensor:
        return (draws.normal(purpose, step, positions, ()).double() * self.std + self.mean).exp().float()


@dataclass(frozen=True)
class LogitNormal:
    """Levels in (0, 1) with logit t ~ N(mean, std^2), for linear flow. arXiv:2403.03206, eq. 19."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _require(self.std > 0, f"std must be positive, got {self.std:g}")

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> Tensor:
        return (draws.normal(purpose, step, positions, ()).double() * self.std + self.mean).sigmoid().float()


@dataclass(frozen=True)
class FixedSet:
    """One of the given levels, in equal shares or with these probabilities, which must sum to 1.

    LADD (arXiv:2403.12015): times (1, .75, .5, .25), probabilities (.7, .1, .1, .1).
    """

    times: tuple[float, ...]
    probabilities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _require(len(self.times) > 0, "times is empty")
        if self.probabilities is not None:
            valid = len(self.probabilities) == len(self.times) and min(self.probabilities) >= 0
            _require(
                valid and math.isclose(sum(self.probabilities), 1, abs_tol=1e-6),
                f"probabilities must be {len(self.times)} numbers that sum to 1, got {self.probabilities}",
            )

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> Tensor:
        shares: Sequence[float] = self.probabilities or [1 / len(self.times)] * len(self.times)
        edges = torch.tensor(shares, dtype=torch.float64).cumsum(0)
        # The total is 1 but for rounding; a draw above it belongs to the last level that can be drawn.
        last = max(index for index, share in enumerate(shares) if share > 0)
        index = torch.searchsorted(edges, draws.uniform(purpose, step, positions), right=True).clamp(max=last)
        return torch.tensor(self.times, dtype=torch.float32)[index]


@dataclass(frozen=True)
class PairedTimes:
    """Pairs s <= t of moment matching (arXiv:2406.04103, algorithm 2), for a generator of num_steps steps.

    With T = t_max - t_min: s ~ U[t_min, t_max), t = min(s + U[0, T/num_steps), t_max).
    """

    num_steps: int
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, f"num_steps must be at least 1, got {self.num_steps}")
        _require(self.t_min < self.t_max, f"need t_min < t_max, got {self.t_min:g} and {self.t_max:g}")

    def sample(self, draws: Draws, purpose: str, step: int, positions: Positions) -> tuple[Tensor, Tensor]:
        """(t, s), each [len(positions)] float32 on the CPU, s <= t."""
        span = self.t_max - self.t_min
        s = self.t_min + span * draws.uniform(f"{purpose}/s", step, positions)
        t = s + span / self.num_steps * draws.uniform(f"{purpose}/step", step, positions)
        return t.clamp(max=self.t_max).float(), s.float()


def _check_karras(sigma_min: float, sigma_max: float, rho: float) -> None:
    _require(
        0 < sigma_min < sigma_max, f"need 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}"
    )
    _require(rho > 0, f"rho must be positive, got {rho:g}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
