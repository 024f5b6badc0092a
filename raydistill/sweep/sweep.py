"""The sweep from the driver's side: cluster, teacher service, Tune, and what is left at the end."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from raydistill.checkpoint import Snapshots
from raydistill.config import flatten, to_dict
from raydistill.errors import ConfigError, PlacementError, RayDistillError, TrackingError, TrainingError
from raydistill.report import write_report
from raydistill.runtime.build import build_pipeline
from raydistill.runtime.fit import require_fit
from raydistill.runtime.prepare import prepare_builtin, prepare_shards
from raydistill.runtime.room import check_room, has_room
from raydistill.runtime.run import InterruptedRunError, check_folder, connect
from raydistill.runtime.services import require_evaluation
from raydistill.runtime.session import request_stop
from raydistill.runtime.settings import RunConfig, without_secret_settings
from raydistill.runtime.signals import on_sigterm
from raydistill.runtime.summary import export_snapshot, register_export
from raydistill.runtime.teachers import require_same_teacher, start_pool, stop_service
from raydistill.sweep.board import ENDED, FILE, Board, State, read, shown_space
from raydistill.sweep.config import Range, SweepConfig, checked, trial_config, trials_of
from raydistill.sweep.trial import COMPLETE, ERROR, INTERRUPTED, KEY, STEP, Order, Trial
from raydistill.tracking import Tracker, has_unsent, journal_is_held, previous_run_id, require_store

log = logging.getLogger(__name__)

_STOP_S = 120.0
_MAY_DIFFER = (
    "output_dir",
    "tracking.",
    "placement.",
    "data.cache_dir",
    "data.num_workers",
    "prepare.",
    "train.log_every",
)
"""Settings that a resumed sweep may give otherwise."""


def sweep(config: SweepConfig, *, resume: bool = False) -> Board:
    """Run all trials, or those that an interruption has left; returns what came of them.

    resume: go on with the sweep of this name. `local_cluster.prepare_to_join` must have been called before Ray, and so
    this module, was imported. Raises RayDistillError for everything a user can mend,
    InterruptedRunError if it was asked to stop.
    """
    config = checked(config)
    require_evaluation(config.run)
    require_store(config.run.tracking, config.run.run_dir)
    board = _board(config, resume)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial that failed early has no figure
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the board has the table
    # figures are in the runs' own journals and MLflow, and nobody is to be told that Tune's own files are missing
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)
    mine = not ray.is_initialized()
    if mine:
        connect(quiet=True)
    try:
        config = board.config = _with_places(config)
        prepare_builtin(config.run)
        prepare_shards(config.run)
        return _on_ray(board)
    finally:
        if mine:
            ray.shutdown()


def _board(config: SweepConfig, resume: bool) -> Board:
    file = Path(config.folder) / FILE
    if journal_is_held(config.folder):
        raise ConfigError(
            f"a sweep of name={config.name!r} is going on in {config.folder}: wait for it, or choose another name"
        )
    if file.is_file() and not resume:
        raise ConfigError(
            f"there is a sweep in {config.folder} already: --resume goes on with it, another name= begins another"
        )
    if resume and not file.is_file():
        raise ConfigError(f"--resume: there is no {file}; without it the sweep begins")
    board = read(file, config) if resume else Board(config)
    now = flatten(without_secret_settings(config.run))
    board.settings = board.settings or now
    changed = [
        f"{name}: {board.settings.get(name)} then, {value} now"
        for name, value in now.items()
        if board.settings.get(name) != value and not name.startswith(_MAY_DIFFER)
    ]
    if changed:
        raise ConfigError(
            f"{file} is of a sweep with other settings ({'; '.join(changed[:5])}): give the same, or another name="
        )
    if config.search != "optuna":
        for number, settings in enumerate(trials_of(config)):
            board.row(_name(config, number), settings)
    if len(board.rows) > config.count:
        raise ConfigError(f"{file} has {len(board.rows)} trials already: give --num-trials at least as many")
    for row in board.rows.values():
        if row.state not in ENDED:
            check_folder(trial_config(config.run, row.settings, row.name))
    return board


def _name(config: SweepConfig, number: int) -> str:
    return f"{config.name}-{number:03d}"


def _with_places(config: SweepConfig) -> SweepConfig:
    """The sweep with its workers' CPUs and the number of trials at a time chosen for the cluster.

    Raises PlacementError if it has no room for one trial.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    placement = config.run.placement
    workers = placement.workers or (2 if placement.mode == "disaggregated" else 1)
    run = replace(config.run, placement=replace(placement, workers=workers))
    least = placement.cpus_per_worker or 1
    check_room(nodes, run, least)
    most = min(config.max_at_once or config.count, config.count)
    places = next((n for n in range(most, 1, -1) if _fits(nodes, run, least, n)), 1)
    cpus = placement.cpus_per_worker
    if not cpus:
        largest = 1 if placement.gpus_per_worker else int(max(node.get("CPU", 0.0) for node in nodes))
        cpus = next((share for share in range(largest, 1, -1) if _fits(nodes, run, share, places)), 1)
    # its figures decide, so it must not wait for a free core; and a worker of one thread has no barriers to suffer at
    evaluator = replace(run.evaluator, idle_priority=False, threads=1) if cpus == 1 else run.evaluator
    run = replace(run, evaluator=evaluator, placement=replace(run.placement, cpus_per_worker=cpus))
    return replace(config, run=run, max_at_once=places)


