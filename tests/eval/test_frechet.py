import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from raydistill.errors import DataError
from raydistill.eval.frechet import Array, FeatureStatistics, frechet_distance


def statistics(features: Array, batches: int = 1) -> FeatureStatistics:
    result = FeatureStatistics()
    for batch in np.array_split(features, batches):
        result.update(torch.from_numpy(batch))
    return result


def samples(seed: int, count: int, dim: int, shift: float = 0.0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dim)) @ rng.normal(size=(dim, dim)) / np.sqrt(dim) + shift


def by_sqrtm(a: Array, b: Array) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


@pytest.mark.parametrize("dim", [1, 2, 16, 64])
def test_distance_equals_the_matrix_square_root_of_scipy_on_full_rank_data(dim: int) -> None:
    a, b = samples(0, 500, dim), samples(1, 400, dim, shift=0.3)
    expected = (
        ((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2) if dim == 1 else by_sqrtm(a, b)
    )
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(float(expected), rel=1e-9)


def test_distance_of_a_set_to_itself_is_zero() -> None:
    for count in (5, 2000):
        ours = statistics(samples(0, count, 64, shift=3.0))
        # sums of 64 terms of order 1 in float64
        assert 0.0 <= frechet_distance(ours, ours) < 1e-10


def with_moments(mean: Array, covariance: Array) -> FeatureStatistics:
    """Data with exactly this mean and covariance (N - 1)."""
    dim = len(mean)
    signs = np.concatenate([np.eye(dim), -np.eye(dim)]) * np.sqrt((2 * dim - 1) / 2)
    return statistics(signs @ np.linalg.cholesky(covariance).T + mean)


def test_distance_of_gaussians_that_commute_has_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    s, r = rng.uniform(0.1, 3.0, 12), rng.uniform(0.1, 3.0, 12)
    mean_a, mean_b = rng.normal(size=12), rng.normal(size=12)
    a = with_moments(mean_a, basis * s**2 @ basis.T)
    b = with_moments(mean_b, basis * r**2 @ basis.T)
    closed_form = ((mean_a - mean_b) ** 2).sum() + ((s - r) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(closed_form, rel=1e-12)


@pytest.mark.parametrize("count", [2, 10, 40])
def test_fewer_samples_than_features_are_handled_exactly(count: int) -> None:
    # both sets lie in a subspace, where the covariances have full rank and scipy is right
    rng = np.random.default_rng(count)
    flat_a, flat_b = rng.normal(size=(count, 1)) * 2 + 1, rng.normal(size=(count, 1))
    direction = rng.normal(size=(1, 64))
    direction /= np.linalg.norm(direction)
    expected = (flat_a.mean() - flat_b.mean()) ** 2 + (flat_a.std(ddof=1) - flat_b.std(ddof=1)) ** 2
    distance = frechet_distance(statistics(flat_a @ direction), statistics(flat_b @ direction))
    assert distance == pytest.approx(float(expected), rel=1e-9)

    # one set is flat, the other is not: cross term from the small matrix B^1/2 A B^1/2
    a, b = samples(1, count, 64), samples(2, 500, 64)
    centred = (a - a.mean(0)) / np.sqrt(count - 1)
    small = centred @ np.cov(b, rowvar=False) @ centred.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(small), 0, None)).sum()
    spread = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * cross
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(float(expected), rel=1e-7)


