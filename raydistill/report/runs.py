"""The runs of a report, from their folders or from MLflow: settings, figures with their protocols, curves, pictures."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from raydistill.checkpoint import Snapshots
from raydistill.errors import CheckpointError, ConfigError, DataError
from raydistill.eval.grids import Grid, read_grid
from raydistill.eval.protocol import METHOD_PROTOCOL, Protocol, cost, require_same, second_figure
from raydistill.runtime.session import LEDGER, TEACHER_STEP
from raydistill.tracking import History, RecordedRun, read_metrics

Points = list[tuple[int, float]]

COUNTERS = {
    "generator_updates": "generator updates",
    "images": "generated images",
    "time/train_s": "seconds of training",
}
"""The x-axes of the curves."""
LOSSES = (
    "loss/dm", "loss/sid", "loss/moment", "loss/regression", "loss/gan_generator", "loss/dsm", "loss/teacher",
    "loss/gan_critic", "critic/lag",
)  # fmt: skip
"""Shown beside the figures; totals are their sums."""
SWEEP = "sweep.json"
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_GRID = re.compile(r"grid_(\d+)\.png")
_SHOWN_SETTINGS = 3
"""Of a sweep's trials, in the names that they have here."""


class NoFiguresError(ConfigError):
    """A run that can't be reported, because nothing of it has been evaluated so far."""


@dataclass(frozen=True)
class Run:
    """A run with at least one figure.

    `figures` and `teacher` hold metrics under their full names; `where` is the folder or the MLflow id it came from.
    """

    name: str
    where: str
    settings: Mapping[str, str]
    figures: Mapping[int, Mapping[str, float]]
    protocols: Mapping[int, Protocol]
    teacher: Mapping[str, float]
    teacher_protocol: Protocol | None
    points: Mapping[str, Points]
    grid_steps: Sequence[int]
    read_picture: Callable[[int], bytes]
    state: str = ""
    """How it ended, where a sweep or MLflow says so."""
    snapshot: int = 0
    """The newest one's step; 0 where none is known."""

    @property
    def protocol(self) -> Protocol:
        """Of the generator's newest figure."""
        return self.protocols[max(self.protocols)]

    @property
    def metric(self) -> str:
        """Full name of the quality figure; lower is better."""
        return self.protocol.key()

    @property
    def accuracy(self) -> str | None:
        """Full name of the figure beside it, higher is better; None where the protocol has no other."""
        return second_figure(self.figures[max(self.figures)])

    @property
    def judged_by(self) -> str:
        """Full name of the figure that `best` goes by (evaluator.best_by)."""
        chosen = self.settings.get("evaluator.best_by", "toyfid")
        if chosen == "accuracy":
            return self.accuracy or self.metric
        # under a published protocol toyfid means fid
        toy = self.protocol.metric.startswith("toy")
        return self.protocol.key(chosen if toy else chosen.removeprefix("toy"))

    @property
    def best(self) -> int:
        """The step whose snapshot is the one that is exported."""
        return min(self.figures, key=lambda step: cost(self.judged_by, self.figures[step][self.judged_by]))

    @property
    def updates(self) -> int:
        """Generator updates made, as far as is known."""
        counted = self.points["generator_updates"]
        return max(max(self.figures), counted[-1][0] if counted else 0, self.snapshot)

    def at(self, counter: str, step: int) -> float | None:
        """A counter at a step, which grows evenly beside the steps at which it was logged; None where it never was."""
        if counter == "generator_updates" or step == 0:
            return float(step)
        points = [(0, 0.0), *(point for point in self.points[counter] if point[0] > 0)]
        if len(points) == 1:
            return None
        after = min(bisect.bisect_left(points, step, key=lambda point: point[0]), len(points) - 1)
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        return y0 + (y1 - y0) * (step - x0) / (x1 - x0)

    def number(self, setting: str) -> float | None:
        """A setting that is a number."""
        try:
            return float(self.settings[setting])
        except (KeyError, ValueError):
            return None

    def grid(self, step: int) -> Grid | None:
        """The picture of an evaluated step, None if it was made before pictures could be taken apart."""
        try:
            return read_grid(self.read_picture(step))
        except DataError:
            return None


