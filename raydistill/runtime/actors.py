"""Ray actors for the services, and the handles through which a training worker speaks to them.

    rank 0 --metrics(...)------> TrackerActor ----> metrics.jsonl, MLflow      (fire and forget; `sync` waits)
    rank 0 --evaluate(step)----> EvaluatorActor    one call in flight, its answer collected between updates
    driver --progress()--------> TrackerActor

Both may die: Ray restarts them and repeats the calls in hand. The evaluator holds nothing that a snapshot does not;
the tracker goes on with its journal and its MLflow run. With evaluator.workers=N the evaluator has N - 1 helpers, each
of which looks at a share of a figure's samples; it makes the figure of the shares, and a share itself where a helper is
lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raydistill.errors import EvaluatorError, RayDistillError
from raydistill.eval.judge import Part
from raydistill.roles.evaluator import Evaluation, Evaluator
from raydistill.runtime.prometheus import Figures
from raydistill.runtime.services import build_evaluator, evaluate_part, evaluate_snapshot, open_tracker
from raydistill.runtime.settings import config_from_dict
from raydistill.tracking import RunInput, Tracker

log = logging.getLogger(__name__)


class _TrackerActor:
    """What is recorded without an answer (`metrics`, `tags`, `inputs`, `artifact_bytes`) keeps what it raises for the
    next `sync`."""

    def __init__(self, config: dict[str, Any]):
        self._config = config_from_dict(config)
        self._opened: Tracker | None = None
        self._failure: Exception | None = None
        self._figures = Figures(self._config.name)
        self._figures.update({"target_updates": self._config.train.generator_updates})

    @property
    def _tracker(self) -> Tracker:
        # opened by the first call, not by the constructor, so that a failure reaches the caller as itself
        if self._opened is None:
            self._opened = open_tracker(self._config)
        return self._opened

    def run_id(self) -> str:
        return self._tracker.run_id

    def params(self, flat: dict[str, Any]) -> None:
        self._tracker.params(flat)

    def metrics(self, values: dict[str, float], step: int, timestamp_ms: int) -> None:
        def record() -> None:
            unsent = self._tracker.progress()["unsent_bytes"]  # before these, which wait for the next batch
            self._tracker.metrics(values, step, timestamp_ms)
            self._figures.update(values | {"tracking/unsent_bytes": unsent})

        self._keep_failure(record)

    def tags(self, tags: dict[str, Any]) -> None:
        self._keep_failure(lambda: self._tracker.tags(tags))

    def inputs(self, inputs: list[RunInput]) -> None:
        self._keep_failure(lambda: self._tracker.inputs(inputs))

    def artifact_bytes(self, data: bytes, name: str, artifact_path: str) -> None:
        self._keep_failure(lambda: self._tracker.artifact_bytes(data, name, artifact_path))

    def artifact(self, path: str, artifact_path: str) -> None:
        self._tracker.artifact(path, artifact_path)

    def sync(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        self._tracker.flush(timeout_s=0.0)

    def _keep_failure(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._failure = self._failure or error

    def progress(self) -> dict[str, Any]:
        return self._tracker.progress()

    def finish(self, status: str) -> bool:
        return self._tracker.finish(status)


class _EvaluatorActor:
    def __init__(self, config: dict[str, Any], helpers: Sequence[Any] = ()):
        import torch

        self._config = config_from_dict(config)
        self._helpers = helpers
        self._built: Evaluator | None = None
        torch.set_num_threads(self._config.evaluator.threads)
        if self._config.evaluator.idle_priority:
            give_way()

    def evaluate(self, step: int) -> Evaluation:
        helpers = _Helpers(self._helpers, step) if self._helpers else None
        return evaluate_snapshot(self._evaluator, self._config, step, helpers)

    def part(self, step: int, worker: int, workers: int) -> Part:
        return evaluate_part(self._evaluator, self._config, step, worker, workers)

    @property
    def _evaluator(self) -> Evaluator:
        if self._built is None:
            from raydistill.runtime.teachers import shared_teacher

            config = self._config
            self._built = (
                build_evaluator(config, "cuda")
                if config.placement.evaluator_gpus
                else build_evaluator(config, shared=partial(shared_teacher, config))
            )
        return self._built


class _Helpers:
    """The other evaluators, asked for one step's shares."""

    def __init__(self, handles: Sequence[Any], step: int):
        self.count = len(handles)
        self._handles = handles
        self._step = step
        self._requests: list[Any] = []

    def start(self) -> None:
        workers = self.count + 1
        self._requests = [
            handle.part.remote(self._step, worker, workers) for worker, handle in enumerate(self._handles, 1)
        ]

    def collect(self) -> list[Part | None]:
        return [self._collected(request) for request in self._requests]

    def _collected(self, request: Any) -> Part | None:
        try:
            part: Part = get(request)
        except ray.exceptions.RayTaskError:
            raise  # it said why, and would say it here
        except ray.exceptions.RayError as error:
            log.warning("a helper of the evaluator is lost: %s", " ".join(str(error).split())[-300:])
            return None
        return part


def give_way() -> None:
    """Run this process only where a processor has nothing else to do, as far as the system can tell.

    OpenMP's barriers wait for the thread that lost its core: on two cores an evaluator that takes a quarter of one
    makes the trainer 1.8 times slower, at idle priority 1.25 times.
    """
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def start_tracker(config: dict[str, Any]) -> Any:
    """The tracker's actor, on the driver's node, whose disk holds the run folder."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(_TrackerActor).options(**options).remote(config)


def start_evaluators(config: dict[str, Any], count: int, gpus: float, nodes: Sequence[str] = ()) -> list[Any]:
    """The evaluator's actor and count - 1 helpers after it, each on its node of these ids if that is there and has
    room."""
    started: list[Any] = []
    for number in reversed(range(count)):
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 3, "max_task_retries": 3}
        if nodes:
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(nodes[number], soft=True)
        helpers = () if number else tuple(started)
        started.insert(0, ray.remote(_EvaluatorActor).options(**options).remote(config, helpers))
    return started


class ActorTracker:
    """A TrackerActor as the loop sees it."""

    def __init__(self, handle: Any):
        self._handle = handle

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        # its time is taken here: calls that an actor's restart repeats may arrive after later ones
        self._handle.metrics.remote(dict(values), step, int(time.time() * 1000))

    def tags(self, tags: Mapping[str, Any]) -> None:
        self._handle.tags.remote(dict(tags))

    def inputs(self, inputs: Sequence[RunInput]) -> None:
        self._handle.inputs.remote(list(inputs))

    def artifact_bytes(self, data: bytes, name: str, artifact_path: str = "") -> None:
        self._handle.artifact_bytes.remote(data, name, artifact_path)

    def sync(self) -> None:
        get(self._handle.sync.remote())


class ActorEvaluator:
    """An EvaluatorActor as the loop sees it."""

    def __init__(self, handle: Any):
        self._handle = handle
        self._request: Any = None

    def start(self, step: int) -> None:
        self._request = self._handle.evaluate.remote(step)

    def collect(self, timeout_s: float) -> Evaluation | None:
        if self._request is None or not ray.wait([self._request], timeout=timeout_s)[0]:
            return None
        request, self._request = self._request, None
        try:
            answer: Evaluation = get(request)
        except ray.exceptions.RayError as error:
            raise EvaluatorError(" ".join(str(error).split())[-500:]) from error
        return answer


def get(reference: Any) -> Any:
    """`ray.get`, with a service's own RayDistillError instead of Ray's wrapping of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, RayDistillError):
            raise cause from None
        raise
