"""What the training loop asks of its surroundings: `Session`, inside Ray Train or inline without Ray.

The loop never imports Ray; `raydistill.runtime.ray_train` holds the Ray Train implementation.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from raydistill.errors import EvaluatorError, TrackingError
from raydistill.eval.protocol import SAMPLER_FIELDS, cost
from raydistill.roles.evaluator import Evaluation
from raydistill.roles.teacher import Scorer
from raydistill.roles.world import World
from raydistill.tracking import RunInput

if TYPE_CHECKING:
    from raydistill.models.pipeline import Pipeline
    from raydistill.runtime.settings import RunConfig
    from raydistill.runtime.trainer import Rank

log = logging.getLogger(__name__)

_TELL_S = 60.0


class TrackerLike(Protocol):
    """The tracker, in this process or behind an actor; every call returns at once but `sync`."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def tags(self, tags: Mapping[str, Any]) -> None: ...

    def inputs(self, inputs: Sequence[RunInput]) -> None: ...

    def artifact_bytes(self, data: bytes, name: str, artifact_path: str = "") -> None: ...

    def sync(self) -> None:
        """Return when everything recorded so far is in the journal on disk."""


class EvaluatorLike(Protocol):
    """The evaluator: requests go in, answers are collected later."""

    def start(self, step: int) -> None:
        """Begin evaluating the snapshot of `step`, or the teacher as TEACHER_STEP. One request at a time."""

    def collect(self, timeout_s: float) -> Evaluation | None:
        """The answer to the request in hand, waiting at most `timeout_s`; None if it is not there yet.

        Raises RayDistillError for what the user can mend, EvaluatorError if the evaluator died over the request.
        """


class Session(Protocol):
    """One rank's view of the run it takes part in."""

    world: World
    device: torch.device
    tracker: TrackerLike
    evaluator: EvaluatorLike | None
    run_id: str

    def scorer(self, pipeline: Pipeline) -> Scorer | None:
        """The teacher of a placement that has it elsewhere; None: it is part of this process."""

    def rank(self, config: RunConfig) -> Rank:
        """What this rank is to hold, ready to train."""

    def should_stop(self, world: World) -> bool:
        """Whether the run was asked to stop (SIGTERM to the driver); called by all ranks of `world`, which agree."""

    def should_save(self) -> bool:
        """Whether a node is about to go away and a snapshot should be written now; true once; called by all ranks."""

    def milestone(self, metrics: dict[str, float]) -> None:
        """Tell whoever coordinates the run that a snapshot's update was reached; called by all ranks together."""


STOP_FILE = "stop_requested"
LEDGER = "evaluations.json"
TEACHER_STEP = -1
"""The step under which the teacher's own figures are asked for."""


def stop_requested(run_dir: str) -> bool:
    """Whether somebody asked the run in `run_dir` to stop at the next update."""
    return os.path.exists(f"{run_dir}/{STOP_FILE}")


def request_stop(run_dir: str) -> None:
    """Ask the run to write a snapshot and stop; safe to call from a signal handler."""
    with open(f"{run_dir}/{STOP_FILE}", "w"):
        pass


