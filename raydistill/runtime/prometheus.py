"""Figures as Prometheus metrics, through Ray's metrics API; `dashboards/` shows them.

    tracker's actor, pool's manager --Figures--> Ray's agent on their node --/metrics--> Prometheus
    teacher replica -----------------latency()-->

A figure's metric is its name in METRICS with an underscore for every other sign: `loss/dm` is
`ray_raydistill_loss_dm{run="..."}` (the `ray_` is Ray's). What stands for a name's * is the label `of`:
`eval/toyfid_2000` is `ray_raydistill_eval_toyfid{run="...", of="2000"}`.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import re
import threading
import time
from collections.abc import Mapping

from ray.util.metrics import Gauge, Histogram

from raydistill.tracking import METRICS

log = logging.getLogger(__name__)

_EVERY_S = 1.0
"""Ray exports a gauge once for each time that it is set, and forgets it two reports later (20 s, its
RAY_metrics_report_interval_ms): a figure that changes once an hour must be set all the time."""
_LATENCY_BOUNDARIES_S = [0.001 * 2**n for n in range(17)]


@functools.cache
def metric_of(name: str) -> tuple[str, str]:
    """A figure's metric, without Ray's prefix, and its label `of`. Raises KeyError for a name that METRICS lacks."""
    before, _, after = _pattern(name).partition("*")
    fixed = re.sub(r"[^a-zA-Z0-9]", "_", before.rstrip("_/") + after)
    return f"raydistill_{fixed}", name[len(before) : len(name) - len(after)]


def _pattern(name: str) -> str:
    for pattern in METRICS:
        if fnmatch.fnmatchcase(name, pattern):
            return pattern
    raise KeyError(name)


class Figures:
    """The newest figures of a run, or of a teacher service, as gauges that live as long as this process.

    A thread sets them, so that whoever has figures waits for nothing and no failure of Ray's metrics reaches them.
    """

    def __init__(self, run: str):
        self._tags = {"run": run}
        self._values: dict[str, float] = {}
        self._gauges: dict[str, Gauge] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._show, daemon=True, name="prometheus")
        self._thread.start()

    def update(self, values: Mapping[str, float]) -> None:
        """Show these from now on, and what was shown before beside them."""
        with self._lock:
            self._values.update(values)

    def _show(self) -> None:
        try:
            while True:
                with self._lock:
                    values = dict(self._values)
                for name, value in values.items():
                    self._set(name, float(value))
                time.sleep(_EVERY_S)
        except Exception as error:
            log.warning("Prometheus gets no more figures of this run: %s: %s", type(error).__name__, error)

    def _set(self, name: str, value: float) -> None:
        metric, of = metric_of(name)
        if metric not in self._gauges:
            self._gauges[metric] = Gauge(metric, METRICS[_pattern(name)], tag_keys=("run", "of"))
        self._gauges[metric].set(value, tags=self._tags | {"of": of})


def latency(run: str) -> Histogram:
    """Of the teacher's answers in this process: `teacher/latency_s`."""
    name = "teacher/latency_s"
    histogram = Histogram(metric_of(name)[0], METRICS[name], _LATENCY_BOUNDARIES_S, tag_keys=("run",))
    return histogram.set_default_tags({"run": run})
