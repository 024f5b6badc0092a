"""The handwritten digits as a COCO-format folder: the published pixels, each under its own class's number."""

import hashlib
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from raydistill.data import digits
from raydistill.data.coco import read_coco
from raydistill.data.digits import NUM_DIGITS, read_digits, write_digits
from raydistill.data.images import load_image
from raydistill.data.prepare import prepare_coco
from raydistill.data.reader import DataConfig, ShardReader
from raydistill.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", progress=False)


def contents(root: Path) -> dict[str, str]:
    files = {str(file.relative_to(root)): file for file in root.rglob("*") if file.is_file()}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def test_the_pixels_are_scikit_learns_values_over_the_whole_range_of_a_byte() -> None:
    pixels, labels = read_digits()
    values, truth = load_digits(return_X_y=True)
    assert (pixels.shape, pixels.dtype, labels.dtype) == ((NUM_DIGITS, 8, 8, 3), np.uint8, np.int64)
    assert (labels == truth).all()
    assert sorted(set(labels.tolist())) == list(range(10))
    for channel in range(3):
        # 16 levels are further apart than rounding, so the values come back
        assert (np.rint(pixels[..., channel] * (16 / 255)).reshape(NUM_DIGITS, 64) == values).all()
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_other_digits_than_the_published_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(DataError, match="the installed scikit-learn holds other digits") as caught:
        read_digits()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_folder_reads_as_coco_with_the_label_as_only_caption(folder: Path, split: str) -> None:
    pixels, labels = read_digits()
    images = read_coco(folder, split)
    assert [image.captions for image in images] == [(str(label),) for label in labels.tolist()]
    for number in (0, 1, 700, NUM_DIGITS - 1):
        with Image.open(images[number].path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (8, 8))
        signed = load_image(images[number].path, 8).permute(1, 2, 0).numpy()
        assert np.allclose(signed, pixels[number] / 127.5 - 1, atol=1e-6)


def test_two_folders_are_equal_and_a_complete_one_is_left_alone(folder: Path, tmp_path: Path) -> None:
    assert contents(write_digits(tmp_path / "again", progress=False)) == contents(folder)
    before = {file: os.stat(file).st_mtime_ns for file in folder.rglob("*")}
    write_digits(folder, progress=False)
    assert {file: os.stat(file).st_mtime_ns for file in folder.rglob("*")} == before


def test_an_interrupted_call_leaves_no_folder_and_the_next_one_a_whole_one(
    folder: Path, tmp_path: Path
) -> None:
    partial = tmp_path / ".digits.partial" / "train"
    partial.mkdir(parents=True)
    (partial / "000000000001.png").write_bytes(b"half a png")
    assert contents(write_digits(tmp_path / "digits", progress=False)) == contents(folder)
    assert not partial.exists()


def test_two_processes_may_write_the_same_folder(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_digits, args=(tmp_path / "d", False)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert contents(tmp_path / "d") == contents(folder)


def test_what_was_changed_or_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep me")
    with pytest.raises(DataError, match="mine exists and was not written by write_digits"):
        write_digits(tmp_path / "mine", progress=False)
    root = write_digits(tmp_path / "d", progress=False)
    captions = root / "annotations" / "captions_val.json"
    original = captions.read_text()
    captions.write_text(original.replace('"caption": "3"', '"caption": "8"'))
    with pytest.raises(DataError, match=r"captions of .* \(val\) were changed"):
        write_digits(root, progress=False)
    captions.write_text(original)
    (root / "train" / "000000000002.png").unlink()
    with pytest.raises(DataError, match="has 1796 images instead of 1797"):
        write_digits(root, progress=False)
    manifest = json.loads((root / "digits.json").read_text()) | {"version": 0}
    (root / "digits.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="holds other digits"):
        write_digits(root, progress=False)


def test_shards_without_an_encoder_give_pixels_and_labels(folder: Path, tmp_path: Path) -> None:
    index = prepare_coco(folder, "train", tmp_path / "shards", image_size=8, progress=False)
    assert (index.image_shape, index.latent_shape, index.text_shapes) == ((3, 8, 8), None, {})
    reader = ShardReader(
        DataConfig(shards=str(tmp_path / "shards"), shuffle_shards=0, num_workers=0),
        purpose="real", seed=0, fields=("image",), batch_size=32, micro_batch_size=32,
    )  # fmt: skip
    batch = next(iter(reader.batch(0)))
    pixels, labels = read_digits()
    assert batch.captions == [str(label) for label in labels[:32].tolist()]
    assert batch.images is not None
    assert np.allclose(batch.images.permute(0, 2, 3, 1).numpy(), pixels[:32] / 127.5 - 1, atol=1e-6)
