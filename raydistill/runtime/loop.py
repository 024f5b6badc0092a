"""The training run on one rank, from the preflight to the last snapshot.

    window u:   generator update u on batch u of prompts
                R critic updates: the first on the very images of the generator update (made before it moved, as in
                DMD2's published order), the others on fresh ones

Ranks hold copies of all roles and slices of every batch. Rank 0 also logs, writes snapshots in a thread of its own and
keeps the evaluation queue; no update waits for either.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from raydistill.checkpoint import Snapshots
from raydistill.config import flatten, to_dict
from raydistill.data.reader import Batch, ShardReader
from raydistill.data.shards import ShardSet
from raydistill.diffusion.random import Draws
from raydistill.errors import CheckpointError, ConfigError, TrainingError
from raydistill.eval.protocol import count_label
from raydistill.methods.method import Method, PhaseDraws, RealBatch
from raydistill.models.denoiser import Cond, frozen_weights
from raydistill.models.diffusers_hub import TextToImage
from raydistill.roles.critic import CriticTrainer
from raydistill.roles.generator import GeneratorTrainer
from raydistill.roles.preflight import preflight
from raydistill.roles.teacher import TeacherScorer
from raydistill.runtime import build
from raydistill.runtime.session import EvaluationQueue, Session
from raydistill.runtime.settings import RESUMABLE_CHANGES, RunConfig, without_tracking_secrets

log = logging.getLogger(__name__)

_PREFLIGHT_SAMPLES = 64


class BatchSource(Protocol):
    """Where batches come from: a `ShardReader`, or whatever stands in for one in a benchmark."""

    counters: dict[str, int]

    def batch(self, global_batch_index: int) -> Iterator[Batch]: ...


OpenReader = Callable[[str, tuple[str, ...], int, int], BatchSource]
"""(purpose, fields, global batch size, micro-batch size) -> source."""


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
            values, kept = self._generator_update(update, gan_stage)
        for k in range(r):
            values |= self._critic_update(update * r + k, kept if k == 0 else None, gan_stage)
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

    def _generator_update(
        self, update: int, gan_stage: bool
    ) -> tuple[dict[str, float], list[tuple[Tensor, Cond]]]:
        kept = []
        reals = self._real_batches(update * self.method.critic_updates_per_generator, rollout_only=True)
        for batch in self._timed(self.readers["prompt/generator"].batch(update)):
            real = next(reals)
            cond = real.cond if real is not None else self._cond(batch)
            draws = self._phase_draws("generator", update, batch)
            x = self.generator.sample(self.method, cond, self.pipeline.latent_shape, real, draws, grad=True)
            leaf = x.detach().requires_grad_()
            queries = self.method.queries(leaf, cond, draws)
            answers = {
                name: (self.teacher if query.network == "teacher" else self.critic).answer(query)
                for name, query in queries.items()
            }
            losses = self.method.generator_losses(leaf, queries, answers)
            self.generator.backward(x, leaf, losses, self._num_micro_batches)
            kept.append((x.detach(), cond))
        return self.generator.step(self.config.train.batch_size, gan_stage=gan_stage), kept

    def _critic_update(
        self, step: int, kept: list[tuple[Tensor, Cond]] | None, gan_stage: bool
    ) -> dict[str, float]:
        reals = self._real_batches(step)
        for number, batch in enumerate(self._timed(self.readers["prompt/critic"].batch(step))):
            draws, real = self._phase_draws("critic", step, batch), next(reals)
            if kept is None:
                # a generator that starts from noised real samples gets their own captions
                cond = real.cond if real is not None and self._from_real else self._cond(batch)
                x = self.generator.sample(
                    self.method, cond, self.pipeline.latent_shape, real, draws, grad=False
                )
            else:
                x, cond = kept[number]
            losses = self.method.critic_losses(self.critic.critic, x, cond, real, draws)
            self.critic.backward(losses, self._num_micro_batches)
        return self.critic.step(gan_stage=gan_stage)

    @property
    def _num_micro_batches(self) -> int:
        return self.config.train.batch_size // self.session.world.size // self.config.micro_batch_size

    def _phase_draws(self, phase: str, step: int, batch: Batch) -> PhaseDraws:
        # positions inside the step's global batch: the step itself is part of the counter
        positions = batch.positions - step * self.config.train.batch_size
        return PhaseDraws(self.draws, phase, step, positions, self.session.device)

    def _real_batches(self, step: int, *, rollout_only: bool = False) -> Iterator[RealBatch | None]:
        wanted = "real" in self.readers and (self._from_real or not rollout_only)
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

    def _open_shards(
        self, purpose: str, fields: tuple[str, ...], batch_size: int, micro_batch_size: int
    ) -> ShardReader:
        data = self.config.data
        index = ShardSet(data.shards, cache_dir=data.cache_dir, endpoint_url=data.endpoint_url).index
        # what the shards don't hold is encoded here, batch by batch
        stored = {"latent": index.latent_shape is not None, "text": bool(index.text_shapes)}
        wanted = ["image" if name == "latent" and not stored[name] else name for name in fields]
        return ShardReader(
            data,
            purpose=purpose,
            seed=self.config.seed,
            fields=[name for name in wanted if stored.get(name, True)],
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=self.session.world.rank,
            world_size=self.session.world.size,
            expect_encoder=self.pipeline.fingerprint,
        )


class SnapshotWriter:
    """Copies the roles' state at once and writes it in a thread; one snapshot at a time."""

    def __init__(self, snapshots: Snapshots):
        self.snapshots = snapshots
        self._future: Future[dict[str, float]] | None = None

    def save(self, trainer: Trainer, manifest: dict[str, Any]) -> None:
        """Begin a snapshot of the trainer as it stands; waits for the one before. Raises CheckpointError."""
        self.wait()
        parts = {}
        for role, owner in (("generator", trainer.generator), ("critic", trainer.critic)):
            tensors, state = owner.save()
            parts[role] = ({name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}, state)
        step = trainer.progress.generator_updates

        def write() -> dict[str, float]:
            started = time.monotonic()
            for role, (tensors, state) in parts.items():
                self.snapshots.write_part(step, role, tensors, state)
            size = self.snapshots.commit(step, manifest, roles=tuple(parts))
            return {"snapshot/seconds": time.monotonic() - started, "snapshot/bytes": float(size)}

        # A thread of its own for each snapshot: one that stays keeps the OpenMP team its tensor copies started, and
        # with more OpenMP threads than cores the trainer's barriers sleep instead of spinning (measured: 1.4 s an
        # update instead of 0.8 s on two cores).
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")
        self._future = thread.submit(write)
        thread.shutdown(wait=False)

    def finished(self) -> dict[str, float] | None:
        """Figures of the snapshot in hand once it is committed, None before. Raises CheckpointError."""
        if self._future is None or not self._future.done():
            return None
        done, self._future = self._future, None
        return done.result()

    def wait(self) -> dict[str, float] | None:
        """Wait for the snapshot in hand."""
        if self._future is None:
            return None
        done, self._future = self._future, None
        return done.result()


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
            raise TrainingError(f"{error}; {write_replay(trainer, config, error)}") from error
        if keeper:
            keeper.after_update(values)
        if is_snapshot_step(config, trainer.progress.generator_updates):
            session.milestone({"generator_updates": float(trainer.progress.generator_updates)})
    if keeper:
        keeper.end(complete=trainer.progress.generator_updates >= total)
    return trainer.progress


