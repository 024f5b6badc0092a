import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydistill.errors import ConfigError, TrackingError
from raydistill.tracking import (
    METRICS,
    RunInput,
    Tracker,
    TrackingConfig,
    check_metric_names,
    check_tracking,
    code_commit,
    download_model,
    previous_run_id,
    register_model,
)
from raydistill.tracking.journal import Journal, StepSet

Make = Callable[..., Tracker]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One sqlite file for all tests that do not test the file itself: MLflow needs seconds to lay one out."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    Tracker(TrackingConfig(uri=uri), str(folder / "run"), "first").finish()
    return uri


@pytest.fixture
def make(database: str, tmp_path: Path) -> Iterator[Make]:
    made: list[Tracker] = []

    def build(run_id: str | None = None, run_dir: str = "run", **settings: Any) -> Tracker:
        config = TrackingConfig(**({"uri": database} | settings))
        made.append(Tracker(config, str(tmp_path / run_dir), "a run", run_id))
        return made[-1]

    yield build
    for tracker in made:
        tracker.finish()


def client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(uri).get_metric_history(run_id, name)]


def test_every_name_that_the_run_needs_is_in_the_list() -> None:
    check_metric_names(METRICS[name] and name.replace("*", "2k") for name in METRICS)
    check_metric_names(["eval/toyfid_500", "preflight/error_t999", "data/rejected/no_caption"])
    assert all(description for description in METRICS.values())


@pytest.mark.parametrize("name", ["loss/dmm", "los/dm", "eval/toyfid", "critic/lag_[a]"])
def test_an_unknown_metric_name_is_refused_with_the_nearest_one(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not in raydistill\.tracking\.METRICS; the nearest name is '"):
        check_metric_names([name])


def test_figures_params_tags_and_artifacts_reach_mlflow(make: Make, database: str, tmp_path: Path) -> None:
    tracker = make()
    tracker.params({"method.name": "dmd2", **{f"p.{i}": i for i in range(250)}, "long": "x" * 9000})
    tracker.tags({"stage": 1})
    tracker.metrics({"loss/dm": 0.5, "lr/generator": 1e-5}, step=10, timestamp_ms=1_700_000_000_000)
    tracker.metrics({"loss/dm": float("nan")}, step=20)
    (tmp_path / "grid.txt").write_text("grid")
    tracker.artifact(str(tmp_path / "grid.txt"), "grids")
    tracker.artifact_bytes(b"png", "step_10.png", "grids/generator")
    assert tracker.flush(30)

    run = client(database).get_run(tracker.run_id)
    assert run.info.run_name == "a run"
    assert run.data.params["method.name"] == "dmd2"
    assert run.data.params["p.249"] == "249"
    assert len(run.data.params) == 252
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("x... [9000 characters]")
    assert run.data.tags["stage"] == "1"
    (point,) = client(database).get_metric_history(tracker.run_id, "lr/generator")
    assert (point.step, point.value, point.timestamp) == (10, 1e-5, 1_700_000_000_000)
    assert str(history(database, tracker.run_id, "loss/dm")) == "[(10, 0.5), (20, nan)]"
    assert {f.path for f in client(database).list_artifacts(tracker.run_id, "grids")} == {
        "grids/grid.txt",
        "grids/generator",
    }
    assert Path(tracker.run_dir, "artifacts/grids/grid.txt").read_text() == "grid"
    # the artifacts lie beside the sqlite file, whatever folder the process is in
    root = Path(database.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert [p.read_bytes() for p in root.rglob("step_10.png")] == [b"png"]
    assert tracker.finish()
    assert client(database).get_run(tracker.run_id).info.status == "FINISHED"


def test_inputs_reach_mlflow_once_with_digest_source_and_part_and_without_secrets(
    make: Make, database: str
) -> None:
    tracker = make()
    shards = RunInput("training_shards", "training", "ab" * 32, "s3://key:sesame@bucket/x", rows=1797)
    tracker.inputs([shards, RunInput("teacher", "teacher", "cd" * 32, "/models/teacher")])
    tracker.inputs([shards])  # as a resumed run says it again
    assert tracker.flush(30)
    inputs = client(database).get_run(tracker.run_id).inputs.dataset_inputs
    found = {each.dataset.name: (each.dataset, {tag.key: tag.value for tag in each.tags}) for each in inputs}
    assert len(inputs) == 2
    data, tags = found["training_shards"]
    assert (data.digest, data.source_type, tags) == ("ab" * 18, "s3", {"mlflow.data.context": "training"})
    assert json.loads(data.source) == {"uri": "s3://***@bucket/x"}
    assert json.loads(data.profile) == {"sha256": "ab" * 32, "num_rows": 1797}
    assert found["teacher"][0].source_type == "local"
    assert "sesame" not in Path(tracker.run_dir, "metrics.jsonl").read_text()


def test_a_run_that_goes_on_in_a_new_comparison_is_shown_under_it(make: Make, database: str) -> None:
    first = make()
    first.finish()
    parent = make(run_dir="parent")
    make(run_id=first.run_id, parent_run_id=parent.run_id).finish()
    (experiment,) = [e for e in client(database).search_experiments() if e.name == "raydistill"]
    nested = client(database).search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent.run_id}'"
    )
    assert [run.info.run_id for run in nested] == [first.run_id]


