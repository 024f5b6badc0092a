import json
import logging
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from raydistill.checkpoint import Snapshots, pack_optimizer, unpack_optimizer
from raydistill.errors import CheckpointError, ConfigError


def some_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(3, 4, 5, generator=generator)
    return {
        "dense": dense,
        "bf16": torch.randn(7, generator=generator).bfloat16(),
        "half": torch.randn(2, 2, generator=generator).half(),
        "double": torch.randn(3, generator=generator).double(),
        "int": torch.arange(5),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": dense.permute(2, 0, 1),
    }


def save(snapshots: Snapshots, step: int) -> None:
    snapshots.write_part(step, "generator", {"w": torch.full((64,), float(step))}, {"updates": step})
    snapshots.commit(step, {"step": step})


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("root", ["local", "memory://round_trip"])
def test_parts_and_manifest_come_back_exactly(tmp_path: Path, root: str) -> None:
    snapshots = Snapshots(str(tmp_path / "run") if root == "local" else root, keep=2)
    assert snapshots.latest() is None
    state = {"images": 123, "lr": 0.1 + 0.2, "stage": "gan", "betas": [0.9, 0.999], "best": float("inf")}
    written = snapshots.write_part(120, "generator", some_weights(0), state)
    written += snapshots.write_part(120, "critic-rank0", some_weights(1), {})
    total = snapshots.commit(120, {"run_id": "abc", "x": 1 / 3}, roles=["generator", "critic-rank0"])

    found = Snapshots(snapshots.root, keep=2).latest()
    assert found is not None
    assert found.step == 120
    assert found.path == snapshots.path(120)
    assert found.path.endswith("/step_00000120")
    assert found.roles == ["critic-rank0", "generator"]
    assert found.manifest == {"run_id": "abc", "x": 1 / 3}
    assert written == found.num_bytes < total
    weights, back = found.part("generator")
    assert_equal(some_weights(0), weights)
    assert back == state
    assert_equal(some_weights(1), found.part("critic-rank0")[0])
    with pytest.raises(CheckpointError, match="no part 'teacher'; it holds critic-rank0, generator"):
        found.part("teacher")


def test_parts_are_files_that_the_safetensors_library_reads(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path), keep=1)
    snapshots.write_part(1, "generator", some_weights(), {})
    assert_equal(some_weights(), load_file(tmp_path / "step_00000001" / "generator.safetensors"))


def test_loaded_weights_survive_the_deletion_of_their_snapshot(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path), keep=1)
    save(snapshots, 1)
    weights, _ = snapshots.read(1).part("generator")
    save(snapshots, 2)
    assert snapshots.steps() == [2]
    assert torch.equal(weights["w"], torch.ones(64))


@pytest.fixture
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "moto_server did not start"
                time.sleep(0.1)
        s3fs.S3FileSystem.clear_instance_cache()  # its key does not hold the endpoint
        s3fs.S3FileSystem().mkdir("snapshots")
        yield "s3://snapshots/runs/one"
    finally:
        server.kill()
        server.wait()


