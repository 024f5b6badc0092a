"""The tracker of one run: what the rest of the package calls."""

import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from raydistill.errors import ConfigError, TrackingError
from raydistill.tracking.journal import Journal
from raydistill.tracking.mlflow_run import (
    MlflowRun,
    as_param,
    as_tag,
    brief,
    require_reachable,
    resolve_uri,
    without_secrets,
)
from raydistill.tracking.names import check_metric_names

log = logging.getLogger(__name__)

_BATCH_BYTES = 1 << 18
_FIRST_RETRY_S = 0.5
_GATHER_S = 3.0
"""A transaction for each update of a fast run takes a tenth of a core away from training; points wait for others."""
_REFUSALS = 3  # attempts at an entry that MLflow refuses while it takes others
OFF = "off"
"""tracking.uri for the journal alone. (The word none is read as the default.)"""
_STATUSES = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where a run's figures go."""

    uri: str | None = None
    """sqlite:////absolute/file.db, http(s)://host:port or off; default: mlflow.db beside the run."""
    experiment: str = "raydistill"
    """MLflow experiment; made if it does not exist."""
    parent_run_id: str | None = None
    """MLflow run to show this one under (a comparison or sweep)."""
    journal_max_mb: int = 256
    """Largest metrics.jsonl in MB; beyond it, points that MLflow can't take are dropped and counted."""
    request_timeout_s: float = 10.0
    """Seconds one request to the tracking server may take."""
    retry_max_s: float = 30.0
    """Longest pause in seconds between attempts to reach a tracking server that went away."""
    register_as: str | None = None
    """Model of MLflow's registry of which the finished run's best export becomes a version, with the alias "best";
    none: of no model."""


@dataclass(frozen=True)
class RunInput:
    """What a run was made from, known by its content: a data set or a network."""

    name: str
    context: str
    """Its part in the run: training, evaluation, teacher."""
    sha256: str
    """Of its content; MLflow shows the beginning as the digest."""
    source: str
    """Path, URL or name."""
    rows: int | None = None
    """Samples in it."""


def check_tracking(config: TrackingConfig, run_dir: str) -> None:
    """Raise ConfigError for settings that can't work; asks no store."""
    if "://" in run_dir:
        raise ConfigError(f"run folder {run_dir} is not local; metrics are journaled on a local disk first")
    for name in ("journal_max_mb", "request_timeout_s", "retry_max_s"):
        if getattr(config, name) <= 0:
            raise ConfigError(f"tracking.{name} is {getattr(config, name)}; it must be positive")
    model = config.register_as
    if model is not None and not re.fullmatch(r"\w[\w.-]*", model):
        raise ConfigError(
            f"tracking.register_as is {model!r}; a model's name is of letters, digits, '_', '.' and '-'"
        )
    if config.uri != OFF:
        resolve_uri(config.uri, run_dir)
    elif model is not None:
        raise ConfigError(
            f"tracking.register_as={model!r} needs MLflow, and tracking.uri={OFF} is the journal alone"
        )


def require_store(config: TrackingConfig, run_dir: str) -> None:
    """Raise TrackingError, within tracking.request_timeout_s, if nobody listens at the store's address."""
    if config.uri != OFF:
        require_reachable(resolve_uri(config.uri, run_dir), config.request_timeout_s)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise TrackingError(
            f"can't write artifact {target} (output_dir): {error.strerror or error}"
        ) from error


