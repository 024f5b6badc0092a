"""Statistics of the reference images: from their files, cached by content, or from a published .npz."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raydistill.errors import ConfigError, DataError
from raydistill.eval.frechet import FeatureStatistics, Gaussian
from raydistill.eval.inception import NUM_FEATURES, Inception
from raydistill.eval.resize import Chain

IMAGE_SUFFIXES = {".bmp", ".jpg", ".jpeg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Of files that clean-fid counts as images, but for .npy."""
ReadImage = Callable[[], bytes]
_CACHE_VERSION = 1


@dataclass(frozen=True)
class Reference:
    """What generated features are compared with; features [M, 2048] float32, None where a file has no more than mean
    and covariance."""

    statistics: FeatureStatistics | Gaussian
    features: Tensor | None


def read_statistics(file: str | Path) -> Reference:
    """A .npz with `mu` and `sigma`, as EDM and clean-fid write them, or with `feats` [M, 2048], clean-fid's *_kid.npz.
    Nothing in it is unpickled.

    Raises ConfigError if it can't be read or holds something else.
    """
    what = f"evaluator.reference={file}"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if "feats" in arrays.files:
                return _of_features(np.asarray(arrays["feats"], dtype=np.float32), what)
            if missing := {"mu", "sigma"} - set(arrays.files):
                raise ConfigError(
                    f"{what} lacks {', '.join(sorted(missing))}; it holds {', '.join(arrays.files) or 'nothing'}"
                )
            mean, covariance = (np.asarray(arrays[name], dtype=np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{what} can't be read as .npz of numbers: {why}") from error
    if mean.shape != (NUM_FEATURES,) or covariance.shape != (NUM_FEATURES, NUM_FEATURES):
        raise ConfigError(
            f"{what} has mu {list(mean.shape)} and sigma {list(covariance.shape)}, not [{NUM_FEATURES}] and "
            f"[{NUM_FEATURES}, {NUM_FEATURES}]: it is of another detector"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ConfigError(f"{what} holds values that are not finite")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6):
        raise ConfigError(f"{what}: its sigma is not symmetric, so it is no covariance")
    return Reference(Gaussian(mean, (covariance + covariance.T) / 2), None)


def _of_features(rows: np.ndarray, what: str) -> Reference:
    if rows.ndim != 2 or rows.shape[1] != NUM_FEATURES or len(rows) < 2:
        raise ConfigError(
            f"{what} has feats {list(rows.shape)}, not [2 or more, {NUM_FEATURES}]: it is of another detector"
        )
    if not np.isfinite(rows).all():
        raise ConfigError(f"{what} holds values that are not finite")
    features = torch.from_numpy(rows)
    statistics = FeatureStatistics()
    for part in features.split(1024):
        statistics.update(part)
    return Reference(statistics, features)


def image_files(folder: str | Path) -> list[Path]:
    """All images of a folder and the folders in it, sorted as clean-fid sorts them."""
    found = (Path(where) / name for where, _, names in os.walk(folder) for name in names)
    return sorted((file for file in found if file.suffix.lower() in IMAGE_SUFFIXES), key=str)


def content_sha256(images: Sequence[ReadImage]) -> str:
    """Hash of the images' encoded bytes, in order."""
    digest = hashlib.sha256()
    for read in images:
        data = read()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def measured(
    images: Sequence[ReadImage],
    content: str,
    chain: Chain,
    detector: Inception,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    cache_dir: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Reference:
    """Features of images in a chain.

    content: their `content_sha256`, by which, with chain and detector, the result is kept in `cache_dir`.
    progress: told how many images are done.

    Raises DataError for an image that can't be read.
    """
    key = hashlib.sha256(f"{_CACHE_VERSION} {content} {chain.name} {detector.sha256}".encode()).hexdigest()
    cached = cache_dir / f"{key[:32]}.npz" if cache_dir else None
    if cached and cached.is_file():
        features = _read_cached(cached, len(images))
    else:
        batches = []
        for start in range(0, len(images), batch_size):
            pictures = [decoded(read) for read in images[start : start + batch_size]]
            batches.append(detector(chain(pictures).to(device)).cpu())
            progress(min(start + batch_size, len(images)))
        features = torch.cat(batches)
        if cached:
            cached.parent.mkdir(parents=True, exist_ok=True)
            # several evaluators may write it at once
            partial = cached.with_suffix(f".{os.getpid()}.partial")
            with partial.open("wb") as file:
                np.savez(file, features=features.numpy())
            partial.replace(cached)
    statistics = FeatureStatistics()
    for rows in features.split(batch_size):
        statistics.update(rows)
    return Reference(statistics, features)


def _read_cached(file: Path, count: int) -> Tensor:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            features = torch.from_numpy(arrays["features"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"the cached reference statistics {file} can't be read, delete it: {error}"
        ) from error
    if features.shape != (count, NUM_FEATURES):
        raise DataError(f"the cached reference statistics {file} are of {list(features.shape)}: delete it")
    return features


def decoded(read: ReadImage) -> np.ndarray:
    """RGB pixels [H, W, 3] uint8. Raises DataError."""
    try:
        with Image.open(io.BytesIO(read())) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"an image of the reference (evaluator.reference) can't be read: {why}") from error


def batches_of(count: int, batch_size: int, worker: int, workers: int) -> Iterator[list[int]]:
    """The batches of one of several workers, in order; their union, worker by worker, is 0 to count - 1.

    Whole batches are shared out, so that each is computed alike however many workers there are.
    """
    starts = np.array_split(np.arange(0, count, batch_size), workers)[worker]
    for start in map(int, starts):
        yield list(range(start, min(start + batch_size, count)))
