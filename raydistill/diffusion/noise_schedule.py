"""What a noise schedule answers: alpha and sigma of `x_t = alpha(t) x0 + sigma(t) eps`, eps ~ N(0, I)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from raydistill.errors import ConfigError


def expand(v: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, ...], with `like`'s number of dimensions. Raises ValueError if the batches differ."""
    if v.ndim != 1 or v.shape[0] != like.shape[0]:
        raise ValueError(
            f"expected one noise level per sample, [{like.shape[0]}], got shape {tuple(v.shape)}"
        )
    return v.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule(ABC):
    """Signal and noise levels over a time that grows towards noise.

    Coefficient methods take a tensor of times of any shape and answer in float64. `t_min` and `t_max` bound
    the levels that networks are trained and sampled on; `t_clean` is the time of clean data (alpha 1, sigma
    0), the last time of a sampler; `t_end` is the last time that has a meaning.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def t_min(self) -> float: ...

    @property
    @abstractmethod
    def t_max(self) -> float: ...

    @property
    def t_clean(self) -> float:
        return 0.0

    @property
    @abstractmethod
    def t_end(self) -> float: ...

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    def edm_sigma(self, t: Tensor) -> Tensor:
        """sigma/alpha, the level of x_t/alpha in EDM's terms; infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    @abstractmethod
    def t_from_edm_sigma(self, edm_sigma: Tensor) -> Tensor:
        """Inverse of `edm_sigma`."""

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t for x0 and noise [B, ...] and t [B], computed in float64, in x0's dtype."""
        return (expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise).to(x0.dtype)

    def to_config(self) -> dict[str, Any]:
        """A JSON-able description; `schedule_from_config` reverses it."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"name": self.name, **values}

    def _checked(self, t: Tensor) -> Tensor:
        """t in float64. Outside [t_clean, t_end]: ConfigError on the CPU, NaN elsewhere."""
        t = t.double()
        inside = (t >= self.t_clean) & (t <= self.t_end)
        if t.device.type == "cpu" and not inside.all():
            raise ConfigError(
                f"noise level t={t[~inside].flatten()[0].item():g} lies outside the range of the {self.name} "
                f"schedule, [{self.t_clean:g}, {self.t_end:g}]"
            )
        return torch.where(inside, t, torch.nan)
