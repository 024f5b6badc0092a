"""Frechet distance between two sets of features, from sums that merge (arXiv:1706.08500, equation 6)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg
from torch import Tensor

from raydistill.errors import DataError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] alone, as statistics files hold them."""

    mean: Array
    covariance: Array


class FeatureStatistics:
    """Streaming float64 statistics of D features: count, sum and sum of outer products.

    They merge exactly, so workers may each see a part, and they can be stored and gone on with. The sums are
    taken about a shift (the first batch's mean, part of the state), which keeps the covariance exact where
    the features' mean is large beside their spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift: Array = np.zeros(0)
        self._sum: Array = np.zeros(0)
        self._outer: Array = np.zeros((0, 0))

    def update(self, features: Tensor | npt.NDArray[np.floating]) -> None:
        """Add features [B, D]. Raises DataError for another D or for values that are not finite."""
        rows = features.detach().cpu().double().numpy() if isinstance(features, Tensor) else features
        rows = np.asarray(rows, dtype=np.float64)
        if rows.ndim != 2 or (self.count and rows.shape[1] != self._sum.size):
            raise DataError(
                f"features have shape {rows.shape}; expected [batch, {self._sum.size or 'features'}]"
            )
        if not np.isfinite(rows).all():
            raise DataError(f"{int((~np.isfinite(rows)).sum())} feature values are not finite")
        if not len(rows):
            return
        if not self.count:
            dim = rows.shape[1]
            self._shift, self._sum, self._outer = rows.mean(0), np.zeros(dim), np.zeros((dim, dim))
        centred = rows - self._shift
        self.count += len(rows)
        self._sum += centred.sum(0)
        self._outer += centred.T @ centred

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the samples of `other`. Raises DataError if it has another number of features."""
        if not other.count:
            return
        if not self.count:
            self.count, self._shift = other.count, other._shift.copy()
            self._sum, self._outer = other._sum.copy(), other._outer.copy()
            return
        if self._sum.size != other._sum.size:
            raise DataError(f"can't merge statistics of {self._sum.size} and {other._sum.size} features")
        # move the other's sums to this shift: x - s = (x - s') + d
        move = other._shift - self._shift
        cross = np.outer(other._sum, move)
        self._outer += other._outer + cross + cross.T + other.count * np.outer(move, move)
        self._sum += other._sum + other.count * move
        self.count += other.count

    def mean(self) -> Array:
        """Mean [D]. Raises DataError without samples."""
        if not self.count:
            raise DataError("statistics of no samples have no mean")
        return self._shift + self._sum / self.count

    def covariance(self, ddof: int = 1) -> Array:
        """Covariance [D, D] with divisor N - ddof. Raises DataError unless N > ddof."""
        if self.count <= ddof:
            raise DataError(f"a covariance needs more than {ddof} samples, there are {self.count}")
        covariance = (self._outer - np.outer(self._sum, self._sum) / self.count) / (self.count - ddof)
        return np.asarray((covariance + covariance.T) / 2)

    def to_arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Everything, as arrays for np.savez."""
        return {"count": np.asarray(self.count), "shift": self._shift, "sum": self._sum, "outer": self._outer}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> "FeatureStatistics":
        """From `to_arrays`, also read back with np.load.

        Raises DataError if the arrays don't fit together.
        """
        statistics = cls()
        try:
            statistics.count = int(arrays["count"])
            shift, total, outer = (
                np.array(arrays[name], dtype=np.float64) for name in ("shift", "sum", "outer")
            )
        except KeyError as error:
            raise DataError(f"feature statistics lack {error}; they hold {', '.join(arrays)}") from error
        if shift.shape != total.shape or outer.shape != 2 * total.shape or statistics.count < 0:
            raise DataError(
                f"feature statistics don't fit together: {shift.shape}, {total.shape}, {outer.shape}"
            )
        statistics._shift, statistics._sum, statistics._outer = shift, total, outer
        return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics | Gaussian) -> float:
    """Frechet distance of the Gaussians with the two sets' means and covariances (N - 1).

    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)); the last trace is the sum of the square roots of the
    eigenvalues of A^(1/2) B A^(1/2), which is symmetric, so it is real and exact also where a covariance is
    singular (fewer samples than features).

    Raises DataError with fewer than two samples on a side or different numbers of features.
    """
    counts = [each.count for each in (a, b) if isinstance(each, FeatureStatistics)]
    if min(counts) < 2:
        raise DataError(
            f"a Frechet distance needs 2 samples on each side, there are {' and '.join(map(str, counts))}"
        )
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    if mean_a.shape != mean_b.shape:
        raise DataError(f"can't compare statistics of {mean_a.size} and {mean_b.size} features")
    difference = mean_a - mean_b
    # With A = U U^T and B = V V^T the roots are the singular values of U^T V: no square of a small eigenvalue
    # is taken, which would cost half the digits where the covariances are nearly singular.
    product = _factor(cov_a, _rank(a)).T @ _factor(cov_b, _rank(b))
    cross = 2.0 * float(np.linalg.svd(product, compute_uv=False).sum())
    # rounding can leave a distance of equal Gaussians at -1e-13
    return max(0.0, float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - cross))


def _moments(of: FeatureStatistics | Gaussian) -> tuple[Array, Array]:
    return (of.mean, of.covariance) if isinstance(of, Gaussian) else (of.mean(), of.covariance())


def _rank(of: FeatureStatistics | Gaussian) -> int:
    """Of the covariance, at most."""
    return len(of.mean) if isinstance(of, Gaussian) else min(of.count - 1, of.mean().size)


def _factor(covariance: Array, rank: int) -> Array:
    size = len(covariance)
    if rank < size:  # the smallest eigenvalues are rounding
        values, vectors = scipy.linalg.eigh(covariance, subset_by_index=(size - rank, size - 1))
    else:
        values, vectors = np.linalg.eigh(covariance)
    # a covariance has no negative eigenvalues either; those here are rounding, about 1e-16 of the largest
    return np.asarray(vectors * np.sqrt(np.clip(values, 0.0, None)))
