"""`run(config)`: a whole run from the driver's side, from the data to the exported generator."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from raydistill.checkpoint import Snapshots
from raydistill.config import flatten, to_dict
from raydistill.errors import ConfigError, PlacementError, TrainingError
from raydistill.runtime.keeper import require_same_settings
from raydistill.runtime.local_cluster import address_to_join, free_ports, prepare_to_join
from raydistill.runtime.prepare import prepare_builtin, prepare_shards
from raydistill.runtime.services import require_evaluation
from raydistill.runtime.session import LEDGER, STOP_FILE, TEACHER_STEP, request_stop, stop_requested
from raydistill.runtime.settings import RunConfig, validate
from raydistill.runtime.signals import on_sigterm
from raydistill.runtime.summary import summarise, warn_if_not_exportable
from raydistill.runtime.uploads import fetch_run, require_uploaded
from raydistill.tracking import journal_is_held, require_store

if TYPE_CHECKING:
    from raydistill.runtime.room import Room

log = logging.getLogger(__name__)

Path_ = TypeVar("Path_", str, str | None)

_POLL_S = 2.0
_PLAIN_LINE_S = 10.0
_UPLOADED = "working_dir_files"


class InterruptedRunError(TrainingError):
    """The run was asked to stop; its snapshot is written."""


def run(config: RunConfig) -> dict[str, Any]:
    """Prepare the data, train, evaluate, export the best snapshot; returns and writes the summary.

    Raises RayDistillError with a one-line message for everything a user can mend, InterruptedRunError after SIGTERM.
    """
    config = resolve(config)
    validate(config)
    require_store(config.tracking, config.run_dir)  # before data is prepared, which may take minutes
    require_evaluation(config)
    warn_if_not_exportable(config)
    if not journal_is_held(config.run_dir):
        fetch_run(config)
    check_folder(config)
    made, total = _snapshots(config).steps(), config.train.generator_updates
    if made and made[-1] >= total:
        log.warning(
            "%s: all %d updates are done already; missing figures, summary and export are made "
            "(resume=false starts anew)", config.name, total,
        )  # fmt: skip
    if config.placement.session == "inline":
        from raydistill.runtime.fit import machine_bytes, require_fit

        require_fit(config, [machine_bytes()])
        _run_inline(config)
    else:
        _run_on_ray(config)
    if _was_stopped(config):
        newest = _snapshots(config).steps()[-1]
        raise InterruptedRunError(
            f"stopped at update {newest} as asked; the same command goes on from its snapshot"
        )
    require_uploaded(config)
    summary: dict[str, Any] = json.loads((Path(config.run_dir) / "summary.json").read_text())
    return summary


def _snapshots(config: RunConfig) -> Snapshots:
    return Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep)


def resolve(config: RunConfig) -> RunConfig:
    """Absolute paths: Ray's workers have working directories of their own."""
    from raydistill.runtime.prepare import builtin_paths

    if "://" in config.output_dir:
        raise ConfigError(f"output_dir={config.output_dir!r} must be a local (or network-mounted) folder")
    base = Path.cwd()
    if _UPLOADED in base.parts:  # Ray deletes the copy that it runs an uploaded job in
        base = Path.home() / "raydistill"
    config = replace(
        config,
        output_dir=str(base / config.output_dir),
        teacher=replace(config.teacher, path=_absolute(config.teacher.path, only_if_there=True)),
        data=replace(
            config.data, shards=_absolute(config.data.shards), cache_dir=_absolute(config.data.cache_dir)
        ),
        prepare=replace(config.prepare, coco=_absolute(config.prepare.coco)),
        evaluator=replace(
            config.evaluator,
            coco=_absolute(config.evaluator.coco),
            detector_file=_absolute(config.evaluator.detector_file),
            reference=_absolute(config.evaluator.reference),
            captions=_absolute(config.evaluator.captions),
            clip=_absolute(config.evaluator.clip),
        ),
        tracking=replace(config.tracking, uri=_absolute_sqlite(config.tracking.uri)),
    )
    return builtin_paths(config)


def _absolute(path: Path_, *, only_if_there: bool = False) -> Path_:
    """A local path from here on; URLs, built-in names and (only_if_there) hub ids stay what they are."""
    if (
        not path
        or "://" in path
        or path.startswith("builtin:")
        or (only_if_there and not Path(path).exists())
    ):
        return path
    return str(Path.cwd() / path)


def _absolute_sqlite(uri: str | None) -> str | None:
    prefix = "sqlite:///"
    return prefix + os.path.abspath(uri.removeprefix(prefix)) if uri and uri.startswith(prefix) else uri


