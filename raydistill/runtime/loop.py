"""The training run on one rank, from the preflight to the last snapshot.

    window u:   generator update u on batch u of prompts
                R critic updates: the first on the very images of the generator update (made before it moved, as in
                DMD2's published order), the others on fresh ones

Ranks hold copies of all roles and slices of every batch. Rank 0 also has a `Keeper`, which logs, writes snapshots in
a thread of its own and keeps the evaluation queue. No update waits for an evaluation; one that begins a snapshot waits
for the snapshot before it and for the journal.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raydistill.checkpoint import Snapshots
from raydistill.data.reader import Batch, ShardReader
from raydistill.data.shards import ShardSet
from raydistill.diffusion.random import Draws
from raydistill.errors import CheckpointError, ConfigError, TrainingError
from raydistill.methods.method import Method, PhaseDraws, RealBatch
from raydistill.models.denoiser import Cond, frozen_weights
from raydistill.models.diffusers_hub import TextToImage
from raydistill.roles.critic import CriticTrainer
from raydistill.roles.generator import GeneratorTrainer
from raydistill.roles.preflight import preflight
from raydistill.roles.teacher import TeacherScorer
from raydistill.runtime import build
from raydistill.runtime.keeper import Keeper, is_snapshot_step, manifest_of, require_same_settings
from raydistill.runtime.session import Session
from raydistill.runtime.settings import RunConfig

log = logging.getLogger(__name__)

_PREFLIGHT_SAMPLES = 64


class BatchSource(Protocol):
    """Where batches come from: a `ShardReader`, or whatever stands in for one in a benchmark."""

    counters: dict[str, int]

    def batch(self, global_batch_index: int) -> Iterator[Batch]: ...


OpenReader = Callable[[str, tuple[str, ...], int, int], BatchSource]
"""(purpose, fields, global batch size, micro-batch size) -> source."""


@dataclass(frozen=True)
class _Sampled:
    """A micro-batch of generated samples, or (x is None) of prompts to generate from."""

    x: Tensor | None
    cond: Cond
    positions: np.ndarray


@dataclass
class Progress:
    """How far the run has come."""

    generator_updates: int = 0
    critic_updates: int = 0
    images: int = 0
    """Samples generated for training, over all ranks."""
    train_s: float = 0.0
    """Seconds spent in updates, over restarts."""


class Trainer:
    """One rank's roles and data, and one window of updates on them."""

    def __init__(
        self,
        config: RunConfig,
        session: Session,
        pipeline: TextToImage | None = None,
        open_reader: OpenReader | None = None,
    ):
        """pipeline, open_reader: instead of those that the settings name."""
        self.config = config
        self.session = session
        self.draws = Draws(config.seed)
        self.pipeline: TextToImage = pipeline or build.build_pipeline(config)
        self.data_fingerprint = ""
        """sha256 of the shards' contents; empty where batches come from elsewhere."""
        if open_reader is None:
            self._shards = self._known_shards()
            self.data_fingerprint = self._shards.fingerprint
        self._open = open_reader or self._open_shards
        self.method: Method = build.build_method(config, self.pipeline)
        self.generator: GeneratorTrainer = build.build_generator(
            config, self.pipeline, session.world, session.device
        )
        self.critic: CriticTrainer = build.build_critic(
            config, self.method, self.pipeline, session.world, session.device
        )
        self.teacher: TeacherScorer = build.build_teacher(config, self.pipeline, session.device)
        size, micro = config.train.batch_size, config.micro_batch_size
        self.readers = {
            purpose: self._open(purpose, ("text",), size, micro)
            for purpose in ("prompt/generator", "prompt/critic")
        }
        if self.method.needs.real_data:
            self.readers["real"] = self._open("real", ("latent", "text"), size, micro)
        self._from_real = self.method.starts_from_real
        self.progress = Progress()
        self.kept: list[_Sampled] = []
        """The generator update's own samples, which the first critic update of the window sees."""
        self._data_s = 0.0

    def preflight(self) -> dict[str, float]:
        """The teacher's error on real samples by noise level; raises ConfigError if they don't fit each other."""
        size = _PREFLIGHT_SAMPLES
        reader = self._open("preflight", ("latent", "text"), size * self.session.world.size, size)
        real = self._real(next(iter(reader.batch(0))))
        denoiser = self.pipeline.denoiser
        report = preflight(denoiser, real.x0, real.cond, self.draws, denoiser.prediction)
        return {f"preflight/error_{level:g}": error for level, error in report.errors.items()}

    def window(self) -> dict[str, float]:
        """One generator update and its R critic updates; returns the figures to log."""
        started = time.perf_counter()
        self._data_s = 0.0
        update = self.progress.generator_updates
        r = self.method.critic_updates_per_generator
        gan_stage = self.method.gan_on(update) and self.method.needs.gan_head
        # frozen until the backward pass is over: checkpointed activations are recomputed in it
        with frozen_weights(self.critic.critic):
            values, self.kept = self._generator_update(update, gan_stage)
        for k in range(r):
            values |= self._critic_update(update, k, self.kept if k == 0 else None, gan_stage)
        seconds = time.perf_counter() - started
        done = self.progress
        done.generator_updates += 1
        done.critic_updates += r
        done.images += self.config.train.batch_size * r
        done.train_s += seconds
        return values | {
            "generator_updates": float(done.generator_updates),
            "critic_updates": float(done.critic_updates),
            "images": float(done.images),
            "time/update_s": seconds,
            "time/data_s": self._data_s,
            "throughput/images_per_s": self.config.train.batch_size * r / seconds,
            "memory/peak_gib": peak_memory_gib(self.session.device),
        }

    def _generator_update(self, update: int, gan_stage: bool) -> tuple[dict[str, float], list[_Sampled]]:
        kept = []
        reals = self._real_batches(update * self.method.critic_updates_per_generator, wanted=self._from_real)
        for batch in self._timed(self.readers["prompt/generator"].batch(update)):
            real = next(reals)
            cond = real.cond if real is not None else self._cond(batch)
            positions = self._in_batch(batch, update)
            draws = PhaseDraws(self.draws, "generator", update, positions, self.session.device)
            x = self.generator.sample(self.method, cond, self.pipeline.latent_shape, real, draws, grad=True)
            leaf = x.detach().requires_grad_()
            queries = self.method.queries(leaf, cond, draws)
            answers = {
                name: (self.teacher if query.network == "teacher" else self.critic).answer(query)
                for name, query in queries.items()
            }
            losses = self.method.generator_losses(leaf, queries, answers)
            self.generator.backward(x, leaf, losses, self._num_micro_batches)
            kept.append(_Sampled(x.detach(), cond, positions))
        return self.generator.step(self.config.train.batch_size, gan_stage=gan_stage), kept

    def _critic_update(
        self, update: int, k: int, kept: list[_Sampled] | None, gan_stage: bool
    ) -> dict[str, float]:
        """The k-th of R; kept: samples that are there already, without them fresh ones are made."""
        step = update * self.method.critic_updates_per_generator + k
        reals = self._real_batches(step, wanted=gan_stage or self._from_real)
        for sampled in kept if kept is not None else self._fresh(update, k):
            draws = PhaseDraws(self.draws, "critic", step, sampled.positions, self.session.device)
            x, cond, real = sampled.x, sampled.cond, next(reals)
            if x is None:
                # a generator that starts from noised real samples gets their own captions
                cond = real.cond if real is not None and self._from_real else cond
                x = self.generator.sample(
                    self.method, cond, self.pipeline.latent_shape, real, draws, grad=False
                )
            losses = self.method.critic_losses(self.critic.critic, x, cond, real, draws)
            self.critic.backward(losses, self._num_micro_batches)
        return self.critic.step(gan_stage=gan_stage)

    def _fresh(self, update: int, k: int) -> Iterator[_Sampled]:
        # only R - 1 of R critic updates read prompts
        number = update * (self.method.critic_updates_per_generator - 1) + k - 1
        for batch in self._timed(self.readers["prompt/critic"].batch(number)):
            yield _Sampled(None, self._cond(batch), self._in_batch(batch, number))

    @property
    def _num_micro_batches(self) -> int:
        return self.config.train.batch_size // self.session.world.size // self.config.micro_batch_size

    def _in_batch(self, batch: Batch, number: int) -> np.ndarray:
        """Positions inside the global batch: draws are keyed by them and by the step."""
        return batch.positions - number * self.config.train.batch_size

    def _real_batches(self, step: int, *, wanted: bool) -> Iterator[RealBatch | None]:
        if not wanted:
            while True:
                yield None
        for batch in self._timed(self.readers["real"].batch(step)):
            yield self._real(batch)

    def _real(self, batch: Batch) -> RealBatch:
        if batch.latents is not None:
            latents = batch.latents.float().to(self.session.device)
        else:
            assert batch.images is not None
            latents = self.pipeline.encode_images(batch.images.to(self.session.device))
        return RealBatch(latents, self._cond(batch))

    def _cond(self, batch: Batch) -> Cond:
        if batch.text is not None:
            return Cond({name: tensor.float() for name, tensor in batch.text.items()}).to(self.session.device)
        return self.pipeline.encode_text(batch.captions)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self._data_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def _known_shards(self) -> ShardSet:
        data = self.config.data
        return ShardSet(
            data.shards, cache_dir=data.cache_dir, endpoint_url=data.endpoint_url, timeout_s=data.timeout_s
        )

    def _open_shards(
        self, purpose: str, fields: tuple[str, ...], batch_size: int, micro_batch_size: int
    ) -> ShardReader:
        index = self._shards.index
        # what the shards don't hold is encoded here, batch by batch
        stored = {"latent": index.latent_shape is not None, "text": bool(index.text_shapes)}
        if not all(stored[name] for name in fields):
            self.pipeline.to(self.session.device)
        wanted = ["image" if name == "latent" and not stored[name] else name for name in fields]
        return ShardReader(
            self.config.data,
            purpose=purpose,
            seed=self.config.seed,
            fields=[name for name in wanted if stored.get(name, True)],
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=self.session.world.rank,
            world_size=self.session.world.size,
            expect_encoder=self.pipeline.fingerprint,
        )


