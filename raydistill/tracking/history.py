"""What MLflow has of runs, for reports: reads only."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raydistill.errors import ConfigError, TrackingError
from raydistill.tracking.mlflow_run import import_mlflow, require_reachable, resolve_uri, without_secrets

_TIMEOUT_S = 5.0
_PAGE = 1000


@dataclass(frozen=True)
class RecordedRun:
    """A run as MLflow has it; `metrics` are the names it has points of."""

    run_id: str
    name: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    metrics: frozenset[str]


class History:
    """A tracking store, open for reading.

    Args:
        uri: as tracking.uri; None is runs/mlflow.db in the working directory.

    Raises ConfigError for a URI without a store and TrackingError, within seconds, for a store that does not answer.
    """

    def __init__(self, uri: str | None) -> None:
        uri = resolve_uri(uri, "runs/report")
        self.shown_uri = without_secrets(uri)
        self._require_reachable(uri)
        self._mlflow = import_mlflow(_TIMEOUT_S)
        with self._asking():
            self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            self._client.search_experiments(max_results=1)

    def run(self, run_id: str) -> RecordedRun:
        """One run. Raises ConfigError if there is none of this id."""
        with self._asking(f"no run {run_id}"):
            return _recorded(self._client.get_run(run_id))

    def children(self, run_id: str) -> list[RecordedRun]:
        """The runs under a parent, oldest first."""
        with self._asking(f"no run {run_id}"):
            experiment = self._client.get_run(run_id).info.experiment_id
            return self._search(experiment, f"tags.`mlflow.parentRunId` = '{run_id}'")

    def experiment(self, name: str) -> list[RecordedRun]:
        """The runs of an experiment, oldest first. Raises ConfigError if there is none of this name."""
        with self._asking():
            found = self._client.get_experiment_by_name(name)
            if found is None or found.lifecycle_stage != "active":
                others = ", ".join(repr(each.name) for each in self._client.search_experiments())
                raise ConfigError(f"no experiment {name!r} at {self.shown_uri}; there are {others}")
            return self._search(found.experiment_id, "")

    def points(self, run: RecordedRun, name: str) -> list[tuple[int, float]]:
        """(step, value) points of a metric, by step."""
        if name not in run.metrics:
            return []
        with self._asking():
            history = self._client.get_metric_history(run.run_id, name)
        return sorted({point.step: float(point.value) for point in history}.items())

    def artifacts(self, run: RecordedRun, folder: str = "") -> list[str]:
        """Paths of a run's artifacts in a folder."""
        with self._asking():
            return [item.path for item in self._client.list_artifacts(run.run_id, folder or None)]

    def artifact(self, run: RecordedRun, path: str) -> bytes:
        """An artifact's bytes."""
        with self._asking(), tempfile.TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(run.run_id, path, folder)).read_bytes()

    def _search(self, experiment_id: str, condition: str) -> list[RecordedRun]:
        found, token = [], None
        while True:
            page = self._client.search_runs(
                [experiment_id], condition, max_results=_PAGE, order_by=["start_time ASC"], page_token=token
            )
            found += [_recorded(run) for run in page]
            token = page.token
            if not token:
                return found

    def _require_reachable(self, uri: str) -> None:
        """MLflow would make a sqlite file that is not there, and try a silent database for minutes."""
        parts = urlsplit(uri)
        if parts.scheme == "sqlite":
            path = Path(uri.removeprefix("sqlite:///"))
            if not path.is_file():
                raise TrackingError(
                    f"no MLflow store at {path}; set --tracking-uri to the one that the runs were tracked in"
                )
            return
        try:
            require_reachable(uri, _TIMEOUT_S)
        except TrackingError as error:
            raise self._silent(error.__cause__ or error) from error

    @contextmanager
    def _asking(self, missing: str | None = None) -> Iterator[None]:
        """missing: what it means if MLflow says that something does not exist."""
        try:
            yield
        except (ConfigError, TrackingError):
            raise
        except Exception as error:  # requests, sqlalchemy and alembic each have their own classes
            if missing and getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
                raise ConfigError(f"{missing} at {self.shown_uri} (--tracking-uri)") from error
            raise self._silent(error) from error

    def _silent(self, error: BaseException) -> TrackingError:
        first_line = without_secrets(str(error).strip().split("\n")[0])
        return TrackingError(
            f"the tracking store {self.shown_uri} does not answer ({first_line}); start the server or correct "
            "--tracking-uri"
        )


def _recorded(run: Any) -> RecordedRun:
    return RecordedRun(
        str(run.info.run_id),
        str(run.info.run_name),
        str(run.info.status),
        dict(run.data.params),
        dict(run.data.tags),
        frozenset(run.data.metrics),
    )