class Keeper:
    """What rank 0 does beside training: logging, snapshots, evaluations."""

    def __init__(self, trainer: Trainer, session: Session, snapshots: Snapshots):
        self.trainer = trainer
        self.session = session
        self.snapshots = snapshots
        self.config = trainer.config
        self.writer = SnapshotWriter(snapshots)
        self.queue = (
            EvaluationQueue(session.evaluator, session.tracker, self.config.run_dir)
            if session.evaluator
            else None
        )
        self._committing: int | None = None

    def begin(self) -> None:
        """The snapshot of step 0 and what a killed run left unevaluated."""
        step = self.trainer.progress.generator_updates
        if self.queue:
            self.queue.submit(None, -1, must=True)
            for older in self.snapshots.steps():
                if is_evaluated_step(self.config, older):
                    self.queue.submit(self.snapshots.path(older), older, must=self._must(older))
        if step == 0 and not self.snapshots.steps():
            self._save()
            self._committed(self.writer.wait())

    def after_update(self, values: dict[str, float]) -> None:
        step = self.trainer.progress.generator_updates
        if step % self.config.train.log_every == 0 or step == self.config.train.generator_updates:
            for counters in [reader.counters for reader in self.trainer.readers.values()]:
                for name, count in counters.items():
                    key = f"data/{name}"
                    values[key] = values.get(key, 0.0) + count
            self.session.tracker.metrics(values, step)
        figures = self.writer.finished()
        if figures:
            self._committed(figures)
        if self.queue:
            self.queue.poll(step)
        if is_snapshot_step(self.config, step):
            self._save()

    def end(self, complete: bool) -> None:
        """Write the last snapshot if it is not there, and drain the evaluator if the run is complete."""
        step = self.trainer.progress.generator_updates
        self._committed(self.writer.wait())
        if step not in self.snapshots.steps():
            self._save()
            self._committed(self.writer.wait())
        if self.queue and complete:
            self.queue.drain(step)

    def _save(self) -> None:
        step = self.trainer.progress.generator_updates
        if self._committing is not None:
            self._committed(self.writer.wait())
        protected = self.queue.pending_steps() if self.queue else set()
        best = self.queue.best_step(best_metric(self.config)) if self.queue else None
        protected |= {best} if best is not None else set()
        if is_evaluated_step(self.config, step):
            protected.add(step)
        self.snapshots.protect(protected)
        self.session.tracker.sync()  # no figure of a step that is in a snapshot may be lost with this process
        self._committing = step
        self.writer.save(self.trainer, manifest_of(self.trainer, self.session))

    def _committed(self, figures: dict[str, float] | None) -> None:
        if figures is None or self._committing is None:
            return
        step, self._committing = self._committing, None
        self.session.tracker.metrics(figures, step)
        if self.queue and is_evaluated_step(self.config, step):
            self.queue.submit(self.snapshots.path(step), step, must=self._must(step))

    def _must(self, step: int) -> bool:
        return step in (0, self.config.train.generator_updates)


