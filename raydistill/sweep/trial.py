"""A trial: the ordinary run of a training job, told to Tune figure by figure."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from raydistill.errors import TrainingError
from raydistill.runtime.run import run
from raydistill.runtime.session import LEDGER, request_stop
from raydistill.runtime.settings import config_from_dict
from raydistill.sweep.config import Settings, trial_config

STEP = "generator_updates"
KEY = "trial"
"""Of the only entry in what Tune hands to a trial: an `Order` as a dict."""
_POLL_S = 1.0


@dataclass(frozen=True)
class Order:
    """What a trial is to do."""

    name: str
    """Of its run, also after an interruption."""
    settings: Settings
    ended: bool = False
    """It finished or was stopped before an interruption: its figures are told again, nothing is run."""


class Trial(tune.Trainable):
    """Runs `run(config)` in a thread; every step is one figure of its evaluator, at the update it belongs to.

    A trial that the scheduler stops is asked to write a snapshot and end, rather than killed: its workers' places are
    given back, its figures are in MLflow, and its snapshots can be used.
    """

    def setup(
        self, config: dict[str, Any], base: Mapping[str, Any] | None = None, metric: str | None = None
    ) -> None:
        """base: the sweep's run as a dict."""
        assert base is not None
        assert metric is not None
        order = Order(**config[KEY])
        self._run_config = trial_config(config_from_dict(dict(base)), order.settings, order.name)
        self._metric = metric
        self._told: set[int] = set()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="run")
        if not order.ended:
            self._thread.start()

    def _run(self) -> None:
        try:
            run(self._run_config)
        except BaseException as error:  # raised again where Tune sees it
            self._error = error

    def step(self) -> dict[str, Any]:
        """The next figure, once it is there. Raises what ended the run."""
        while True:
            over = not self._thread.is_alive()
            new = sorted(
                item
                for item in figures_of(self._run_config.run_dir, self._metric).items()
                if item[0] not in self._told
            )
            if over and self._error is not None:
                raise self._error
            if over and not new:
                raise TrainingError(f"{self._run_config.name} has ended without a figure {self._metric}")
            # the last one is told when the run is over, with its summary and export
            if over or (new and new[0][0] < self._run_config.train.generator_updates):
                step, value = new[0]
                self._told.add(step)
                return {STEP: step, self._metric: value, "done": over and len(new) == 1}
            self._thread.join(_POLL_S)

    def cleanup(self) -> None:
        """Ask the run to end, and wait until it has."""
        while self._thread.is_alive():
            # again and again: a run that is just beginning takes an old request for its predecessor's
            with contextlib.suppress(FileNotFoundError):
                request_stop(self._run_config.run_dir)
            self._thread.join(_POLL_S)


def figures_of(run_dir: str, metric: str) -> dict[int, float]:
    """A run's values of a metric by generator update, as far as they are there."""
    try:
        ledger = json.loads((Path(run_dir) / LEDGER).read_text())
    except FileNotFoundError:
        return {}
    return {
        int(step): entry["metrics"][metric]
        for step, entry in ledger.items()
        if metric in entry.get("metrics", {}) and int(step) >= 0
    }