def _fits(nodes: list[Mapping[str, float]], run: RunConfig, cpus: int, trials: int) -> bool:
    """Whether so many trials have room at a time, each with its evaluator, and its teachers if it has its own."""
    if not has_room(nodes, run, cpus, runs=trials):
        return False
    each = math.ceil(trials / len(nodes))
    try:
        require_fit(run, [node.get("memory", math.inf) / each for node in nodes])
    except PlacementError:
        return False
    return True


def _on_ray(board: Board) -> Board:
    config = board.config
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    parent = Tracker(config.run.tracking, config.folder, config.name, run_id=previous_run_id(config.folder))
    status = "FAILED"
    try:
        parent.params({"space": shown_space(config)} | {
            "metric": config.figure, "search": config.search, "at_once": config.max_at_once,
        })  # fmt: skip
        if parent.uri:
            tracking = replace(config.run.tracking, parent_run_id=parent.run_id)
            config = board.config = replace(config, run=replace(config.run, tracking=tracking))
        board.save()
        with on_sigterm(partial(_stop_trials, board)), _teacher_service(board):
            _tune(board)
        _send_what_waits(board)
        unfinished = [row for row in board.rows.values() if row.state in ("pending", "running")]
        left = len(unfinished) + config.count - len(board.rows)
        if left:
            status = "KILLED"
            for row in unfinished:
                row.state = "pending"
            board.save()
            raise InterruptedRunError(
                f"the sweep was stopped with {left} of {config.count} trials unfinished; "
                "the same command with --resume goes on from their snapshots"
            )
        _leave_results(board)
        parent.artifact(str(board.file))
        if report := board.results["report"]:
            parent.artifact(report)
        status = "FAILED" if board.failed else "FINISHED"
    finally:
        parent.finish(status)
    return board


def _send_what_waits(board: Board) -> None:
    """Figures of ended trials that a tracking server was not there for."""
    tracking = board.config.run.tracking
    for row in board.rows.values():
        run_id = previous_run_id(row.run_dir)
        if row.state not in ENDED or run_id is None or not has_unsent(row.run_dir):
            continue
        try:
            tracker = Tracker(tracking, row.run_dir, row.name, run_id=run_id)
        except TrackingError as error:
            log.warning("%s is not whole in MLflow, --resume tries it again: %s", row.name, error)
            continue
        tracker.finish("FINISHED" if row.state == "finished" else "KILLED")


@contextmanager
def _teacher_service(board: Board) -> Iterator[None]:
    """The teacher of all trials, with the number of its copies on the board; ended with the sweep."""
    service = board.config.run.placement.teacher_service
    if not board.config.share_teacher or not service:
        yield
        return
    try:
        manager = start_pool(board.config.run)
        if service != board.config.own_service:
            require_same_teacher(board.config.run, manager, build_pipeline(board.config.run).fingerprint)
        yield
        board.teacher_copies = ray.get(manager.copies.remote())
    finally:
        if service == board.config.own_service:
            with contextlib.suppress(PlacementError):  # none was started
                stop_service(service)


def _ask_to_stop(run_dir: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # it has not begun
        request_stop(run_dir)


def _stop_and_wait(run_dir: str) -> None:
    """Until the run has written its snapshot and closed its tracker; Tune itself would kill it after ten seconds."""
    until = time.monotonic() + _STOP_S
    _ask_to_stop(run_dir)
    while journal_is_held(run_dir) and time.monotonic() < until:
        pass  # the question itself waits


def _stop_trials(board: Board) -> None:
    """What SIGTERM does: the trials write snapshots, then Tune ends. Ctrl-C, Tune's, does not wait for them."""
    os.write(2, b"raydistill: SIGTERM: the trials write their snapshots\n")
    running = [row.run_dir for row in board.rows.values() if row.state == "running"]
    for run_dir in running:
        _ask_to_stop(run_dir)
    for run_dir in running:
        _stop_and_wait(run_dir)
    os.kill(os.getpid(), signal.SIGINT)


def _tune(board: Board) -> None:
    config = board.config
    ended = {name for name, row in board.rows.items() if row.state in ENDED}
    orders = [asdict(Order(name, row.settings, ended=name in ended)) for name, row in board.rows.items()]
    if config.search == "optuna":
        space: dict[str, Any] = {}
        search: Searcher | None = NumberedSearch(config, orders)
        count = config.num_trials
    else:
        space, search, count = {KEY: tune.grid_search(orders)}, None, 1
    base = to_dict(config.run)
    trainable = tune.with_parameters(Trial, base=base, metric=config.figure)
    # a trial's own actor only waits: its workers take their CPUs and GPUs themselves, which Tune does not count
    trainable = tune.with_resources(trainable, {"node:__internal_head__": 0.001})
    tuner = tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=config.figure, mode=config.mode, num_samples=count, search_alg=search,
            scheduler=_scheduler(config), max_concurrent_trials=config.max_at_once,
            reuse_actors=True,
            trial_name_creator=_run_of, trial_dirname_creator=_run_of,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=config.folder, verbose=0, callbacks=[_Watcher(board)],
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a run's snapshots are its own
        ),
    )  # fmt: skip
    tuner.fit()


