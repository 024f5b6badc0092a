"""The drawn data set: deterministic, COCO-shaped, and captions say exactly what the pixels show."""

import hashlib
import json
import multiprocessing
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydistill.data.scenes import (
    BACKGROUNDS,
    CAPTIONS_PER_IMAGE,
    RGB,
    SIZES,
    draw,
    draw_jpeg,
    scene,
    write_scenes,
)
from raydistill.errors import DataError
from raydistill.eval.features import COLOURS, SHAPES, load_scene_net

NUM = 300


def named_pairs(caption: str) -> set[tuple[str, str]]:
    return set(re.findall(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", caption))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", num_train=40, num_val=20, progress=False)


def contents(root: Path) -> dict[str, str]:
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in root.rglob("*")
        if f.is_file()
    }


def test_a_scene_is_a_pure_function_of_seed_split_and_index() -> None:
    assert [draw_jpeg(scene(3, "val", i)) for i in (5, 2)] == [draw_jpeg(scene(3, "val", i)) for i in (5, 2)]
    assert scene(3, "val", 5) != scene(4, "val", 5)
    assert scene(3, "val", 5) != scene(3, "train", 5)


def test_pixels_of_the_first_scenes_are_the_published_ones() -> None:
    # Pixels rather than JPEG bytes: these depend on the libjpeg that Pillow was built with.
    pixels = b"".join(draw(scene(0, "train", i)).tobytes() for i in range(64))
    assert (
        hashlib.sha256(pixels).hexdigest()
        == "92747d71d6608d401434577c138949243880263aea2ccb567581b2915579b2f3"
    )


def test_two_folders_of_one_seed_are_equal_and_another_seed_differs(folder: Path, tmp_path: Path) -> None:
    again = write_scenes(tmp_path / "again", num_train=40, num_val=20, progress=False)
    other = write_scenes(tmp_path / "other", num_train=40, num_val=20, seed=1, progress=False)
    assert contents(again) == contents(folder)
    assert contents(other)["train/000000000001.jpg"] != contents(folder)["train/000000000001.jpg"]


def test_every_caption_names_exactly_the_objects_of_its_scene() -> None:
    for i in range(NUM):
        content = scene(0, "train", i)
        assert len(content.captions) == CAPTIONS_PER_IMAGE
        assert len(set(content.captions)) == CAPTIONS_PER_IMAGE, content.captions
        for caption in content.captions:
            assert named_pairs(caption) == {(o.colour, o.shape) for o in content.objects}, caption


def test_sizes_positions_relations_and_backgrounds_in_captions_are_true() -> None:
    seen = set()
    for i in range(NUM):
        content = scene(0, "train", i)
        by_name = {(o.colour, o.shape): o for o in content.objects}
        for caption in content.captions:
            for size, colour, shape in re.findall(r"\b(small|large) (\w+) (\w+)", caption):
                assert by_name[colour, shape].size == size
                assert abs(by_name[colour, shape].diameter - SIZES[size]) <= 0.5
            for background in re.findall(r"on a (\w+) background", caption):
                assert abs(content.background_level - BACKGROUNDS[background]) <= 6
                seen.add(background)
            place = re.search(r" (?:at|in) the (.+)$", caption)
            if place:
                thing = content.objects[0]
                row = ("top", "middle", "bottom")[round((thing.y - 9) / 7)]
                column = ("left", "center", "right")[round((thing.x - 9) / 7)]
                words = [w for w in (row, column) if w not in ("middle", "center")] or ["center"]
                assert place.group(1) == " ".join(words), (caption, thing)
                seen.add(place.group(1))
            relation = re.search(
                r"(\w+) (\w+) (left of|right of|above|below) an? (?:small |large )?(\w+) (\w+)", caption
            )
            if relation:
                a, b = by_name[relation.group(1, 2)], by_name[relation.group(4, 5)]
                holds = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}
                assert holds[relation.group(3)]
                seen.add(relation.group(3))
    assert seen >= {
        "left of",
        "right of",
        "above",
        "below",
        "dark",
        "gray",
        "center",
        "top left",
        "bottom right",
    }


def test_shapes_lie_inside_the_image_and_do_not_touch() -> None:
    for i in range(3000):
        things = scene(0, "train", i).objects
        for thing in things:
            assert 9 <= thing.diameter <= 15
            assert min(thing.x, thing.y) >= thing.diameter / 2
            assert max(thing.x, thing.y) <= 32 - thing.diameter / 2
        if len(things) == 2:
            a, b = things
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.diameter + b.diameter) / 2


