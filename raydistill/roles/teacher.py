"""The teacher: a frozen denoiser that answers queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from raydistill.methods.method import Query
from raydistill.models.denoiser import Cond, Denoiser, denoise_guided


class TeacherScorer:
    """Answers `x0` queries with guidance, conditional and unconditional halves in one batch."""

    def __init__(self, denoiser: Denoiser, null_cond: Callable[[int], Cond] | None):
        """null_cond: the unconditional half for a batch size, None where the teacher has none."""
        self.denoiser = denoiser.eval().requires_grad_(False)
        self._null_cond = null_cond

    def answer(self, query: Query) -> Tensor:
        """x0 [B, C, H, W]; carries a graph to `query.x_t` exactly if that requires a gradient."""
        if query.want != "x0":
            raise ValueError(f"the teacher answers x0, not {query.want}")
        null = self._null_cond(len(query.x_t)) if self._null_cond and query.guidance_scale != 1.0 else None
        with torch.set_grad_enabled(query.x_t.requires_grad):
            return denoise_guided(self.denoiser, query.x_t, query.t, query.cond, null, query.guidance_scale)
