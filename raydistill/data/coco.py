"""Which images and captions does a COCO-format folder hold?

    ROOT/annotations/captions_SPLIT.json    {"images": [{"id", "file_name"}],
                                             "annotations": [{"id", "image_id", "caption"}]}
    ROOT/SPLIT/FILE_NAME                    or ROOT/images/SPLIT/FILE_NAME

SPLIT may be given without COCO's year: `train` finds train2014 or train2017 where only one is there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from raydistill.data.images import first_line
from raydistill.errors import DataError

log = logging.getLogger(__name__)

_YEARS = ("", "2014", "2017")
_LOOKED_FOR = 20


@dataclass(frozen=True)
class CocoImage:
    """One image and its captions; `captions` is empty where the annotations have none for it."""

    id: int
    path: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class CocoFiles:
    """Where one split lies; `split` is its full name (train2014)."""

    split: str
    annotations: Path
    images: Path

    def sha256(self) -> str:
        """Hash of the annotation file."""
        with open(self.annotations, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def find_coco(root: str | Path, split: str) -> CocoFiles:
    """The files of a split. Raises DataError naming what is missing and which splits are there."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"COCO folder {root} is not there")
    names = [split + year for year in _YEARS]
    there = [name for name in names if (root / "annotations" / f"captions_{name}.json").is_file()]
    if not there:
        files = (root / "annotations").glob("captions_*.json")
        splits = sorted(file.stem.removeprefix("captions_") for file in files)
        raise DataError(
            f"COCO folder {root} has no annotations/captions_{split}.json; "
            f"splits with captions there: {', '.join(splits) or 'none'}"
        )
    if split not in there and len(there) > 1:
        raise DataError(f"split {split!r} of {root} may be any of {', '.join(there)}: name one of them")
    name = there[0]
    folders = [root / name, root / "images" / name]
    for folder in folders:
        if folder.is_dir():
            return CocoFiles(name, root / "annotations" / f"captions_{name}.json", folder)
    raise DataError(
        f"the images of split {name!r} are not there: neither {folders[0]} nor {folders[1]} is a folder"
    )


def read_coco(root: str | Path, split: str) -> list[CocoImage]:
    """Images of a split in the order of their ids, each with its captions in the order of theirs.

    Raises DataError where the annotations are not COCO captions or contradict themselves. Image files are not
    opened, and images without a caption are returned as they are.
    """
    return read_captions(find_coco(root, split))


def read_captions(files: CocoFiles) -> list[CocoImage]:
    """`read_coco` for files that are found already."""
    source = files.annotations
    try:
        data = json.loads(source.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{source} is not JSON: {first_line(error)}") from error
    if not isinstance(data, dict) or not all(
        isinstance(data.get(k), list) for k in ("images", "annotations")
    ):
        raise DataError(
            f"{source} is not a COCO captions file: it needs the lists `images` and `annotations`"
        )
    paths = _paths(files, data["images"])
    if not paths:
        raise DataError(f"{source} lists no images")
    captions: dict[int, list[tuple[int, str]]] = {image_id: [] for image_id in paths}
    empty = 0
    for number, annotation in enumerate(data["annotations"]):
        try:
            image_id, caption = int(annotation["image_id"]), annotation["caption"].strip()
            place = int(annotation.get("id", number))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{source}: annotation {number} has no integer image_id and `caption`") from None
        if image_id not in captions:
            raise DataError(
                f"{source}: a caption belongs to image id {image_id}, which `images` does not list"
            )
        if caption:
            captions[image_id].append((place, caption))
        else:
            empty += 1
    _require_same_year(files, paths)
    if empty:
        log.warning("%s: %d captions are empty and were left out", source, empty)
    return [
        CocoImage(image_id, path, tuple(caption for _, caption in sorted(captions[image_id])))
        for image_id, path in sorted(paths.items())
    ]


def _require_same_year(files: CocoFiles, paths: dict[int, Path]) -> None:
    """Raise DataError if the images that lie there are others than those that the captions are of."""
    some = [path for _, path in sorted(paths.items())[:_LOOKED_FOR]]
    if any(path.is_file() for path in some):
        return
    others = next((entry.name for entry in os.scandir(files.images) if entry.is_file()), None)
    if others is not None:
        raise DataError(
            f"{files.annotations} lists {some[0].name}, but {files.images} holds none of its first {len(some)} images "
            f"(there is {others}): captions and images are of different COCO years or splits; see --split "
            "(prepare.split)"
        )


def _paths(files: CocoFiles, images: Iterable[Any]) -> dict[int, Path]:
    paths: dict[int, Path] = {}
    for number, image in enumerate(images):
        try:
            image_id, name = int(image["id"]), PurePosixPath(image["file_name"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{files.annotations}: image {number} has no integer id and file_name") from None
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{files.annotations}: file_name {str(name)!r} leaves the image folder")
        if image_id in paths:
            raise DataError(f"{files.annotations}: image id {image_id} is listed twice")
        paths[image_id] = files.images / name
    return paths
