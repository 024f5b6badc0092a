"""Kernel inception distance, by clean-fid, in whatever features are given."""

import numpy as np
from torch import Tensor

from raydistill.torchvision_ops import ensure_torchvision_importable


def kernel_distance(a: Tensor, b: Tensor, seed: int = 0) -> float:
    """KID of two feature sets [N, D] and [M, D]: unbiased, so also meaningful at small N (arXiv:1801.01401, eq. 4).

    clean-fid averages over random subsets of at most 1000; `seed` fixes them.
    """
    ensure_torchvision_importable()
    from cleanfid.fid import kernel_distance as clean_kernel_distance

    state = np.random.get_state()
    np.random.seed(seed)
    try:
        return float(clean_kernel_distance(a.double().cpu().numpy(), b.double().cpu().numpy()))
    finally:
        np.random.set_state(state)
