"""The teacher: a frozen denoiser that answers queries, in this process or behind a service."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raydistill.diffusion.samplers import ddim, trailing_times
from raydistill.diffusion.schedules import VPDiscreteSchedule
from raydistill.methods.method import Query
from raydistill.models.denoiser import Cond, Denoiser, denoise_guided


class Pending(Protocol):
    """A query on its way."""

    def answer(self) -> Tensor:
        """The answer, waited for if need be; carries a graph to `query.x_t` exactly if that requires a gradient."""


class Scorer(Protocol):
    """A teacher, wherever it lives."""

    denoiser: Denoiser
    """Its network without guidance."""

    def submit(self, query: Query) -> Pending:
        """Ask; returns at once."""

    def figures(self) -> dict[str, float]:
        """For the log, since they were last asked for."""


@dataclass(frozen=True)
class _Deferred:
    scorer: TeacherScorer
    query: Query

    def answer(self) -> Tensor:
        return self.scorer.answer(self.query)


class TeacherScorer:
    """Answers queries with guidance, conditional and unconditional halves in one batch."""

    def __init__(self, denoiser: Denoiser, null_cond: Callable[[int], Cond] | None):
        """null_cond: the unconditional half for a batch size, None where the teacher has none."""
        self.denoiser = denoiser.eval().requires_grad_(False)
        self._null_cond = null_cond

    def submit(self, query: Query) -> Pending:
        """The query, computed when its answer is asked for: nothing is gained by holding it earlier."""
        return _Deferred(self, query)

    def figures(self) -> dict[str, float]:
        return {}

    def answer(self, query: Query) -> Tensor:
        """x0 or a sample [B, C, H, W], or bottleneck features [B, D, h, w] of the conditional half."""
        with torch.set_grad_enabled(query.x_t.requires_grad):
            if query.want == "features":
                return self.denoiser.features(query.x_t, query.t, query.cond)
            if query.want not in ("x0", "sample"):
                raise ValueError(f"the teacher answers x0, features and samples, not {query.want}")
            guided = self._null_cond is not None and query.guidance_scale != 1.0
            null = self._null_cond(len(query.x_t)) if guided and self._null_cond else None

            def x0(x_t: Tensor, t: Tensor) -> Tensor:
                return denoise_guided(self.denoiser, x_t, t, query.cond, null, query.guidance_scale)

            return self._sample(query, x0) if query.want == "sample" else x0(query.x_t, query.t)

    def _sample(self, query: Query, x0: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        schedule = self.denoiser.schedule
        if not isinstance(schedule, VPDiscreteSchedule):
            raise ValueError(f"samples are DDIM's, on discrete timesteps, not on {type(schedule).__name__}")
        times = trailing_times(query.steps, schedule.num_train_timesteps)
        return ddim(x0, schedule, [*times, schedule.t_clean], query.x_t)


class KeptGraphs:
    """A teacher's answers to others, with the graphs of the newest differentiable ones kept for their backward pass.

    A graph is used once and dropped; the oldest is dropped beyond `limit`. What is not kept is computed again.
    """

    def __init__(self, scorer: TeacherScorer, limit: int):
        self._scorer = scorer
        self._limit = limit
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def answer(self, query: Query, key: str) -> Tensor:
        """The answer without its graph, which is kept under `key` if `query.x_t` requires a gradient."""
        answer = self._scorer.answer(query)
        if query.x_t.requires_grad:
            self._kept[key] = (query.x_t, answer)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        return answer.detach()

    def vjp(self, key: str, cotangent: Tensor) -> Tensor | None:
        """Gradient of <answer, cotangent> with respect to x_t; None if the graph is not kept (any more)."""
        if key not in self._kept:
            return None
        x_t, answer = self._kept.pop(key)
        (gradient,) = torch.autograd.grad(answer, x_t, cotangent)
        return gradient
