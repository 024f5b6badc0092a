"""A real run whose best export is registered, and what MLflow knows of the run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydistill.checkpoint import Snapshots
from raydistill.runtime import digits
from raydistill.runtime.commands import evaluate
from raydistill.runtime.run import run
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.summary import table
from raydistill.tracking import code_commit


def small(output_dir: Path, updates: int) -> RunConfig:
    config = digits.sid(128 * updates)
    return replace(
        config,
        output_dir=str(output_dir),
        placement=replace(config.placement, session="inline"),
        tracking=replace(config.tracking, register_as="one_step_digits"),
        evaluator=replace(config.evaluator, num_samples=200, teacher_steps=2, every=2),
        # so that the run may go on to more updates
        generator=replace(config.generator, lr_schedule="constant"),
        critic=replace(config.critic, lr_schedule="constant"),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output_dir = tmp_path_factory.mktemp("runs")
    return output_dir, run(small(output_dir, 4))


def client(output_dir: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{output_dir}/mlflow.db")


def test_the_best_snapshot_is_registered_and_gives_its_figure_again(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    output_dir, summary = finished
    assert summary["registered"] == "models:/one_step_digits/1"
    version = client(output_dir).get_model_version_by_alias("one_step_digits", "best")
    assert version.run_id == summary["mlflow_run_id"]
    ledger = json.loads((output_dir / "sid_digits" / "evaluations.json").read_text())
    best = ledger[str(summary["best_step"])]
    snapshots = Snapshots(f"{summary['run_dir']}/snapshots", keep=1)
    assert version.tags == {
        "metric": "eval/toyfid_200",
        "metric_value": str(summary["toyfid_best"]),
        "protocol_hash": best["protocol"]["hash"],
        "generator_update": str(summary["best_step"]),
        "method": "sid",
        "teacher": "builtin:digits",
        "teacher_fingerprint": snapshots.read(summary["best_step"]).manifest["teacher_fingerprint"],
        "guidance_scale": "1.0",
    }
    asked = [
        {"run": "models:/one_step_digits@best", "tracking_uri": f"sqlite:///{output_dir}/mlflow.db"},
        {"run": summary["export"]},
        {"run": summary["run_dir"], "step": summary["best_step"]},
    ]
    for each in asked:
        again = evaluate(**each)
        assert again["eval/toyfid_200"] == pytest.approx(float(version.tags["metric_value"]), rel=1e-6), each
        assert again["protocol_hash"] == version.tags["protocol_hash"]
        assert again["step"] == summary["best_step"]


def test_mlflow_knows_what_the_run_was_made_from_where_it_ran_and_what_it_left(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    output_dir, summary = finished
    known = client(output_dir).get_run(summary["mlflow_run_id"])
    ledger = json.loads((output_dir / "sid_digits" / "evaluations.json").read_text())
    tags = known.data.tags
    assert (tags["method"], tags["placement"]) == ("sid", "colocated")
    assert tags["protocol_hash"] == ledger["4"]["protocol"]["hash"]
    assert tags.get("commit") == code_commit()
    assert tags["export"] == summary["export"]
    inputs = {
        tag.value: each.dataset for each in known.inputs.dataset_inputs for tag in each.tags
    }  # by the part that they play
    assert inputs.keys() == {"training", "evaluation", "teacher"}
    assert json.loads(inputs["training"].profile)["num_rows"] == 1797
    assert json.loads(inputs["evaluation"].profile)["sha256"] == ledger["4"]["protocol"]["reference_sha256"]
    names = known.data.metrics.keys()
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"} <= names
    grids = client(output_dir).list_artifacts(summary["mlflow_run_id"], "grids")
    assert [file.path for file in grids] == [f"grids/grid_0000000{step}.png" for step in (0, 2, 4)]


def test_a_run_that_goes_on_registers_its_new_best_as_another_version_only_if_there_is_one(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    output_dir, summary = finished
    assert run(small(output_dir, 4))["registered"] == "models:/one_step_digits/1"
    longer = run(small(output_dir, 6))
    number = 1 if longer["best_step"] == summary["best_step"] else 2
    assert longer["registered"] == f"models:/one_step_digits/{number}"
    first = evaluate("models:/one_step_digits/1", tracking_uri=f"sqlite:///{output_dir}/mlflow.db")
    assert first["eval/toyfid_200"] == pytest.approx(summary["toyfid_best"], rel=1e-6)


def test_a_registry_that_is_gone_costs_a_warning_and_no_run(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output_dir, _ = finished
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    config = replace(small(output_dir, 1), name="unregistered")
    summary = run(config)
    assert summary["registered"] is None
    assert Path(summary["export"]).is_dir()
    assert "is not registered as one_step_digits" in caplog.text
    assert "registered: not, see the warning" in table(summary)
    assert client(output_dir).get_run(summary["mlflow_run_id"]).info.status == "FINISHED"