def _run_inline(config: RunConfig) -> None:
    import torch

    from raydistill.roles.world import World
    from raydistill.runtime import loop
    from raydistill.runtime.build import pick_device
    from raydistill.runtime.services import LocalEvaluator, LocalTracker, open_tracker
    from raydistill.runtime.session import EvaluatorLike, TrackerLike
    from raydistill.runtime.trainer import Trainer

    prepare_builtin(config)
    prepare_shards(config)
    _prepare_folder(config)
    tracker = open_tracker(config)

    class InlineSession:
        def __init__(self) -> None:
            self.world = World()
            self.device: torch.device = pick_device(config.placement.gpus_per_worker)
            self.tracker: TrackerLike = LocalTracker(tracker)
            self.evaluator: EvaluatorLike | None = (
                LocalEvaluator(config) if config.evaluator.enabled else None
            )
            self.run_id = tracker.run_id

        def scorer(self, pipeline: Any) -> None:
            return None

        def rank(self, config: RunConfig) -> Trainer:
            return Trainer(config, self)

        def should_stop(self, world: World) -> bool:
            return stop_requested(config.run_dir)

        def should_save(self) -> bool:
            return False

        def milestone(self, metrics: dict[str, float]) -> None:
            pass

    status = "FAILED"
    try:
        tracker.params(flatten(config))
        with _stop_on_sigterm(config.run_dir), show_progress(config, tracker.progress):
            loop.train(config, InlineSession())
        status = _close(config, tracker.run_id, tracker.artifact, tracker.tags)
    finally:
        tracker.finish(status)


