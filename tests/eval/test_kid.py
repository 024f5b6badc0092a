"""Kernel distance: clean-fid's, unbiased, reproducible, and without a trace on numpy's global generator."""

import numpy as np
import torch

from raydistill.eval.kid import kernel_distance


def features(seed: int, num: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(num, 16, generator=torch.Generator().manual_seed(seed)) + shift


def polynomial_mmd2(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3, arXiv:1801.01401 eq. 4 on whole sets."""
    d, n, m = a.shape[1], len(a), len(b)
    kaa, kbb, kab = (((x @ y.T) / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = (kaa.sum() - np.trace(kaa)) / (n * (n - 1)) + (kbb.sum() - np.trace(kbb)) / (m * (m - 1))
    return float(within - 2 * kab.mean())


def test_small_sets_give_the_estimator_of_the_paper() -> None:
    a, b = features(0, 200), features(1, 200, 0.5)
    expected = polynomial_mmd2(a.double().numpy(), b.double().numpy())
    # clean-fid draws subsets without replacement, here the whole sets each time
    assert abs(kernel_distance(a, b) - expected) < 1e-9


def test_equal_distributions_are_at_zero_on_average_and_shifted_ones_are_not() -> None:
    same = [kernel_distance(features(2 * n, 100), features(2 * n + 1, 100)) for n in range(20)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same)) + 1e-3
    assert min(same) < 0  # unbiased: on both sides of zero
    assert kernel_distance(features(0, 100), features(1, 100, 1.0)) > 1


def test_same_seed_gives_the_same_figure_and_numpys_generator_is_left_alone() -> None:
    a, b = features(0, 1500), features(1, 1500, 0.1)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    assert kernel_distance(a, b) == kernel_distance(a, b)
    assert (np.random.get_state()[1] == before).all()
