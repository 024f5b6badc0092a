"""One rank's slices of the batches: prompts and real samples as tensors, each with its position in the global batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from raydistill.data.reader import Batch, ShardReader
from raydistill.data.shards import ShardSet
from raydistill.methods.method import RealBatch
from raydistill.models.denoiser import Cond
from raydistill.models.pipeline import Pipeline
from raydistill.roles.world import World
from raydistill.runtime.settings import RunConfig


class BatchSource(Protocol):
    """Where batches come from: a `ShardReader`, or whatever stands in for one in a benchmark."""

    counters: dict[str, int]

    def batch(self, global_batch_index: int) -> Iterator[Batch]: ...


OpenReader = Callable[[str, tuple[str, ...], int, int, World], BatchSource]
"""(purpose, fields, global batch size, micro-batch size, the ranks that share a batch) -> source."""


@dataclass(frozen=True)
class Prompts:
    """A micro-batch of conditions to generate from."""

    cond: Cond
    positions: np.ndarray
    """[B], inside the global batch: draws are keyed by them and by the step."""


class Batches:
    """This rank's readers; `ahead`: the generator's next batch is read while the critic reads its own."""

    def __init__(
        self,
        config: RunConfig,
        pipeline: Pipeline,
        world: World,
        device: torch.device,
        *,
        real_data: bool,
        ahead: bool,
        open_reader: OpenReader | None = None,
    ):
        """world: the ranks that share each batch. open_reader: instead of the shards that the settings name."""
        self.config = config
        self.world = world
        self.device = device
        self._pipeline = pipeline
        self.fingerprint, self.num_samples = "", 0
        """sha256 of the shards' contents and the samples in them; empty where batches come from elsewhere."""
        if open_reader is None:
            data = config.data
            self._shards = ShardSet(
                data.shards,
                cache_dir=data.cache_dir,
                endpoint_url=data.endpoint_url,
                timeout_s=data.timeout_s,
            )
            self.fingerprint, self.num_samples = self._shards.fingerprint, self._shards.num_samples
        self._open_reader = open_reader or self._open_shards
        size = config.train.batch_size
        self.micro_batch_size = config.train.micro_batch(world.size)
        self.num_micro_batches = size // world.size // self.micro_batch_size
        micro = self.micro_batch_size
        self.readers = {
            purpose: self._open_reader(purpose, ("text",), size, micro, world)
            for purpose in ("prompt/generator", "prompt/critic")
        }
        if real_data:
            self.readers["real"] = self._open_reader("real", ("latent", "text"), size, micro, world)
            if ahead:
                # the same samples: a reader's window moves on and would have to come back
                self.readers["real/ahead"] = self._open_reader("real", ("latent", "text"), size, micro, world)
        self._data_s = 0.0

    def prompts(self, purpose: str, number: int) -> Iterator[Prompts]:
        """This rank's micro-batches of batch `number` of "prompt/generator" or "prompt/critic"."""
        for batch in self._timed(self.readers[purpose].batch(number)):
            yield Prompts(self._cond(batch), batch.positions - number * self.config.train.batch_size)

    def real(self, number: int, *, wanted: bool = True, ahead: bool = False) -> Iterator[RealBatch | None]:
        """This rank's micro-batches of real batch `number`, or Nones without end."""
        if not wanted:
            while True:
                yield None
        for batch in self._timed(self.readers["real/ahead" if ahead else "real"].batch(number)):
            yield self._real(batch)

    def some_real(self, size: int) -> RealBatch:
        """The first real samples of a stream of their own."""
        fields = ("latent", "text")
        reader = self._open_reader("preflight", fields, size * self.world.size, size, self.world)
        return self._real(next(iter(reader.batch(0))))

    def counters(self) -> dict[str, float]:
        """What the readers counted so far, named data/..."""
        totals: dict[str, float] = {}
        for reader in self.readers.values():
            for name, count in reader.counters.items():
                totals[f"data/{name}"] = totals.get(f"data/{name}", 0.0) + count
        return totals

    def take_seconds(self) -> float:
        """Seconds spent waiting for data since this was last asked."""
        seconds, self._data_s = self._data_s, 0.0
        return seconds

    def _real(self, batch: Batch) -> RealBatch:
        if batch.latents is not None:
            latents = batch.latents.float().to(self.device)
        else:
            assert batch.images is not None
            latents = self._pipeline.encode_images(batch.images.to(self.device))
        return RealBatch(latents, self._cond(batch))

    def _cond(self, batch: Batch) -> Cond:
        if batch.text is not None:
            return Cond({name: tensor.float() for name, tensor in batch.text.items()}).to(self.device)
        return self._pipeline.encode_text(batch.captions)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._data_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _open_shards(
        self, purpose: str, fields: tuple[str, ...], batch_size: int, micro_batch_size: int, world: World
    ) -> ShardReader:
        index = self._shards.index
        # what the shards don't hold is encoded here, batch by batch
        stored = {"latent": index.latent_shape is not None, "text": bool(index.text_shapes)}
        if not all(stored[name] for name in fields):
            self._pipeline.to(self.device)
        wanted = ["image" if name == "latent" and not stored[name] else name for name in fields]
        return ShardReader(
            self.config.data,
            purpose=purpose,
            seed=self.config.seed,
            fields=[name for name in wanted if stored.get(name, True)],
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            expect_encoder=self._pipeline.fingerprint,
        )