def test_snapshots_on_s3_round_trip_rotate_and_refuse_damage(
    s3_bucket: str, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = Snapshots(s3_bucket, keep=2)
    for step in (1, 2, 3):
        snapshots.write_part(step, "generator", some_weights(step), {"step": step})
        snapshots.write_part(step, "critic", {"big": torch.arange(2_000_000)}, {})
        snapshots.commit(step, {"step": step})
    assert snapshots.steps() == [2, 3]
    with pytest.raises(CheckpointError, match="exists already"):
        snapshots.write_part(3, "critic", {}, {})
    found = snapshots.latest()
    assert found is not None
    assert found.step == 3
    assert_equal(some_weights(3), found.part("generator")[0])
    assert torch.equal(found.part("critic")[0]["big"], torch.arange(2_000_000))

    files = s3fs.S3FileSystem(skip_instance_cache=True)
    name = f"{s3_bucket}/step_00000003/generator.safetensors"
    data = bytearray(files.cat_file(name))
    data[-1] ^= 1
    files.pipe_file(name, bytes(data))
    snapshots.write_part(4, "generator", {}, {})
    with caplog.at_level(logging.WARNING):
        older = snapshots.latest()
    assert older is not None
    assert older.step == 2
    assert "step_00000003/generator.safetensors does not match its hash" in caplog.text
    assert len(snapshots.discard_unfinished()) == 2
    assert Snapshots(s3_bucket, keep=2).steps() == [2]
    assert bytes(files.cat_file(name.replace("step_", "broken_step_"))) == bytes(data)


def test_an_s3_store_that_is_not_there_is_a_checkpoint_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CheckpointError, match=r"s3://nowhere/run.*checkpoint\.uri") as caught:
        Snapshots("s3://nowhere/run", keep=1).write_part(1, "generator", {}, {})
    assert "secret-key" not in str(caught.value)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.5, 0.99), weight_decay=0.01),
    "adamw_foreach_amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True, amsgrad=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "adam_tensor_lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-3),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd_without_momentum": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def build(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 5e-4}]
    if kind == "adam_tensor_lr":
        del groups[1]["lr"]
    return model, OPTIMIZERS[kind](groups)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_resumed_through_a_snapshot_equals_the_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    model, optimizer = build(kind)
    train(model, optimizer, 0, 4)
    tensors, state = pack_optimizer(optimizer)
    weights = {f"model.{k}": v for k, v in model.state_dict().items()}
    weights |= {f"optimizer.{k}": v for k, v in tensors.items()}
    snapshots = Snapshots(str(tmp_path), keep=1)
    snapshots.write_part(4, "generator", weights, {"optimizer": state})
    snapshots.commit(4, {})
    train(model, optimizer, 4, 8)

    resumed, fresh = build(kind)
    train(resumed, fresh, 90, 91)
    loaded, state = snapshots.read(4).part("generator")
    resumed.load_state_dict({k[6:]: v for k, v in loaded.items() if k.startswith("model.")})
    kept = {k[10:]: v for k, v in loaded.items() if k.startswith("optimizer.")}
    before = {k: v.clone() for k, v in kept.items()}
    unpack_optimizer(fresh, kept, state["optimizer"])
    for ours, theirs in zip(fresh.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {
            k: v for k, v in theirs.items() if k != "params"
        }
        assert all(type(ours[k]) is type(theirs[k]) for k in theirs)
    train(resumed, fresh, 4, 8)
    assert_equal(model.state_dict(), resumed.state_dict())
    assert_equal(pack_optimizer(optimizer)[0], pack_optimizer(fresh)[0])
    assert_equal(before, kept)  # training on does not reach into what was loaded


def test_adam_step_counts_are_saved_as_the_float_tensors_they_are() -> None:
    model, optimizer = build("adamw")
    train(model, optimizer, 0, 3)
    tensors, state = pack_optimizer(optimizer)
    assert torch.equal(tensors["0.step"], torch.tensor(3.0))
    json.dumps(state)


def test_optimizer_state_of_another_kind_or_shape_is_refused() -> None:
    model, optimizer = build("adamw")
    train(model, optimizer, 0, 1)
    tensors, state = pack_optimizer(optimizer)
    with pytest.raises(CheckpointError, match="state of AdamW, this run's optimiser is RAdam"):
        unpack_optimizer(build("radam")[1], tensors, state)
    groups = [{"params": nn.Linear(4, 9).parameters()}, {"params": nn.Linear(8, 2).parameters()}]
    with pytest.raises(CheckpointError, match=r"parameter 0: \[8, 4\] in the snapshot, \[9, 4\] here"):
        unpack_optimizer(torch.optim.AdamW(groups), tensors, state)
    with pytest.raises(CheckpointError, match=r"\[2, 2\] parameters per group, this run's has \[4\]"):
        unpack_optimizer(torch.optim.AdamW(model.parameters()), tensors, state)


def test_optimizer_state_that_needs_pickle_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.LBFGS([weight], max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight - torch.tensor([3.0, -2.0])).pow(4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(CheckpointError, match="only tensors and JSON values"):
        pack_optimizer(optimizer)


def test_retention_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path), keep=2)
    snapshots.protect({1})
    for step in range(1, 6):
        save(snapshots, step)
    assert snapshots.steps() == [1, 4, 5]
    snapshots.protect({4})
    save(snapshots, 6)
    save(snapshots, 7)
    assert snapshots.steps() == [4, 6, 7]
    with pytest.raises(ConfigError, match=r"checkpoint\.keep is 0"):
        Snapshots(str(tmp_path), keep=0)


def test_two_writers_of_one_role_collide(tmp_path: Path) -> None:
    first, second = Snapshots(str(tmp_path), keep=1), Snapshots(str(tmp_path), keep=1)
    first.write_part(1, "generator", {"w": torch.ones(3)}, {})
    with pytest.raises(CheckpointError, match="another rank uses the same role name"):
        second.write_part(1, "generator", {"w": torch.zeros(3)}, {})
    first.commit(1, {})
    assert torch.equal(first.read(1).part("generator")[0]["w"], torch.ones(3))
    with pytest.raises(CheckpointError, match="never overwritten"):
        second.commit(1, {})