def test_the_commit_is_the_checkouts_and_says_whether_it_was_changed() -> None:
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    assert code_commit() == (f"{head}-dirty" if changed else head or None)


def exported(folder: Path, content: str = "weights") -> Path:
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "unet" / "model.safetensors").write_text(content)
    (folder / "index.json").write_text("{}")
    return folder


def test_a_registered_export_is_had_back_by_its_alias_and_keeps_its_files_and_tags(
    make: Make, database: str, tmp_path: Path
) -> None:
    tracker = make()
    config = TrackingConfig(uri=database)
    folder = exported(tmp_path / "run" / "export")
    tags = {"metric": "eval/toyfid_2k", "metric_value": 0.5, "source": "http://me:sesame@host"}
    assert register_model(config, "digits", folder, tracker.run_id, tags) == "1"
    assert register_model(config, "digits", folder, tracker.run_id, {"metric_value": 0.25}) == "1"
    first = client(database).get_model_version_by_alias("digits", "best")
    assert first.tags == {"metric": "eval/toyfid_2k", "metric_value": "0.25", "source": "http://***@host"}
    assert (first.run_id, first.status) == (tracker.run_id, "READY")

    # the run goes on, and its export folder holds another generator
    exported(folder, "better weights")
    assert register_model(config, "digits", folder, tracker.run_id, {}) == "2"
    for model, content in (("models:/digits@best", "better weights"), ("models:/digits/1", "weights")):
        back = download_model(model, database, tmp_path / content)
        assert (back / "unet" / "model.safetensors").read_text() == content
        assert sorted(path.name for path in back.iterdir()) == ["index.json", "unet"]


def test_a_registry_that_is_gone_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrackingConfig(uri="http://anna:geheim@127.0.0.1:9")
    assert register_model(config, "digits", exported(tmp_path / "export"), "0" * 32, {}) is None
    assert "is not registered as digits at http://***@127.0.0.1:9" in caplog.text
    assert "geheim" not in caplog.text


