"""Which shards does a data set have, and in which order does a run see their samples?

The order is a pure function of (seed, purpose, epoch, samples per shard, shuffle_shards): shards are
permuted, taken `shuffle_shards` at a time as a block, and the samples of a block are permuted. Ranks, workers
and batch sizes don't enter, so the n-th sample of the stream is the same for all of them and a cursor is one
integer.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import logging
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from raydistill.data.images import first_line
from raydistill.data.shard_file import ShardFile, shared_shard
from raydistill.data.storage import LocalFolder, RemoteFolder, is_remote
from raydistill.diffusion.random import Draws
from raydistill.errors import DataError

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
INDEX_NAME = "index.json"


@dataclass(frozen=True)
class ShardInfo:
    """One shard as the index knows it."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """`index.json`, written last beside the shards: without it there is no data set."""

    shards: tuple[ShardInfo, ...]
    image_shape: tuple[int, ...] | None
    """[3, H, W] of every image, or None where they differ."""
    latent_shape: tuple[int, ...] | None = None
    """[C, h, w] of the scaled latents, or None without latents."""
    text_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of one caption's arrays by name: {"text": (L, D)}; empty without embeddings."""
    array_dtype: str = "float16"
    """What latents and embeddings are stored as."""
    encoder: str | None = None
    """Fingerprint of what made latents and embeddings."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Images that were left out, by reason."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Source and settings that the shards are a function of."""

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    def to_json(self) -> bytes:
        return json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}, indent=1).encode()

    @staticmethod
    def from_json(data: bytes, url: str) -> ShardIndex:
        """Raises DataError for anything but an index of this version."""
        try:
            content = json.loads(data)
            version = content.pop("schema")
            if version != SCHEMA_VERSION:
                raise DataError(
                    f"{url} has schema version {version}, known is {SCHEMA_VERSION}: prepare the shards again"
                )
            shapes = {key: content[key] and tuple(content[key]) for key in ("image_shape", "latent_shape")}
            texts = {name: tuple(shape) for name, shape in content["text_shapes"].items()}
            shards = tuple(ShardInfo(**shard) for shard in content["shards"])
            return ShardIndex(**(content | shapes | {"shards": shards, "text_shapes": texts}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{url} is no shard index: {first_line(error)}; prepare the shards again"
            ) from error


class ShardSet:
    """The shards that `data.shards` names, checked against their indexes, opened as they are needed."""

    def __init__(
        self,
        shards: str,
        *,
        cache_dir: str | None = None,
        endpoint_url: str | None = None,
        timeout_s: float = 300.0,
        max_open: int = 16,
    ):
        """shards: a folder, one tar, or a glob over tars; local or a URL such as s3://bucket/prefix.

        timeout_s: how long a URL is tried. max_open: shards kept open.

        Raises DataError for an empty glob, a folder without index, a shard that is missing or has another
        size than its index says, and for folders that hold different things.
        """
        self.shards = shards
        self._max_open = max_open
        self._entries: list[tuple[LocalFolder | RemoteFolder, ShardInfo]] = []
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()
        if not shards:
            raise DataError(
                "data.shards is empty: give a folder of shards, a glob over tars, or an s3:// URL"
            )
        indexes = []
        remote = {"cache_dir": cache_dir, "endpoint_url": endpoint_url, "timeout_s": timeout_s}
        for folder, pattern in self._folders(shards, remote):
            index, infos = _listed(folder, pattern, shards)
            indexes.append((folder, index))
            self._entries.extend((folder, info) for info in infos)
        first_folder, self.index = indexes[0]
        for folder, index in indexes[1:]:
            for name in ("image_shape", "latent_shape", "text_shapes", "array_dtype", "encoder"):
                ours, theirs = getattr(self.index, name), getattr(index, name)
                if ours != theirs:
                    raise DataError(
                        f"data.shards={shards!r} joins folders of different {name}: {ours} in "
                        f"{first_folder.root}, {theirs} in {folder.root}"
                    )
        if sum(self.counts) == 0:
            raise DataError(f"data.shards={shards!r} holds no samples")

    @staticmethod
    def _folders(shards: str, remote: dict[str, Any]) -> list[tuple[LocalFolder | RemoteFolder, str | None]]:
        """Folders and the pattern that picks shards in each; None picks what the index lists."""
        parent, _, last = shards.rstrip("/").rpartition("/")
        picks = last.endswith(".tar") or any(mark in last for mark in "*?[")
        if is_remote(shards):
            folder = RemoteFolder(parent if picks else shards, **remote)
            return [(folder, last if picks else None)]
        if not picks:
            return [(LocalFolder(shards), None)]
        if any(mark in shards for mark in "*?["):
            parents = sorted({os.path.dirname(path) for path in glob.glob(shards)})
            if not parents:
                raise DataError(f"data.shards={shards!r} matches no file")
        else:
            parents = [parent or ("/" if shards.startswith("/") else ".")]
        return [(LocalFolder(path or "."), last) for path in parents]

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples per shard, in the order of the index."""
        return tuple(info.samples for _, info in self._entries)

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' own hashes, in order: the same samples, wherever they lie."""
        return hashlib.sha256("\n".join(info.sha256 for _, info in self._entries).encode()).hexdigest()

    @property
    def held_in_memory(self) -> bool:
        """Whether an open shard is its bytes in memory: remote, and no cache_dir."""
        folder = self._entries[0][0]
        return isinstance(folder, RemoteFolder) and folder.cache_dir is None

    @property
    def downloads(self) -> bool:
        return isinstance(self._entries[0][0], RemoteFolder)

    def bytes_of(self, shard: int) -> int:
        return self._entries[shard][1].bytes

    def url(self, shard: int) -> str:
        folder, info = self._entries[shard]
        return folder.path(info.name)

    def open(self, shard: int) -> ShardFile:
        """The shard, from the open ones if it is there. Raises DataError; any thread may call it."""
        with self._lock:
            known = self._open.get(shard)
            if known is not None:
                self._open.move_to_end(shard)
                return known
        folder, info = self._entries[shard]
        identity = folder.identity(info.name, info.sha256)
        opened = shared_shard(self.url(shard), identity, lambda: folder.shard(info.name, info.sha256))
        if len(opened) != info.samples:
            raise DataError(
                f"shard {self.url(shard)} holds {len(opened)} samples, {INDEX_NAME} says {info.samples}: "
                "it was replaced; prepare the shards again"
            )
        with self._lock:
            self._open[shard] = opened
            while len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return opened

    def fetch(self, shards: Sequence[int]) -> None:
        """Download shards into the cache folder; what fails is logged, and raised when it is opened."""
        for shard in shards:
            folder, info = self._entries[shard]
            try:
                folder.shard(info.name, info.sha256)
            except DataError as error:
                log.warning("could not download ahead: %s", error)
                return


def _listed(
    folder: LocalFolder | RemoteFolder, pattern: str | None, shards: str
) -> tuple[ShardIndex, list[ShardInfo]]:
    sizes = folder.sizes()
    if pattern is not None and not fnmatch.filter(sizes, pattern):
        raise DataError(f"data.shards={shards!r} matches no file in {folder.root}")
    if INDEX_NAME not in sizes:
        raise DataError(
            f"data.shards={shards!r}: {folder.root} has no {INDEX_NAME}, so its shards are not complete; "
            "make them with jobs/prepare_coco.py (run again, it goes on where it stopped)"
        )
    index = ShardIndex.from_json(folder.read(INDEX_NAME), folder.path(INDEX_NAME))
    infos = {info.name: info for info in index.shards}
    if pattern is not None:
        names = sorted(fnmatch.filter(sizes, pattern))
        unknown = [name for name in names if name not in infos]
        if unknown:
            raise DataError(f"data.shards={shards!r}: {folder.path(unknown[0])} is not in its {INDEX_NAME}")
        infos = {name: infos[name] for name in names}
    for name, info in infos.items():
        if name not in sizes:
            raise DataError(
                f"data.shards={shards!r}: shard {folder.path(name)} is missing ({INDEX_NAME} lists it)"
            )
        if sizes[name] != info.bytes:
            raise DataError(
                f"data.shards={shards!r}: shard {folder.path(name)} has {sizes[name]} bytes, not the "
                f"{info.bytes} of {INDEX_NAME}: it is truncated or was replaced; copy or prepare it again"
            )
    return index, list(infos.values())


@dataclass(frozen=True)
class Block:
    """Shards whose samples are shuffled together, and where the block begins in its epoch."""

    number: int
    start: int
    shards: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class EpochPlan:
    """The order of one epoch."""

    seed: int
    purpose: str
    epoch: int
    shuffled: bool
    blocks: tuple[Block, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [block.start for block in self.blocks]

    def block_at(self, offset: int) -> Block:
        """The block that holds the epoch's sample number `offset`."""
        return self.blocks[bisect_right(self._starts, offset) - 1]

    def order(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """The block's samples in the order they are seen: shard numbers [n], sample numbers in them [n]."""
        shards = np.repeat(np.asarray(block.shards, np.int64), block.counts)
        samples = np.concatenate([np.arange(count) for count in block.counts])
        if not self.shuffled:
            return shards, samples
        purpose = f"data/{self.purpose}/samples/{block.number}"
        order = Draws(self.seed).permutation(purpose, self.epoch, block.num_samples)
        return shards[order], samples[order]


def plan(seed: int, purpose: str, epoch: int, shard_counts: Sequence[int], shuffle_shards: int) -> EpochPlan:
    """The order of an epoch over shards of these sizes, shuffle_shards at a time; 0: the stored order."""
    if shuffle_shards == 0:
        shards = np.arange(len(shard_counts))
    else:
        shards = Draws(seed).permutation(f"data/{purpose}/shards", epoch, len(shard_counts))
    size = shuffle_shards or 1
    groups = [tuple(int(s) for s in shards[i : i + size]) for i in range(0, len(shards), size)]
    counts = [tuple(shard_counts[shard] for shard in group) for group in groups]
    starts = accumulate((sum(group) for group in counts), initial=0)
    # an empty block would hide the one before it from the search by offset
    blocks = [(s, g, c) for s, g, c in zip(starts, groups, counts, strict=False) if sum(c)]
    return EpochPlan(
        seed, purpose, epoch, shuffle_shards > 0, tuple(Block(n, *block) for n, block in enumerate(blocks))
    )
