"""MLflow's model registry: an exported folder becomes a version of a named model, and comes back as a folder.

A version's files are the folder's own, as artifacts of the run that made it. They lie under the hash of their content,
so that a version keeps its files when the run goes on and exports another generator. Nothing is pickled.
"""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydistill.errors import ConfigError, TrackingError
from raydistill.tracking.mlflow_run import (
    as_tag,
    brief,
    import_mlflow,
    require_reachable,
    resolve_uri,
    without_secrets,
)
from raydistill.tracking.tracker import TrackingConfig

log = logging.getLogger(__name__)

_MODEL = re.compile(r"models:/(?P<name>\w[\w.-]*)(@(?P<alias>[\w-]+)|/(?P<version>\d+))")


def register_model(
    config: TrackingConfig,
    name: str,
    export_folder: str | Path,
    run_id: str,
    tags: Mapping[str, Any],
    alias: str = "best",
) -> str | None:
    """Register an exported folder as a version of the model `name` and point `alias` at it; returns the version.

    A run's same content is one version, however often it is registered. The alias moves to it from any other version.

    config: where MLflow is; without a URI the database beside the run, whose folder `export_folder` lies in.
    run_id: the run that made the folder. tags: of the version.

    Returns None, after a warning, where MLflow does not answer or has no registry.
    """
    folder = Path(export_folder).absolute()
    uri = resolve_uri(config.uri, str(folder.parent))
    try:
        require_reachable(uri, config.request_timeout_s)
        mlflow = import_mlflow(config.request_timeout_s)
        client = mlflow.MlflowClient(tracking_uri=uri)
        where = f"export/{_content_hash(folder)[:16]}"
        source = f"{client.get_run(run_id).info.artifact_uri}/{where}"
        try:
            client.create_registered_model(name)
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        version = next((each.version for each in known if each.source == source), None)
        if version is None:
            client.log_artifacts(run_id, str(folder), where)
            version = client.create_model_version(name, source, run_id, await_creation_for=0).version
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, as_tag(key, value))
        client.set_registered_model_alias(name, alias, version)
    except Exception as error:  # of many libraries; the export is there, and the run must not fail for it
        log.warning(
            "%s is not registered as %s at %s (%s); the same command again tries it again",
            folder, name, without_secrets(uri), brief(error),
        )  # fmt: skip
        return None
    return str(version)


def download_model(model: str, tracking_uri: str | None, folder: str | Path) -> Path:
    """Copy the files of models:/NAME@ALIAS or models:/NAME/VERSION into a folder; returns where they are.

    tracking_uri: default MLFLOW_TRACKING_URI, or else runs/mlflow.db. Raises ConfigError for another form or store,
    TrackingError if the store has no such model or does not answer.
    """
    form = _MODEL.fullmatch(model)
    if form is None:
        raise ConfigError(
            f"{model!r} is no model of MLflow's registry: models:/NAME@ALIAS or models:/NAME/VERSION"
        )
    uri = resolve_uri(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), "runs/any")
    if uri.startswith("sqlite") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise ConfigError(f"there is no {uri}, where {model} is looked for; give --tracking-uri")
    timeout_s = TrackingConfig.request_timeout_s
    require_reachable(uri, timeout_s)
    mlflow = import_mlflow(timeout_s)
    name = form["name"]
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        version = form["version"] or client.get_model_version_by_alias(name, form["alias"]).version
        files = client.get_model_version_download_uri(name, version)
        there = mlflow.artifacts.download_artifacts(
            artifact_uri=files, dst_path=str(folder), tracking_uri=uri
        )
    except Exception as error:  # of requests, sqlalchemy and the artifact store
        raise TrackingError(f"{model} can't be had from {without_secrets(uri)}: {brief(error)}") from error
    return Path(there)


def _content_hash(folder: Path) -> str:
    """sha256 over names and contents of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
