"""One MLflow run, by its client: made or resumed, filled in batches, ended.

`import_mlflow` is the only place that imports mlflow.
"""

import fcntl
import getpass
import json
import logging
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from raydistill.errors import ConfigError, TrackingError

log = logging.getLogger(__name__)

# limits of MLflow's API (mlflow/utils/validation.py, 3.17)
MAX_METRICS = 1000
MAX_PARAMS = 100
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
MAX_DIGEST_CHARS = 36
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SCHEMES = ("sqlite", *_PORTS)
_USER_INFO = re.compile(r"(\w[\w+.-]*://)[^/@\s]+@")
_SECRET_NAME = re.compile(
    r"(^|[._-])(password|passwd|secret|token|credentials?|(api|access|secret)_key)$", re.I
)
_SECRET_QUERY = re.compile(
    r"([?&][^=&\s]*(?:password|secret|token|signature|credential|key)[^=&\s]*=)[^&\s]+", re.I
)


def without_secrets(text: str) -> str:
    """The text with user names, passwords and tokens in its URIs replaced by ***."""
    return _SECRET_QUERY.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def resolve_uri(uri: str | None, run_dir: str) -> str:
    """An absolute tracking URI; None is the sqlite file beside the run folder.

    Raises ConfigError for URIs that MLflow 3 has no store for.
    """
    beside = f"sqlite:///{Path(run_dir).absolute().parent / 'mlflow.db'}"
    if uri is None:
        return beside
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme not in _SCHEMES:
        raise ConfigError(
            f"tracking.uri is {without_secrets(uri)!r}; MLflow has no store for that (its file store is "
            "gone). Use "
            "sqlite:////absolute/mlflow.db, http(s)://host:port, "
            f"{', '.join(s + '://...' for s in _SCHEMES[3:])}, "
            f"off for the journal alone, or leave it out for {beside}"
        )
    if scheme == "sqlite":
        return f"sqlite:///{os.path.abspath(uri.split(':///', 1)[-1])}"
    return uri


def require_reachable(uri: str, timeout_s: float) -> None:
    """Raise TrackingError unless somebody listens at a server's or database's address.

    MLflow itself tries a database for minutes. A file, and a server behind a proxy, are left to it.
    """
    parts = urlsplit(uri)
    if not parts.hostname or (parts.scheme in getproxies() and not proxy_bypass(parts.hostname)):
        return
    try:
        port = parts.port or _PORTS[parts.scheme.split("+")[0]]
        socket.create_connection((parts.hostname, port), timeout_s).close()
    except (OSError, ValueError) as error:  # ValueError: a port that is none
        raise TrackingError(_no_answer(uri, error)) from error