def test_of_two_writers_at_the_same_time_one_wins_whole(tmp_path: Path) -> None:
    outcomes: list[object] = []
    barrier = threading.Barrier(2)

    def write(value: float) -> None:
        snapshots = Snapshots(str(tmp_path), keep=1)
        barrier.wait()
        try:
            snapshots.write_part(1, "generator", {"w": torch.full((500_000,), value)}, {})
            outcomes.append(value)
        except CheckpointError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [value for value in outcomes if isinstance(value, float)]
    snapshots = Snapshots(str(tmp_path), keep=1)
    snapshots.commit(1, {})
    assert snapshots.read(1).part("generator")[0]["w"].unique().tolist() == [winner]


def test_a_commit_without_all_roles_is_refused(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path), keep=1)
    with pytest.raises(CheckpointError, match=r"lacks the parts \(all of them\)"):
        snapshots.commit(1, {})
    snapshots.write_part(1, "generator", {}, {})
    with pytest.raises(CheckpointError, match="lacks the parts critic"):
        snapshots.commit(1, {}, roles=["generator", "critic"])
    assert snapshots.latest() is None


@pytest.mark.parametrize("role", ["manifest", "../x", "a/b", "a.json", "", ".hidden"])
def test_a_role_that_would_be_an_unsafe_file_name_is_refused(tmp_path: Path, role: str) -> None:
    with pytest.raises(CheckpointError, match="can't name a file"):
        Snapshots(str(tmp_path), keep=1).write_part(1, role, {}, {})


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path / "run"), keep=1)
    with pytest.raises(CheckpointError, match="state of 'generator' at step 1 is not JSON"):
        snapshots.write_part(1, "generator", {}, {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"'w' is torch\.float32 in torch\.sparse_coo layout"):
        snapshots.write_part(1, "generator", {"w": torch.eye(2).to_sparse()}, {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["generator.safetensors", "generator.json", "manifest.json"])
def test_a_snapshot_with_a_flipped_byte_is_skipped_with_a_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = Snapshots(str(tmp_path), keep=3)
    save(snapshots, 1)
    save(snapshots, 2)
    path = tmp_path / "step_00000002" / name
    flip_byte(path, -1 if name.endswith("safetensors") else path.read_bytes().index(b"schema"))
    with caplog.at_level(logging.WARNING):
        found = snapshots.latest()
    assert found is not None
    assert found.step == 1
    assert "skipping a broken snapshot" in caplog.text
    assert str(path) in caplog.text
    with pytest.raises(CheckpointError, match=r"step_00000002"):
        snapshots.read(2)


def test_a_missing_and_a_truncated_part_are_named(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path), keep=1)
    save(snapshots, 1)
    part = tmp_path / "step_00000001" / "generator.safetensors"
    os.truncate(part, 100)
    with pytest.raises(CheckpointError, match=r"generator\.safetensors has 100 bytes; its manifest says"):
        snapshots.read(1)
    part.unlink()
    with pytest.raises(CheckpointError, match=r"generator\.safetensors is missing"):
        snapshots.read(1)


def rewrite_manifest(folder: Path, name: str) -> None:
    import hashlib

    document = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    document["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(document))


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "weights.pt", "adam.pkl", "a/b.json"])
def test_a_manifest_that_names_other_files_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snapshots = Snapshots(str(tmp_path / "run"), keep=1)
    save(snapshots, 1)
    folder = tmp_path / "run" / "step_00000001"
    if not name.startswith("/"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    rewrite_manifest(folder, name)
    with pytest.raises(CheckpointError, match="nothing is unpickled"):
        snapshots.read(1)
    assert snapshots.latest() is None
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_dressed_as_safetensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snapshots = Snapshots(str(tmp_path / "run"), keep=1)
    save(snapshots, 1)
    folder = tmp_path / "run" / "step_00000001"
    (folder / "generator.safetensors").write_bytes(pickle.dumps(Bomb()))
    rewrite_manifest(folder, "generator.safetensors")
    with pytest.raises(CheckpointError, match=r"is not safetensors .* pickled weights are never loaded"):
        snapshots.read(1).part("generator")
    torch.save({"w": torch.ones(2)}, folder / "generator.safetensors")
    rewrite_manifest(folder, "generator.safetensors")
    with pytest.raises(CheckpointError, match="is not safetensors"):
        snapshots.read(1).part("generator")
    assert not (tmp_path / "exploded").exists()


FILL_AND_FAIL = """
import resource, signal, sys, torch
from raydistill.checkpoint import Snapshots
from raydistill.errors import CheckpointError
snapshots = Snapshots(sys.argv[1], keep=2)
if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
snapshots.write_part(1, "generator", {"w": torch.ones(25_000)}, {})
snapshots.commit(1, {})
snapshots.write_part(2, "critic", {"w": torch.ones(10_000)}, {})
try:
    snapshots.write_part(2, "generator", {"w": torch.ones(1_000_000)}, {})
except CheckpointError as error:
    print(error)
snapshots.write_part(2, "generator", {"w": torch.ones(25_000)}, {})
"""


def small_disk(folder: Path) -> bool:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk_names_path_room_and_setting_and_leaves_the_older_snapshot(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    # without the right to mount, a file-size limit makes the same write fail for want of room
    mounted = small_disk(disk)
    try:
        child = subprocess.run(
            [sys.executable, "-c", FILL_AND_FAIL, str(disk / "run"), "tmpfs" if mounted else "limit"],
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        message = child.stdout.strip()
        assert "No space left on device" in message if mounted else "File too large" in message
        assert f"can't write part 'generator' of {disk}/run/step_00000002" in message
        assert "needs 3.81 MiB, " in message
        assert "MiB were free" in message
        assert "output_dir" in message
        assert "checkpoint.keep" in message
        found = Snapshots(str(disk / "run"), keep=2).latest()
        assert found is not None
        assert found.step == 1
        assert torch.equal(found.part("generator")[0]["w"], torch.ones(25_000))
        # the whole half snapshot went, the critic's part too, so the room is back and the step can be retried
        assert sorted(p.name for p in (disk / "run" / "step_00000002").iterdir()) == [
            "generator.json",
            "generator.safetensors",
        ]
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_root_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match=r"is a file, not a folder|Not a directory"):
        Snapshots(str(tmp_path / "run"), keep=1).write_part(1, "generator", {}, {})


KILLED_WHILE_WRITING = """
import sys, torch
from raydistill.checkpoint import Snapshots
snapshots = Snapshots(sys.argv[1], keep=5)
step = 0
while True:
    step += 1
    for role in ("generator", "critic"):
        snapshots.write_part(step, role, {str(i): torch.full((50_000,), float(step)) for i in range(20)},
        {"n": step})
    snapshots.commit(step, {"n": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay_s", [0.0, 0.004, 0.011])
def test_sigkill_while_writing_leaves_the_last_complete_snapshot(tmp_path: Path, delay_s: float) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    for _ in range(2):
        committed = int(writer.stdout.readline())
    # wait until files of the next snapshot are being written, so that the kill falls inside one
    unfinished = tmp_path / f"step_{committed + 1:08d}"
    while not unfinished.exists():
        pass
    time.sleep(delay_s)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    committed = int([str(committed), *writer.stdout.read().split()][-1])

    snapshots = Snapshots(str(tmp_path), keep=5)
    found = snapshots.latest()
    assert found is not None
    # the kill may fall between the rename of the manifest and the print
    assert found.step in (committed, committed + 1)
    for role in ("generator", "critic"):
        weights, state = found.part(role)
        assert state == {"n": found.step}
        assert all(torch.equal(w, torch.full((50_000,), float(found.step))) for w in weights.values())
    snapshots.discard_unfinished()
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == f"step_{found.step:08d}"
    save(snapshots, found.step + 1)
    assert snapshots.steps()[-1] == found.step + 1


def test_leftovers_of_a_killed_run_are_cleared_and_broken_snapshots_moved_aside(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path), keep=5)
    for step in (1, 2, 3):
        save(snapshots, step)
    flip_byte(tmp_path / "step_00000003" / "generator.safetensors", -1)
    snapshots.write_part(4, "critic", {}, {})
    with pytest.raises(CheckpointError, match=r"discard_unfinished"):
        Snapshots(str(tmp_path), keep=5).write_part(4, "critic", {}, {})
    done = Snapshots(str(tmp_path), keep=5).discard_unfinished()
    assert len(done) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "broken_step_00000003",
        "step_00000001",
        "step_00000002",
    ]
    save(snapshots, 3)
    assert snapshots.discard_unfinished() == []


def test_a_signal_handler_that_raises_while_writing_leaves_no_half_snapshot(tmp_path: Path) -> None:
    class Stop(BaseException):
        pass

    class StopsWhenCopied(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if getattr(func, "__name__", "") == "detach":
                raise Stop
            return super().__torch_function__(func, types, args, kwargs or {})

    snapshots = Snapshots(str(tmp_path), keep=1)
    with pytest.raises(Stop):
        snapshots.write_part(1, "generator", {"w": torch.ones(3).as_subclass(StopsWhenCopied)}, {})
    assert list(tmp_path.iterdir()) == []


def test_file_size_limit_is_reported_as_want_of_room(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    snapshots = Snapshots(str(tmp_path), keep=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(CheckpointError, match=r"File too large.*lower checkpoint\.keep"):
            snapshots.write_part(1, "generator", {"w": torch.ones(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
