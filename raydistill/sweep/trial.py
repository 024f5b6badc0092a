"""A trial: the ordinary run of a training job, told to Tune figure by figure."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from raydistill.errors import RayDistillError, TrackingError
from raydistill.runtime.run import InterruptedRunError, run
from raydistill.runtime.session import LEDGER, request_stop
from raydistill.runtime.settings import config_from_dict
from raydistill.sweep.config import Settings, trial_config
from raydistill.tracking import require_store, without_secrets

log = logging.getLogger(__name__)

STEP = "generator_updates"
KEY = "trial"
"""Of the only entry in what Tune hands to a trial: an `Order` as a dict."""
COMPLETE, ERROR, INTERRUPTED = "complete", "error", "interrupted"
"""In a trial's last result: all updates are made; or what ended it, and whether that was a request to stop."""
_POLL_S = 1.0
_STORE_S = 1800.0
"""How long a trial that is to begin waits for a tracking server that went away."""


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
        self._base, self._metric = config_from_dict(dict(base)), metric
        self._begin(Order(**config[KEY]))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process, which has imported everything."""
        self.cleanup()
        self._begin(Order(**new_config[KEY]))
        return True

    def _begin(self, order: Order) -> None:
        self._run_config = trial_config(self._base, order.settings, order.name)
        self._told: set[int] = set()
        self._last: dict[str, Any] | None = None
        self._error: BaseException | None = None
        self._asked_to_end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="run")
        if not order.ended:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._wait_for_store()
            run(self._run_config)
        except BaseException as error:  # raised again where Tune sees it
            self._error = error

    def _wait_for_store(self) -> None:
        """What ended a trial must not end the next ones while nobody looks."""
        config, until = self._run_config, time.monotonic() + _STORE_S
        while True:
            try:
                return require_store(config.tracking, config.run_dir)
            except TrackingError as error:
                if time.monotonic() > until:
                    raise
                log.warning("%s waits: %s", config.name, error)
                if self._asked_to_end.wait(config.tracking.retry_max_s):
                    raise InterruptedRunError("stopped before it began") from error

    def step(self) -> dict[str, Any]:
        """The next figure, once it is there; the last result says how the run ended."""
        while True:
            over = not self._thread.is_alive()
            new = sorted(
                item
                for item in figures_of(self._run_config.run_dir, self._metric).items()
                if item[0] not in self._told
            )
            if over and self._error is not None:
                # as text: Tune would pickle the exception, and try the same again
                return (self._last or {}) | {
                    "done": True, ERROR: _one_line(self._error),
                    INTERRUPTED: isinstance(self._error, InterruptedRunError),
                }  # fmt: skip
            if over and not new:
                if self._last is None:
                    missing = f"{self._run_config.name} has ended without a figure {self._metric}"
                    return {"done": True, ERROR: missing, INTERRUPTED: False}
                return self._last | {"done": True, COMPLETE: True}  # its last evaluation has failed
            # the last one is told when the run is over, with its summary and export
            if over or (new and new[0][0] < self._run_config.train.generator_updates):
                step, value = new[0]
                self._told.add(step)
                self._last = {STEP: step, self._metric: value}
                ended = over and len(new) == 1
                return self._last | {"done": ended, COMPLETE: ended}
            self._thread.join(_POLL_S)

    def cleanup(self) -> None:
        """Ask the run to end, and wait until it has."""
        self._asked_to_end.set()
        while self._thread.is_alive():
            # again and again: a run that is just beginning takes an old request for its predecessor's
            with contextlib.suppress(FileNotFoundError):
                request_stop(self._run_config.run_dir)
            self._thread.join(_POLL_S)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return without_secrets(text if isinstance(error, RayDistillError) else f"{type(error).__name__}: {text}")[
        :500
    ]


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
