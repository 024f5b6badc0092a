"""Classifier-free guidance, with one convention for its scale. Ho & Salimans, arXiv:2207.12598."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(x0_cond: Tensor, x0_uncond: Tensor, scale: float) -> Tensor:
    """x0_uncond + scale (x0_cond - x0_uncond): scale 0 ignores the condition, 1 is no guidance.

    Guiding x0, eps, v or flow is the same, as each is affine in the others at a given x_t.
    """
    # lerp, unlike the formula as written, gives x0_cond exactly at scale 1.
    return torch.lerp(x0_uncond, x0_cond, scale)


def extra_to_scale(w: float) -> float:
    """Scale for papers that write (1 + w) cond - w uncond (arXiv:2207.12598, eq. 6), 0 for no guidance."""
    return w + 1