class Tracker:
    """Records a run's figures in `run_dir` at once and in MLflow soon after.

    No call waits for MLflow but the constructor, `flush` and `finish`. Points that the journal has already
    (same name and step) are not recorded twice, so a resumed run may repeat the steps since its snapshot.

    Args:
        run_dir: local folder of the run; holds metrics.jsonl and artifacts/.
        run_name: the name MLflow shows.
        run_id: MLflow run to go on with, for instance from a snapshot's manifest; None makes a new one.

    Raises ConfigError for a setting that can't work and TrackingError if the store does not answer now.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: str,
        run_name: str,
        run_id: str | None = None,
    ) -> None:
        check_tracking(config, run_dir)
        self.run_dir = os.path.abspath(run_dir)
        self.uri: str | None = None
        self._run: MlflowRun | None = None
        if config.uri == OFF:
            self.run_id = run_id or f"local-{uuid.uuid4().hex}"
        else:
            uri = resolve_uri(config.uri, self.run_dir)
            self.uri = without_secrets(uri)
            self._run = MlflowRun(
                uri, config.experiment, run_name, run_id, config.parent_run_id, config.request_timeout_s
            )
            self.run_id = self._run.run_id
        self._journal = Journal(self.run_dir, self.run_id, config.journal_max_mb * 2**20)
        self._retry_max_s = config.retry_max_s
        self._latest: dict[str, tuple[int, float]] = {}
        self._last_step = 0
        self._repeated = 0
        self._lost_entries = 0
        self._refusals = 0
        self._closed = False
        self._complete = False
        self._idle = threading.Condition()
        self._wake, self._urgent = threading.Event(), threading.Event()
        self._wake.set()
        self._sender = threading.Thread(target=self._send_for_ever, name="mlflow-sender", daemon=True)
        if self._run is not None:
            self._sender.start()

    def metrics(self, values: Mapping[str, float], step: int, timestamp_ms: int | None = None) -> None:
        """Record values at a step; `timestamp_ms` (default: now) is milliseconds since 1970.

        Raises ValueError for a name that is not in METRICS.
        """
        check_metric_names(values)
        numbers = {name: float(value) for name, value in values.items()}
        now = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
        self._repeated += len(numbers) - self._journal.append_metrics(numbers, int(step), now)
        # a late result of an older step must not hide a newer one of the same name
        for name, value in numbers.items():
            if step >= self._latest.get(name, (0, 0.0))[0]:
                self._latest[name] = int(step), value
        self._last_step = max(self._last_step, int(step))
        self._wake.set()

    def params(self, flat: Mapping[str, Any]) -> None:
        """Record the settings of the run under dotted names, without secrets."""
        self._append({"params": {name: as_param(name, value) for name, value in flat.items()}})

    def tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags of the run, without secrets."""
        self._append({"tags": {name: as_tag(name, value) for name, value in tags.items()}})

    def inputs(self, inputs: Sequence[RunInput]) -> None:
        """Record what the run is made from; MLflow takes the same input once."""
        self._append({"inputs": [asdict(each) | {"source": without_secrets(each.source)} for each in inputs]})

    def artifact(self, local_path: str, artifact_path: str = "") -> None:
        """Copy a file into run_dir/artifacts/<artifact_path> and send it to MLflow.

        Raises TrackingError if there is no such file.
        """
        source = Path(local_path)
        if not source.is_file():
            raise TrackingError(f"artifact {local_path} is not a file")
        target = self._artifact_file(source.name, artifact_path)
        if source.resolve() != target.resolve():
            with _writing(target):
                shutil.copyfile(source, target)
        self._append({"artifact": str(target.relative_to(self.run_dir)), "folder": artifact_path})

    def artifact_bytes(self, data: bytes, name: str, artifact_path: str = "") -> None:
        """Write bytes to run_dir/artifacts/<artifact_path>/<name> and send them to MLflow."""
        target = self._artifact_file(name, artifact_path)
        with _writing(target):
            target.write_bytes(data)
        self._append({"artifact": str(target.relative_to(self.run_dir)), "folder": artifact_path})

    def progress(self) -> dict[str, Any]:
        """Latest values and their steps for a progress bar, and what is waiting, repeated or lost."""
        return {
            "step": self._last_step,
            "values": {name: value for name, (_, value) in self._latest.items()},
            "steps": {name: step for name, (step, _) in self._latest.items()},
            "unsent_bytes": self._journal.unsent_bytes if self._run else 0,
            "repeated_points": self._repeated,
            "dropped_points": self._journal.dropped_points,
            "lost_entries": self._lost_entries,
        }

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Have everything on disk, wait for MLflow, and say whether it has everything."""
        self._journal.sync()
        if self._run is None:
            return True
        deadline = time.monotonic() + timeout_s
        self._urgent.set()
        self._wake.set()
        with self._idle:
            while self._journal.unsent_bytes and (left := deadline - time.monotonic()) > 0:
                # woken by success; without it, one more attempt a second
                self._idle.wait(min(left, 1.0))
                self._urgent.set()
        return self._journal.unsent_bytes == 0

    def finish(self, status: str = "FINISHED", timeout_s: float = 60.0) -> bool:
        """Send what is left, end the MLflow run, and say whether MLflow has everything.

        Points that could not be sent stay in the journal; a Tracker with the same run_dir and run_id sends
        them. Raises ValueError for a status that is not FINISHED, FAILED or KILLED.
        """
        if status not in _STATUSES:
            raise ValueError(f"status is {status!r}; MLflow's are {', '.join(_STATUSES)}")
        if self._closed:
            return self._complete
        self._complete = self.flush(timeout_s)
        if self._complete and self._journal.dropped_points:
            # only now is there room for it
            self.metrics({"tracking/dropped_points": self._journal.dropped_points}, self._last_step)
            self._complete = self.flush(timeout_s)
        self._closed = True
        self._urgent.set()
        self._wake.set()
        if self._run is not None:
            self._sender.join(timeout_s)
        if not self._complete:
            log.warning(
                "%d bytes of figures are not in MLflow at %s, which does not answer; they are in %s and are "
                "sent when the run is resumed",
                self._journal.unsent_bytes,
                self.uri,
                self._journal.path,
            )
        elif self._run is not None:
            try:
                self._run.set_status(status)
            except Exception as error:  # the figures are safe; the status is not worth a failed run
                log.warning("could not set the status of MLflow run %s: %s", self.run_id, brief(error))
                self._complete = False
        self._journal.close()
        return self._complete

    def _append(self, entry: dict[str, Any]) -> None:
        if not self._journal.append(entry):
            self._lost_entries += 1
            log.warning(
                "the journal is full (tracking.journal_max_mb); lost %s of %s",
                next(iter(entry)),
                self.run_dir,
            )
        self._wake.set()

    def _artifact_file(self, name: str, artifact_path: str) -> Path:
        relative = PurePosixPath(artifact_path, name)
        if relative.is_absolute() or ".." in relative.parts or not name or "/" in name:
            raise TrackingError(
                f"artifact {artifact_path!r}/{name!r} is not a path inside the run's artifacts"
            )
        return Path(self.run_dir, "artifacts", *relative.parts)

    def _send_for_ever(self) -> None:
        pause_s, down_since = 0.0, 0.0
        while True:
            # while MLflow is down only a flush cuts the pause short; new points arrive all the time
            (self._urgent if pause_s else self._wake).wait(pause_s or None)
            if not pause_s:
                self._urgent.wait(_GATHER_S)
            self._wake.clear()
            self._urgent.clear()
            try:
                while self._send_batch():
                    if down_since:
                        waited = time.monotonic() - down_since
                        log.warning("MLflow at %s answers again after %.1f s", self.uri, waited)
                    pause_s = down_since = 0.0
                with self._idle:
                    self._idle.notify_all()
            except Exception as error:  # the journal has the figures, and the next attempt may pass
                if not down_since:
                    down_since = time.monotonic()
                    log.warning("MLflow at %s fails (%s); figures wait on disk", self.uri, brief(error))
                pause_s = min(max(2 * pause_s, _FIRST_RETRY_S), self._retry_max_s)
            if self._closed:
                return

    def _send_batch(self) -> bool:
        entries = self._journal.pending(_BATCH_BYTES)
        if not entries or self._run is None:
            return False
        points: list[tuple[str, float, int, int]] = []
        for entry, offset in entries:
            if "values" in entry:
                at = (entry["timestamp_ms"], entry["step"])
                points += [(name, value, *at) for name, value in entry["values"].items()]
                continue
            try:
                self._send_other(self._run, entry)
            except Exception as error:
                # an entry that MLflow refuses must not hold up the points around it
                self._run.log_metrics(points)
                self._refusals = self._refusals + 1 if self._run.answers() else 0
                if self._refusals < _REFUSALS:
                    raise
                self._lost_entries += 1
                log.warning("MLflow refuses %s (%s); it is on disk only", _shorten(entry), brief(error))
                self._refusals = 0
                self._journal.mark_sent(offset)
                return True
        self._run.log_metrics(points)
        self._journal.mark_sent(entries[-1][1])
        return True

    def _send_other(self, run: MlflowRun, entry: dict[str, Any]) -> None:
        if "params" in entry:
            run.log_params(entry["params"])
        elif "tags" in entry:
            run.log_tags(entry["tags"])
        elif "inputs" in entry:
            run.log_inputs(entry["inputs"])
        elif Path(self.run_dir, entry["artifact"]).is_file():
            run.log_artifact(str(Path(self.run_dir, entry["artifact"])), entry["folder"])
        else:
            self._lost_entries += 1
            log.warning("artifact %s was deleted before MLflow had it", entry["artifact"])


def _shorten(entry: dict[str, Any]) -> str:
    text = str(entry)
    return text if len(text) < 200 else text[:200] + "..."