@dataclass(frozen=True)
class Runs:
    """What is reported, and the names of runs without figures."""

    runs: list[Run]
    left_out: list[str]


def read_runs(sources: Sequence[str | Path], tracking_uri: str | None = None) -> Runs:
    """Runs from their folders, sweeps' folders and MLflow ids (a parent's stands for its children).

    Raises ConfigError for a source that is none of these, NoFiguresError for a run without figures, TrackingError if
    MLflow does not answer.
    """
    found = Runs([], [])
    history: History | None = None
    for source in sources:
        folder = Path(source)
        if (folder / SWEEP).is_file():
            _add(found, _sweep(folder))
        elif folder.is_dir():
            found.runs.append(read_folder(folder))
        elif _RUN_ID.fullmatch(str(source)):
            history = history or History(tracking_uri)
            if children := history.children(str(source)):
                _add(found, _recorded(history, children))
            else:
                found.runs.append(read_recorded(history, history.run(str(source))))
        else:
            raise ConfigError(
                f"no run folder {str(source)!r} here; give runs/NAME, a sweep's folder or the id of an MLflow run"
            )
    return _checked(found, ", ".join(map(str, sources)))


def read_experiment(name: str, tracking_uri: str | None = None) -> Runs:
    """The runs of an MLflow experiment that have figures. Raises as `read_runs` does."""
    history = History(tracking_uri)
    recorded = history.experiment(name)
    parents = {run.tags.get("mlflow.parentRunId") for run in recorded}
    found = Runs([], [])
    _add(found, _recorded(history, [run for run in recorded if run.run_id not in parents]))
    return _checked(found, f"experiment {name!r}")


def _sweep(folder: Path) -> list[tuple[str, Callable[[], Run]]]:
    try:
        trials = json.loads((folder / SWEEP).read_text())["trials"]
        known = [{key: trial[key] for key in ("name", "state", "run_dir", "settings")} for trial in trials]
        return [
            (f"{_label(folder, trial)} ({trial['state']})", partial(_trial, folder, trial)) for trial in known
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / SWEEP} is no sweep's record: {type(error).__name__}: {error}"
        ) from error


def _label(folder: Path, trial: Mapping[str, Any]) -> str:
    """Its number, and what it was tried with: more than the run's name says to those who look at a chart."""
    settings = trial["settings"]
    tried = ", ".join(f"{name.rpartition('.')[2]} {_short(value)}" for name, value in settings.items())
    number = str(trial["name"]).removeprefix(f"{folder.resolve().name}-")
    return f"{number}: {tried}" if 0 < len(settings) <= _SHOWN_SETTINGS else str(trial["name"])


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _trial(folder: Path, trial: Mapping[str, Any]) -> Run:
    run_dir = folder / trial["run_dir"]
    if not run_dir.is_dir():
        run_dir = folder.parent / trial["name"]  # it was moved, and the runs with it
    if not (run_dir / LEDGER).is_file():
        raise NoFiguresError(f"trial {trial['name']} has no figures so far")
    run = read_folder(run_dir)
    settings = {name: str(value) for name, value in trial["settings"].items()}
    return replace(
        run, name=_label(folder, trial), settings={**run.settings, **settings}, state=trial["state"]
    )


def _recorded(history: History, recorded: Sequence[RecordedRun]) -> list[tuple[str, Callable[[], Run]]]:
    return [(run.name, partial(read_recorded, history, run)) for run in recorded]


def _add(found: Runs, readers: Sequence[tuple[str, Callable[[], Run]]]) -> None:
    for name, read in readers:
        try:
            found.runs.append(read())
        except NoFiguresError:
            found.left_out.append(name)


