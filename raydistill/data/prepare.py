"""Captioned images or prompts become webdataset shards, with latents and embeddings where an encoder is given.

    OUT/shard-000000.tar      per sample: KEY.jpg or .png, KEY.json, KEY.latent.npy, KEY.text.npy, ...
    OUT/index.json            counts, hashes, shapes, encoder; written last
    OUT/progress.json         what is known of each finished shard, by which a later run goes on or repairs

A shard is a pure function of the plan (source, settings, encoder) and its number, and is there as a whole or not at
all. So a run that is killed goes on with the shards that are missing and ends with the same bytes, and worker processes
can write them in any order. OUT may be a folder of an object store.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from raydistill.data.entries import Encoder, Shapes, join_shape
from raydistill.data.images import first_line, progress_interval_s
from raydistill.data.shard_writer import Shard, ShardWriter, sha256_of
from raydistill.data.shards import INDEX_NAME, SCHEMA_VERSION, ShardIndex, ShardInfo
from raydistill.data.sources import CocoSource, Refused, Source
from raydistill.data.target import LocalTarget, RemoteTarget, Target
from raydistill.errors import DataError
from raydistill.object_store import is_remote

__all__ = ["Elsewhere", "Encoder", "prepare", "prepare_coco"]

log = logging.getLogger(__name__)

_PROGRESS_NAME = "progress.json"

Elsewhere = Callable[[ShardWriter, Sequence[int]], Iterable[tuple[int, Shard]]]
"""Writes shards of these numbers in other processes, with an encoder of their own; gives each when it is there."""


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
    **settings: Any,
) -> ShardIndex:
    """`prepare` for a split of a COCO-format folder; limit: the first images only."""
    _require_positive({"samples-per-shard": samples_per_shard, "limit": limit})
    source = CocoSource(coco_root, split, samples_per_shard, limit)
    return prepare(source, out, encoder=encoder, image_size=image_size, progress=progress, **settings)


def prepare(
    source: Source,
    out: str | Path,
    *,
    encoder: Encoder | None = None,
    elsewhere: Elsewhere | None = None,
    image_size: int | None = None,
    progress: bool = True,
    array_dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 64,
    max_rejected_share: float = 0.0,
    endpoint_url: str | None = None,
) -> ShardIndex:
    """Write a source's shards into the folder `out`, local or a URL, and return their index.

    Calling it again goes on where it stopped: shards whose size and hash are right are kept (of a URL's only the size
    is looked at), others are written anew. Several processes may call it at once for a local folder: one writes, the
    others wait.

    image_size: edge of the square that images are cropped and resized to; None stores them as they are. Files
    that have the size already are stored byte for byte, others as PNG. elsewhere: writes the shards instead of this
    process, with encoders like this one. array_dtype: of latents and embeddings. batch_size: samples encoded at
    once. max_rejected_share: share of samples that may be left out because they have no caption, no file or no
    decodable content. endpoint_url: of an S3 service other than AWS.

    Raises DataError for bad input, naming the first sample, and for an `out` that holds other shards.
    """
    _require_positive({"image-size": image_size, "batch-size": batch_size})
    if not 0 <= max_rejected_share < 1:
        raise DataError(
            f"--max-rejected-share (or prepare.max_rejected_share) {max_rejected_share} must be in [0, 1)"
        )
    target: Target = RemoteTarget(str(out), endpoint_url) if is_remote(str(out)) else LocalTarget(out)
    plan = source.plan | {
        "image_size": image_size,
        "encoder": None if encoder is None else encoder.fingerprint,
        "array_dtype": array_dtype,
    }
    writer = ShardWriter(source, target, image_size, array_dtype, batch_size)
    try:
        with _locked(target):
            return _Preparation(writer, plan, max_rejected_share, encoder, elsewhere).run(progress)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"can't write shards to {target.root}: {reason} (--out, or data.shards)") from error


def _require_positive(values: dict[str, int | None]) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise DataError(f"--{name} {value} must be at least 1")


@contextmanager
def _locked(target: Target) -> Iterator[None]:
    if not isinstance(target, LocalTarget):
        yield
        return
    Path(target.root).mkdir(parents=True, exist_ok=True)
    with open(Path(target.root, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Preparation:
    """One call of `prepare`, holding the folder's lock."""

    def __init__(
        self,
        writer: ShardWriter,
        plan: dict[str, Any],
        max_rejected_share: float,
        encoder: Encoder | None,
        elsewhere: Elsewhere | None,
    ):
        self.writer = writer
        self.target = writer.target
        self.plan = plan
        self.max_rejected_share = max_rejected_share
        self.encoder = encoder
        self.elsewhere = elsewhere
        self._rejected: Counter[str] = Counter()

    def run(self, progress: bool) -> ShardIndex:
        files = self.target.sizes()
        ready = {n: shard for n, shard in self._finished(files).items() if self._is_intact(shard, files)}
        self._check_known()
        sizes = self.writer.source.sizes
        missing = [number for number in range(len(sizes)) if number not in ready]
        complete = not missing and INDEX_NAME in files
        if not complete:
            # from here on, until it is written again, the folder is no data set
            self.target.remove(INDEX_NAME)
            self._save(_PROGRESS_NAME, self._progress(ready))
        self._rejected = sum((Counter(shard.rejected) for shard in ready.values()), Counter())
        with tqdm(
            total=sum(sizes) or None,
            desc="shards",
            unit="img",
            disable=not progress,
            mininterval=progress_interval_s(),
        ) as bar:
            bar.update(sum(_seen(shard) for shard in ready.values()))
            for number, shard in self._shards(missing, bar):
                ready[number] = shard
                self._save(_PROGRESS_NAME, self._progress(ready))
                if not self.plan["images"]:
                    self._check_share(
                        sum(map(_seen, ready.values())), f"{shard.info.name} and those before it"
                    )
        index = self._index([ready[number] for number in sorted(ready)])
        if not complete:
            self._save(INDEX_NAME, index.to_json())
        return index

    def _shards(self, numbers: Sequence[int], bar: tqdm) -> Iterator[tuple[int, Shard]]:
        if self.elsewhere is None:
            for number in numbers:
                yield number, self.writer.write(number, self.encoder, self._refuse, bar.update)
            return
        for number, shard in self.elsewhere(self.writer, numbers):
            bar.update(_seen(shard))
            self._rejected += Counter(shard.rejected)
            self._check_share(self.plan["images"], shard.info.name)
            yield number, shard

    def _progress(self, ready: dict[int, Shard]) -> bytes:
        shards = {number: asdict(ready[number]) for number in sorted(ready)}
        return json.dumps({"schema": SCHEMA_VERSION, "plan": self.plan, "shards": shards}, indent=1).encode()

    def _finished(self, files: dict[str, int]) -> dict[int, Shard]:
        """What earlier runs of the same plan have written. Raises DataError for the work of another plan."""
        root = self.target.root
        if _PROGRESS_NAME not in files:
            others = [name for name in files if name.endswith(".tar") or name == INDEX_NAME]
            if others:
                raise DataError(
                    f"{root} holds {min(others)}, which this command did not write: choose another folder "
                    "(--out, or data.shards), or train on it as it is (prepare.coco=none)"
                )
            return {}
        try:
            content = json.loads(self.target.read(_PROGRESS_NAME))
            found = {"schema": content["schema"], **content["plan"]}
            shards = {
                int(number): Shard(ShardInfo(**shard["info"]), shard["shapes"], shard["rejected"])
                for number, shard in content["shards"].items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{root}/{_PROGRESS_NAME} is damaged ({first_line(error)}): remove {root}"
            ) from error
        wanted = {"schema": SCHEMA_VERSION, **self.plan}
        changes = [
            f"{name} {_short(found.get(name))}, not {_short(wanted.get(name))}"
            for name in wanted | found
            if wanted.get(name) != found.get(name)
        ]
        if changes and any(name.endswith(".tar") for name in files):
            raise DataError(
                f"{root} holds shards of {'; '.join(changes)}: choose another folder (--out, or data.shards), "
                "train on it as it is (prepare.coco=none), or remove it"
            )
        return {} if changes else shards

    def _is_intact(self, shard: Shard, files: dict[str, int]) -> bool:
        if files.get(shard.info.name) != shard.info.bytes:
            return False
        return self.target.digest(shard.info.name, sha256_of) in (shard.info.sha256, None)

    def _check_known(self) -> None:
        """Finds what can't be used whatever its pixels are, before hours are spent on the rest."""
        for count, refused in enumerate(self.writer.source.refused(), 1):
            self._check(count, self.plan["images"], refused)

    def _refuse(self, refused: Refused) -> None:
        self._rejected[refused.reason] += 1
        if self.plan["images"]:
            self._check(sum(self._rejected.values()), self.plan["images"], refused)

    def _check(self, count: int, total: int, refused: Refused) -> None:
        if count > self.max_rejected_share * total:
            raise DataError(
                f"{refused.where} can't be used: {refused.reason.replace('_', ' ')}; "
                f"{count} of {total} images so far, --max-rejected-share (or prepare.max_rejected_share) "
                f"allows {self.max_rejected_share:g}"
            )

    def _check_share(self, total: int, where: str) -> None:
        for reason in self._rejected:
            self._check(sum(self._rejected.values()), total, Refused(reason, f"a sample of {where}"))

    def _index(self, shards: list[Shard]) -> ShardIndex:
        shapes: Shapes = {}
        for shard in shards:
            for name, shape in shard.shapes.items():
                join_shape(shapes, name, shape)
        if not any(shard.info.samples for shard in shards):
            raise DataError(f"no sample of {self.target.root}'s source can be used: {dict(self._rejected)}")
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
        self.target.write(name, lambda file: file.write(data))


def _seen(shard: Shard) -> int:
    return shard.info.samples + sum(shard.rejected.values())


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
