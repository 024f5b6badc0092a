"""A real MLflow server on a real PostgreSQL, as cluster/ starts them, and a real run that it goes away from."""

import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import missing

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cluster"))
from mlflow_outage import drill
from mlflow_server import MlflowServer, programs

sys.path.pop(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that another user may enter: PostgreSQL is never root's. Pytest's own may be closed to others."""
    try:
        programs()
    except FileNotFoundError as error:
        missing("postgresql", f"make tools installs it, as root on Debian ({error})")
    with tempfile.TemporaryDirectory(prefix="raydistill-", dir="/tmp") as made:
        Path(made).chmod(0o755)
        yield Path(made)


def test_server_on_postgresql_killed_in_mid_run_has_every_metric_complete_and_in_order(folder: Path) -> None:
    small = ["evaluator.num_samples=100", "evaluator.teacher_steps=2", "evaluator.every=20"]
    happened = drill(folder, outage_s=5.0, updates=60, overrides=small)
    assert happened["updates_while_away"] > 0, happened
    assert "fails" in happened["told"][0]
    differences = happened["differences"]
    assert {"loss/sid", "eval/toyfid_100", "system/cpu_utilization_percentage"} <= differences.keys()
    assert {name: how for name, how in differences.items() if how} == {}
    assert happened["points"] > 60 * 10

    # the same folder holds the same runs, its password is nobody else's, and no log tells it
    secret = folder / "server" / "password"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    for log in ("mlflow.log", "postgres.log"):
        assert secret.read_text() not in (folder / "server" / log).read_text()
    with MlflowServer(folder / "server") as server:
        from mlflow import MlflowClient

        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("raydistill")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == "FINISHED"
        assert {each.dataset.name for each in run.inputs.dataset_inputs} == {
            "teacher", "training_shards", "evaluation_reference",
        }  # fmt: skip
        assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
            "grids", "summary.json", "evaluations.json",
        }  # fmt: skip
