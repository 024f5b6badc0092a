"""One shard: samples read, cropped, encoded and written, as a pure function of the source, the plan and its number."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import webdataset

from raydistill.data.entries import Encoder, Picture, Shapes, entries, stored_picture
from raydistill.data.images import UNDECODABLE, first_line
from raydistill.data.shards import ShardInfo
from raydistill.data.sources import Refused, Source
from raydistill.data.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A finished shard: its line in the index, what its samples look like, and the samples it left out."""

    info: ShardInfo
    shapes: Shapes
    rejected: dict[str, int]


@dataclass(frozen=True)
class ShardWriter:
    """What every shard of a data set is written with; sent to worker processes."""

    source: Source
    target: Target
    image_size: int | None
    array_dtype: str
    batch_size: int

    def write(
        self,
        number: int,
        encoder: Encoder | None,
        refused: Callable[[Refused], None] = lambda _: None,
        seen: Callable[[], object] = lambda: None,
    ) -> Shard:
        """Write shard `number` under its name.

        refused: is told of each sample that is left out, and may raise. seen: is called for each sample. Raises
        DataError and OSError.
        """
        name = shard_name(number)
        rejected: Counter[str] = Counter()
        shapes: Shapes = {}
        count, size, digest = 0, 0, ""

        def refuse(what: Refused) -> None:
            rejected[what.reason] += 1
            refused(what)

        def fill(file: BinaryIO) -> None:
            nonlocal count, size, digest
            # fixed times make equal content equal bytes
            with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                for pictures in self._batches(number, refuse, seen):
                    for entry in entries(pictures, encoder, self.array_dtype, shapes):
                        tar.write(entry)
                    count += len(pictures)
            file.flush()
            size, digest = Path(file.name).stat().st_size, sha256_of(Path(file.name))

        self.target.write(name, fill)
        return Shard(ShardInfo(name, count, size, digest), shapes, dict(rejected))

    def _batches(
        self, number: int, refuse: Callable[[Refused], None], seen: Callable[[], object]
    ) -> Iterator[list[Picture]]:
        pictures: list[Picture] = []
        held = 0
        for sample in self.source.read(number):
            held += 1
            if isinstance(sample, Refused):
                refuse(sample)
            else:
                try:
                    pictures.append(stored_picture(sample, self.image_size))
                except UNDECODABLE as error:
                    log.warning("%s: %s", sample.where, first_line(error))
                    refuse(Refused("image_undecodable", sample.where))
            seen()
            if held == self.batch_size:
                if pictures:
                    yield pictures
                pictures, held = [], 0
        if pictures:
            yield pictures


def shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def sha256_of(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
