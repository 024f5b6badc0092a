"""What rank 0 keeps beside training: snapshots written in a thread, evaluations asked for, figures logged."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.checkpoint import Snapshots
from raydistill.config import flatten, to_dict
from raydistill.errors import CheckpointError, ConfigError, TrackingError
from raydistill.runtime.node_load import NodeLoad
from raydistill.runtime.session import TEACHER_STEP, EvaluationQueue, Session
from raydistill.runtime.settings import (
    NUMERIC_PLACEMENT,
    RESUMABLE_CHANGES,
    RunConfig,
    teacher_folder,
    without_secret_settings,
)
from raydistill.runtime.uploads import Uploads, open_mirror
from raydistill.tracking import RunInput

log = logging.getLogger(__name__)

PREEMPTION_EVERY = 20
"""Updates between questions whether a node goes away, in which all ranks take part; one costs about 8 ms."""
_PART_S = 600.0

if TYPE_CHECKING:
    from raydistill.runtime.trainer import Rank


class SnapshotWriter:
    """Copies the roles' state at once and writes it in a thread; one snapshot at a time."""

    def __init__(self, snapshots: Snapshots, roles: Sequence[str]):
        """roles: the parts that make a snapshot complete; other ranks may write some."""
        self.snapshots = snapshots
        self._roles = roles
        self._future: Future[dict[str, float]] | None = None

    def save(self, trainer: Rank, manifest: dict[str, Any] | None) -> None:
        """Begin a snapshot of the rank as it stands; waits for the one before. Raises CheckpointError.

        manifest: to commit it with; None: another rank does that.
        """
        self.wait()
        parts = {}
        for part, (tensors, state) in trainer.save().items():
            parts[part] = ({name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}, state)
        step = trainer.progress.generator_updates

        def write() -> dict[str, float]:
            started = time.monotonic()
            for part, (tensors, state) in parts.items():
                self.snapshots.write_part(step, part, tensors, state)
            if manifest is None:
                return {}
            self._wait_for_others(step)
            size = self.snapshots.commit(step, manifest, roles=self._roles)
            return {"snapshot/seconds": time.monotonic() - started, "snapshot/bytes": float(size)}

        # A thread of its own for each snapshot: one that stays keeps the OpenMP team its tensor copies started, and
        # with more OpenMP threads than cores the trainer's barriers sleep instead of spinning (measured: 1.4 s an
        # update instead of 0.8 s on two cores).
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="snapshot")
        self._future = thread.submit(write)
        thread.shutdown(wait=False)

    def _wait_for_others(self, step: int) -> None:
        until = time.monotonic() + _PART_S
        while missing := [role for role in self._roles if not self.snapshots.has_part(step, role)]:
            if time.monotonic() > until:
                raise CheckpointError(
                    f"snapshot {self.snapshots.path(step)}: its part of {', '.join(missing)} did not come within "
                    f"{_PART_S:.0f} s; all nodes must see one output_dir"
                )
            time.sleep(0.02)

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


class PartWriter:
    """Writes a rank's parts of each snapshot, where that is not rank 0, which makes the snapshot complete."""

    def __init__(self, trainer: Rank, snapshots: Snapshots):
        self.trainer = trainer
        self.writer = SnapshotWriter(snapshots, ())
        self._written = trainer.progress.generator_updates

    def begin(self) -> None:
        """The part of step 0."""
        if self._written == 0 and not self.writer.snapshots.steps():
            self.writer.save(self.trainer, None)

    def save(self) -> None:
        """Begin the part of this step, unless it is written; raises CheckpointError for the one before."""
        step = self.trainer.progress.generator_updates
        if step != self._written:
            self._written = step
            self.writer.save(self.trainer, None)

    def end(self) -> None:
        """The part of the last step, written to its end."""
        self.save()
        self.writer.wait()


