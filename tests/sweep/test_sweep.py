"""A real sweep on the digits: three trials on one teacher, one stopped early, the driver killed, and resumed."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from subprocess import run as run_command
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from ray.tune.search import Searcher

from raydistill.runtime import digits
from raydistill.sweep.board import Board, Row
from raydistill.sweep.config import Range, SweepConfig, checked
from raydistill.sweep.sweep import NumberedSearch
from raydistill.sweep.trial import KEY

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "jobs" / "sid_cifar10.py")
SMALL = [
    "train.batch_size=16", "train.generator_updates=6", "train.log_every=1", "evaluator.every=3",
    "evaluator.num_samples=64", "evaluator.batch_size=64", "evaluator.teacher_steps=2", "evaluator.grid_images=2",
    "checkpoint.every=1", "generator.lr_schedule=constant",
]  # fmt: skip
# the first one stays what it was, which the second one has made worse by update 3 and the third one not yet
SWEEP = [
    sys.executable, "-m", "raydistill.cli", "sweep", JOB, "--over", "generator.lr=1e-12,1e-2,1e-3", "--at-once", "1",
    *SMALL, "name=sweep", "tracking.experiment=not-for-tune",
]  # fmt: skip


def sweep_json(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "runs" / "sweep" / "sweep.json").read_text())
    return content


def wait_for(condition: Callable[[], bool], process: Popen[str], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


def losses(run_dir: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        values = {name: v for name, v in entry.get("values", {}).items() if name.startswith("loss/")}
        if values:
            found[entry["step"]] = values
    return found


@pytest.mark.ray
def test_a_sweep_that_is_killed_goes_on_and_keeps_what_is_done(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    runs = tmp_path / "runs"
    process = Popen(SWEEP, cwd=tmp_path, env=env, stdout=PIPE, stderr=PIPE, text=True)
    try:
        third = runs / "sweep-002" / "snapshots"
        wait_for(lambda: third.is_dir() and any(third.glob("*1/manifest.json")), process, 400)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        process.kill()
        process.communicate()
    before = sweep_json(tmp_path)
    assert [each["state"] for each in before["trials"]] == ["finished", "stopped", "running"]
    kept = {n: (runs / f"sweep-00{n}" / "metrics.jsonl").read_bytes() for n in (0, 1)}

    again = run_command(SWEEP, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "--resume goes on with it" in again.stderr
    done = run_command(
        [*SWEEP, "--resume"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = sweep_json(tmp_path)
    assert [each["state"] for each in after["trials"]] == ["finished", "stopped", "finished"]
    first, stopped, third_trial = (each["generator_updates"] for each in after["trials"])
    assert (first, third_trial) == (6, 6)
    assert (
        stopped >= 3
    )  # by when its figure was judged, and it was asked to stop, so small a run may have got further
    assert after["trials"][:2] == before["trials"][:2]
    assert {n: (runs / f"sweep-00{n}" / "metrics.jsonl").read_bytes() for n in (0, 1)} == kept
    assert (after["teacher_copies"], after["resumed"]) == (1, 1)
    best = min(after["trials"], key=lambda trial: trial["metric"])
    assert after["best"] == best["name"]
    assert f"* {best['name']}" in done.stdout
    assert f"best: {best['name']}" in done.stdout
    assert Path(after["export"], "edm.json").is_file()

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "not-for-tune"]
    by_name: dict[str, list[Any]] = {}
    for each in client.search_runs([experiment.experiment_id]):
        by_name.setdefault(str(each.info.run_name), []).append(each)
    assert {name: len(found) for name, found in by_name.items()} == {
        "sweep": 1, "sweep-000": 1, "sweep-001": 1, "sweep-002": 1,
    }  # fmt: skip
    parent = by_name.pop("sweep")[0].info
    for (each,) in by_name.values():
        assert each.data.tags["mlflow.parentRunId"] == parent.run_id
    steps = [
        point.step for point in client.get_metric_history(by_name["sweep-002"][0].info.run_id, "loss/sid")
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert parent.status == by_name["sweep-002"][0].info.status == "FINISHED"

    # what Tune writes is no place for the settings, tracking.uri with its password among them
    for file in (runs / "sweep" / "tune").rglob("*"):
        assert file.is_dir() or b"not-for-tune" not in file.read_bytes(), file

    # the shared teacher and the others beside it change nothing
    alone = [
        sys.executable, JOB, *SMALL, "generator.lr=1e-3", "name=alone", "placement.session=inline",
        "evaluator.enabled=false",
    ]  # fmt: skip
    run_command(
        alone, cwd=tmp_path, env=env | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=200
    )
    assert losses(runs / "alone") == losses(runs / "sweep-002")


def test_optunas_suggestions_go_on_where_an_interrupted_sweep_ended() -> None:
    space = {"generator.lr": Range("loguniform", 1e-5, 1e-3), "method.alpha": [1.0, 1.2]}
    config = checked(SweepConfig(run=digits.sid(), space=space, search="optuna", num_trials=4))

    def suggested(search: Searcher, trials: int) -> list[dict[str, Any]]:
        return [(search.suggest(f"t{n}") or {})[KEY] for n in range(trials)]

    first = suggested(NumberedSearch(config, []), 3)
    assert [order["name"] for order in first] == ["sid_digits-000", "sid_digits-001", "sid_digits-002"]
    assert all(1e-5 <= order["settings"]["generator.lr"] <= 1e-3 for order in first)
    ended = [{**order, "ended": True} for order in first[:2]]
    again = suggested(NumberedSearch(config, ended), 4)
    assert again[:2] == ended
    assert [order["name"] for order in again[2:]] == ["sid_digits-002", "sid_digits-003"]
    rates = [order["settings"]["generator.lr"] for order in again]
    assert len(set(rates)) == 4


def test_the_table_marks_the_best_and_a_failed_trial_is_never_it(tmp_path: Path) -> None:
    config = SweepConfig(run=digits.sid(), space={"method.alpha": [1.0, 1.2, 0.5]})
    board = Board(config)
    for n, (alpha, figure, state) in enumerate(
        [(1.0, 0.3, "finished"), (1.2, 0.2, "stopped"), (0.5, 0.1, "failed")]
    ):
        name = f"t{n}"
        board.rows[name] = Row(name, str(tmp_path), {"method.alpha": alpha}, figure, 5, state, 5)  # type: ignore[arg-type]
    assert board.best is board.rows["t1"]
    title, heads, *lines = board.table().splitlines()
    assert title == "sid_digits: 2 of 3 trials done; * is the best so far"
    assert heads.split()[:2] == ["trial", "alpha"]
    assert [line.split()[:3] for line in lines] == [
        ["t0", "1", "finished"], ["*", "t1", "1.2"], ["t2", "0.5", "failed"],
    ]  # fmt: skip
