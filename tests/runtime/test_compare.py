"""Several runs as one comparison: real runs on the digits, a real MLflow store."""

import json
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from subprocess import run as run_command
from typing import Literal

import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image

from raydistill.errors import ConfigError, TrackingError
from raydistill.runtime import digits
from raydistill.runtime.compare import compare
from raydistill.runtime.settings import RunConfig

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "jobs" / "compare_methods.py"


def test_a_small_comparison_ends_with_table_plot_and_runs_under_one_parent_and_goes_on(
    tmp_path: Path,
) -> None:
    out = tmp_path / "comparison.json"
    command = [
        sys.executable, str(JOB), "--only", "sid", "moment_matching_2", "--images", "256", "--runs",
        str(tmp_path / "runs"), "--out", str(out),
    ]  # fmt: skip
    done = run_command(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(each["method"], each["steps"], each["images"]) for each in rows] == [
        ("sid", 1, 256), ("moment_matching", 2, 256),
    ]  # fmt: skip
    for each in rows:
        assert (
            f"| {each['name']} | {each['steps']} | {each['toyfid_start']:.3f} | {each['toyfid_end']:.3f} |"
            in done.stdout
        )
        assert each["toyfid_end"] != each["toyfid_start"]
        assert 0 < each["toyfid_teacher"] < each["toyfid_end"]
        assert each["curve"][0][:2] == [0, each["toyfid_start"]]
        assert each["wall_s"] > 0
    assert Image.open(out.with_suffix(".png")).width > 500

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "raydistill"]
    by_name = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = by_name.pop("digits_methods")
    assert by_name.keys() == {"sid_digits", "moment_matching_2_digits"}
    nested = client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert {run.info.run_name for run in nested} == by_name.keys()
    assert {run.info.status for run in by_name.values()} == {"FINISHED"} == {parent.info.status}
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "comparison.json",
        "comparison.png",
    }

    again = run_command(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stderr
    assert "sid_digits: all 2 updates are done already" in again.stderr
    assert json.loads(out.read_text())["rows"] == rows
    assert len(client.search_runs([experiment.experiment_id])) == 3


THREE_RUNS = """
import sys
from dataclasses import replace
from raydistill.errors import RayDistillError
from raydistill.runtime import digits
from raydistill.runtime.compare import compare

if __name__ == "__main__":
    configs = [replace(make(100_000), output_dir="runs") for make in (digits.sid, digits.sida, digits.dmd2)]
    few = [replace(each, evaluator=replace(each.evaluator, num_samples=50, teacher_steps=2)) for each in configs]
    try:
        compare("three", few, at_once=1)
    except RayDistillError as error:
        sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize(
    ("whom", "how", "told_of"),
    [
        ("run", signal.SIGKILL, r"killed from outside.*0 of 3 .*same command again"),
        ("comparison", signal.SIGTERM, r"stopped at update \d+ as asked; the same command goes on"),
    ],
)
def test_a_comparison_that_is_stopped_says_how_to_go_on_in_one_line_and_leaves_no_process(
    tmp_path: Path, whom: str, how: int, told_of: str
) -> None:
    script, runs = tmp_path / "three_runs.py", tmp_path / "runs"
    script.write_text(THREE_RUNS)
    with Popen([sys.executable, str(script)], cwd=tmp_path, stdout=DEVNULL, stderr=PIPE, text=True) as job:
        until = time.monotonic() + 120
        while not (runs / "sid_digits" / "snapshots").is_dir():
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        children = psutil.Process(job.pid).children()
        (worker,) = [child for child in children if "--multiprocessing-fork" in child.cmdline()]
        (worker if whom == "run" else job).send_signal(how)
        _, told = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "Traceback" not in told
    assert re.search(f"error: .*{told_of}", told)
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not (runs / "sida_digits").exists()


def test_a_store_that_nobody_is_at_is_told_of_before_data_is_made(tmp_path: Path) -> None:
    config = digits.sid(128)
    nowhere = replace(config.tracking, uri="http://127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9 does not answer.*tracking\.uri"):
        compare("nowhere", [replace(config, output_dir=str(tmp_path / "runs"), tracking=nowhere)], at_once=1)
    assert not (tmp_path / "runs").exists()


def test_runs_of_one_name_are_refused() -> None:
    twice = [digits.sid(), digits.sid(alpha=1.0)]
    with pytest.raises(ConfigError, match="names of their own: sid_digits"):
        compare("twice", twice, at_once=1)


def test_figures_of_different_protocols_are_never_put_in_one_table(tmp_path: Path) -> None:
    def small(name: str, num_samples: int, weights: Literal["raw", "ema"]) -> RunConfig:
        config = digits.sid(128)
        return replace(
            config,
            name=name,
            output_dir=str(tmp_path),
            tracking=replace(config.tracking, uri="off"),
            evaluator=replace(config.evaluator, num_samples=num_samples, weights=weights, teacher_steps=2),
        )

    with pytest.raises(ConfigError, match=r"their protocols differ in (?=.*num_samples)(?=.*weights)"):
        compare("mixed", [small("one", 50, "ema"), small("other", 60, "raw")], at_once=2)


@pytest.mark.parametrize("method", [digits.dmd2, digits.sid, digits.sida, digits.moment_matching])
def test_budgets_are_in_generated_images(method: object) -> None:
    config = method(images=100_000)  # type: ignore[operator]
    per_update = digits.images_of_update(config.method)
    assert 100_000 - per_update < config.train.generator_updates * per_update <= 100_000
