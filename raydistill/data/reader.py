"""Training batches from shards: global batch b is the same samples for any ranks, workers and micro-batches.

The stream is endless. Position p = b * batch_size + i has epoch p // N and offset p % N in that epoch's plan;
rank r takes the contiguous positions [b * B + r * B / world, b * B + (r + 1) * B / world). Resuming is asking
for batch b.

Every rank opens every shard of a block, since its slice is spread over all of them, but reads only its own
samples' bytes; ranks of one machine share the page cache, or `data.cache_dir` for remote shards.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raydistill.data.prefetch import Window
from raydistill.data.samples import Batch, PixelCache, Rows
from raydistill.data.shard_file import IMAGE_SUFFIXES, RejectedSample, ShardFile
from raydistill.data.shards import Block, EpochPlan, ShardSet, plan
from raydistill.diffusion.random import Draws
from raydistill.errors import ConfigError, DataError
from raydistill.object_store import require_endpoint

__all__ = ["FIELDS", "Batch", "DataConfig", "ShardReader"]

FIELDS = ("image", "latent", "text")
# So many rejected samples in a row have no other cause than a block with nothing to give.
_MAX_ATTEMPTS = 64


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training shards."""

    shards: str
    """Folder, tar or glob of webdataset shards with their index.json; local or a URL (s3://bucket/prefix)."""
    shuffle_shards: int = 8
    """Shards whose samples are shuffled together; 0 keeps the stored order."""
    num_workers: int = 1
    """Threads that read and decode ahead of training; 0 reads when a batch is asked for."""
    prefetch_micro_batches: int = 4
    """Micro-batches kept ready ahead of the one in use."""
    cache_mb: int = 1024
    """MiB for decoded images, and for shards read from a URL without cache_dir."""
    cache_dir: str | None = None
    """Local folder for downloaded shards, named by their sha256; grows to the size of the data set."""
    endpoint_url: str | None = None
    """Address of an S3 service other than AWS (http://127.0.0.1:9000); its credentials: the environment."""
    max_rejected_share: float = 0.01
    """Share of samples that may be unusable before the run stops."""
    timeout_s: float = 300.0
    """Seconds without a batch, or without an answer from a URL, after which the run stops."""

    def __post_init__(self) -> None:
        for name, least in (
            ("shuffle_shards", 0),
            ("num_workers", 0),
            ("prefetch_micro_batches", 0),
            ("cache_mb", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be at least {least}")
        require_endpoint(self.endpoint_url, "data.endpoint_url")
        if not 0 <= self.max_rejected_share < 1:
            raise ConfigError(f"data.max_rejected_share={self.max_rejected_share} must be in [0, 1)")
        if not self.timeout_s > 0:
            raise ConfigError(f"data.timeout_s={self.timeout_s} must be above 0")


@dataclass
class _Loaded:
    batch: Batch
    rejected: Counter[str]


class ShardReader:
    """One rank's view of the stream. For one consumer thread."""

    def __init__(
        self,
        config: DataConfig,
        *,
        purpose: str,
        seed: int,
        fields: Sequence[str] = ("latent", "text"),
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        expect_encoder: str | None = None,
    ):
        """purpose: names the stream; streams of different purposes have independent orders and captions.

        fields: what batches hold beside captions, of image, latent and text. batch_size: over all ranks.
        expect_encoder: fingerprint that latents and embeddings must be made with.

        Raises ConfigError for sizes that don't divide, DataError for shards that are not what `fields` needs.
        """
        unknown = [name for name in fields if name not in FIELDS]
        if unknown:
            raise ConfigError(f"unknown data field {unknown[0]!r}; there are {', '.join(FIELDS)}")
        if not 0 <= rank < world_size or micro_batch_size < 1 or batch_size < 1:
            raise ConfigError(
                f"rank {rank} of {world_size}, batch size {batch_size}, micro-batch size {micro_batch_size}: "
                "rank must be below the number of ranks, sizes at least 1"
            )
        if batch_size % (world_size * micro_batch_size):
            raise ConfigError(
                f"train.batch_size={batch_size} is not divisible by {world_size} ranks x "
                f"train.micro_batch_size={micro_batch_size} = {world_size * micro_batch_size}"
            )
        self.config = config
        self.purpose = purpose
        self.seed = seed
        self.fields = tuple(fields)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = batch_size // world_size // micro_batch_size
        self._first = rank * (batch_size // world_size)
        self._share_of_epoch = 1 / world_size
        self._draws = Draws(seed)
        self._shards = ShardSet(
            config.shards,
            cache_dir=config.cache_dir,
            endpoint_url=config.endpoint_url,
            timeout_s=config.timeout_s,
            max_open=max(2 * config.shuffle_shards, 16),
        )
        self._index = self._shards.index
        self._num_samples = self._shards.num_samples
        self._check_memory()
        self._check_index(expect_encoder)
        self._images = PixelCache(config.cache_mb << 20)
        # Bound to the instance, so that the caches die with the reader.
        counts, together = self._shards.counts, config.shuffle_shards
        plans = lru_cache(maxsize=4)(lambda epoch: plan(seed, purpose, epoch, counts, together))
        self._plan: Callable[[int], EpochPlan] = plans
        self._order = lru_cache(maxsize=4)(
            lambda epoch, block: plans(epoch).order(plans(epoch).blocks[block])
        )
        self._downloading: set[tuple[int, int]] = set()
        self._reading = 0
        self._check_first_shard()
        self._rejected: Counter[str] = Counter()
        self._accepted = 0
        self._window: Window[_Loaded] = Window(
            self._load, num_threads=config.num_workers, ahead=config.prefetch_micro_batches
        )

    @property
    def num_samples(self) -> int:
        """Samples in one epoch."""
        return self._num_samples

    @property
    def counters(self) -> dict[str, int]:
        """Samples handed out so far, and those among them that stand in for a refused one, by its reason."""
        reasons = {f"rejected/{reason}": count for reason, count in sorted(self._rejected.items())}
        return {"accepted": self._accepted, "rejected": sum(self._rejected.values()), **reasons}

    @property
    def images_decoded(self) -> int:
        """Image files decoded so far, prefetched ones included."""
        return self._images.decoded

    def batch(self, global_batch_index: int) -> Iterator[Batch]:
        """This rank's micro-batches of a global batch, in order; any batch may be asked for at any time.

        The iterator raises DataError for unusable shards, too many rejected samples, and where nothing
        arrives in data.timeout_s.
        """
        for micro in range(self.num_micro_batches):
            try:
                loaded = self._window.take(
                    global_batch_index * self.num_micro_batches + micro, self.config.timeout_s
                )
            except FutureTimeoutError:
                raise DataError(
                    f"no batch arrived in data.timeout_s={self.config.timeout_s:g} s: micro-batch {micro} of "
                    f"batch {global_batch_index} ({self.purpose}) of data.shards={self.config.shards!r}, "
                    f"last at {self._shards.url(self._reading)}"
                ) from None
            self._accepted += len(loaded.batch.keys)
            self._rejected += loaded.rejected
            self._check_share()
            yield loaded.batch

    def close(self) -> None:
        """End the reading threads; the reader is of no use after it."""
        self._window.close()

    def _load(self, number: int) -> _Loaded:
        step, micro = divmod(number, self.num_micro_batches)
        first = step * self.batch_size + self._first + micro * self.micro_batch_size
        positions = np.arange(first, first + self.micro_batch_size, dtype=np.int64)
        rows = Rows(self._index, self.fields, self._images, len(positions))
        choices = self._draws.uniform(f"data/{self.purpose}/caption", 0, positions).tolist()
        rejected: Counter[str] = Counter()
        for row, position in enumerate(positions.tolist()):
            refused: Counter[str] = Counter()
            for attempt in range(_MAX_ATTEMPTS):
                shard, sample = self._locate(position, attempt)
                try:
                    rows.fill(row, self._open(shard), sample, choices[row])
                    break
                except RejectedSample as refusal:
                    refused[refusal.reason] += 1
                    # A refused replacement is counted at its own position, so that an epoch counts each once.
                    if attempt == 0:
                        rejected[refusal.reason] += 1
                    last = f"{self._open(shard).key(sample)} in {self._shards.url(shard)}: {refusal}"
            else:
                raise DataError(
                    f"{_MAX_ATTEMPTS} samples in a row were rejected ({_listing(refused)}), the last one "
                    f"{last}; check data.shards"
                )
        return _Loaded(rows.batch(positions), rejected)

    def _locate(self, position: int, attempt: int) -> tuple[int, int]:
        """Shard and sample of a position; from attempt 1 on another sample of the same block instead."""
        epoch, offset = divmod(position, self._num_samples)
        block = self._plan(epoch).block_at(offset)
        shards, samples = self._order(epoch, block.number)
        at = offset - block.start
        if attempt:
            purpose = f"data/{self.purpose}/replacement"
            at = int(self._draws.integers(purpose, attempt, [position], 0, block.num_samples))
        if self._shards.downloads and not self._shards.held_in_memory:
            self._download_next(epoch, block)
        return int(shards[at]), int(samples[at])

    def _download_next(self, epoch: int, block: Block) -> None:
        """Fetch the next block's shards into the cache folder while this one is read."""
        if (epoch, block.number) in self._downloading:
            return
        self._downloading.add((epoch, block.number))
        blocks = self._plan(epoch).blocks
        last = block.number + 1 == len(blocks)
        following = self._plan(epoch + 1).blocks[0] if last else blocks[block.number + 1]
        threading.Thread(target=self._shards.fetch, args=(following.shards,), daemon=True).start()

    def _open(self, shard: int) -> ShardFile:
        self._reading = shard
        return self._shards.open(shard)

    def _check_share(self) -> None:
        rejected = sum(self._rejected.values())
        # Before the first epoch is through, its whole size is the measure: one bad sample among the first ten
        # is no verdict on eight thousand.
        seen = max(rejected + self._accepted, self._num_samples * self._share_of_epoch)
        if rejected > self.config.max_rejected_share * seen:
            raise DataError(
                f"{rejected} samples of data.shards={self.config.shards!r} were rejected "
                f"({_listing(self._rejected)}), more than data.max_rejected_share="
                f"{self.config.max_rejected_share:g} of {int(seen)}"
            )

    def _check_memory(self) -> None:
        if not self._shards.held_in_memory:
            return
        # where two blocks meet, the shards of both are needed
        sizes = sorted((self._shards.bytes_of(s) for s in range(len(self._shards.counts))), reverse=True)
        needed = sum(sizes[: 2 * max(1, self.config.shuffle_shards)])
        if needed > self.config.cache_mb << 20:
            raise DataError(
                f"data.shards={self.config.shards!r} needs {needed / 2**20:.1f} MiB of memory for "
                f"two blocks of data.shuffle_shards={self.config.shuffle_shards}, data.cache_mb is "
                f"{self.config.cache_mb}: set data.cache_dir, lower data.shuffle_shards or raise it"
            )

    def _check_index(self, expect_encoder: str | None) -> None:
        index, where = self._index, f"data.shards={self.config.shards!r}"
        has = {"image": index.image_shape, "latent": index.latent_shape, "text": index.text_shapes}
        for name in self.fields:
            if has[name]:
                continue
            if name in ("image", "latent") and index.plan.get("source") == "prompts":
                raise DataError(
                    f"{where} was prepared from prompts, without images: it serves methods that need none, with "
                    "teacher.preflight=false"
                )
            if name == "image":
                raise DataError(
                    f"{where}: its images differ in size; prepare them with prepare_coco --image-size"
                )
            there = [field for field in FIELDS if has[field]]
            raise DataError(
                f"{where} was prepared without {name}: it holds {', '.join(there) or 'captions'}, needed are "
                f"{', '.join(self.fields)}; prepare it with prepare_coco --encode TEACHER_FOLDER"
            )
        encoded = {"latent", "text"} & set(self.fields)
        if expect_encoder is not None and encoded and index.encoder != expect_encoder:
            raise DataError(
                f"{where} was encoded by {str(index.encoder)[:12]}, this run's teacher.path is "
                f"{expect_encoder[:12]}: prepare the shards with that teacher, or train with theirs"
            )

    def _check_first_shard(self) -> None:
        """The first shard must hold what the index promises, so that a mix-up shows before training does."""
        number = next(n for n, count in enumerate(self._shards.counts) if count)
        shard, url = self._open(number), self._shards.url(number)
        found = shard.suffixes()
        needed = ["json"]
        if "image" in self.fields:
            needed.append(next((suffix for suffix in IMAGE_SUFFIXES if suffix in found), "jpg or png"))
        if "latent" in self.fields:
            needed.append("latent.npy")
        if "text" in self.fields:
            needed.extend(f"{name}.npy" for name in self._index.text_shapes)
        missing = [suffix for suffix in needed if suffix not in found]
        if missing:
            raise DataError(
                f"shard {url} has no {', '.join(missing)}: they hold {', '.join(sorted(found))}, needed are "
                f"{', '.join(sorted(needed))} (data.shards); prepare the shards with what is missing"
            )
        rows = Rows(self._index, self.fields, self._images, 1)
        refused: Counter[str] = Counter()
        detail = ""
        for sample in range(min(len(shard), _MAX_ATTEMPTS)):
            try:
                rows.fill(0, shard, sample, 0.0)
                return
            except RejectedSample as refusal:
                detail = detail or f"{shard.key(sample)}: {refusal}"
                refused[refusal.reason] += 1
        raise DataError(
            f"shard {url} (data.shards) has no usable sample among its first {sum(refused.values())} "
            f"({_listing(refused)}); the first is {detail}"
        )


def _listing(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