def resume(trainer: Trainer, snapshots: Snapshots) -> None:
    """Load the newest complete snapshot into the trainer, if there is one.

    Raises ConfigError if it was made with settings that change the numbers, CheckpointError for another teacher.
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
    now, then = flatten(trainer.config), manifest["settings"]
    changed = [name for name in now if now[name] != then.get(name) and not name.startswith(RESUMABLE_CHANGES)]
    if changed:
        listed = ", ".join(f"{name}: {then.get(name)} then, {now[name]} now" for name in changed[:5])
        raise ConfigError(
            f"run {trainer.config.name!r} has a snapshot at update {snapshot.step} made with other settings "
            f"({listed}); "
            "choose another name, or resume=false to start anew"
        )
    trainer.generator.load(*snapshot.part("generator"))
    trainer.critic.load(*snapshot.part("critic"))
    trainer.progress = Progress(**manifest["progress"])
    log.warning("resumed from %s", snapshot.path)


def manifest_of(trainer: Trainer, session: Session) -> dict[str, Any]:
    """What a snapshot says of its run; all draws and the data order follow from seed and counters."""
    config = without_tracking_secrets(trainer.config)
    return {
        "method": trainer.config.method.kind,
        "progress": vars(trainer.progress).copy(),
        "config": to_dict(config),
        "settings": flatten(config),
        "teacher_fingerprint": trainer.pipeline.fingerprint,
        "tracking_run_id": session.run_id,
        "world_size": session.world.size,
    }


def write_replay(trainer: Trainer, config: RunConfig, error: TrainingError) -> str:
    """Save the weights as they are before the failed step; batch and draws follow from the counters."""
    if trainer.session.world.rank:
        return "rank 0 has written what is needed to replay the step"
    replay = Snapshots(f"{config.run_dir}/replay", keep=1)
    step = trainer.progress.generator_updates
    if step not in replay.steps():
        replay.discard_unfinished()
        for role, owner in (("generator", trainer.generator), ("critic", trainer.critic)):
            replay.write_part(step, role, *owner.save())
        # the failed step is one of the window's: these say which, and all its draws follow from them
        steps = {"generator": trainer.generator.optimizer.steps, "critic": trainer.critic.optimizer.steps}
        replay.commit(
            step, manifest_of(trainer, trainer.session) | {"optimizer_steps": steps, "stopped_by": str(error)}
        )
    return f"weights before the step, settings and counters are in {replay.path(step)}"


def is_evaluated_step(config: RunConfig, step: int) -> bool:
    return config.evaluator.enabled and (
        step % config.evaluator.every == 0 or step == config.train.generator_updates
    )


def is_snapshot_step(config: RunConfig, step: int) -> bool:
    last = step == config.train.generator_updates
    return last or step % config.checkpoint.every == 0 or is_evaluated_step(config, step)


def best_metric(config: RunConfig) -> str:
    """The metric whose lowest value marks the best snapshot."""
    return f"eval/toyfid_{count_label(config.evaluator.num_samples)}"


def peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    scale = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30
