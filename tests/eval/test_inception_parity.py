"""Features, distances and references of published protocols beside clean-fid's own functions on the same files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from raydistill.errors import ConfigError, DataError
from raydistill.eval.frechet import FeatureStatistics, frechet_distance
from raydistill.eval.inception import SHA256, Inception
from raydistill.eval.kid import kernel_distance
from raydistill.eval.reference import content_sha256, decoded, image_files, measured, read_statistics
from raydistill.eval.resize import CHAINS, Chain, chain
from raydistill.torchvision_ops import ensure_torchvision_importable
from tests.eval.detector_file import write_detector

ensure_torchvision_importable()
from cleanfid import fid as clean  # noqa: E402
from cleanfid.inception_torchscript import InceptionV3W  # noqa: E402
from torchvision.transforms import functional  # noqa: E402

# odd margins on both sides, larger and smaller than a patch, upright
SIZES = [(411, 300), (305, 304), (300, 433), (64, 51), (320, 299), (299, 330)]


def draw(folder: Path, sizes: list[tuple[int, int]], seed: int) -> Path:
    folder.mkdir()
    draws = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        coarse = draws.integers(0, 256, (9, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)
        noise = draws.integers(-20, 20, (size[1], size[0], 3))
        pixels = (np.asarray(image).astype(int) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.{'png' if number % 2 else 'jpg'}")
    return folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return write_detector(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    return draw(root / "real", SIZES * 2, 1), draw(root / "fake", SIZES[::-1] * 2, 2)


def crop_and_lanczos(edge: int) -> Callable[[np.ndarray], np.ndarray]:
    """As DMD2's evaluator: torchvision's crop to the short edge, then PIL."""

    def transform(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        square = functional.center_crop(image, min(image.size))
        return np.array(square.resize((edge, edge), Image.LANCZOS))

    return transform


def patch(pixels: np.ndarray) -> np.ndarray:
    image = Image.fromarray(pixels)
    return np.array(functional.center_crop(image, 299) if min(image.size) >= 299 else image)


THEIRS = {
    "crop-lanczos256-clean299": crop_and_lanczos(256),
    "crop-lanczos512-clean299": crop_and_lanczos(512),
    "patch299-clean299": patch,
}


def clean_features(folder: Path, detector: Path, name: str) -> np.ndarray:
    mode = "legacy_tensorflow" if name == "inside" else "clean"
    net = InceptionV3W(str(detector.parent), download=False, resize_inside=name == "inside")
    with torch.no_grad():
        found = clean.get_folder_features(
            str(folder), net, num_workers=0, batch_size=1 if name == "inside" else 5, device="cpu", mode=mode,
            verbose=False, custom_image_tranform=THEIRS.get(name),
        )  # fmt: skip
    # clean-fid goes through the suffixes one after the other
    files = sorted(folder.iterdir(), key=lambda file: str(file))
    assert len(found) == len(files)
    return np.asarray(found)


def ours(folder: Path, inception: Inception, each: Chain, batch_size: int) -> Tensor:
    files = image_files(folder)
    found = measured([file.read_bytes for file in files], "", each, inception, batch_size=batch_size)
    assert found.features is not None
    return found.features


@pytest.mark.parametrize("name", CHAINS)
def test_features_are_those_of_clean_fid(
    detector: tuple[Path, str], folders: tuple[Path, Path], name: str
) -> None:
    file, sha256 = detector
    inception = Inception(file, sha256)
    for folder in folders:
        found = ours(folder, inception, chain(name), batch_size=1 if name == "inside" else 5)
        assert found.shape == (12, 2048)
        expected = clean_features(folder, file, name)
        order = [str(path) for path in sorted(folder.iterdir(), key=str)]
        assert order == [str(path) for path in image_files(folder)]
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", THEIRS)
def test_the_resize_chain_is_clean_fids_bit_for_bit(folders: tuple[Path, Path], name: str) -> None:
    files = image_files(folders[0])
    dataset = clean.ResizeDataset([str(file) for file in files], mode="clean")
    dataset.custom_image_tranform = THEIRS[name]
    found = chain(name)([decoded(file.read_bytes) for file in files])
    assert found.shape == (len(files), 3, 299, 299)
    assert found.dtype == torch.float32
    for number in range(len(files)):
        assert torch.equal(found[number], dataset[number])


def test_fid_and_kid_are_clean_fids_in_the_same_features(
    detector: tuple[Path, str], folders: tuple[Path, Path]
) -> None:
    inception = Inception(*detector)
    real, fake = (ours(folder, inception, chain("crop-lanczos256-clean299"), 5) for folder in folders)
    # a square root of 2048 x 2048 takes clean-fid minutes here; the distance of 2048 features has a test of its own
    some = slice(0, 2048, 64)
    a, b = FeatureStatistics(), FeatureStatistics()
    a.update(real[:, some])
    b.update(fake[:, some])
    theirs = clean.fid_from_feats(real[:, some].double().numpy(), fake[:, some].double().numpy())
    assert frechet_distance(a, b) == pytest.approx(float(np.real(theirs)), rel=1e-4)
    np.random.seed(0)
    expected = clean.kernel_distance(fake.double().numpy(), real.double().numpy())
    assert kernel_distance(fake, real) == pytest.approx(expected, rel=1e-9)


def test_fid_of_2048_features_is_exact_with_fewer_samples(
    detector: tuple[Path, str], folders: tuple[Path, Path]
) -> None:
    inception = Inception(*detector)
    real, fake = (ours(folder, inception, chain("patch299-clean299"), 5).double() for folder in folders)
    a, b = FeatureStatistics(), FeatureStatistics()
    a.update(real)
    b.update(fake)
    x, y = real - real.mean(0), fake - fake.mean(0)
    # tr (A B)^(1/2) is the nuclear norm of X Y^T / (N - 1), which is small
    cross = torch.linalg.svdvals(x @ y.T).sum() / (len(x) - 1)
    spread = (x.square().sum() + y.square().sum()) / (len(x) - 1)
    expected = float((real.mean(0) - fake.mean(0)).square().sum() + spread - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_images_of_two_sizes_are_refused_where_the_detector_resizes(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"evaluator\.reference.* size of the generated images"):
        chain("inside")([decoded(file.read_bytes) for file in image_files(folders[0])])
    with pytest.raises(ConfigError, match="the chains are inside, crop"):
        chain("bilinear")


def test_a_detector_is_loaded_only_if_its_hash_is_right(detector: tuple[Path, str], tmp_path: Path) -> None:
    file, sha256 = detector
    with pytest.raises(ConfigError, match=rf"has sha256 {sha256}, not {SHA256}: it is not loaded") as caught:
        Inception(file)
    assert "\n" not in str(caught.value)
    assert "evaluator.detector_sha256" in str(caught.value)
    missing = tmp_path / "nowhere.pt"
    with pytest.raises(ConfigError, match=rf"sha256 {SHA256}\), and {missing} is not there") as caught:
        Inception(missing)
    for word in ("evaluator.detector_file", "https://", "evaluator.protocol=toy", "inception-2015-12-05.pt"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match=r"evaluator\.detector_sha256='abc' must be 64"):
        Inception(file, "abc")
    assert Inception(file, sha256.upper()).sha256 == sha256


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    import hashlib

    marker = tmp_path / "executed"
    file = tmp_path / "detector.pt"
    torch.save({"layers": Payload(marker)}, file)
    with pytest.raises(ConfigError, match="it is not loaded"):
        Inception(file)
    # not even where the user trusts the wrong kind of file
    with pytest.raises(DataError, match="is no TorchScript module"):
        Inception(file, hashlib.sha256(file.read_bytes()).hexdigest())
    stats = tmp_path / "stats.npz"
    np.savez(stats, mu=np.array(Payload(marker)), sigma=np.eye(2048))
    with pytest.raises(
        ConfigError, match=r"evaluator\.reference=.*can't be read as \.npz of numbers"
    ) as caught:
        read_statistics(stats)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    np.load(stats, allow_pickle=True)["mu"]
    assert marker.exists(), "the payload works"


def test_statistics_are_read_as_edm_and_clean_fid_write_them(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    features = draws.normal(size=(40, 2048))
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "ref.npz", mu=mean, sigma=covariance)
    reference = read_statistics(tmp_path / "ref.npz")
    assert reference.features is None
    measured_by_us = FeatureStatistics()
    measured_by_us.update(features)
    assert frechet_distance(measured_by_us, reference.statistics) == pytest.approx(
        0.0, abs=1e-6 * np.trace(covariance)
    )
    np.savez_compressed(tmp_path / "ref_kid.npz", feats=features)  # as clean-fid's make_custom_stats
    for_kid = read_statistics(tmp_path / "ref_kid.npz")
    assert for_kid.features is not None
    np.testing.assert_array_equal(for_kid.features.numpy(), features.astype(np.float32))
    assert frechet_distance(measured_by_us, for_kid.statistics) == pytest.approx(
        0.0, abs=1e-6 * np.trace(covariance)
    )
    bad = {
        r"feats \[40, 3\].*another detector": {"feats": features[:, :3]},
        "values that are not finite": {"feats": features * np.inf},
        "lacks sigma; it holds mu": {"mu": mean},
        r"mu \[3\] and sigma \[3, 3\].*another detector": {"mu": mean[:3], "sigma": covariance[:3, :3]},
        "not finite": {"mu": mean * np.nan, "sigma": covariance},
        "not symmetric": {"mu": mean, "sigma": covariance + draws.normal(size=covariance.shape)},
    }
    for complaint, arrays in bad.items():
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ConfigError, match=complaint):
            read_statistics(tmp_path / "bad.npz")
    (tmp_path / "bad.npz").write_text("<html>not found</html>")
    with pytest.raises(ConfigError, match="can't be read"):
        read_statistics(tmp_path / "bad.npz")


def test_reference_features_are_kept_by_content(detector: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    inception = Inception(*detector)
    first = draw(tmp_path / "first", SIZES[3:], 3)
    copy = Path(shutil.copytree(first, tmp_path / "elsewhere"))
    told: list[int] = []

    def read(folder: Path, name: str) -> tuple[str, Tensor]:
        images = [file.read_bytes for file in image_files(folder)]
        content = content_sha256(images)
        found = measured(
            images,
            content,
            chain(name),
            inception,
            batch_size=2,
            cache_dir=tmp_path / "cache",
            progress=told.append,
        )
        assert found.features is not None
        return content, found.features

    content, features = read(first, "patch299-clean299")
    assert told == [2, 3]
    again, kept = read(copy, "patch299-clean299")
    assert (again, told) == (content, [2, 3])
    assert torch.equal(kept, features)
    read(first, "crop-lanczos256-clean299")
    assert told == [2, 3] * 2, "another chain is another reference"
    changed = sorted(copy.glob("*.png"))[0]
    with Image.open(changed) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(changed)
    assert read(copy, "patch299-clean299")[0] != content
    assert told == [2, 3] * 3
