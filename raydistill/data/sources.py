"""What shards are made from: samples shard by shard, each a caption or several, with an image or without.

    CocoSource        a COCO-format folder: shard n holds images n * size ... in the order of their ids
    PromptSource      (prompts.py) a list of prompts, one a line, without images
    PairSource        (pairs.py) image-text shards as img2dataset writes them for LAION: one shard for each of theirs

A source is sent to worker processes, so it holds names and places, not contents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raydistill.data.coco import CocoImage, find_coco, read_captions


@dataclass(frozen=True)
class Sample:
    """One sample on its way into a shard."""

    key: str
    captions: tuple[str, ...]
    about: Mapping[str, Any]
    """Goes into the sample's JSON beside the captions."""
    where: str
    """As messages call it."""
    image: bytes | None = None
    """The image's file; None: the sample has none."""


@dataclass(frozen=True)
class Refused:
    """A sample that can't be used."""

    reason: str
    """The name it is counted under."""
    where: str


class Source(Protocol):
    """Samples by shard; `read` may be called in any process, and again."""

    @property
    def plan(self) -> dict[str, Any]:
        """What the shards are a function of, by content, beside how they are written."""

    @property
    def sizes(self) -> Sequence[int]:
        """Samples of each shard, refused ones included, as far as known before they are read."""

    def read(self, shard: int) -> Iterator[Sample | Refused]:
        """A shard's samples in order. Raises DataError."""

    def refused(self) -> Iterator[Refused]:
        """What is known to be unusable before anything is read."""


class CocoSource:
    """A split of a COCO-format folder."""

    def __init__(self, root: str | Path, split: str, samples_per_shard: int, limit: int | None = None):
        """Raises DataError as `find_coco` and `read_captions` do."""
        files = find_coco(root, split)
        self._images = read_captions(files)[:limit]
        self._size = samples_per_shard
        self.plan: dict[str, Any] = {
            "source": "coco",
            "split": files.split,
            "annotations_sha256": files.sha256(),
            "images": len(self._images),
            "samples_per_shard": samples_per_shard,
        }

    @property
    def sizes(self) -> Sequence[int]:
        starts = range(0, len(self._images), self._size)
        return [min(self._size, len(self._images) - start) for start in starts]

    def read(self, shard: int) -> Iterator[Sample | Refused]:
        for image in self._images[shard * self._size : (shard + 1) * self._size]:
            where = _where(image)
            if not image.captions:
                yield Refused("caption_missing", where)
                continue
            try:
                data = image.path.read_bytes()
            except FileNotFoundError:
                yield Refused("image_missing", where)
                continue
            about = {"image_id": image.id, "file_name": image.path.name}
            yield Sample(f"{image.id:012d}", image.captions, about, where, data)

    def refused(self) -> Iterator[Refused]:
        listed: dict[Path, set[str]] = {}
        for image in self._images:
            if not image.captions:
                yield Refused("caption_missing", _where(image))
                continue
            folder = image.path.parent
            if folder not in listed:
                listed[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
            if image.path.name not in listed[folder]:
                yield Refused("image_missing", _where(image))


def _where(image: CocoImage) -> str:
    return f"image id {image.id} ({image.path})"
