"""Shards written by several processes at once: actors with an encoder each, a shard at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from raydistill.data.entries import Encoder
from raydistill.data.prepare import Elsewhere
from raydistill.data.shard_writer import Shard, ShardWriter
from raydistill.errors import DataError, PlacementError
from raydistill.models.diffusers_hub import load_pipeline
from raydistill.runtime.actors import get
from raydistill.runtime.prepare import PipelineEncoder
from raydistill.runtime.run import connect


class _ShardActor:
    def __init__(self, teacher: str | None, device: str, threads: int):
        self._teacher, self._device, self._threads = teacher, device, threads
        self._encoder: Encoder | None = None

    def write(self, writer: ShardWriter, number: int) -> Shard:
        # the encoder is loaded here, not by the constructor, so that a failure reaches the caller as itself
        if self._teacher is not None and self._encoder is None:
            import torch

            torch.set_num_threads(self._threads)
            self._encoder = PipelineEncoder(load_pipeline(self._teacher), self._device)
        try:
            return writer.write(number, self._encoder)
        except OSError as error:
            raise DataError(
                f"can't write shards to {writer.target.root}: {error.strerror or error} (--out)"
            ) from error


def on_ray(workers: int, teacher: str | None, device: str = "cpu") -> Elsewhere:
    """Write shards by so many actors: on the cluster of RAY_ADDRESS, or on a Ray of this process's own.

    teacher: whose encoder each loads; None: nothing is encoded. A shard whose actor dies is written by another. All
    nodes must see the source's files and, unless it is a URL, the folder of shards. `prepare_to_join` comes before this
    module, which imports ray.
    """

    def write(writer: ShardWriter, numbers: Sequence[int]) -> Iterator[tuple[int, Shard]]:
        if not numbers:
            return
        mine = not ray.is_initialized()
        if mine:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            connect()
        try:
            yield from _write(writer, numbers, workers, teacher, device)
        finally:
            if mine:
                ray.shutdown()

    return write


def _write(
    writer: ShardWriter, numbers: Sequence[int], workers: int, teacher: str | None, device: str
) -> Iterator[tuple[int, Shard]]:
    there = ray.cluster_resources()
    kind = "GPU" if device.startswith("cuda") else "CPU"
    if there.get(kind, 0) < workers:
        raise PlacementError(f"--workers {workers} needs as many {kind}s; Ray has {there.get(kind, 0):g}")
    cpus = max(1, int(there.get("CPU", 1)) // workers)
    options: dict[str, Any] = {
        "num_cpus": cpus, "num_gpus": int(kind == "GPU"), "max_restarts": 3, "max_task_retries": 3,
    }  # fmt: skip
    actors = [
        ray.remote(_ShardActor).options(**options).remote(teacher, device, cpus)
        for _ in range(min(workers, len(numbers)))
    ]
    shared, left = ray.put(writer), iter(numbers)
    running: dict[Any, tuple[int, Any]] = {}

    def hand_out(actor: Any) -> None:
        number = next(left, None)
        if number is not None:
            running[actor.write.remote(shared, number)] = number, actor

    try:
        for actor in actors:
            hand_out(actor)
        while running:
            (done,), _ = ray.wait(list(running))
            number, actor = running.pop(done)
            shard = get(done)
            hand_out(actor)
            yield number, shard
    finally:
        for actor in actors:
            ray.kill(actor)