def test_statistics_equal_numpy_whatever_the_batches() -> None:
    features = samples(0, 301, 20, shift=5.0)
    for batches in (1, 7, 301):
        ours = statistics(features, batches)
        assert ours.count == 301
        np.testing.assert_allclose(ours.mean(), features.mean(0), rtol=1e-13)
        np.testing.assert_allclose(ours.covariance(), np.cov(features, rowvar=False), rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(
            ours.covariance(ddof=0), np.cov(features, rowvar=False, ddof=0), rtol=1e-11, atol=1e-13
        )


def test_a_large_common_offset_does_not_eat_the_covariance() -> None:
    features = samples(0, 400, 8)
    plain, offset = statistics(features, 4), statistics(features + 1e6, 4)
    np.testing.assert_allclose(offset.covariance(), plain.covariance(), rtol=1e-6)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_three_workers_give_the_figure_of_one(order: tuple[int, ...]) -> None:
    features, reference = samples(0, 600, 64), statistics(samples(1, 900, 64, shift=0.2))
    parts = np.array_split(features, [150, 380])
    merged = FeatureStatistics()
    for index in order:
        merged.merge(statistics(parts[index], 3))
    merged.merge(FeatureStatistics())
    one = statistics(features)
    assert merged.count == one.count
    np.testing.assert_allclose(merged.mean(), one.mean(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(merged.covariance(), one.covariance(), rtol=0, atol=1e-9)
    assert frechet_distance(merged, reference) == pytest.approx(frechet_distance(one, reference), rel=1e-9)


def test_merging_leaves_the_other_side_alone() -> None:
    a, b = FeatureStatistics(), statistics(samples(0, 10, 3))
    before = b.covariance()
    a.merge(b)
    a.update(torch.full((5, 3), 9.0))
    np.testing.assert_array_equal(b.covariance(), before)


def test_statistics_survive_a_file_and_go_on(tmp_path: Path) -> None:
    features = samples(0, 100, 5)
    half = statistics(features[:60])
    np.savez(tmp_path / "statistics.npz", **half.to_arrays())
    with np.load(tmp_path / "statistics.npz", allow_pickle=False) as arrays:
        resumed = FeatureStatistics.from_arrays(arrays)
    resumed.update(features[60:])
    half.update(features[60:])
    np.testing.assert_array_equal(resumed.covariance(), half.covariance())
    np.testing.assert_array_equal(resumed.mean(), half.mean())


def test_what_has_no_distance_is_refused() -> None:
    one = statistics(samples(0, 1, 4))
    many = statistics(samples(0, 10, 4))
    with pytest.raises(DataError, match="needs 2 samples on each side, there are 1 and 10"):
        frechet_distance(one, many)
    with pytest.raises(DataError, match="4 and 5 features"):
        frechet_distance(many, statistics(samples(0, 10, 5)))
    with pytest.raises(DataError, match="4 and 5 features"):
        many.merge(statistics(samples(0, 10, 5)))
    with pytest.raises(DataError, match="2 feature values are not finite"):
        many.update(torch.tensor([[1.0, float("nan"), float("inf"), 0.0]]))
    with pytest.raises(DataError, match=r"expected \[batch, 4\]"):
        many.update(torch.zeros(3, 5))
    with pytest.raises(DataError, match="no samples"):
        FeatureStatistics().mean()
    with pytest.raises(DataError, match="lack 'shift'"):
        FeatureStatistics.from_arrays({"count": np.asarray(1)})
    assert many.count == 10


CLEANFID = """
import sys, warnings
import numpy as np
from raydistill.torchvision_ops import ensure_torchvision_importable
ensure_torchvision_importable()
warnings.simplefilter("ignore")
from cleanfid.fid import frechet_distance
arrays = np.load(sys.argv[1])
print(repr(float(frechet_distance(*(arrays[name] for name in ("mu1", "sigma1", "mu2", "sigma2"))))))
"""


def test_distance_equals_clean_fid_on_the_same_statistics(tmp_path: Path) -> None:
    a, b = statistics(samples(0, 700, 64)), statistics(samples(1, 900, 64, shift=0.2))
    np.savez(
        tmp_path / "moments.npz",
        mu1=a.mean(),
        sigma1=a.covariance(),
        mu2=b.mean(),
        sigma2=b.covariance(),
    )
    command = [sys.executable, "-c", CLEANFID, str(tmp_path / "moments.npz")]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert frechet_distance(a, b) == pytest.approx(float(child.stdout), rel=1e-9)
