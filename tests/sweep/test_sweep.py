"""A real sweep on the digits: of four trials one is stopped early, one diverges; stopped, killed, resumed."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, Popen
from subprocess import run as run_command
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from ray.tune.search import Searcher

from raydistill.checkpoint import Snapshots
from raydistill.runtime import digits
from raydistill.runtime.run import InterruptedRunError
from raydistill.runtime.session import LEDGER
from raydistill.sweep.board import Board, Row
from raydistill.sweep.config import Range, SweepConfig, checked
from raydistill.sweep.sweep import NumberedSearch, _send_what_waits
from raydistill.sweep.trial import KEY, Order, Trial
from raydistill.tracking import Tracker, TrackingConfig, has_unsent

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "jobs" / "sid_cifar10.py")
SMALL = [
    "train.batch_size=16", "train.generator_updates=120", "train.log_every=20", "evaluator.every=60",
    "evaluator.num_samples=64", "evaluator.batch_size=64", "evaluator.teacher_steps=2", "evaluator.grid_images=2",
    "checkpoint.every=20",
]  # fmt: skip
# the last one diverges; of the others at update 60 the second one, which stays what it was, is the worst
SWEEP = [
    sys.executable, "-m", "raydistill.cli", "sweep", JOB, "--at-once", "1",
    "--over", "generator.lr=1e-3,1e-12,5e-4,1e30",
    *SMALL, "placement.cpus_per_worker=1", "name=sweep", "tracking.experiment=not-for-tune",
    "tracking.register_as=one-step",
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
    first = runs / "sweep-000" / "snapshots"
    wait_for(lambda: first.is_dir() and any(first.glob("*20/manifest.json")), process, 400)
    process.terminate()
    _, said = process.communicate(timeout=200)
    assert process.returncode == 2, said
    assert "the trials write their snapshots" in said
    assert "stopped with 4 of 4 trials unfinished" in said
    asked_at = Snapshots(str(first), keep=1).steps()[-1]
    assert 20 <= asked_at < 120
    assert [each["state"] for each in sweep_json(tmp_path)["trials"]] == ["pending"] * 4

    process = Popen([*SWEEP, "--resume"], cwd=tmp_path, env=env, stdout=PIPE, stderr=PIPE, text=True)
    try:
        third = runs / "sweep-002" / "snapshots"
        wait_for(lambda: third.is_dir() and any(third.glob("*20/manifest.json")), process, 400)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        process.kill()
        process.communicate()
    before = sweep_json(tmp_path)
    assert [each["state"] for each in before["trials"]] == ["finished", "stopped", "running", "pending"]
    kept = {n: (runs / f"sweep-00{n}" / "metrics.jsonl").read_bytes() for n in (0, 1)}

    again = run_command(SWEEP, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert again.returncode == 2
    assert "--resume goes on with it" in again.stderr
    done = run_command(
        [*SWEEP, "--resume"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 2, done.stdout + done.stderr
    failed = done.stderr.splitlines()[-1]
    assert "1 of 4 trials failed, --resume tries them again; sweep-003: " in failed
    assert "non-finite" in failed or "not finite" in failed or "nan" in failed, failed
    assert f"{runs}/sweep-003/replay" in failed
    after = sweep_json(tmp_path)
    assert [each["state"] for each in after["trials"]] == ["finished", "stopped", "finished", "failed"]
    made = [each["generator_updates"] for each in after["trials"]]
    assert made[0] == made[2] == 120
    assert 60 <= made[1] <= 120  # stopped by its figure of update 60, with a snapshot of where it was
    assert made[3] == 0
    # asked to stop, it wrote a snapshot where it then was
    assert 60 < Snapshots(f"{runs}/sweep-001/snapshots", keep=1).steps()[-1] < 120
    assert after["trials"][:2] == before["trials"][:2]
    assert {n: (runs / f"sweep-00{n}" / "metrics.jsonl").read_bytes() for n in (0, 1)} == kept
    assert (after["teacher_copies"], after["resumed"]) == (1, 2)
    best = min(after["trials"][:3], key=lambda trial: trial["metric"])
    assert after["best"] == best["name"]
    assert f"* {best['name']}" in done.stdout
    assert f"best: {best['name']}" in done.stdout
    assert Path(after["export"], "edm.json").is_file()
    page = Path(after["report"]).read_text()
    assert all(f"00{n}: lr " in page for n in range(4))
    assert "report: runs/sweep/report.html" in done.stdout

    client = MlflowClient(f"sqlite:///{runs}/mlflow.db")
    version = client.get_model_version_by_alias("one-step", "best")
    assert after["registered"] == f"models:/one-step/{version.version}" == "models:/one-step/1"
    assert version.tags["metric_value"] == str(best["metric"])
    (experiment,) = [e for e in client.search_experiments() if e.name == "not-for-tune"]
    by_name: dict[str, list[Any]] = {}
    for each in client.search_runs([experiment.experiment_id]):
        by_name.setdefault(str(each.info.run_name), []).append(each)
    assert {name: len(found) for name, found in by_name.items()} == {
        "sweep": 1, "sweep-000": 1, "sweep-001": 1, "sweep-002": 1, "sweep-003": 1,
    }  # fmt: skip
    parent = by_name.pop("sweep")[0].info
    for (each,) in by_name.values():
        assert each.data.tags["mlflow.parentRunId"] == parent.run_id
    steps = [
        point.step for point in client.get_metric_history(by_name["sweep-002"][0].info.run_id, "loss/sid")
    ]
    assert steps == list(range(20, 121, 20))
    statuses = {name: each.info.status for name, (each,) in by_name.items()}
    assert statuses == {
        "sweep-000": "FINISHED", "sweep-001": "KILLED", "sweep-002": "FINISHED", "sweep-003": "FAILED",
    }  # fmt: skip
    assert parent.status == "FAILED"

    # what Tune writes is no place for the settings, tracking.uri with its password among them
    for file in (runs / "sweep" / "tune").rglob("*"):
        content = b"" if file.is_dir() else file.read_bytes()
        # Tune writes pickles as hexadecimal digits into JSON
        assert b"not-for-tune" not in content, file
        assert b"not-for-tune".hex().encode() not in content, file

    # the shared teacher changes nothing
    alone = [
        sys.executable, JOB, *SMALL, "generator.lr=5e-4", "name=alone", "placement.session=inline",
        "evaluator.enabled=false",
    ]  # fmt: skip
    run_command(
        alone, cwd=tmp_path, env=env | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=200
    )
    assert losses(runs / "alone") == losses(runs / "sweep-002")


def trial_on(uri: str, folder: Path) -> Trial:
    """One that has not begun."""
    run = replace(digits.sid(), output_dir=str(folder), tracking=TrackingConfig(uri=uri, retry_max_s=0.2))
    trial = object.__new__(Trial)
    trial._base, trial._metric = run, "eval/toyfid_1797"
    trial._begin(Order("t", {}, ended=True))
    return trial


def test_a_trial_that_is_to_begin_waits_for_a_tracking_server_that_went_away(tmp_path: Path) -> None:
    with socket.socket() as later:
        later.bind(("127.0.0.1", 0))
        trial = trial_on(f"http://127.0.0.1:{later.getsockname()[1]}", tmp_path)
        waiting = threading.Thread(target=trial._wait_for_store)
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        later.listen()
        waiting.join(60)
        assert not waiting.is_alive()


def test_a_trial_that_waits_for_a_tracking_server_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    with socket.socket() as never:
        never.bind(("127.0.0.1", 0))
        trial = trial_on(f"http://127.0.0.1:{never.getsockname()[1]}", tmp_path)
        trial.cleanup()
        with pytest.raises(InterruptedRunError):
            trial._wait_for_store()


def test_figures_of_ended_trials_that_mlflow_missed_are_sent_when_the_sweep_ends(tmp_path: Path) -> None:
    run = replace(digits.sid(), output_dir=str(tmp_path))
    board = Board(SweepConfig(run=run, space={"method.alpha": [1.0, 1.2]}))
    ids = []
    for name, state in (("t0", "finished"), ("t1", "running")):
        tracker = Tracker(run.tracking, str(tmp_path / name), name)
        tracker.metrics({"loss/sid": 1.0}, 1)
        assert tracker.finish("FAILED")
        with (tmp_path / name / "metrics.jsonl").open("a") as journal:
            journal.write(
                json.dumps(
                    {"step": 2, "timestamp_ms": int(1000 * time.time()) + 1, "values": {"loss/sid": 0.5}}
                )
                + "\n"
            )
        board.rows[name] = Row(name, str(tmp_path / name), {}, state=state)  # type: ignore[arg-type]
        ids.append(tracker.run_id)
    assert has_unsent(str(tmp_path / "t0"))
    _send_what_waits(board)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    histories = [[(p.step, p.value) for p in client.get_metric_history(id, "loss/sid")] for id in ids]
    assert histories == [[(1, 1.0), (2, 0.5)], [(1, 1.0)]]
    assert client.get_run(ids[0]).info.status == "FINISHED"
    assert not has_unsent(str(tmp_path / "t0"))


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


def test_a_trials_updates_are_those_of_its_newest_snapshot_whatever_was_evaluated(tmp_path: Path) -> None:
    run = replace(digits.sid(), output_dir=str(tmp_path))
    config = SweepConfig(run=run, space={"method.alpha": [1.0, 1.2]})
    board = Board(config)
    Path(config.folder).mkdir()
    for name in ("t0", "t1"):
        run_dir = Path(board.row(name, {}).run_dir)
        run_dir.mkdir()
        (run_dir / LEDGER).write_text(json.dumps({"5": {"metrics": {config.figure: 0.3}}, "9": {}}))
    snapshots = Snapshots(str(tmp_path / "t1" / "snapshots"), keep=1)
    snapshots.write_part(9, "generator", {"weight": torch.zeros(1)}, {})
    snapshots.commit(9, {})
    board.update("t0", "running")
    board.update("t1", "stopped")
    assert [row.generator_updates for row in board.rows.values()] == [5, 9]
    assert [(row.metric, row.step) for row in board.rows.values()] == [(0.3, 5)] * 2
