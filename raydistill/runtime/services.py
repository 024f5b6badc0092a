"""Tracker and evaluator as the loop sees them, in this process; `raydistill.runtime.actors` puts both behind actors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raydistill.checkpoint import Snapshots
from raydistill.roles.evaluator import Evaluation, Evaluator
from raydistill.runtime.build import build_method, build_pipeline
from raydistill.runtime.settings import RunConfig
from raydistill.tracking import Tracker, previous_run_id


def open_tracker(config: RunConfig) -> Tracker:
    """The run's tracker; goes on with the MLflow run that its folder already has. Raises TrackingError."""
    return Tracker(config.tracking, config.run_dir, config.name, run_id=previous_run_id(config.run_dir))


def build_evaluator(config: RunConfig, device: str = "cpu") -> Evaluator:
    """The evaluator with a pipeline of its own."""
    pipeline = build_pipeline(config)
    return Evaluator(
        config.evaluator,
        pipeline,
        build_method(config, pipeline),
        config.teacher.guidance_scale,
        device=device,
        cache_dir=f"{config.output_dir}/teacher_figures",
    )


def evaluate_snapshot(evaluator: Evaluator, config: RunConfig, step: int) -> Evaluation:
    """The figures of the run's snapshot of `step`; step -1 is the teacher."""
    if step < 0:
        return evaluator.evaluate_teacher()
    return evaluator.evaluate(Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep).read(step))


class LocalTracker:
    """A Tracker in this process."""

    def __init__(self, tracker: Tracker):
        self._tracker = tracker

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.metrics(values, step)

    def tags(self, tags: Mapping[str, Any]) -> None:
        self._tracker.tags(tags)

    def artifact_bytes(self, data: bytes, name: str, artifact_path: str = "") -> None:
        self._tracker.artifact_bytes(data, name, artifact_path)

    def sync(self) -> None:
        self._tracker.flush(timeout_s=0.0)


class LocalEvaluator:
    """An Evaluator in this process: a request is answered before `start` returns, so training waits for it."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._evaluator: Evaluator | None = None
        self._answer: tuple[int, Evaluation] | None = None

    def start(self, path: str | None, step: int) -> None:
        if self._evaluator is None:
            self._evaluator = build_evaluator(self._config)
        with torch.random.fork_rng(devices=[]):
            self._answer = step, evaluate_snapshot(self._evaluator, self._config, step)

    def busy(self) -> bool:
        return self._answer is not None

    def collect(self, timeout_s: float) -> tuple[int, Evaluation] | None:
        answer, self._answer = self._answer, None
        return answer
