"""A COCO-format folder becomes webdataset shards, with latents and text embeddings where an encoder is given.

    OUT/shard-000000.tar      per image: KEY.jpg or .png, KEY.json, KEY.latent.npy, KEY.text.npy, ...
    OUT/index.json            counts, hashes, shapes, encoder; written last
    OUT/progress.json         what is known of each finished shard, by which a later run goes on or repairs

A shard is a pure function of the plan (source, settings, encoder) and its number: it is written under a
temporary name and renamed, so a run that is killed goes on with the shard it was at and ends with the same
bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import webdataset
from tqdm import tqdm

from raydistill.data.coco import CocoImage, find_coco, read_captions
from raydistill.data.entries import Encoder, Picture, Shapes, entries, join_shape, stored_picture
from raydistill.data.images import UNDECODABLE, first_line, progress_interval_s
from raydistill.data.shards import INDEX_NAME, SCHEMA_VERSION, ShardIndex, ShardInfo
from raydistill.data.storage import is_remote
from raydistill.errors import DataError

__all__ = ["Encoder", "prepare_coco"]

log = logging.getLogger(__name__)

_PROGRESS_NAME = "progress.json"


@dataclass(frozen=True)
class _Shard:
    """A finished shard: its line in the index, what its samples look like, and the images it left out."""

    info: ShardInfo
    shapes: Shapes
    rejected: dict[str, int]


def prepare_coco(
    coco_root: str | Path,
    split: str,
    out: str | Path,
    samples_per_shard: int = 1000,
    encoder: Encoder | None = None,
    image_size: int | None = None,
    progress: bool = True,
    *,
    limit: int | None = None,
    array_dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    max_rejected_share: float = 0.0,
) -> ShardIndex:
    """Write the shards of a COCO split into the folder `out` and return their index.

    Calling it again goes on where it stopped: shards whose size and hash are right are kept, others are
    written anew. Several processes may call it at once: one writes, the others wait.

    image_size: edge of the square that images are cropped and resized to; None stores them as they are. Files
    that have the size already are stored byte for byte, others as PNG. limit: the first images only.
    array_dtype: of latents and embeddings. batch_size: images encoded at once. max_rejected_share: share of
    images that may be left out because they have no caption, no file or no decodable content.

    Raises DataError for bad input, naming the first image, and for an `out` that holds other shards.
    """
    if is_remote(str(out)):
        raise DataError(f"shards are written to a local folder and uploaded from there, not to {out}")
    for name, value in (
        ("samples-per-shard", samples_per_shard),
        ("image-size", image_size),
        ("limit", limit),
        ("batch-size", batch_size),
    ):
        if value is not None and value < 1:
            raise DataError(f"--{name} {value} must be at least 1")
    files = find_coco(coco_root, split)
    images = read_captions(files)[:limit]
    plan = {
        "source": "coco",
        "split": files.split,
        "annotations_sha256": files.sha256(),
        "images": len(images),
        "samples_per_shard": samples_per_shard,
        "image_size": image_size,
        "encoder": None if encoder is None else encoder.fingerprint,
        "array_dtype": array_dtype,
    }
    out = Path(out).absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _Writer(out, plan, images, encoder, batch_size, max_rejected_share).run(progress)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"can't write shards to {out}: {reason} (--out, or data.shards)") from error


class _Writer:
    """One call of `prepare_coco`, holding the folder's lock."""

    def __init__(
        self,
        out: Path,
        plan: dict[str, Any],
        images: list[CocoImage],
        encoder: Encoder | None,
        batch_size: int,
        max_rejected_share: float,
    ):
        self.out = out
        self.plan = plan
        self.images = images
        self.encoder = encoder
        self.batch_size = batch_size
        self.max_rejected_share = max_rejected_share
        self._files: dict[Path, set[str]] = {}
        self._rejected: Counter[str] = Counter()

    def run(self, progress: bool) -> ShardIndex:
        ready = {number: shard for number, shard in self._finished().items() if self._is_intact(shard)}
        self._check_images()
        size = self.plan["samples_per_shard"]
        starts = range(0, len(self.images), size)
        complete = len(ready) == len(starts) and (self.out / INDEX_NAME).exists()
        if not complete:
            # from here on, until it is written again, the folder is no data set
            (self.out / INDEX_NAME).unlink(missing_ok=True)
        self._rejected = sum((Counter(shard.rejected) for shard in ready.values()), Counter())
        with tqdm(
            total=len(self.images),
            desc="shards",
            unit="img",
            disable=not progress,
            mininterval=progress_interval_s(),
        ) as bar:
            for number, start in enumerate(starts):
                images = self.images[start : start + size]
                if number in ready:
                    bar.update(len(images))
                    continue
                ready[number] = self._write_shard(f"shard-{number:06d}.tar", images, bar)
                self._save(_PROGRESS_NAME, self._progress(ready))
        index = self._index([ready[number] for number in sorted(ready)])
        if not complete:
            self._save(INDEX_NAME, index.to_json())
        return index

    def _progress(self, ready: dict[int, _Shard]) -> bytes:
        shards = {number: asdict(ready[number]) for number in sorted(ready)}
        return json.dumps({"schema": SCHEMA_VERSION, "plan": self.plan, "shards": shards}, indent=1).encode()

    def _finished(self) -> dict[int, _Shard]:
        """What earlier runs of the same plan have written. Raises DataError for the work of another plan."""
        file = self.out / _PROGRESS_NAME
        if not file.exists():
            others = [name for name in os.listdir(self.out) if name.endswith(".tar") or name == INDEX_NAME]
            # a run that is killed after its first shard leaves just that one without a line about it
            if others not in ([], ["shard-000000.tar"]):
                raise DataError(
                    f"{self.out} holds {min(others)}, which this command did not write: choose another folder "
                    "(--out, or data.shards), or train on it as it is (prepare.coco=none)"
                )
            return {}
        try:
            content = json.loads(file.read_bytes())
            found = {"schema": content["schema"], **content["plan"]}
            shards = {
                int(number): _Shard(ShardInfo(**shard["info"]), shard["shapes"], shard["rejected"])
                for number, shard in content["shards"].items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is damaged ({first_line(error)}): remove {self.out}") from error
        wanted = {"schema": SCHEMA_VERSION, **self.plan}
        changes = [
            f"{name} {_short(found.get(name))}, not {_short(wanted.get(name))}"
            for name in wanted | found
            if wanted.get(name) != found.get(name)
        ]
        if changes:
            raise DataError(
                f"{self.out} holds shards of {'; '.join(changes)}: choose another folder (--out, or data.shards), "
                "train on it as it is (prepare.coco=none), or remove it"
            )
        return shards

    def _is_intact(self, shard: _Shard) -> bool:
        file = self.out / shard.info.name
        if not file.is_file() or file.stat().st_size != shard.info.bytes:
            return False
        return _sha256(file) == shard.info.sha256

    def _check_images(self) -> None:
        """Finds what can't be used whatever its pixels are, before hours are spent on the rest."""
        missing: Counter[str] = Counter()
        for image in self.images:
            reason = self._unusable(image)
            if reason:
                missing[reason] += 1
                self._check_share(missing, image, reason)

    def _unusable(self, image: CocoImage) -> str | None:
        if not image.captions:
            return "caption_missing"
        folder = image.path.parent
        if folder not in self._files:
            self._files[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        return None if image.path.name in self._files[folder] else "image_missing"

    def _check_share(self, rejected: Counter[str], image: CocoImage, reason: str) -> None:
        count = sum(rejected.values())
        if count > self.max_rejected_share * len(self.images):
            raise DataError(
                f"image id {image.id} ({image.path}) can't be used: {reason.replace('_', ' ')}; "
                f"{count} of {len(self.images)} images so far, --max-rejected-share (or prepare.max_rejected_share) "
                f"allows {self.max_rejected_share:g}"
            )

    def _write_shard(self, name: str, images: Sequence[CocoImage], bar: tqdm) -> _Shard:
        partial = self.out / f".{name}.partial"
        rejected: Counter[str] = Counter()
        shapes: Shapes = {}
        count = 0
        try:
            with open(partial, "wb") as file:
                # fixed times make equal content equal bytes
                with webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                    for pictures in self._batches(images, rejected, bar):
                        for entry in entries(pictures, self.encoder, self.plan["array_dtype"], shapes):
                            tar.write(entry)
                        count += len(pictures)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        info = ShardInfo(name, count, partial.stat().st_size, _sha256(partial))
        os.replace(partial, self.out / name)
        return _Shard(info, shapes, dict(rejected))

    def _batches(
        self, images: Sequence[CocoImage], rejected: Counter[str], bar: tqdm
    ) -> Iterator[list[Picture]]:
        for start in range(0, len(images), self.batch_size):
            pictures = []
            for image in images[start : start + self.batch_size]:
                reason = self._unusable(image)
                if reason is None:
                    try:
                        pictures.append(stored_picture(image, self.plan["image_size"]))
                    except UNDECODABLE as error:
                        reason = "image_undecodable"
                        log.warning("image id %d (%s): %s", image.id, image.path, first_line(error))
                if reason is not None:
                    rejected[reason] += 1
                    self._rejected[reason] += 1
                    self._check_share(self._rejected, image, reason)
                bar.update()
            if pictures:
                yield pictures

    def _index(self, shards: list[_Shard]) -> ShardIndex:
        shapes: Shapes = {}
        for shard in shards:
            for name, shape in shard.shapes.items():
                join_shape(shapes, name, shape)
        if not any(shard.info.samples for shard in shards):
            raise DataError(f"no image of {self.plan['split']} can be used: {dict(self._rejected)}")
        known = {name: tuple(shape) for name, shape in shapes.items() if shape is not None}
        return ShardIndex(
            shards=tuple(shard.info for shard in shards),
            image_shape=known.pop("image", None),
            latent_shape=known.pop("latent", None),
            text_shapes=known,
            array_dtype=self.plan["array_dtype"],
            encoder=self.plan["encoder"],
            rejected=dict(self._rejected),
            plan=self.plan,
        )

    def _save(self, name: str, data: bytes) -> None:
        partial = self.out / f".{name}.partial"
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.out / name)


def _sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
