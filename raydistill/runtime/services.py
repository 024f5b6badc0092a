"""Tracker and evaluator as the loop sees them, in this process; `raydistill.runtime.actors` puts both behind actors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from raydistill.checkpoint import Snapshot, Snapshots
from raydistill.errors import EvaluatorError, RayDistillError
from raydistill.eval.judge import Part
from raydistill.models.denoiser import Denoiser
from raydistill.models.edm_pipeline import is_edm
from raydistill.roles.evaluation_inputs import require_conditions, require_files
from raydistill.roles.evaluator import Evaluation, Evaluator, Helpers
from raydistill.runtime.build import build_method, build_pipeline
from raydistill.runtime.session import TEACHER_STEP
from raydistill.runtime.settings import RunConfig, teacher_folder
from raydistill.tracking import RunInput, Tracker, code_commit, previous_run_id

log = logging.getLogger(__name__)


def open_tracker(config: RunConfig) -> Tracker:
    """The run's tracker; goes on with the MLflow run that its folder already has. Raises TrackingError."""
    tracker = Tracker(config.tracking, config.run_dir, config.name, run_id=previous_run_id(config.run_dir))
    tags = {"method": config.method.label, "placement": config.placement.mode, "commit": code_commit()}
    tracker.tags({name: value for name, value in tags.items() if value is not None})
    return tracker


def build_evaluator(
    config: RunConfig, device: str = "cpu", shared: Callable[[str], Denoiser | None] = lambda _: None
) -> Evaluator:
    """The evaluator with a pipeline of its own; shared: its denoiser by its fingerprint, if others have it."""
    pipeline = build_pipeline(config)
    if denoiser := shared(pipeline.fingerprint):
        pipeline.denoiser = denoiser
    return Evaluator(
        config.evaluator,
        pipeline,
        build_method(config, pipeline),
        config.teacher.guidance_scale,
        device=device,
        cache_dir=f"{config.output_dir}/teacher_figures",
        reference_dir=f"{config.output_dir}/reference_features",
        channels_last=config.train.channels_last,
    )


def require_evaluation(config: RunConfig) -> None:
    """Raise ConfigError or DataError if the evaluator's protocol does not fit the teacher or lacks a file."""
    if config.evaluator.enabled:
        require_protocol_fits(config)
        require_files(config.evaluator)


def require_protocol_fits(config: RunConfig) -> None:
    """Raise ConfigError if the evaluator's protocol does not fit the teacher's conditions."""
    if config.evaluator.enabled:
        require_conditions(config.evaluator, by_class=is_edm(teacher_folder(config.teacher)))


def evaluate_snapshot(
    evaluator: Evaluator, config: RunConfig, step: int, helpers: Helpers | None = None
) -> Evaluation:
    """The figures of the run's snapshot of `step`, or of the teacher."""
    if step == TEACHER_STEP:
        return evaluator.evaluate_teacher(helpers)
    return evaluator.evaluate(_snapshot(config, step), helpers)


def evaluate_part(evaluator: Evaluator, config: RunConfig, step: int, worker: int, workers: int) -> Part:
    """One worker's share of it."""
    return evaluator.part(None if step == TEACHER_STEP else _snapshot(config, step), worker, workers)


def _snapshot(config: RunConfig, step: int) -> Snapshot:
    return Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep).read(step)


class LocalTracker:
    """A Tracker in this process."""

    def __init__(self, tracker: Tracker):
        self._tracker = tracker

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.metrics(values, step)

    def tags(self, tags: Mapping[str, Any]) -> None:
        self._tracker.tags(tags)

    def inputs(self, inputs: Sequence[RunInput]) -> None:
        self._tracker.inputs(inputs)

    def artifact_bytes(self, data: bytes, name: str, artifact_path: str = "") -> None:
        self._tracker.artifact_bytes(data, name, artifact_path)

    def sync(self) -> None:
        self._tracker.flush(timeout_s=0.0)


class LocalEvaluator:
    """An Evaluator in this process: a request is answered before `start` returns, so training waits for it."""

    def __init__(self, config: RunConfig):
        self._config = config
        self._evaluator: Evaluator | None = None
        self._answer: Evaluation | EvaluatorError | None = None

    def start(self, step: int) -> None:
        try:
            if self._evaluator is None:
                self._evaluator = build_evaluator(self._config)
            with torch.random.fork_rng(devices=[]):
                self._answer = evaluate_snapshot(self._evaluator, self._config, step)
        except RayDistillError:
            raise
        except Exception as error:
            log.debug("evaluation of step %d", step, exc_info=True)
            self._answer = EvaluatorError(f"{type(error).__name__}: {error}")

    def collect(self, timeout_s: float) -> Evaluation | None:
        answer, self._answer = self._answer, None
        if isinstance(answer, EvaluatorError):
            raise answer
        return answer