def _checked(found: Runs, asked: str) -> Runs:
    """Names that tell runs apart, and one protocol."""
    if not found.runs:
        raise NoFiguresError(
            f"{asked}: none of its {len(found.left_out)} runs has a figure so far, wait for one"
        )
    names = [run.name for run in found.runs]
    runs = [
        replace(run, name=f"{run.name} ({run.where})") if names.count(run.name) > 1 else run
        for run in found.runs
    ]
    first = runs[0]
    for run in runs:
        both = [*first.protocols.values(), *run.protocols.values()]
        try:
            require_same(both, METHOD_PROTOCOL)
        except ConfigError as error:
            between = f"{first.name} and {run.name}" if run is not first else first.name
            raise ConfigError(f"{between}: {error}") from error
    return Runs(runs, found.left_out)


def read_folder(folder: Path) -> Run:
    """A run from its folder. Raises ConfigError if it is none, NoFiguresError if nothing is evaluated yet."""
    ledger = folder / LEDGER
    if not ledger.is_file():
        if (folder / "snapshots").is_dir() or (folder / "metrics.jsonl").is_file():
            raise NoFiguresError(f"run {folder} has no figures so far: wait for its first evaluation")
        raise ConfigError(f"{folder} is no run's folder: it holds neither {LEDGER} nor {SWEEP} nor snapshots")
    snapshots = Snapshots(str(folder / "snapshots"), keep=1)
    steps = snapshots.steps()
    try:
        settings = snapshots.manifest(steps[-1])["settings"] if steps else {}
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{snapshots.path(steps[-1])} went away while it was read; try again"
        ) from error
    pictures = {
        int(match[1]): path for path in (folder / "artifacts" / "grids").glob("*") if (match := _named(path))
    }
    run = _run(
        folder.resolve().name,
        str(folder),
        {name: str(value) for name, value in settings.items()},
        ledger.read_text(),
        read_metrics(str(folder), {*COUNTERS, *LOSSES}),
        sorted(pictures),
        lambda step: pictures[step].read_bytes(),
    )
    return replace(run, snapshot=steps[-1] if steps else 0)


def read_recorded(history: History, recorded: RecordedRun) -> Run:
    """A run from MLflow. Raises NoFiguresError if nothing is evaluated yet, TrackingError if MLflow does not answer."""
    if LEDGER not in history.artifacts(recorded):
        raise NoFiguresError(
            f"MLflow run {recorded.run_id} ({recorded.name}) has no figures with their protocol ({LEDGER}) so far"
        )
    pictures = {
        int(match[1]): path for path in history.artifacts(recorded, "grids") if (match := _named(Path(path)))
    }
    return _run(
        recorded.name,
        recorded.run_id,
        recorded.params,
        history.artifact(recorded, LEDGER).decode(),
        {name: history.points(recorded, name) for name in (*COUNTERS, *LOSSES)},
        sorted(pictures),
        lambda step: history.artifact(recorded, pictures[step]),
        recorded.status.lower() if recorded.status in ("FAILED", "KILLED") else "",
    )


def _named(path: Path) -> re.Match[str] | None:
    return _GRID.fullmatch(path.name)


def _run(
    name: str,
    where: str,
    settings: Mapping[str, str],
    ledger: str,
    points: Mapping[str, Points],
    grid_steps: Sequence[int],
    read_picture: Callable[[int], bytes],
    state: str = "",
) -> Run:
    try:
        entries = {int(step): entry for step, entry in json.loads(ledger).items() if entry["state"] == "done"}
        figures = {step: entry["metrics"] for step, entry in sorted(entries.items())}
        described = {step: entry["protocol"] for step, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{LEDGER} of {where} can't be read: {type(error).__name__}: {error}") from error
    protocols = {
        step: Protocol.from_dict({field: value for field, value in each.items() if field != "hash"})
        for step, each in described.items()
    }
    teacher, teacher_protocol = figures.pop(TEACHER_STEP, {}), protocols.pop(TEACHER_STEP, None)
    if not figures:
        raise NoFiguresError(f"run {where} has no figures so far: wait for its first evaluation")
    shown = [step for step in grid_steps if step in figures]
    return Run(
        name,
        where,
        settings,
        figures,
        protocols,
        teacher,
        teacher_protocol,
        points,
        shown,
        read_picture,
        state,
    )