def train(config: RunConfig, session: Session) -> Progress:
    """The run on this rank; returns how far it came. Raises what the roles raise.

    Every rank ends with the same `Progress`; rank 0 has drained the evaluator.
    """
    torch.set_grad_enabled(True)
    trainer = Trainer(config, session)
    snapshots = Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep)
    main = session.world.rank == 0
    if main:
        snapshots.discard_unfinished()
    session.world.barrier()
    resume(trainer, snapshots)
    newest, oldest = session.world.range(trainer.progress.generator_updates)
    if newest != oldest:
        raise ConfigError(
            f"ranks resume from different snapshots, updates {oldest} to {newest}: all nodes must see one "
            f"output_dir={config.output_dir!r}"
        )
    start = trainer.progress.generator_updates
    if start == 0 and config.teacher.preflight:
        figures = trainer.preflight()
        if main:
            session.tracker.metrics(figures, 0)
    keeper = Keeper(trainer, session, snapshots) if main else None
    if keeper:
        keeper.begin()
    total = config.train.generator_updates
    while trainer.progress.generator_updates < total:
        stopping = session.should_stop()
        if stopping:
            break
        try:
            values = trainer.window()
        except TrainingError as error:
            try:
                where = write_replay(trainer, config, error)
            except CheckpointError as full:
                where = f"no replay of it could be written: {full}"
            session.world.barrier()  # all ranks fail together, and the first one to end takes the others with it
            raise TrainingError(f"{error}; {where}") from error
        if keeper:
            keeper.after_update(values)
        if session.should_save() and keeper:
            keeper.save_now()
        if is_snapshot_step(config, trainer.progress.generator_updates):
            session.milestone({"generator_updates": float(trainer.progress.generator_updates)})
    if keeper:
        keeper.end()
    session.world.barrier()  # no rank ends before the last snapshot is committed
    if keeper and trainer.progress.generator_updates >= total:
        keeper.drain()
    return trainer.progress