class EvaluationQueue:
    """Which snapshots get evaluated, newest wins, and what came of them; lives in rank 0.

    At most one evaluation runs and one waits. A newer snapshot takes the waiting one's place, unless that was marked
    `must` (the first, the last). The ledger on disk outlives the process: what has no figures is asked for again by
    the next process. An evaluator that dies over a request costs that request, never the training.
    """

    def __init__(self, evaluator: EvaluatorLike, tracker: TrackerLike, run_dir: str):
        self._evaluator = evaluator
        self._tracker = tracker
        self._run_dir = run_dir
        self._ledger_file = Path(run_dir) / LEDGER
        self.ledger: dict[str, dict[str, Any]] = (
            json.loads(self._ledger_file.read_text()) if self._ledger_file.is_file() else {}
        )
        for step in [step for step, entry in self.ledger.items() if entry["state"] == "failed"]:
            del self.ledger[step]
        self._reference = ""
        self._waiting: list[tuple[int, bool]] = []  # (step, must); the teacher is TEACHER_STEP
        self._running: int | None = None

    def pending_steps(self) -> set[int]:
        """Steps whose snapshots must not be deleted yet."""
        steps = {step for step, _ in self._waiting}
        return steps | ({self._running} if self._running is not None else set())

    def figures(self, now: int) -> dict[str, float]:
        """What waits, and how old the newest figures are; `now`: generator updates made."""
        done = [int(step) for step, entry in self.ledger.items() if entry["state"] == "done"]
        return {
            "eval/queue": float(len(self.pending_steps())),
            "eval/behind_updates": float(now - max([0, *done])),
        }

    def answered(self, step: int) -> bool:
        return str(step) in self.ledger

    def submit(self, step: int, *, must: bool = False) -> None:
        """Ask for the evaluation of the snapshot of `step` (TEACHER_STEP: of the teacher)."""
        if self.answered(step) or step in self.pending_steps():
            return
        for waiting in [entry for entry in self._waiting if not entry[1]]:
            self._waiting.remove(waiting)
            self._record(waiting[0], {"state": "skipped"})
        self._waiting.append((step, must))
        self._start_next()

    def poll(self, now: int, timeout_s: float = 0.0) -> None:
        """Collect an answer if there is one; `now`: generator updates made, to report the lag."""
        if self._running is None:
            return
        step = self._running
        try:
            evaluation = self._evaluator.collect(timeout_s)
        except EvaluatorError as error:
            log.warning("the evaluation of step %d failed, training goes on: %s", step, error)
            self._running = None
            self._record(step, {"state": "failed", "error": str(error)})
            self._tracker.metrics({"eval/failed": float(self._count("failed"))}, now)
            self._start_next()
            return
        if evaluation is None:
            return
        self._running = None
        metrics = evaluation.metrics
        if step >= 0:
            metrics = metrics | {
                "eval/lag_updates": float(now - step),
                "eval/skipped": float(self._count("skipped")),
            }
            self._tracker.artifact_bytes(evaluation.grid_png, f"grid_{step:08d}.png", "grids")
            self._tracker.tags({"protocol_hash": str(evaluation.protocol.get("hash", ""))})
        self._tracker.metrics(metrics, max(step, 0))
        self._note_reference(evaluation.protocol)
        self._forget_other_protocols(evaluation.protocol)
        # a figure counts as answered only once it is in the journal
        self._tracker.sync()
        self._record(step, {"state": "done", "metrics": evaluation.metrics, "protocol": evaluation.protocol})
        self._start_next()

    def wait(self, now: int, timeout_s: float) -> None:
        """Wait for what was asked for, for `timeout_s` at most and until the run is asked to stop."""
        until = time.monotonic() + timeout_s
        while self.pending_steps() and time.monotonic() < until and not stop_requested(self._run_dir):
            self._start_next()
            self.poll(now, timeout_s=min(1.0, timeout_s))

    def drain(self, now: int) -> None:
        """Wait for everything that was asked for; a run that is asked to stop leaves it to the next process."""
        told = time.monotonic()
        while self.pending_steps() and not stop_requested(self._run_dir):
            self._start_next()
            self.poll(now, timeout_s=1.0)
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                log.warning("waiting for the evaluation of step(s) %s", sorted(self.pending_steps()))

    def best_step(self, metric: str) -> int | None:
        """The step with the best value of a metric among those evaluated."""
        found = {
            int(s): e["metrics"][metric] for s, e in self.ledger.items() if metric in e.get("metrics", {})
        }
        return min(found, key=lambda step: cost(metric, found[step]), default=None)

    def _start_next(self) -> None:
        if self._running is None and self._waiting:
            step, _ = self._waiting.pop(0)
            self._evaluator.start(step)
            self._running = step

    def _note_reference(self, protocol: Mapping[str, Any]) -> None:
        sha256 = str(protocol["reference_sha256"])
        if sha256 != self._reference:
            self._reference = sha256
            name, rows = str(protocol["reference"]), int(protocol["num_reference"])
            self._tracker.inputs([RunInput("evaluation_reference", "evaluation", sha256, name, rows)])

    def _forget_other_protocols(self, protocol: Mapping[str, Any]) -> None:
        """Figures made with other references, captions or detectors are no curve together with this one."""

        def data(of: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in of.items() if name not in (*SAMPLER_FIELDS, "hash")}

        others = [
            step
            for step, entry in self.ledger.items()
            if entry["state"] == "done" and data(entry["protocol"]) != data(protocol)
        ]
        if others:
            log.warning(
                "the figures of step(s) %s were made under another protocol (evaluator.coco, evaluator.reference, "
                "evaluator.captions or prepare.num_val changed) and are left out from here on",
                ", ".join(others),
            )
        for step in others:
            del self.ledger[step]

    def _count(self, state: str) -> int:
        return sum(entry["state"] == state for entry in self.ledger.values())

    def _record(self, step: int, entry: dict[str, Any]) -> None:
        self.ledger[str(step)] = entry
        partial = self._ledger_file.with_suffix(".partial")
        try:
            text = json.dumps(self.ledger, indent=1)
            partial.write_text(text)
            partial.replace(self._ledger_file)
        except OSError as error:
            raise TrackingError(
                f"can't write {self._ledger_file} (output_dir): {error.strerror or error}"
            ) from error
        if entry["state"] == "done":
            # the protocol beside every figure, in MLflow too while the run goes on
            self._tracker.artifact_bytes(text.encode(), LEDGER)
