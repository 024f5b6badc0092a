"""Snapshots in an object store: a real service over HTTP that is killed and comes back, and addresses that can't be."""

import http.server
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import s3fs
import torch

from raydistill.checkpoint import Mirror, Snapshots
from raydistill.data.reader import DataConfig
from raydistill.errors import CheckpointError, ConfigError, RayDistillError
from raydistill.runtime import uploads
from raydistill.runtime.settings import CheckpointConfig, RunConfig, validate
from raydistill.runtime.uploads import Uploads, fetch_run, open_mirror, require_uploaded
from raydistill.tracking import Tracker, TrackingConfig
from raydistill.tracking.names import check_metric_names

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cluster"))
from s3_service import S3Service

sys.path.pop(0)

SECRET = "not-to-be-printed"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Service]:
    with S3Service(tmp_path_factory.mktemp("s3") / "moto.log") as running:
        yield running


@pytest.fixture
def store(service: S3Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """The service with an empty bucket `runs`."""
    for name, value in service.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(uploads, "_FIRST_PAUSE_S", 0.05)
    s3fs.S3FileSystem.clear_instance_cache()  # its key holds no credentials
    files = fsspec.filesystem("s3", endpoint_url=service.endpoint, skip_instance_cache=True)
    files.mkdir("runs")
    yield files
    service.start()
    files.rm("runs", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()


def config_for(folder: Path, service: S3Service, **changes: object) -> RunConfig:
    checkpoint = CheckpointConfig(
        uri="s3://runs/here", endpoint_url=service.endpoint, retry_max_s=0.2, upload_wait_s=30.0
    )
    return RunConfig(
        name="run", output_dir=str(folder), data=DataConfig(shards="none"),
        checkpoint=replace(checkpoint, **changes),  # type: ignore[arg-type]
    )  # fmt: skip


def local(config: RunConfig) -> Snapshots:
    return Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep)


def commit(snapshots: Snapshots, step: int) -> None:
    snapshots.write_part(step, "generator", {"w": torch.full((300, 1000), float(step))}, {"step": step})
    snapshots.commit(step, {"step": step})


def copies(config: RunConfig) -> list[int]:
    assert config.copies_url is not None
    return Snapshots(f"{config.copies_url}/snapshots", 1, config.checkpoint.endpoint_url).steps()


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sending(config: RunConfig, snapshots: Snapshots) -> Uploads:
    mirror = open_mirror(config, snapshots)
    assert mirror is not None
    return Uploads(mirror, config.checkpoint.retry_max_s)


def test_a_service_that_dies_costs_no_snapshot_that_is_kept_and_holds_nobody_up(
    store: s3fs.S3FileSystem, service: S3Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(tmp_path, service)
    snapshots = local(config)
    sender = sending(config, snapshots)
    commit(snapshots, 1)
    sender.changed()
    wait_for(lambda: sender.figures(1)["upload/lag_updates"] == 0)
    assert copies(config) == [1]

    with caplog.at_level(logging.WARNING):
        service.kill()
        for step in range(2, 8):
            snapshots.protect({3})  # the best so far
            commit(snapshots, step)
            sender.changed()
        assert snapshots.steps() == [3, 6, 7]
        wait_for(lambda: sender.figures(7)["upload/retries"] > 2)
        assert not sender.finish(0.1)  # bounded, and told
        figures = sender.figures(7)
        check_metric_names(figures)
        assert (figures["upload/lag_updates"], figures["upload/waiting"]) == (6.0, 3.0)
        service.start()
        assert sender.finish(30.0)
    assert copies(config) == [3, 6, 7]  # the newest two and the best; the one from before is too old
    for step in (3, 6, 7):
        mirrored = Snapshots(f"{config.copies_url}/snapshots", 1, service.endpoint).read(step)
        assert torch.equal(mirrored.part("generator")[0]["w"], torch.full((300, 1000), float(step)))
    require_uploaded(config)
    assert sender.figures(7)["upload/lag_updates"] == 0
    assert "snapshots wait in" in caplog.text
    assert "snapshots of update(s) 3, 6, 7 are not in s3://runs/here/run yet" in caplog.text
    assert "takes snapshots again after" in caplog.text
    assert caplog.text.count("snapshots wait in") == 1  # once, not at every attempt
    assert SECRET not in caplog.text


def test_an_upload_is_a_snapshot_only_with_its_manifest_and_what_a_killed_sender_left_is_cleared(
    store: s3fs.S3FileSystem, service: S3Service, tmp_path: Path
) -> None:
    config = config_for(tmp_path, service)
    snapshots = local(config)
    commit(snapshots, 4)
    folder = "runs/here/run/snapshots"
    store.pipe_file(f"{folder}/step_00000002/generator.safetensors", b"half of it")
    assert copies(config) == []
    mirror = open_mirror(config, snapshots)
    assert mirror is not None
    arrived: list[int] = []

    def kill_after_the_second(num_bytes: int) -> None:
        arrived.append(num_bytes)
        if len(arrived) == 2:
            service.kill()

    with pytest.raises(CheckpointError, match=r"can't be written \(checkpoint\.uri\)"):
        mirror.push(4, kill_after_the_second)
    service.start()
    sent = store.ls(f"{folder}/step_00000004")
    assert sent
    assert copies(config) == []
    again = mirror.push(4)
    assert again is not None
    assert again < snapshots.read(4).num_bytes  # what had arrived was not sent again
    assert copies(config) == [4]
    assert [path.rsplit("/", 1)[-1] for path in store.ls(folder)] == ["step_00000004"]
    with snapshots.hold(4) as there:
        commit(snapshots, 5)
        commit(snapshots, 6)
        assert there
        assert snapshots.steps() == [4, 5, 6]  # not deleted under the sender's hands
    snapshots.retire()
    assert snapshots.steps() == [5, 6]
    assert mirror.push(4) is None


def test_another_machine_fetches_snapshots_figures_and_journal_and_passes_over_damage(
    store: s3fs.S3FileSystem, service: S3Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = config_for(tmp_path / "a", service), config_for(tmp_path / "b", service)
    tracker = Tracker(first.tracking, first.run_dir, "run")
    tracker.metrics({"loss/dm": 0.5}, 3)
    tracker.artifact_bytes(b"png", "grid.png", "grids")
    (Path(first.run_dir) / "evaluations.json").write_text('{"2": {"state": "done"}}')
    snapshots = local(first)
    for step in (2, 4):
        commit(snapshots, step)
    sender = sending(first, snapshots)
    assert sender.finish(30.0)
    tracker.finish()
    name = "runs/here/run/snapshots/step_00000004/generator.safetensors"
    data = store.cat_file(name)
    store.pipe_file(name, data[:-1] + bytes([data[-1] ^ 1]))

    with caplog.at_level(logging.WARNING):
        fetch_run(second)
    assert local(second).steps() == [2]
    assert "step_00000004/generator.safetensors does not match its hash" in caplog.text
    assert "fetched update(s) 2 from s3://runs/here/run" in caplog.text
    store.pipe_file(name, data)
    fetch_run(second)
    assert local(second).steps() == [2, 4]
    newest = local(second).latest()
    assert newest is not None
    assert torch.equal(newest.part("generator")[0]["w"], torch.full((300, 1000), 4.0))
    run_dir = Path(second.run_dir)
    assert (run_dir / "evaluations.json").read_text() == '{"2": {"state": "done"}}'
    assert (run_dir / "artifacts" / "grids" / "grid.png").read_bytes() == b"png"
    # MLflow's file stayed on the other machine: a new run there gets all that was ever recorded, and nothing twice
    moved = Tracker(second.tracking, second.run_dir, "run")
    assert moved.run_id != tracker.run_id
    moved.metrics({"loss/dm": 0.7}, 3)
    assert moved.progress()["repeated_points"] == 1
    assert moved.finish()
    from mlflow import MlflowClient

    history = MlflowClient(f"sqlite:///{tmp_path}/b/mlflow.db").get_metric_history(moved.run_id, "loss/dm")
    assert [(point.step, point.value) for point in history] == [(3, 0.5)]
    # what is newer here stays as it is
    commit(local(second), 6)
    (run_dir / "evaluations.json").write_text("{}")
    fetch_run(second)
    assert (run_dir / "evaluations.json").read_text() == "{}"
    with pytest.raises(
        ConfigError, match=r"resume=false: checkpoint\.uri=.* \(updates 2, 4\); choose another name"
    ):
        fetch_run(replace(second, resume=False))
    with pytest.raises(
        CheckpointError, match=r"snapshots of update\(s\) 6 are only in .*, not in checkpoint\.uri="
    ):
        require_uploaded(second)


class AnotherRegion(http.server.BaseHTTPRequestHandler):
    """Answers as S3 does for a bucket of another region (moto serves every region alike)."""

    protocol_version = "HTTP/1.1"  # clients wait for its "100 Continue"

    def do_HEAD(self) -> None:
        self.send_response(400)
        self.end_headers()

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = (
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region 'us-east-1' is wrong; expecting "
            b"'eu-west-1'</Message><Region>eu-west-1</Region></Error>"
        )
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def refusal(config: RunConfig) -> str:
    with pytest.raises(RayDistillError) as caught:
        fetch_run(config)
    told = str(caught.value)
    assert "checkpoint.uri" in told
    assert SECRET not in told
    assert "\n" not in told
    return told


def test_addresses_that_cannot_be_are_one_line_before_anything_starts(
    store: s3fs.S3FileSystem, service: S3Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path, service)
    assert "there is no such bucket" in refusal(config_for(tmp_path, service, uri="s3://nobody/here"))
    away = config_for(tmp_path, service, endpoint_url="http://127.0.0.1:9")
    assert "it can't be known where the run stands" in refusal(away)
    commit(local(config), 1)
    fetch_run(away)  # a run that has snapshots of its own goes on without
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AnotherRegion)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = config_for(tmp_path, service, endpoint_url=f"http://127.0.0.1:{server.server_port}")
    assert "the region is wrong (it is in eu-west-1); set AWS_DEFAULT_REGION" in refusal(there)
    server.shutdown()
    with S3Service(tmp_path / "strict.log", checks_credentials_after=0) as strict:
        told = refusal(config_for(tmp_path, strict))
    assert "these credentials are refused (InvalidAccessKeyId); they come from AWS_ACCESS_KEY_ID" in told
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    assert "no credentials are there; set AWS_ACCESS_KEY_ID" in refusal(config)
    monkeypatch.setenv("AWS_PROFILE", "nosuch")
    s3fs.S3FileSystem.clear_instance_cache()
    assert "(nosuch) could not be found (AWS_PROFILE)" in refusal(config)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"uri": "/folder"}, r"checkpoint\.uri='/folder' must be a URL"),
        ({"uri": "s3://AKIA:hidden@bucket/x"}, r"checkpoint\.uri has credentials in its URL"),
        ({"endpoint_url": "http://me:hidden@host"}, r"checkpoint\.endpoint_url has credentials in its URL"),
        ({"endpoint_url": "localhost"}, r"checkpoint\.endpoint_url='localhost' must be http\(s\)://HOST"),
        ({"endpoint_url": "http://host?sig=hidden"}, r"checkpoint\.endpoint_url='http://host' must be"),
        ({"retry_max_s": 0.0}, r"checkpoint\.retry_max_s=0 must be above 0"),
        ({"upload_wait_s": -1.0}, r"checkpoint\.upload_wait_s=-1 must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, service: S3Service, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        validate(config_for(tmp_path, service, **changes))
    assert "hidden" not in str(caught.value)


def test_a_journal_of_a_server_that_all_machines_reach_stays_its_runs(tmp_path: Path) -> None:
    url = f"memory://{tmp_path.name}"
    first = RunConfig(
        name="run", output_dir=str(tmp_path / "a"), data=DataConfig(shards="none"), tracking=TrackingConfig(uri="off"),
        checkpoint=CheckpointConfig(uri=url),
    )  # fmt: skip
    tracker = Tracker(first.tracking, first.run_dir, "run")
    snapshots = local(first)
    commit(snapshots, 1)
    mirror = open_mirror(first, snapshots)
    assert isinstance(mirror, Mirror)
    mirror.push(1)
    second = replace(first, output_dir=str(tmp_path / "b"))
    fetch_run(second)
    from raydistill.tracking import previous_run_id

    assert previous_run_id(second.run_dir) == tracker.run_id
    tracker.finish()
