"""COCO-format folders: every layout in use is read, and what is wrong with one is said."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydistill.data.coco import read_coco
from raydistill.data.images import load_image
from raydistill.data.scenes import scene
from raydistill.errors import DataError
from tests.data.samples_on_disk import write_coco

IMAGES = {"a.jpg": (12, 12), "b.png": (20, 10)}
CAPTIONS = {1: ["one", " two\n"], 2: ["three"]}


def test_drawn_scenes_are_read_with_their_captions_in_order(scenes: Path) -> None:
    images = read_coco(scenes, "train")
    assert [image.id for image in images] == list(range(1, 51))
    assert all(image.path.is_file() for image in images)
    assert images[7].captions == scene(0, "train", 7).captions


@pytest.mark.parametrize("year", ["2014", "2017", ""])
@pytest.mark.parametrize("folder", ["train{}", "images/train{}"])
def test_cocos_own_layouts_are_found_without_their_year(tmp_path: Path, year: str, folder: str) -> None:
    root = write_coco(tmp_path, f"train{year}", IMAGES, CAPTIONS, folder.format(year))
    images = read_coco(root, "train")
    assert [(image.path.name, image.captions) for image in images] == [
        ("a.jpg", ("one", "two")),
        ("b.png", ("three",)),
    ]
    assert images == read_coco(root, f"train{year}")


def test_images_come_in_the_order_of_their_ids_whatever_the_file_says(tmp_path: Path) -> None:
    root = write_coco(tmp_path, "train", IMAGES, CAPTIONS)
    file = root / "annotations" / "captions_train.json"
    content = json.loads(file.read_text())
    shuffled = {name: entries[::-1] for name, entries in content.items()}
    in_order = read_coco(root, "train")
    file.write_text(json.dumps(shuffled))
    assert read_coco(root, "train") == in_order


def test_a_split_that_may_be_two_years_has_to_be_named(tmp_path: Path) -> None:
    for year in ("2014", "2017"):
        write_coco(tmp_path, f"val{year}", IMAGES, CAPTIONS)
    with pytest.raises(DataError, match="any of val2014, val2017"):
        read_coco(tmp_path, "val")
    assert len(read_coco(tmp_path, "val2017")) == 2


def test_empty_captions_are_left_out_and_counted_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_coco(tmp_path, "train", IMAGES, {1: ["one", "  "], 2: [""]})
    assert [image.captions for image in read_coco(root, "train")] == [("one",), ()]
    assert "2 captions are empty" in caplog.text


def test_a_folder_that_lacks_something_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not there"):
        read_coco(tmp_path / "nowhere", "train")
    root = write_coco(tmp_path, "val2017", IMAGES, CAPTIONS)
    with pytest.raises(DataError, match=r"no annotations/captions_train\.json; splits .* there: val2017"):
        read_coco(root, "train")
    (root / "val2017").rename(root / "pictures")
    with pytest.raises(DataError, match=r"images of split 'val2017' are not there: neither .*images/val2017"):
        read_coco(root, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"images": []}', "needs the lists `images` and `annotations`"),
        ('{"images": [], "annotations": []}', "lists no images"),
        ('{"images": [{"id": 1}], "annotations": []}', "image 0 has no integer id and file_name"),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
            "image id 1 is listed twice",
        ),
        ('{"images": [{"id": 1, "file_name": "../a"}], "annotations": []}', "leaves the image folder"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "caption": "x"}]}',
            "belongs to image id 2, which `images` does not list",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}',
            "annotation 0 has no integer image_id and `caption`",
        ),
    ],
)
def test_annotations_that_are_no_coco_captions_are_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    write_coco(tmp_path, "train", IMAGES, CAPTIONS)
    (tmp_path / "annotations" / "captions_train.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_coco(tmp_path, "train")


def test_images_are_cropped_to_the_middle_and_scaled_to_one(tmp_path: Path) -> None:
    thirds = np.repeat(np.array([0, 51, 255], np.uint8), 10)
    Image.fromarray(np.tile(thirds, (10, 1))).save(tmp_path / "wide.png")
    image = load_image(tmp_path / "wide.png", 5)
    assert image.shape == (3, 5, 5)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, torch.full((3, 5, 5), 51 / 127.5 - 1))


def test_an_image_that_is_cut_off_is_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path, "train", IMAGES, CAPTIONS)
    path = read_coco(root, "train")[0].path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.jpg can't be read: "):
        load_image(path, 8)