def test_the_named_colours_are_the_colours_of_the_pixels(folder: Path) -> None:
    table = json.loads((folder / "annotations" / "captions_train.json").read_text())
    captions = {a["image_id"]: a["caption"] for a in table["annotations"]}
    palette = np.array(
        [RGB[c] for c in COLOURS] + [(level,) * 3 for level in BACKGROUNDS.values()], dtype=float
    )
    for entry in table["images"]:
        pixels = np.asarray(Image.open(folder / "train" / entry["file_name"])).reshape(-1, 3).astype(float)
        distance = ((pixels[:, None] - palette) ** 2).sum(-1) ** 0.5
        sure = distance.argmin(1)[distance.min(1) < 25]  # edges are mixtures and belong to no colour
        shown = {COLOURS[c] for c in range(len(COLOURS)) if (sure == c).sum() >= 12}
        assert shown == {colour for colour, _ in named_pairs(captions[entry["id"]])}


def test_scene_net_sees_the_named_objects_and_no_others(folder: Path) -> None:
    net = load_scene_net()
    table = json.loads((folder / "annotations" / "captions_val.json").read_text())
    captions = {a["image_id"]: a["caption"] for a in table["annotations"]}
    right = 0
    for entry in table["images"]:
        pixels = torch.from_numpy(np.array(Image.open(folder / "val" / entry["file_name"]))).permute(2, 0, 1)[
            None
        ]
        found = {(COLOURS[c], SHAPES[s]) for c, s in (net.objects(pixels)[0] > 0).nonzero().tolist()}
        right += found == named_pairs(captions[entry["id"]])
    assert right >= 19


def test_the_folder_has_cocos_layout_and_schema(folder: Path) -> None:
    for split, count in (("train", 40), ("val", 20)):
        table = json.loads((folder / "annotations" / f"captions_{split}.json").read_text())
        assert {"info", "images", "annotations"} <= table.keys()
        assert len(table["images"]) == count
        assert len(list((folder / split).iterdir())) == count
        assert len({a["id"] for a in table["annotations"]}) == CAPTIONS_PER_IMAGE * count
        assert {a["image_id"] for a in table["annotations"]} == {e["id"] for e in table["images"]}
        for entry in table["images"]:
            with Image.open(folder / split / entry["file_name"]) as image:
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert image.size == (entry["width"], entry["height"]) == (32, 32)


def test_every_colour_shape_and_size_occurs_about_equally_often() -> None:
    things = [o for i in range(4000) for o in scene(0, "train", i).objects]
    for options, of in ((COLOURS, "colour"), (SHAPES, "shape"), (tuple(SIZES), "size")):
        shares = [sum(getattr(o, of) == option for o in things) / len(things) for option in options]
        assert max(shares) < 1.2 / len(options)
        assert min(shares) > 0.8 / len(options)


def test_a_complete_folder_is_not_drawn_again(folder: Path) -> None:
    before = {f: os.stat(f).st_mtime_ns for f in folder.rglob("*")}
    write_scenes(folder, num_train=40, num_val=20, progress=False)
    assert {f: os.stat(f).st_mtime_ns for f in folder.rglob("*")} == before


def test_an_interrupted_call_is_continued(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "scenes"
    partial = tmp_path / ".scenes.partial"
    (partial / "train").mkdir(parents=True)
    (partial / "scenes.json").write_text(
        json.dumps({"version": 1, "seed": 0, "num_train": 40, "num_val": 20})
    )
    kept = partial / "train" / "000000000003.jpg"
    kept.write_bytes((folder / "train" / kept.name).read_bytes())
    (partial / "train" / "000000000004.jpg.tmp").write_bytes(b"half a jpeg")
    drawn_at = os.stat(kept).st_mtime_ns
    write_scenes(root, num_train=40, num_val=20, progress=False)
    assert os.stat(root / "train" / kept.name).st_mtime_ns == drawn_at
    assert contents(root) == contents(folder)
    assert not partial.exists()


def test_two_processes_may_write_the_same_folder(folder: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=write_scenes, args=(tmp_path / "s", 40, 20, 0, False)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert contents(tmp_path / "s") == contents(folder)


def test_a_folder_with_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep me")
    with pytest.raises(DataError, match="mine exists and was not written by write_scenes"):
        write_scenes(tmp_path / "mine", progress=False)
    with pytest.raises(DataError, match="holds other scenes"):
        write_scenes(folder, num_train=41, num_val=20, progress=False)


def test_missing_images_and_changed_captions_are_noticed(tmp_path: Path) -> None:
    root = write_scenes(tmp_path / "s", num_train=3, num_val=2, progress=False)
    captions = root / "annotations" / "captions_val.json"
    original = captions.read_text()
    captions.write_text(original.replace("square", "hexagon").replace("ring", "hexagon") + " ")
    with pytest.raises(DataError, match=r"captions of .* were changed"):
        write_scenes(root, num_train=3, num_val=2, progress=False)
    captions.write_text(original)
    (root / "train" / "000000000002.jpg").unlink()
    with pytest.raises(DataError, match="has 2 images, its manifest says 3"):
        write_scenes(root, num_train=3, num_val=2, progress=False)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown split 'test'; the scenes have train, val"):
        scene(0, "test", 0)
    with pytest.raises(DataError, match="at least one image per split, got train 0"):
        write_scenes(tmp_path / "s", num_train=0, progress=False)