def _run_on_ray(config: RunConfig) -> None:
    prepare_to_join(address_to_join() if os.environ.get("RAY_ADDRESS") else "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: the evaluator could not give way then
    import ray

    from raydistill.runtime import actors
    from raydistill.runtime.room import find_room, with_workers

    mine = not ray.is_initialized()
    if mine and config.placement.teacher_service and not os.environ.get("RAY_ADDRESS"):
        raise PlacementError(
            f"placement.teacher_service={config.placement.teacher_service!r} needs a cluster that outlives this run: "
            "submit the job to one (raydistill submit), or set RAY_ADDRESS"
        )
    if mine:
        connect()
    try:
        config = with_workers(config)
        _train_on_ray(config, find_room(config), actors.start_tracker(to_dict(config)))
    finally:
        if mine:
            ray.shutdown()


def _train_on_ray(config: RunConfig, room: Room, tracker: Any) -> None:
    """The run from its data on; services start as early as they can, because each imports for ten seconds."""
    import ray

    from raydistill.runtime import actors, ray_train
    from raydistill.runtime.teachers import start_pool

    gpus = config.placement.evaluator_gpus

    def start_evaluators() -> list[Any]:
        return actors.start_evaluators(to_dict(config), config.evaluator.workers, gpus, room.evaluators)

    teachers = None
    evaluators: list[Any] = []
    status, opened = "FAILED", False
    try:
        prepare_builtin(config)
        if config.evaluator.enabled and not gpus:
            evaluators = start_evaluators()
            if config.evaluator.teacher_figure and not (Path(config.run_dir) / LEDGER).exists():
                # the answer stays in the evaluator's cache, a failure shows again when the queue asks
                evaluators[0].evaluate.remote(TEACHER_STEP)
        prepare_shards(config)
        _prepare_folder(config)
        if config.evaluator.enabled and gpus:
            evaluators = start_evaluators()
        run_id = actors.get(tracker.run_id.remote())
        opened = True
        actors.get(tracker.params.remote(flatten(config)))
        if config.placement.mode != "colocated":
            teachers = start_pool(config, room.teachers)

        def progress() -> dict[str, Any]:
            return ray.get(tracker.progress.remote())

        # inside ray.init's own SIGTERM handler, which would end this process at once
        with _stop_on_sigterm(config.run_dir), show_progress(config, progress):
            ray_train.fit(config, tracker, evaluators[0] if evaluators else None, teachers, run_id)
        status = _close(
            config,
            run_id,
            lambda path, folder: actors.get(tracker.artifact.remote(path, folder)),
            lambda tags: actors.get(tracker.tags.remote(tags)),
        )
    finally:
        if opened:
            try:
                ray.get(tracker.finish.remote(status))
            except ray.exceptions.RayError as error:  # must not hide what ended the run
                log.warning("the tracker could not be closed; its journal is whole: %s", error)
        own = None if config.placement.teacher_service else teachers
        for actor in (tracker, *evaluators, own):
            if actor is not None:
                ray.kill(actor)


def connect(num_cpus: int | None = None, *, quiet: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS, or start one that lives as long as this process, with all CPUs or `num_cpus`.

    quiet: what other processes print is left in Ray's logs.

    The workers learn its address: Ray Train asks its state API whether the controller lives, and without RAY_ADDRESS
    that asks the head which was started last on the machine, be it another cluster's (the run would lose its workers)
    or dead (each question takes 40 s).
    """
    import ray

    address = os.environ.get("RAY_ADDRESS", "")
    if address:
        known = "://" not in address and address not in ("auto", "local")
        try:
            ray.init(
                logging_level="WARNING",
                log_to_driver=not quiet,
                runtime_env=_workers_know(address) if known else None,
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise PlacementError(
                f"RAY_ADDRESS={address!r} can't be joined: {error}; unset it to start a Ray of this run's own"
            ) from error
        return
    mine = "RAY_GCS_SERVER_PORT" not in os.environ
    port = os.environ.setdefault("RAY_GCS_SERVER_PORT", str(free_ports(1)[0]))
    try:
        # "local" rather than what Ray finds: the address of a head that died is remembered, and waited for
        ray.init(
            address="local",
            num_cpus=num_cpus,
            logging_level="WARNING",
            log_to_driver=not quiet,
            object_store_memory=256 * 2**20,
            dashboard_host="127.0.0.1",
            runtime_env=_workers_know(f"127.0.0.1:{port}"),
        )
    finally:
        if mine:
            del os.environ["RAY_GCS_SERVER_PORT"]


def _workers_know(address: str) -> dict[str, Any]:
    return {"env_vars": {"RAY_ADDRESS": address}}


def _close(
    config: RunConfig,
    run_id: str,
    artifact: Callable[[str, str], Any],
    tags: Callable[[dict[str, Any]], Any],
) -> str:
    """Summary and export of a complete run; the MLflow status."""
    if _was_stopped(config):
        return "KILLED"
    path = summarise(config, run_id)
    artifact(str(path), "")
    summary = json.loads(path.read_text())
    # its files may be gigabytes: MLflow holds them only as a registered model
    tags({name: summary[name] for name in ("export", "exported_step") if summary[name] is not None})
    return "FINISHED"


def _was_stopped(config: RunConfig) -> bool:
    """Whether it was asked to stop, and that left something undone."""
    if not stop_requested(config.run_dir):
        return False
    total = config.train.generator_updates
    if _snapshots(config).steps()[-1] < total:
        return True
    return config.evaluator.enabled and str(total) not in json.loads(
        (Path(config.run_dir) / LEDGER).read_text()
    )


def check_folder(config: RunConfig) -> None:
    """Refuse, before anything starts and with a finished run's record untouched, what could not go on."""
    if journal_is_held(config.run_dir):
        raise ConfigError(
            f"a run of name={config.name!r} is going on in {config.run_dir}: choose another name, or wait for it"
        )
    newest = _snapshots(config).latest()
    if config.resume and newest is not None:
        require_same_settings(config, newest.step, newest.manifest)


def _prepare_folder(config: RunConfig) -> None:
    folder = Path(config.run_dir)
    if folder.exists() and not config.resume:
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        log.warning("resume=false: the earlier run was set aside as %s", aside)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP_FILE).unlink(missing_ok=True)


def _stop_on_sigterm(run_dir: str) -> AbstractContextManager[None]:
    """SIGTERM asks the run to write a snapshot and end."""

    def ask() -> None:
        request_stop(run_dir)
        os.write(2, b"raydistill: SIGTERM: writing a snapshot, then stopping\n")  # sys.stderr may be in use

    return on_sigterm(ask)


@contextmanager
def show_progress(config: RunConfig, progress: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """A bar on a terminal, a line every ten seconds elsewhere, fed from the tracker."""
    done = threading.Event()
    thread = threading.Thread(target=_draw, args=(config, progress, done), daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10.0)


def _draw(config: RunConfig, progress: Callable[[], dict[str, Any]], done: threading.Event) -> None:
    total = config.train.generator_updates
    terminal = sys.stderr.isatty()
    bar = tqdm(total=total, desc=config.name, unit="update", disable=not terminal, smoothing=0.1)
    shown: tuple[int, str] = (-1, "")
    first: tuple[int, float] | None = None
    last_line = 0.0
    while True:
        ending = done.wait(_POLL_S)
        try:
            state = progress()
        except Exception as error:  # the tracker's actor may be restarting; training goes on without the bar
            if ending:
                return
            log.debug("no progress to show: %s", error)
            continue
        values, step = state["values"], int(state["values"].get("generator_updates", 0))
        if first is None and step:
            first = step, time.monotonic()
        words = _words(values, state["steps"])
        if terminal:
            bar.n = step
            bar.set_postfix_str(words)
        elif (step, words) != shown and (ending or time.monotonic() - last_line >= _PLAIN_LINE_S):
            last_line = time.monotonic()
            shown = (step, words)
            print(f"{config.name}: update {step}/{total}{_eta(step, total, first)} {words}", flush=True)
        if ending:
            bar.close()
            return


def _eta(step: int, total: int, first: tuple[int, float] | None) -> str:
    if first is None or step <= first[0]:
        return ""
    pace = (time.monotonic() - first[1]) / (step - first[0])
    left = int(pace * (total - step))
    return f" [{pace:.2f} s/update, ETA {left // 60}:{left % 60:02d}]"


def _words(values: dict[str, float], steps: dict[str, int]) -> str:
    losses = [("loss/generator_total", "generator"), ("loss/critic_total", "critic")]
    figures = [
        (name, name.removeprefix("eval/"))
        for name in sorted(values)
        if name.startswith(("eval/toyfid", "eval/fid"))
    ]
    words = [f"{short}={values[name]:.3g}" for name, short in losses if name in values]
    if figures:
        # said with its update: it may be far behind
        words.append(f"| update {steps[figures[0][0]]}:")
        figures += [
            (name, "accuracy") for name in sorted(values) if "_accuracy_" in name and "teacher" not in name
        ]
        words += [f"{short}={values[name]:.3g}" for name, short in figures]
    return " ".join(words)
