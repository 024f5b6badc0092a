"""What is known of a sweep: kept in sweep.json after every event, shown as one table."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from raydistill.checkpoint import Snapshots
from raydistill.errors import CheckpointError, ConfigError
from raydistill.eval.protocol import cost
from raydistill.sweep.config import Range, Settings, SweepConfig
from raydistill.sweep.trial import figures_of

FILE = "sweep.json"
State = Literal["pending", "running", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped")
"""States that a resumed sweep leaves as they are."""
_EVERY_S = 30.0


@dataclass
class Row:
    """One trial."""

    name: str
    run_dir: str
    settings: Settings
    metric: float | None = None
    """The best figure so far."""
    step: int | None = None
    """The generator update it belongs to."""
    state: State = "pending"
    generator_updates: int = 0
    """Made, as far as its figures and snapshots tell."""
    error: str | None = None


@dataclass
class Board:
    """All trials of a sweep, in order."""

    config: SweepConfig
    rows: dict[str, Row] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """What the trials have in common, without secrets."""
    teacher_copies: int | None = None
    """Of the shared teacher's weights in memory, on all nodes, at the sweep's end."""
    resumed: int = 0
    """How often the sweep was resumed."""
    results: dict[str, Any] = field(default_factory=dict)
    """What the sweep left at its end."""
    _shown: tuple[float, tuple[State, ...]] = (0.0, ())

    @property
    def file(self) -> Path:
        return Path(self.config.folder) / FILE

    def row(self, name: str, settings: Settings) -> Row:
        """The trial's row, made if it is new."""
        run_dir = f"{self.config.run.output_dir}/{name}"
        return self.rows.setdefault(name, Row(name, run_dir, dict(settings)))

    def update(self, name: str, state: State, error: str | None = None) -> None:
        """Take a trial's figures from its run, and keep and show what is new."""
        row = self.rows[name]
        row.state, row.error = state, error
        found = {s: v for s, v in figures_of(row.run_dir, self.config.figure).items() if math.isfinite(v)}
        if found:
            row.step = min(found, key=lambda step: (cost(self.config.figure, found[step]), step))
            row.metric = found[row.step]
        row.generator_updates = max([0, *found, *Snapshots(f"{row.run_dir}/snapshots", keep=1).steps()])
        self.save()
        self.show()

    @property
    def failed(self) -> list[Row]:
        """Trials that ended with an error."""
        return [row for row in self.rows.values() if row.state == "failed"]

    @property
    def best(self) -> Row | None:
        """The trial with the best figure."""
        judged = [row for row in self.rows.values() if row.metric is not None and row.state != "failed"]
        return min(judged, key=lambda row: cost(self.config.figure, row.metric or 0.0), default=None)

    def save(self) -> None:
        """Write sweep.json, whole or not at all. Raises CheckpointError."""
        best = self.best
        content = {
            "name": self.config.name,
            "metric": self.config.figure,
            "mode": self.config.mode,
            "search": self.config.search,
            "space": shown_space(self.config),
            "settings": self.settings,
            "trials": [asdict(row) for row in self.rows.values()],
            "teacher_copies": self.teacher_copies,
            "resumed": self.resumed,
            "best": best.name if best else None,
            **self.results,
        }
        partial = self.file.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n")
            partial.replace(self.file)
        except OSError as error:
            raise CheckpointError(
                f"can't write {self.file} (output_dir): {error.strerror or error}"
            ) from error

    def show(self) -> None:
        """Print the table when a trial has ended, and every half minute."""
        states = tuple(row.state for row in self.rows.values() if row.state not in ("pending", "running"))
        at, before = self._shown
        if states != before or time.monotonic() - at > _EVERY_S:
            self._shown = time.monotonic(), states
            print(f"\n{self.table()}", flush=True)
            sys.stdout.flush()

    def table(self) -> str:
        """One line a trial: settings, state, updates, best figure."""
        columns = _short(list(self.config.space))
        heads = ["trial", *columns.values(), "state", "updates", self.config.figure, "at update"]
        total = self.config.run.train.generator_updates
        best = self.best
        lines = []
        for row in self.rows.values():
            lines.append([
                ("* " if row is best else "  ") + row.name,
                *(_text(row.settings.get(name)) for name in columns),
                row.state, f"{row.generator_updates}/{total}",
                "" if row.metric is None else f"{row.metric:.4g}", "" if row.step is None else str(row.step),
            ])  # fmt: skip
        widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
        done = sum(row.state in ENDED for row in self.rows.values())
        title = f"{self.config.name}: {done} of {len(self.rows)} trials done; * is the best so far"
        return "\n".join(
            [title] + ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
                       for line in [heads, *lines]]
        )  # fmt: skip


def read(file: Path, config: SweepConfig) -> Board:
    """The board of an interrupted sweep. Raises ConfigError if it was another sweep."""
    try:
        kept = json.loads(file.read_text())
        # the folder may have been moved
        rows = {
            entry["name"]: Row(**entry | {"run_dir": f"{config.run.output_dir}/{entry['name']}"})
            for entry in kept["trials"]
        }
        was, space, settings = (kept["metric"], kept["search"]), kept["space"], kept["settings"]
        copies, resumed = kept["teacher_copies"], kept["resumed"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no sweep's record ({type(error).__name__}: {error})") from None
    if was != (config.figure, config.search):
        raise ConfigError(
            f"{file} is of a sweep with metric {was[0]} and search {was[1]}, this one has {config.figure} and "
            f"{config.search}: give the same, or another name="
        )
    if space != (now := shown_space(config)):
        raise ConfigError(
            f"{file} is of a sweep over another space ({space}, now {now}): give the same, or another name="
        )
    return Board(config, rows, settings, copies, resumed + 1)


def shown_space(config: SweepConfig) -> dict[str, str]:
    """The space as text."""
    return {
        name: str(values) if isinstance(values, Range) else ",".join(map(str, values))
        for name, values in config.space.items()
    }


def _short(names: Sequence[str]) -> Mapping[str, str]:
    """Dotted names by their last parts, where these tell them apart."""
    last = {name: name.rpartition(".")[2] for name in names}
    return last if len(set(last.values())) == len(last) else {name: name for name in names}


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