def _run_of(trial: Any) -> str:
    return str(trial.config[KEY]["name"])


def _scheduler(config: SweepConfig) -> TrialScheduler:
    total = config.run.train.generator_updates
    if not config.asha or config.grace >= total:
        return FIFOScheduler()
    # a trial's last figure ends it anyway: as a rung it would call the better ones of the last ones stopped
    return ASHAScheduler(
        time_attr=STEP, max_t=total + 1, grace_period=config.grace, reduction_factor=config.reduction_factor
    )


class NumberedSearch(Searcher):
    """Optuna's suggestions as orders: those of an interrupted sweep first, then new ones."""

    def __init__(self, config: SweepConfig, orders: list[dict[str, Any]]):
        super().__init__(metric=config.figure, mode=config.mode)
        self._config, self._orders, self._number = config, list(orders), 0
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        known = [order["settings"] for order in orders]
        self._inner = OptunaSearch(
            OptunaSearch.convert_search_space({name: _domain(v) for name, v in config.space.items()}),
            metric=config.figure, mode=config.mode, 
            # points of an earlier start draw nothing: with the same seed the new ones would be theirs again
            seed=config.run.seed + len(known), points_to_evaluate=known or None,
        )  # fmt: skip

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        settings = self._inner.suggest(trial_id)
        if not isinstance(settings, dict):
            return settings
        number, self._number = self._number, self._number + 1
        if number < len(self._orders):
            return {KEY: self._orders[number]}
        return {KEY: asdict(Order(_name(self._config, number), settings))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._inner.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._inner.on_trial_complete(trial_id, result, error)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as of `_Watcher`."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep suggests from sweep.json."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


def _domain(values: Any) -> Any:
    if not isinstance(values, Range):
        return tune.choice(list(values))
    low, high = (int(values.low), int(values.high)) if values.kind == "randint" else (values.low, values.high)
    return getattr(tune, values.kind)(low, high)


class _Watcher(tune.Callback):
    """Tells the board of Tune's events."""

    def __init__(self, board: Board):
        self._board = board

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes what it is given to a file, and tracking.uri may hold a password."""
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._tell(trial, "running")

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self._tell(trial, "running")

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result, order = trial.last_result or {}, trial.config[KEY]
        if ERROR in result:
            self._tell(trial, "pending" if result[INTERRUPTED] else "failed", result[ERROR])
        elif result.get(COMPLETE):
            self._tell(trial, "finished")
        else:
            if not order["ended"]:
                _stop_and_wait(self._board.row(order["name"], order["settings"]).run_dir)
            self._tell(trial, "stopped")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._tell(trial, "failed", "its process died, twice: Ray's logs say why")

    def _tell(self, trial: Any, state: State, error: str | None = None) -> None:
        order = trial.config[KEY]
        self._board.row(order["name"], order["settings"])
        if not order["ended"]:
            self._board.update(order["name"], state, error)


def _leave_results(board: Board) -> None:
    """In the sweep's folder: the best trial's best snapshot as a generator, registered where that is asked for, and the
    report on all trials."""
    best = board.best
    if best is None or best.step is None:
        errors = "; ".join(f"{row.name}: {row.error}" for row in board.rows.values() if row.error)
        raise TrainingError(f"no trial of the sweep has a figure {board.config.figure}: {errors}")
    config = trial_config(board.config.run, best.settings, best.name)
    folder = Path(board.config.folder)
    board.results = {"export": None, "export_step": best.step, "report": None}
    try:
        snapshots = Snapshots(f"{best.run_dir}/snapshots", config.checkpoint.keep)
        exported = export_snapshot(config, snapshots.read(best.step), folder / "export")
        board.results["export"] = str(exported)
        name, run_id = board.config.run.tracking.register_as, previous_run_id(best.run_dir)
        if name and run_id:
            board.results["registered"] = register_export(config, name, best.step, exported, run_id)
    except RayDistillError as error:
        log.warning("the best trial is not exported: %s", error)
        board.results["export_error"] = str(error)
    board.save()
    try:
        report = write_report([folder], folder / "report.html", f"raydistill: sweep {board.config.name}")
        board.results["report"] = str(report)
    except RayDistillError as error:
        log.warning("there is no report: %s", error)
    board.save()
