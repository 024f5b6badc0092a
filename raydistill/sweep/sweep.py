"""The sweep from the driver's side: cluster, teacher service, Tune, and what is left at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
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
from raydistill.errors import ConfigError, PlacementError, RayDistillError, TrainingError
from raydistill.runtime.prepare import prepare_builtin, prepare_shards
from raydistill.runtime.room import check_room
from raydistill.runtime.run import InterruptedRunError, connect
from raydistill.runtime.session import request_stop
from raydistill.runtime.settings import RunConfig, without_secret_settings
from raydistill.runtime.summary import export_snapshot
from raydistill.runtime.teachers import start_pool, stop_service
from raydistill.sweep.board import ENDED, FILE, Board, State, read
from raydistill.sweep.config import Range, SweepConfig, checked, trial_config, trials_of
from raydistill.sweep.trial import KEY, STEP, Order, Trial
from raydistill.tracking import Tracker, journal_is_held, previous_run_id, without_secrets

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
    board = _board(config, resume)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # figures are in the runs' own journals and MLflow
    mine = not ray.is_initialized()
    if mine:
        connect(quiet=True)
    try:
        trials = config.num_trials if config.search == "optuna" else len(board.rows)
        config = _with_places(config, trials)
        board.config = config
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
            row = board.row(_name(config, number), settings)
            if row.settings != settings:
                raise ConfigError(
                    f"{file} is of a sweep over another space ({row.name} has {row.settings}, it would have {settings} "
                    "now): give the same, or another name="
                )
    return board


def _name(config: SweepConfig, number: int) -> str:
    return f"{config.name}-{number:03d}"


def _with_places(config: SweepConfig, trials: int) -> SweepConfig:
    """The sweep with its workers' CPUs and the number of trials at a time chosen for the cluster.

    Raises PlacementError if it has no room for one trial.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    placement = config.run.placement
    workers = placement.workers or (2 if placement.mode == "disaggregated" else 1)
    cpus = placement.cpus_per_worker
    if not cpus:
        total = sum(node.get("CPU", 0.0) for node in nodes)
        cpus = 1 if placement.gpus_per_worker else max(1, int(total // (workers * max(1, trials))))
    # its figures decide, so it must not wait for a free core; and a worker of one thread has no barriers to suffer at
    evaluator = (
        replace(config.run.evaluator, idle_priority=False, threads=1) if cpus == 1 else config.run.evaluator
    )
    placement = replace(placement, workers=workers, cpus_per_worker=cpus)
    run = replace(config.run, placement=placement, evaluator=evaluator)
    check_room(nodes, run, cpus)
    places = 1
    while places < trials and _fits(nodes, run, places + 1):
        places += 1
    return replace(config, run=run, max_at_once=min(config.max_at_once or places, places))


def _fits(nodes: list[Mapping[str, float]], run: RunConfig, trials: int) -> bool:
    placement = run.placement
    more = replace(placement, workers=placement.workers * trials)
    try:
        check_room(nodes, replace(run, placement=more), placement.cpus_per_worker)
    except PlacementError:
        return False
    return True


def _on_ray(board: Board) -> Board:
    config = board.config
    Path(config.folder).mkdir(parents=True, exist_ok=True)
    parent = Tracker(config.run.tracking, config.folder, config.name, run_id=previous_run_id(config.folder))
    status = "FAILED"
    try:
        parent.params({"space": {name: _shown(values) for name, values in config.space.items()}} | {
            "metric": config.figure, "search": config.search, "at_once": config.max_at_once,
        })  # fmt: skip
        if parent.uri:
            tracking = replace(config.run.tracking, parent_run_id=parent.run_id)
            config = board.config = replace(config, run=replace(config.run, tracking=tracking))
        board.save()
        with _sigterm_stops(board), _teacher_service(board):
            _tune(board)
        unfinished = [row.name for row in board.rows.values() if row.state in ("pending", "running")]
        if unfinished:
            status = "KILLED"
            raise InterruptedRunError(
                f"the sweep was stopped with {len(unfinished)} of {len(board.rows)} trials unfinished; the same "
                "command with --resume goes on from their snapshots"
            )
        _export_best(board)
        parent.artifact(str(board.file))
        status = "FINISHED"
    finally:
        parent.finish(status)
    return board


def _shown(values: Any) -> str:
    return str(values) if isinstance(values, Range) else ",".join(map(str, values))


@contextmanager
def _teacher_service(board: Board) -> Iterator[None]:
    """The teacher of all trials, with the number of its copies on the board; ended with the sweep."""
    service = board.config.run.placement.teacher_service
    if not board.config.share_teacher or not service:
        yield
        return
    try:
        manager = start_pool(board.config.run)
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


@contextmanager
def _sigterm_stops(board: Board) -> Iterator[None]:
    """SIGTERM ends the sweep once its trials have written snapshots; Ctrl-C, which is Tune's, does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        os.write(2, b"raydistill: SIGTERM: the trials write their snapshots\n")
        running = [row.run_dir for row in board.rows.values() if row.state == "running"]
        for run_dir in running:
            _ask_to_stop(run_dir)
        for run_dir in running:
            _stop_and_wait(run_dir)
        os.kill(os.getpid(), signal.SIGINT)  # Tune ends by that

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        total = self._board.config.run.train.generator_updates
        reached = (trial.last_result or {}).get(STEP, 0)
        order = trial.config[KEY]
        if reached < total and not order["ended"]:
            _stop_and_wait(self._board.row(order["name"], order["settings"]).run_dir)
        self._tell(trial, "finished" if reached >= total else "stopped")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        error = trial.get_pickled_error()
        cause = getattr(error, "cause", None) or error
        interrupted = isinstance(cause, InterruptedRunError)
        self._tell(
            trial, "pending" if interrupted else "failed", without_secrets(" ".join(str(cause).split())[:500])
        )

    def _tell(self, trial: Any, state: State, error: str | None = None) -> None:
        order = trial.config[KEY]
        self._board.row(order["name"], order["settings"])
        if not order["ended"]:
            self._board.update(order["name"], state, error)


def _export_best(board: Board) -> None:
    """The best trial's best snapshot as a generator, in the sweep's folder."""
    best = board.best
    if best is None or best.step is None:
        errors = "; ".join(f"{row.name}: {row.error}" for row in board.rows.values() if row.error)
        raise TrainingError(f"no trial of the sweep has a figure {board.config.figure}: {errors}")
    config = trial_config(board.config.run, best.settings, best.name)
    snapshots = Snapshots(f"{best.run_dir}/snapshots", config.checkpoint.keep)
    try:
        exported = export_snapshot(config, snapshots.read(best.step), Path(board.config.folder) / "export")
        board.save(export=str(exported), export_step=best.step)
    except RayDistillError as error:
        log.warning("the best trial is not exported: %s", error)
        board.save(export=None, export_error=str(error))
