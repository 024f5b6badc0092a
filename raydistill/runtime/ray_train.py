"""The one place that calls Ray Train: the worker group, its session, and what its failures mean.

Ray Train starts the workers, joins them in a process group, restarts the group after a failure and warns of a node
that goes away. Snapshots are ours (`raydistill.checkpoint`): they outlive Ray's versions and serve the inline session
too, so a restarted group looks for the newest one itself and Train is told of it by a report without a checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raydistill import errors
from raydistill.errors import RayDistillError, TrainingError
from raydistill.models.pipeline import Pipeline
from raydistill.roles.teacher import Scorer
from raydistill.roles.world import World
from raydistill.runtime import actors, loop
from raydistill.runtime.apart import CriticRank, GeneratorRank
from raydistill.runtime.batches import OpenReader
from raydistill.runtime.build import pick_device
from raydistill.runtime.pool import TeacherPool
from raydistill.runtime.ranks import partition
from raydistill.runtime.room import worker_cpus
from raydistill.runtime.session import EvaluatorLike, TrackerLike, stop_requested
from raydistill.runtime.settings import (
    RunConfig,
    config_from_dict,
    to_dict,
    without_secret_settings,
)
from raydistill.runtime.teachers import require_same_teacher
from raydistill.runtime.trainer import Rank, Trainer

_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_FAILURE_FILE = "failure.json"


class TrainSession:
    """`Session` inside a Ray Train worker."""

    def __init__(self, config: RunConfig, tracker: Any, evaluator: Any, teachers: Any, run_id: str):
        context = ray.train.get_context()
        self.world = World(context.get_world_rank(), context.get_world_size())
        self.device = pick_device(config.placement.gpus_per_worker)
        self.tracker: TrackerLike = actors.ActorTracker(tracker)
        self.evaluator: EvaluatorLike | None = (
            actors.ActorEvaluator(evaluator) if evaluator is not None else None
        )
        self.run_id = run_id
        self._config = config
        self._teachers = teachers
        self._run_dir = config.run_dir
        self._warned = False

    def scorer(self, pipeline: Pipeline) -> Scorer | None:
        if self._teachers is None:
            return None
        spec = require_same_teacher(self._config, self._teachers, pipeline.fingerprint)
        placement = self._config.placement
        return TeacherPool(
            self._teachers,
            pipeline.denoiser,
            device=self.device,
            wire_dtype=placement.wire_dtype,
            transport=spec.transport,
            chunk_size=placement.teacher_chunk_size,
            timeout_s=placement.teacher_timeout_s,
        )

    def rank(self, config: RunConfig, open_reader: OpenReader | None = None) -> Rank:
        """What this rank is to hold. open_reader: instead of the shards that the settings name."""
        if config.placement.mode != "disaggregated":
            return Trainer(config, self, open_reader=open_reader)
        nodes = torch.zeros(self.world.size, dtype=torch.int64)
        nodes[self.world.rank] = ray.train.get_context().get_node_rank()
        self.world.max_(nodes)
        ranks = partition(nodes.tolist(), config.placement.critic_ranks)
        groups = {role: dist.new_group(list(ranks.ranks(role))) for role in ("generator", "critic")}
        role = ranks.role(self.world.rank)
        members = ranks.ranks(role)
        world = World(members.index(self.world.rank), len(members), groups[role])
        return (GeneratorRank if role == "generator" else CriticRank)(
            config, self, ranks, world, open_reader=open_reader
        )

    def should_stop(self, world: World) -> bool:
        return world.any(stop_requested(self._run_dir))

    def should_save(self) -> bool:
        if self._warned or ray.train.get_preemption_info() is None:
            return False
        # training goes on: when the node is gone Ray restarts the group, and counts that as no failure of ours
        self._warned = True
        return True

    def milestone(self, metrics: dict[str, float]) -> None:
        ray.train.report(metrics)


def train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs. A mistake of ours or the user's is written down, not retried."""
    # it tells of every report, by a logger that is named after its file
    told_by = Path(ray.train.__file__).parent / "v2/_internal/execution/context.py"
    logging.getLogger(str(told_by)).setLevel(logging.WARNING)
    config = config_from_dict(settings["config"])
    failure = Path(config.run_dir) / _FAILURE_FILE
    if failure.exists():
        return
    if not config.placement.gpus_per_worker:
        torch.set_num_threads(settings["cpus"])
    session = TrainSession(
        config, settings["tracker"], settings["evaluator"], settings["teachers"], settings["run_id"]
    )
    try:
        loop.train(config, session)
    except RayDistillError as error:
        # Ray hands a service's error on as a class of its own that derives from the original one
        kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
        cause = getattr(error, "cause", error)
        partial = failure.with_suffix(f".{session.world.rank}.partial")
        try:
            partial.write_text(json.dumps({"kind": kind, "message": str(cause)}))
            partial.replace(failure)
        except OSError:  # a full disk: what Ray says of the error has to do
            raise error from None
        if session.world.size > 1:
            raise  # the other ranks may wait for this one; the restarted group finds the file and ends
        return


def fit(config: RunConfig, tracker: Any, evaluator: Any, teachers: Any, run_id: str) -> None:
    """Train under Ray Train until the run ends or was asked to stop.

    teachers: the pool's manager, None where every worker has the teacher itself.

    Raises the RayDistillError that stopped it, PlacementError if the cluster is too small, and TrainingError after
    `placement.max_failures` restarts.
    """
    cpus = worker_cpus(config)
    failure = Path(config.run_dir) / _FAILURE_FILE
    failure.unlink(missing_ok=True)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # its 2 s would throttle reports
    # no node but this one can go away, and every process of Ray's wakes a hundred times a second
    unwatched = sum(node["Alive"] for node in ray.nodes()) == 1 and _WATCHER not in os.environ
    if unwatched:
        os.environ[_WATCHER] = "0"
    resources: dict[str, float] = {"CPU": cpus}
    if config.placement.gpus_per_worker:
        resources["GPU"] = config.placement.gpus_per_worker
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": to_dict(without_secret_settings(config)), "run_id": run_id, "cpus": cpus,
            "tracker": tracker, "evaluator": evaluator, "teachers": teachers,
        },
        scaling_config=ScalingConfig(
            num_workers=config.placement.workers,
            use_gpu=config.placement.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if config.placement.gpus_per_worker else "gloo", timeout_s=600
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=f"{config.run_dir}/ray_train",
            failure_config=FailureConfig(max_failures=config.placement.max_failures),
        ),
    )  # fmt: skip
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if not failure.exists():
            told = _foreseen(error)
            if told is not None:
                raise told from error
            raise TrainingError(
                f"training failed (placement.max_failures={config.placement.max_failures}); the last reason: "
                f"{str(error).strip().splitlines()[-1]}"
            ) from error
    finally:
        if unwatched:
            del os.environ[_WATCHER]
    if failure.exists():
        told = json.loads(failure.read_text())
        raise getattr(errors, told["kind"])(told["message"])


def _foreseen(error: BaseException) -> RayDistillError | None:
    """The RayDistillError inside a failure of Ray Train, if there is one."""
    for failure in (*getattr(error, "worker_failures", {}).values(), error.__cause__):
        # Ray hands errors on in wrappers of its own
        for each in (failure, getattr(failure, "_base_exc", None), getattr(failure, "cause", None)):
            if isinstance(each, RayDistillError):
                return each
    return None
