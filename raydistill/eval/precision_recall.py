"""Improved precision and recall (arXiv:1904.06991, equation 1) in whatever features are given."""

from __future__ import annotations

import torch
from torch import Tensor

from raydistill.errors import DataError

NEIGHBOURS = 3
_ROWS = 1024


def precision_recall(
    generated: Tensor, real: Tensor, *, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """(precision, recall) of features [N, D] and [M, D]: the share of generated samples that lie within the distance of
    some real sample to its third nearest neighbour, and the reverse.

    Raises DataError with fewer than four samples on a side.
    """
    if min(len(generated), len(real)) <= NEIGHBOURS:
        raise DataError(
            f"precision and recall need more than {NEIGHBOURS} samples on each side, there are {len(generated)} and "
            f"{len(real)}"
        )
    ours, theirs = generated.to(device).double(), real.to(device).double()
    return _covered(ours, theirs), _covered(theirs, ours)


def _covered(samples: Tensor, manifold: Tensor) -> float:
    """Share of samples within a ball of the manifold."""
    radii = torch.cat(
        # a sample's nearest neighbour is itself
        [_squared(rows, manifold).kthvalue(NEIGHBOURS + 1, dim=1).values for rows in manifold.split(_ROWS)]
    )
    inside = sum(int((_squared(rows, manifold) <= radii).any(dim=1).sum()) for rows in samples.split(_ROWS))
    return inside / len(samples)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances [len(a), len(b)]."""
    return a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