def resume(trainer: Trainer, snapshots: Snapshots) -> None:
    """Load the newest complete snapshot into the trainer, if there is one.

    Raises ConfigError if it was made with settings that change the numbers, CheckpointError for another teacher or
    other data.
    """
    snapshot = snapshots.latest()
    if snapshot is None:
        return
    manifest = snapshot.manifest
    if manifest["teacher_fingerprint"] != trainer.pipeline.fingerprint:
        raise CheckpointError(
            f"{snapshot.path} was made with another teacher (teacher.path={manifest['config']['teacher']['path']!r}); "
            "choose another name, or resume=false to start anew"
        )
    if manifest["data_fingerprint"] != trainer.data_fingerprint:
        raise CheckpointError(
            f"{snapshot.path} was trained on other shards than data.shards={trainer.config.data.shards!r} holds now; "
            "choose another name, or resume=false to start anew"
        )
    require_same_settings(trainer.config, snapshot.step, manifest)
    trainer.generator.load(*snapshot.part("generator"))
    trainer.critic.load(*snapshot.part("critic"))
    trainer.progress = Progress(**manifest["progress"])
    log.warning("resumed from %s", snapshot.path)


def write_replay(trainer: Trainer, config: RunConfig, error: TrainingError) -> str:
    """Save the weights as they are before the failed step; batch and draws follow from the counters."""
    replay = Snapshots(f"{config.run_dir}/replay", keep=1)
    step = trainer.progress.generator_updates
    if trainer.session.world.rank == 0 and step not in replay.steps():
        replay.discard_unfinished()
        for role, owner in (("generator", trainer.generator), ("critic", trainer.critic)):
            replay.write_part(step, role, *owner.save())
        # made before the generator moved: a critic step that failed on them can't make them again
        if trainer.generator.optimizer.steps > step:
            samples = {f"x/{n}": s.x.contiguous() for n, s in enumerate(trainer.kept) if s.x is not None}
            replay.write_part(step, "samples", samples, {})
        # the failed step is one of the window's: these say which, and all its draws follow from them
        steps = {"generator": trainer.generator.optimizer.steps, "critic": trainer.critic.optimizer.steps}
        replay.commit(
            step, manifest_of(trainer, trainer.session) | {"optimizer_steps": steps, "stopped_by": str(error)}
        )
    return f"weights before the step, settings and counters are in {replay.path(step)}"


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