class Keeper:
    """What rank 0 does beside training: logging, snapshots, evaluations."""

    def __init__(self, trainer: Rank, session: Session, snapshots: Snapshots):
        self.trainer = trainer
        self.session = session
        self.snapshots = snapshots
        self.config = trainer.config
        parts: Sequence[str] = ("generator", "critic")
        if trainer.sharded:
            parts = [name for rank in range(trainer.world.size) for name in trainer.part_names(rank)]
        self.writer = SnapshotWriter(snapshots, parts)
        self.queue = (
            EvaluationQueue(session.evaluator, session.tracker, self.config.run_dir)
            if session.evaluator
            else None
        )
        mirror = open_mirror(self.config, snapshots)
        self.uploads = Uploads(mirror, self.config.checkpoint.retry_max_s) if mirror else None
        self._committing: int | None = None
        self._load = NodeLoad(session.device)

    def begin(self) -> None:
        """What the run is made from, the snapshot of step 0, and what a killed run left unevaluated."""
        step = self.trainer.progress.generator_updates
        self.session.tracker.inputs(inputs_of(self.trainer))
        self.session.tracker.metrics({"restarts": float(count_start(self.config.run_dir, step))}, step)
        if self.queue:
            if self.config.evaluator.teacher_figure:
                self.queue.submit(TEACHER_STEP, must=True)
            for older in self.snapshots.steps():
                if is_evaluated_step(self.config, older):
                    self.queue.submit(older, must=self._must(older))
        if step == 0 and not self.snapshots.steps():
            self._save()
            self._committed(self.writer.wait())
        if step == 0 and self.queue and not self.config.placement.evaluator_gpus:
            self.queue.wait(step, self.config.evaluator.head_start_s)

    def after_update(self, values: dict[str, float]) -> None:
        step = self.trainer.progress.generator_updates
        if step % self.config.train.log_every == 0 or step == self.config.train.generator_updates:
            values |= self.trainer.batches.counters() | self._load.sample()
            values |= self.queue.figures(step) if self.queue else {}
            values |= self.uploads.figures(step) if self.uploads else {}
            self.session.tracker.metrics(values, step)
        figures = self.writer.finished()
        if figures:
            self._committed(figures)
        if self.queue:
            self.queue.poll(step)
        if is_snapshot_step(self.config, step):
            self._save()

    def save_now(self) -> None:
        """A snapshot out of turn, unless this step has one already."""
        step = self.trainer.progress.generator_updates
        if step != self._committing and step not in self.snapshots.steps():
            log.warning("a node goes away: writing a snapshot at update %d", step)
            self._save()

    def end(self) -> None:
        """Write the last snapshot if it is not there."""
        step = self.trainer.progress.generator_updates
        self._committed(self.writer.wait())
        if step not in self.snapshots.steps():
            self._save()
            self._committed(self.writer.wait())

    def drain(self) -> None:
        """Wait for the evaluations that were asked for."""
        if self.queue:
            self.queue.drain(self.trainer.progress.generator_updates)

    def close(self) -> None:
        """Wait for the copies of snapshots that are still to be made, for checkpoint.upload_wait_s at most."""
        if self.uploads:
            self.session.tracker.sync()
            self.uploads.finish(self.config.checkpoint.upload_wait_s)
            step = self.trainer.progress.generator_updates
            self.session.tracker.metrics(
                self.uploads.figures(step), step
            )  # the dashboard's; the journal has the step

    def _save(self) -> None:
        step = self.trainer.progress.generator_updates
        if self._committing is not None:
            self._committed(self.writer.wait())
        protected = self.queue.pending_steps() if self.queue else set()
        best = self.queue.best_step(self.config.evaluator.best_metric) if self.queue else None
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
        if self.uploads:
            self.uploads.changed()
        if self.queue and is_evaluated_step(self.config, step):
            self.queue.submit(step, must=self._must(step))

    def _must(self, step: int) -> bool:
        return not self.config.evaluator.may_skip or step in (0, self.config.train.generator_updates)


def inputs_of(trainer: Rank) -> list[RunInput]:
    """Teacher and training shards as a tracker records them."""
    config, batches = trainer.config, trainer.batches
    teacher = RunInput("teacher", "teacher", trainer.pipeline.fingerprint, teacher_folder(config.teacher))
    shards = RunInput(
        "training_shards", "training", batches.fingerprint, config.data.shards, batches.num_samples
    )
    return [teacher, shards] if batches.fingerprint else [teacher]


def count_start(run_dir: str, update: int) -> int:
    """Note that training begins at this update; returns how many times it had begun before."""
    path = Path(run_dir) / "starts.jsonl"
    try:
        with path.open("a+") as file:
            file.write(json.dumps({"time": time.time(), "update": update}) + "\n")
            file.seek(0)
            return len(file.readlines()) - 1
    except OSError as error:
        raise TrackingError(f"can't write {path} (output_dir): {error.strerror or error}") from error


def manifest_of(trainer: Rank, session: Session) -> dict[str, Any]:
    """What a snapshot says of its run; all draws and the data order follow from seed and counters."""
    config = without_secret_settings(trainer.config)
    return {
        "method": trainer.config.method.kind,
        "progress": vars(trainer.progress).copy(),
        "config": to_dict(config),
        "settings": flatten(config),
        "teacher_fingerprint": trainer.pipeline.fingerprint,
        "data_fingerprint": trainer.batches.fingerprint,
        "tracking_run_id": session.run_id,
        "world_size": session.world.size,
    }


def require_same_settings(config: RunConfig, step: int, manifest: dict[str, Any]) -> None:
    """Raise ConfigError if the snapshot of `step` was made with settings that change the numbers."""
    now, then = flatten(config), manifest["settings"]
    constant = all(role.lr_schedule == "constant" for role in (config.generator, config.critic))
    may_differ = RESUMABLE_CHANGES + ("train.generator_updates",) * constant  # a linear schedule ends there
    changed = [
        name
        for name in now
        if (name in NUMERIC_PLACEMENT and now[name] != then.get(name, now[name]))
        or (now[name] != then.get(name) and not name.startswith(may_differ))
    ]
    if changed:
        listed = ", ".join(f"{name}: {then.get(name)} then, {now[name]} now" for name in changed[:5])
        raise ConfigError(
            f"run {config.name!r} has a snapshot at update {step} made with other settings "
            f"({listed}); "
            "choose another name, or resume=false to start anew"
        )


def is_evaluated_step(config: RunConfig, step: int) -> bool:
    return config.evaluator.enabled and (
        step % config.evaluator.every == 0 or step == config.train.generator_updates
    )


def is_snapshot_step(config: RunConfig, step: int) -> bool:
    last = step == config.train.generator_updates
    return last or step % config.checkpoint.every == 0 or is_evaluated_step(config, step)


def all_meet_at(config: RunConfig, step: int) -> bool:
    """Whether all ranks wait for each other at the end of this update: for a snapshot, or to look for preemption."""
    return is_snapshot_step(config, step) or step % PREEMPTION_EVERY == 0
