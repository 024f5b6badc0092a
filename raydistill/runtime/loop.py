"""The training run on one rank, from the preflight to the last snapshot.

Ranks that hold a role hold copies of it, or with placement.sharding=fsdp a share, and slices of every batch. Rank 0
also has a `Keeper`, which logs, writes snapshots in a thread of its own and keeps the evaluation queue. No update waits
for an evaluation; one that begins a snapshot waits for the snapshot before it and for the journal.
"""

from __future__ import annotations

import logging

import torch

from raydistill.checkpoint import Snapshots
from raydistill.errors import CheckpointError, ConfigError, TrainingError
from raydistill.runtime.keeper import (
    PREEMPTION_EVERY,
    Keeper,
    PartWriter,
    is_snapshot_step,
    manifest_of,
    require_same_settings,
)
from raydistill.runtime.session import Session
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.trainer import GeneratorSide, Progress, Rank

log = logging.getLogger(__name__)


def train(config: RunConfig, session: Session) -> Progress:
    """The run on this rank; returns how far it came. Raises what the roles raise.

    Every rank ends with the same `Progress`; rank 0 has drained the evaluator.
    """
    torch.set_grad_enabled(True)
    trainer = session.rank(config)
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
    if start == 0 and config.teacher.preflight and isinstance(trainer, GeneratorSide):
        figures = trainer.preflight()
        if main:
            session.tracker.metrics(figures, 0)
    keeper = Keeper(trainer, session, snapshots) if main else None
    # a role whose first rank is not rank 0 writes its own part of each snapshot, and so does every rank with a share
    writes = trainer.world.rank == 0 or trainer.sharded
    writer = PartWriter(trainer, snapshots) if writes and not main else None
    if keeper:
        keeper.begin()
    if writer:
        writer.begin()
    total = config.train.generator_updates
    while trainer.progress.generator_updates < total:
        if not trainer.goes_on():
            break
        try:
            values = trainer.window()
        except TrainingError as error:
            try:
                where = write_replay(trainer, config, error)
            except CheckpointError as full:
                where = f"no replay of it could be written: {full}"
            trainer.world.barrier()  # its ranks fail together, and the first one to end takes the others with it
            raise TrainingError(f"{error}; {where}") from error
        step = trainer.progress.generator_updates
        if keeper:
            keeper.after_update(values)
        if writer and is_snapshot_step(config, step):
            writer.save()
        if step % PREEMPTION_EVERY == 0 and session.should_save():
            if keeper:
                keeper.save_now()
            if writer:
                writer.save()
        if is_snapshot_step(config, step):
            session.milestone({"generator_updates": float(step)})
    if keeper:
        keeper.end()
    if writer:
        writer.end()
    session.world.barrier()  # no rank ends before the last snapshot is committed
    if keeper and trainer.progress.generator_updates >= total:
        keeper.drain()
    if keeper:
        keeper.close()
    return trainer.progress


def resume(trainer: Rank, snapshots: Snapshots) -> None:
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
    if manifest["data_fingerprint"] != trainer.batches.fingerprint:
        raise CheckpointError(
            f"{snapshot.path} was trained on other shards than data.shards={trainer.config.data.shards!r} holds now; "
            "choose another name, or resume=false to start anew"
        )
    require_same_settings(trainer.config, snapshot.step, manifest)
    trainer.load(snapshot)
    log.warning("resumed from %s", snapshot.path)


def write_replay(trainer: Rank, config: RunConfig, error: TrainingError) -> str:
    """Save this rank's roles as they are before the failed step; batch and draws follow from the counters.

    Called by all ranks of the role. Raises CheckpointError if it can't be written.
    """
    # roles apart may fail at the same time, each with its own part
    own = "" if len(trainer.parts) > 1 else f"/{next(iter(trainer.parts))}"
    replay = Snapshots(f"{config.run_dir}/replay{own}", keep=1)
    step = trainer.progress.generator_updates
    world = trainer.world
    if not world.any(world.rank == 0 and step not in replay.steps()):
        return f"weights before the step, settings and counters are in {replay.path(step)}"
    if world.rank == 0:
        replay.discard_unfinished()
    world.barrier()
    full: CheckpointError | None = None
    if world.rank == 0 or trainer.sharded:
        try:
            for part, (tensors, state) in trainer.save().items():
                replay.write_part(step, part, tensors, state)
        except CheckpointError as reason:
            full = reason
    if world.any(full is not None):
        raise full or CheckpointError(f"another rank can't write its part of {replay.path(step)}")
    if world.rank == 0:
        samples = {f"x/{n}": sampled.x.contiguous() for n, sampled in enumerate(trainer.kept)}
        # made by weights that have moved since: a critic step that failed on them can't make them again
        if samples and trainer.samples_are_older:
            replay.write_part(step, "samples", samples, {})
        # the failed step is one of the window's: these say which, and all its draws follow from them
        steps = {role: owner.optimizer.steps for role, owner in trainer.parts.items()}
        replay.commit(
            step, manifest_of(trainer, trainer.session) | {"optimizer_steps": steps, "stopped_by": str(error)}
        )
    return f"weights before the step, settings and counters are in {replay.path(step)}"