def test_a_run_that_the_store_does_not_know_costs_a_warning(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = TrackingConfig(uri=database)
    assert register_model(config, "nobody", exported(tmp_path / "export"), "0" * 32, {}) is None
    assert "is not registered as nobody" in caplog.text


@pytest.mark.parametrize(
    ("model", "error", "told"),
    [
        ("models:/nosuch@best", TrackingError, r"models:/nosuch@best can't be had from sqlite"),
        ("models:/digits/99", TrackingError, r"models:/digits/99 can't be had from sqlite"),
        ("models:/a/b@best", ConfigError, r"models:/NAME@ALIAS"),
    ],
)
def test_a_model_that_is_not_there_is_told_in_one_line(
    database: str, tmp_path: Path, model: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        download_model(model, database, tmp_path)
    assert "\n" not in str(caught.value)


def test_looking_for_a_model_makes_no_new_database(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--tracking-uri"):
        download_model("models:/digits@best", f"sqlite:///{tmp_path}/none.db", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_shows_the_newest_values_though_older_ones_come_late(make: Make) -> None:
    tracker = make(uri="off")
    tracker.metrics({"loss/dm": 2.0, "eval/toyfid_2k": 9.0}, step=20)
    tracker.metrics({"eval/toyfid_2k": 11.0, "eval/seconds": 3.0}, step=10)
    progress = tracker.progress()
    assert progress["step"] == 20
    assert progress["values"] == {"loss/dm": 2.0, "eval/toyfid_2k": 9.0, "eval/seconds": 3.0}


def test_a_resumed_run_continues_its_mlflow_run_and_repeats_no_point(make: Make, database: str) -> None:
    first = make()
    for step in range(1, 6):
        first.metrics({"loss/dm": float(step)}, step)
    first.params({"steps": 5})
    first.finish("FAILED")
    assert previous_run_id(first.run_dir) == first.run_id
    second = make(run_id=first.run_id)
    assert client(database).get_run(first.run_id).info.status == "RUNNING"
    for step in range(3, 9):
        second.metrics({"loss/dm": float(step), "loss/dsm": 1.0}, step)
    second.params({"steps": 8})
    second.finish()
    assert second.run_id == first.run_id
    assert second.progress()["repeated_points"] == 3
    assert history(database, first.run_id, "loss/dm") == [(s, float(s)) for s in range(1, 9)]
    assert [s for s, _ in history(database, first.run_id, "loss/dsm")] == list(range(3, 9))
    run = client(database).get_run(first.run_id)
    assert run.data.params["steps"] == "5"
    assert run.data.tags["changed/steps"] == "8"
    assert run.info.status == "FINISHED"


KILLED = """
import os, signal, sys
from raydistill.tracking import Tracker, TrackingConfig
tracker = Tracker(TrackingConfig(uri=sys.argv[1]), sys.argv[2], "killed")
print(tracker.run_id, flush=True)
for step in range(200):
    tracker.metrics({"loss/dm": step / 7, "loss/dsm": step / 3}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_loses_no_point_and_the_next_start_sends_the_rest(
    make: Make, database: str, tmp_path: Path
) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED, database, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL
    run_id = child.stdout.split()[0]
    assert len(history(database, run_id, "loss/dm")) < 200
    # a kill may also tear the last line
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 200, "timest')
    tracker = make(run_id=run_id)
    tracker.metrics({"loss/dm": 200.0}, 200)
    assert tracker.flush(30)
    assert history(database, run_id, "loss/dm") == [*((s, s / 7) for s in range(200)), (200, 200.0)]
    assert len(history(database, run_id, "loss/dsm")) == 200


def test_points_sent_but_not_marked_as_sent_are_not_doubled(make: Make, database: str) -> None:
    first = make()
    for step in range(50):
        first.metrics({"loss/dm": 1.0 / (step + 1), "loss/dsm": float("nan")}, step)
    first.finish()
    os.unlink(Path(first.run_dir, "metrics.sent"))
    second = make(run_id=first.run_id)
    assert second.flush(30)
    assert len(history(database, first.run_id, "loss/dm")) == 50
    assert len(history(database, first.run_id, "loss/dsm")) == 50


def test_a_new_run_in_an_old_folder_gets_a_journal_of_its_own(make: Make, database: str) -> None:
    first = make()
    first.metrics({"loss/dm": 1.0}, 1)
    first.finish()
    second = make()
    assert second.run_id != first.run_id
    second.metrics({"loss/dm": 2.0}, 1)
    assert second.flush(30)
    assert history(database, second.run_id, "loss/dm") == [(1, 2.0)]
    assert Path(second.run_dir, f"metrics.{first.run_id}.jsonl").exists()


def test_two_trackers_can_not_share_a_run_folder(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydistill.tracking.journal._LOCK_WAIT_S", 0.2)
    make(uri="off")
    with pytest.raises(TrackingError, match="another run with the same output_dir"):
        make(uri="off")


def test_the_default_is_a_sqlite_file_beside_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker = Tracker(TrackingConfig(), "runs/one", "one")
    tracker.metrics({"loss/dm": 1.0}, 1)
    monkeypatch.chdir("/")  # as Ray Train does to its workers
    tracker.artifact_bytes(b"x", "a.txt")
    assert tracker.finish()
    assert tracker.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert history(tracker.uri, tracker.run_id, "loss/dm") == [(1, 1.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        ".mlflow.db.lock",
        "mlartifacts",
        "mlflow.db",
        "one",
    ]
    run = client(tracker.uri).get_run(tracker.run_id)
    assert run.info.artifact_uri.startswith(str(tmp_path / "runs" / "mlartifacts"))
    assert run.data.tags["mlflow.user"]
    printed = capfd.readouterr()
    assert "alembic" not in printed.err.lower()
    assert "mlflow" not in printed.out.lower()


RACE = """
import sys
from raydistill.tracking import Tracker, TrackingConfig
tracker = Tracker(TrackingConfig(uri=sys.argv[1], experiment="race"), sys.argv[2], "racer")
tracker.metrics({"loss/dm": 1.0}, 1)
print(tracker.finish(), file=sys.stderr)
"""


def test_runs_that_start_together_share_one_new_database_and_experiment(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new.db"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, uri, str(tmp_path / f"run{i}")], stderr=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    for racer in racers:
        _, error = racer.communicate()
        assert racer.returncode == 0, error
        assert error.strip() == "True"
    (experiment,) = [e for e in client(uri).search_experiments() if e.name == "race"]
    assert len(client(uri).search_runs([experiment.experiment_id])) == 3


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "/tmp/mlruns", "ftp://host/x"])
def test_a_uri_without_a_store_is_refused_with_the_sqlite_alternative(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri is .*sqlite:///"):
        Tracker(TrackingConfig(uri=uri), str(tmp_path / "run"), "x")


@pytest.mark.parametrize("name", ["journal_max_mb", "request_timeout_s", "retry_max_s"])
def test_settings_that_can_not_work_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"tracking\.{name} is 0"):
        Tracker(TrackingConfig(uri="off", **{name: 0}), str(tmp_path), "x")


@pytest.mark.parametrize(
    ("uri", "name", "told"), [("off", "digits", r"tracking\.uri=off"), (None, "a/b", r"register_as is 'a/b'")]
)
def test_a_model_that_can_not_be_registered_is_refused_before_the_run(
    tmp_path: Path, uri: str | None, name: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        check_tracking(TrackingConfig(uri=uri, register_as=name), str(tmp_path / "run"))


@pytest.mark.parametrize("scheme", ["http", "postgresql", "postgresql+psycopg"])
def test_a_server_that_is_down_at_the_start_is_an_error_at_once_and_names_no_password(
    tmp_path: Path, scheme: str
) -> None:
    with pytest.raises(TrackingError, match=r"tracking\.uri") as caught:
        Tracker(TrackingConfig(uri=f"{scheme}://anna:geheim@127.0.0.1:9"), str(tmp_path / "run"), "x")
    assert f"{scheme}://***@127.0.0.1:9 does not answer" in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_a_run_id_of_another_store_and_a_deleted_run_are_refused(make: Make, database: str) -> None:
    with pytest.raises(TrackingError, match=r"is not at sqlite:.*set tracking\.uri to the store"):
        make(run_id="0" * 32)
    tracker = make()
    tracker.finish()
    client(database).delete_run(tracker.run_id)
    with pytest.raises(TrackingError, match="was deleted"):
        make(run_id=tracker.run_id)


def test_a_deleted_experiment_is_refused_by_name(make: Make, database: str) -> None:
    make(experiment="gone").finish()
    client(database).delete_experiment(client(database).get_experiment_by_name("gone").experiment_id)
    with pytest.raises(TrackingError, match=r"experiment 'gone' .* was deleted"):
        make(experiment="gone")


def test_secrets_are_logged_nowhere(make: Make, database: str, caplog: pytest.LogCaptureFixture) -> None:
    tracker = make()
    with caplog.at_level(logging.DEBUG, logger="raydistill"):
        tracker.params(
            {
                "data.shards": "s3://key:sesame@bucket/x",
                "tracking.uri": "https://u:sesame@host/x?token=sesame&a=1",
                "hub.token": "sesame",
                "aws.secret_key": "sesame",
                "text.max_tokens": 77,
                "teacher.tokenizer": "clip",
            }
        )
        tracker.tags({"source": "http://me:sesame@host", "api_key": "sesame"})
        assert tracker.flush(30)
    run = client(database).get_run(tracker.run_id)
    assert "sesame" not in str(run.to_dictionary()) + caplog.text
    assert "sesame" not in Path(tracker.run_dir, "metrics.jsonl").read_text()
    assert run.data.params["tracking.uri"] == "https://***@host/x?token=***&a=1"
    assert run.data.params["text.max_tokens"] == "77"
    assert run.data.params["teacher.tokenizer"] == "clip"


def test_an_entry_that_mlflow_refuses_holds_up_no_figures(make: Make, database: str) -> None:
    tracker = make()
    tracker.metrics({"loss/dm": 1.0}, 1)
    tracker.tags({"bad\x00name?": "x"})
    tracker.metrics({"loss/dm": 2.0}, 2)
    assert tracker.flush(30)
    assert history(database, tracker.run_id, "loss/dm") == [(1, 1.0), (2, 2.0)]
    assert tracker.progress()["lost_entries"] == 1


@pytest.mark.parametrize("name", [("../x", ""), ("x", "../y"), ("x", "/etc"), ("", "a"), ("a/b", "")])
def test_an_artifact_can_not_leave_the_run_folder(make: Make, name: tuple[str, str]) -> None:
    with pytest.raises(TrackingError, match="not a path inside"):
        make(uri="off").artifact_bytes(b"", *name)


def test_a_missing_artifact_and_a_wrong_status_are_refused(make: Make) -> None:
    tracker = make(uri="off")
    with pytest.raises(TrackingError, match="is not a file"):
        tracker.artifact("/no/such/file")
    with pytest.raises(ValueError, match="FINISHED, FAILED, KILLED"):
        tracker.finish("DONE")


def start_server(port: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    # a group of its own, so that the kill takes its workers too
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return server
        except OSError:
            assert server.poll() is None, "mlflow server ended"
            assert time.monotonic() < deadline, "mlflow server did not start"
            time.sleep(0.2)


def kill_server(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def test_a_server_killed_in_mid_run_gets_every_point_in_order_when_it_is_back(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(database.removeprefix("sqlite:///"), tmp_path / "server.db")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    server = start_server(port, tmp_path)
    try:
        config = TrackingConfig(uri=uri, retry_max_s=1.0)
        tracker = Tracker(config, str(tmp_path / "runs" / "one"), "one")
        for step in range(20):
            tracker.metrics({"loss/dm": step / 7}, step)
        assert tracker.flush(30)
        kill_server(server)

        longest = 0.0
        for step in range(20, 60):
            start = time.monotonic()
            tracker.metrics({"loss/dm": step / 7}, step)
            longest = max(longest, time.monotonic() - start)
            time.sleep(0.01)
        tracker.artifact_bytes(b"grid", "grid.png", "grids")
        tracker.tags({"during": "outage"})
        assert not tracker.flush(1)
        assert longest < 0.5, "training waited for the tracking server"
        assert "fails" in caplog.text
        assert tracker.progress()["unsent_bytes"] > 0

        server = start_server(port, tmp_path)
        tracker.metrics({"loss/dm": 60 / 7}, 60)
        assert tracker.finish(timeout_s=30)
        assert "answers again" in caplog.text
        points = client(uri).get_metric_history(tracker.run_id, "loss/dm")
        assert [(p.step, p.value) for p in points] == [(step, step / 7) for step in range(61)]
        assert [p.timestamp for p in points] == sorted(p.timestamp for p in points)
        run = client(uri).get_run(tracker.run_id)
        assert run.data.tags["during"] == "outage"
        assert run.info.status == "FINISHED"
        assert [f.path for f in client(uri).list_artifacts(tracker.run_id, "grids")] == ["grids/grid.png"]
    finally:
        kill_server(server)


def test_points_dropped_while_the_database_was_locked_are_counted_in_mlflow(
    make: Make, database: str
) -> None:
    tracker = make(journal_max_mb=1, retry_max_s=0.5)
    values = {name: 0.123456789 for name in METRICS if "*" not in name and "tracking" not in name}
    lock = sqlite3.connect(database.removeprefix("sqlite:///"))
    try:
        lock.execute("BEGIN EXCLUSIVE")
        for step in range(2000):
            tracker.metrics(values, step)
    finally:
        lock.close()
    assert tracker.finish()
    dropped = tracker.progress()["dropped_points"]
    assert dropped > 0
    assert history(database, tracker.run_id, "tracking/dropped_points") == [(1999, dropped)]
    steps = [step for step, _ in history(database, tracker.run_id, "loss/dm")]
    assert steps == list(range(2000 - dropped // len(values)))


def test_a_full_journal_counts_what_it_drops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(str(tmp_path), "run", max_bytes=5_000)
    for step in range(200):
        journal.append_metrics({"loss/dm": 1.0, "loss/dsm": 2.0}, step, 0)
    kept = len(journal.pending(10**6))
    assert 0 < kept < 100
    assert journal.dropped_points == 2 * (200 - kept)
    assert caplog.text.count("is full") == 1
    journal.close()


def test_a_journal_whose_points_are_sent_makes_room_and_still_knows_the_recent_ones(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path), "run", max_bytes=5_000)
    sent: list[int] = []
    for step in range(1000):
        assert journal.append_metrics({"loss/dm": 1.0}, step, 0) == 1
        if step % 3 == 0:
            for entry, offset in journal.pending(300):
                sent.append(entry["step"])
                journal.mark_sent(offset)
    journal.close()
    assert journal.dropped_points == 0
    assert (tmp_path / "metrics.jsonl").stat().st_size < 6_000

    again = Journal(str(tmp_path), "run", max_bytes=5_000)
    while rest := again.pending(300):
        sent += [entry["step"] for entry, _ in rest]
        again.mark_sent(rest[-1][1])
    assert sent == list(range(1000))
    assert again.append_metrics({"loss/dm": 1.0}, 990, 0) == 0
    assert again.append_metrics({"loss/dm": 1.0}, 1000, 0) == 1
    again.close()


def test_a_crash_between_the_two_writes_of_a_compaction_loses_nothing(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path), "run", max_bytes=4_000)
    for step in range(40):
        journal.append_metrics({"loss/dm": 1.0}, step, 0)
    journal.mark_sent(journal.pending(2_000)[-1][1])
    marked = (tmp_path / "metrics.sent").read_text()
    unsent = [entry["step"] for entry, _ in journal.pending(10**6)]
    before = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    step = 40
    while json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == before:
        journal.append_metrics({"loss/dm": 1.0}, step, 0)
        step += 1
    journal.close()
    assert (tmp_path / "metrics.sent").read_text() == marked
    again = Journal(str(tmp_path), "run", max_bytes=4_000)
    assert [entry["step"] for entry, _ in again.pending(10**6)] == [*unsent, *range(40, step)]
    again.close()


def test_threads_that_append_together_tear_no_line(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path), "run", max_bytes=10**7)

    def work(offset: int) -> None:
        for step in range(300):
            journal.append_metrics({"loss/dm": 1.0}, 4 * step + offset, 0)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry["step"] for entry, _ in journal.pending(10**7)) == list(range(1200))
    journal.close()


def test_the_step_set_is_exact() -> None:
    steps = StepSet()
    for step in (0, 5, 1023, 1024, 10**9):
        assert steps.add("a", step)
        assert not steps.add("a", step)
        assert steps.add("b", step)
    assert steps.add("a", 6)


def test_importing_the_package_does_not_import_mlflow() -> None:
    code = "import sys, raydistill.tracking; print('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