class MlflowRun:
    """A run of an experiment, open for writing.

    Args:
        uri: absolute tracking URI, as `resolve_uri` returns it.
        run_id: the run to go on with; None makes a new one named `run_name`.

    Raises TrackingError if the store does not answer, or if the run or the experiment was deleted.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_id: str | None,
        parent_run_id: str | None,
        request_timeout_s: float,
    ) -> None:
        self.shown_uri = without_secrets(uri)
        require_reachable(uri, request_timeout_s)
        self._mlflow = import_mlflow(request_timeout_s)
        try:
            with _alone_with_new_file(uri):
                self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            if run_id is None:
                experiment_id = self._experiment(uri, experiment)
                run = self._client.create_run(
                    experiment_id, run_name=run_name, tags=_start_tags(parent_run_id)
                )
            else:
                run = self._client.get_run(run_id)
        except TrackingError:
            raise
        except Exception as error:  # requests, sqlalchemy and alembic each have their own classes
            raise TrackingError(self._start_failure(uri, run_id, error)) from error
        if run.info.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow run {run_id} at {self.shown_uri} was deleted; restore it or start a new run"
            )
        self.run_id = str(run.info.run_id)
        self._params = dict(run.data.params)
        if run_id is not None:
            self.set_status("RUNNING")
            if parent_run_id is not None:  # of a comparison or sweep that was begun anew
                self.log_tags({"mlflow.parentRunId": parent_run_id})

    def _start_failure(self, uri: str, run_id: str | None, error: Exception) -> str:
        if run_id is not None and getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return (
                f"MLflow run {run_id} is not at {self.shown_uri}: set tracking.uri to the store the run "
                "began with, "
                "or start a new run in another output_dir"
            )
        return _no_answer(uri, error)

    def _experiment(self, uri: str, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            root = None
            if uri.startswith("sqlite"):
                # by default it would be ./mlruns of whatever folder the process is in, and Ray changes that
                root = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts")
            try:
                return str(self._client.create_experiment(name, artifact_location=root))
            except self._mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = self._client.get_experiment_by_name(name)  # another run was faster
        if found is None or found.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow experiment {name!r} at {self.shown_uri} was deleted; restore it or set "
                "tracking.experiment"
            )
        return str(found.experiment_id)

    def log_metrics(self, points: list[tuple[str, float, int, int]]) -> None:
        """Log (name, value, timestamp in ms, step) points; sending a point twice changes nothing."""
        metric = self._mlflow.entities.Metric
        for start in range(0, len(points), MAX_METRICS):
            batch = [metric(*point) for point in points[start : start + MAX_METRICS]]
            self._client.log_batch(self.run_id, metrics=batch)

    def log_params(self, params: dict[str, str]) -> None:
        """Log parameters.

        One that the run has already with another value becomes the tag `changed/<name>`.
        """
        changed = {k: v for k, v in params.items() if self._params.get(k, v) != v}
        new = [(k, v) for k, v in params.items() if k not in self._params]
        for start in range(0, len(new), MAX_PARAMS):
            batch = [self._mlflow.entities.Param(k, v) for k, v in new[start : start + MAX_PARAMS]]
            self._client.log_batch(self.run_id, params=batch)
            self._params.update(new[start : start + MAX_PARAMS])
        if changed:
            log.warning("MLflow parameters can't change; the resumed run's are tags: %s", ", ".join(changed))
            self.log_tags({f"changed/{k}": v for k, v in changed.items()})

    def log_tags(self, tags: dict[str, str]) -> None:
        items = list(tags.items())
        for start in range(0, len(items), MAX_PARAMS):
            batch = [self._mlflow.entities.RunTag(k, v) for k, v in items[start : start + MAX_PARAMS]]
            self._client.log_batch(self.run_id, tags=batch)

    def log_inputs(self, inputs: Sequence[Mapping[str, Any]]) -> None:
        """Log `RunInput`s as dictionaries; MLflow knows one by name and digest and takes it once."""
        entities = self._mlflow.entities
        self._client.log_inputs(
            self.run_id,
            [
                entities.DatasetInput(
                    entities.Dataset(
                        name=each["name"],
                        digest=each["sha256"][:MAX_DIGEST_CHARS],
                        source_type="local" if each["source"].startswith("/") else _scheme(each["source"]),
                        source=json.dumps({"uri": each["source"]}),
                        profile=json.dumps(
                            {"sha256": each["sha256"]}
                            | ({} if each["rows"] is None else {"num_rows": each["rows"]})
                        ),
                    ),
                    [entities.InputTag("mlflow.data.context", each["context"])],
                )
                for each in inputs
            ],
        )

    def log_artifact(self, path: str, folder: str) -> None:
        self._client.log_artifact(self.run_id, path, folder or None)

    def answers(self) -> bool:
        """Is the store there? Tells an entry that it refuses from a store that is down."""
        try:
            self._client.get_run(self.run_id)
        except Exception:  # any failure means no
            return False
        return True

    def set_status(self, status: str) -> None:
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status)


def as_param(name: str, value: Any) -> str:
    """A value as MLflow shows it: no secrets, and cut with a note where it is longer than MLflow takes."""
    if _SECRET_NAME.search(name) and value is not None:
        return "***"
    text = without_secrets(str(value))
    if len(text) > MAX_PARAM_CHARS:
        note = f"... [{len(text)} characters]"
        log.warning("parameter %s has %d characters; MLflow takes %d", name, len(text), MAX_PARAM_CHARS)
        text = text[: MAX_PARAM_CHARS - len(note)] + note
    return text


def as_tag(name: str, value: Any) -> str:
    """A tag's value, with secrets replaced and cut to what MLflow takes."""
    return "***" if _SECRET_NAME.search(name) else without_secrets(str(value))[:MAX_TAG_CHARS]


def _scheme(source: str) -> str:
    return urlsplit(source).scheme or "name"  # such as a hub's


def brief(error: Exception) -> str:
    """The first line of an error under its class's name, without secrets."""
    return without_secrets(f"{type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _no_answer(uri: str, error: Exception) -> str:
    return without_secrets(
        f"the tracking store {uri} does not answer ({_first_line(error)}); start the server, correct tracking.uri, "
        "or leave it out for a local sqlite file"
    )


def import_mlflow(request_timeout_s: float) -> Any:
    """The module, set up to answer at once instead of trying for minutes."""
    # MLflow's own retries block for minutes; the journal retries instead. A user's settings win.
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(request_timeout_s))),
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.store.db_migrations"):
        logging.getLogger(name).setLevel(logging.WARNING)
    import mlflow
    import mlflow.entities
    import mlflow.exceptions

    return mlflow


@contextmanager
def _alone_with_new_file(uri: str) -> Iterator[None]:
    # processes that lay out the same new sqlite file at the same time break each other's migrations (MLflow
    # 3.17)
    if not uri.startswith("sqlite"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start_tags(parent_run_id: str | None) -> dict[str, str]:
    tags = {"mlflow.source.type": "LOCAL"}
    if parent_run_id is not None:
        tags["mlflow.parentRunId"] = parent_run_id
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):
        log.debug("no user name for the run")
    commit = code_commit()
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
    return tags


def code_commit() -> str | None:
    """The git commit of this package's checkout, with "-dirty" after it where files were changed; None without git."""
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    command = ["git", "-C", str(Path(__file__).parent), *describe]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
