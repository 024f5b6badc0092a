"""Teachers behind Ray: answers and gradients of the local network, replicas that die, grow and are shared."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from raydistill.errors import ConfigError, PlacementError
from raydistill.methods.method import Query
from raydistill.models.denoiser import Cond, Packed
from raydistill.roles.teacher import KeptGraphs, TeacherScorer
from raydistill.runtime import wire
from raydistill.runtime.build import build_pipeline, build_teacher
from raydistill.runtime.pool import TeacherPool
from raydistill.runtime.settings import PlacementConfig, RunConfig, TeacherConfig, to_dict
from raydistill.runtime.teachers import (
    _PoolManager,
    require_same_teacher,
    services,
    start_pool,
    stop_service,
    teacher_identity,
    wanted_replicas,
)
from tests.tiny import tiny_config

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


def scenes(**placement: Any) -> RunConfig:
    config = tiny_config(teacher={"path": "builtin:scenes", "guidance_scale": 2.0})
    settings: dict[str, Any] = {"mode": "teachers", "cpus_per_teacher": 0.0} | placement
    return replace(config, placement=PlacementConfig(**settings))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20,
        logging_level="WARNING",
    )  # fmt: skip
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def local() -> TeacherScorer:
    torch.set_num_threads(1)
    config = scenes()
    return build_teacher(config, build_pipeline(config), torch.device("cpu"))


def query(rows: int = 3, want: Any = "x0", *, grad: bool = False, guidance_scale: float = 2.0) -> Query:
    generator = torch.Generator().manual_seed(3)
    x_t = torch.randn(rows, 4, 8, 8, generator=generator).requires_grad_(grad)
    text = torch.randn(rows, 20, 64, generator=generator)
    t = torch.tensor([20.0, 480.0, 950.0, 3.0, 700.0, 333.0])[:rows]
    return Query(
        network="teacher", want=want, x_t=x_t, t=t, cond=Cond({"text": text}), guidance_scale=guidance_scale
    )


@pytest.fixture(scope="module")
def manager(cluster: str) -> Any:
    return start_pool(scenes(teacher_replicas=2))


def client(manager: Any, local: TeacherScorer, **options: Any) -> TeacherPool:
    return TeacherPool(manager, local.denoiser, **options)


def test_answers_are_bit_for_bit_those_of_the_local_teacher(manager: Any, local: TeacherScorer) -> None:
    pool = client(manager, local)
    for asked in (query(), query(guidance_scale=1.0), query(guidance_scale=7.5), query(want="features")):
        answer = pool.submit(asked).answer()
        assert torch.equal(answer, local.answer(asked))
        assert not answer.requires_grad
    # a replica takes queries once its process is there
    deadline = time.monotonic() + 60
    while pool.figures()["teacher/replicas"] < 2.0 and time.monotonic() < deadline:
        time.sleep(0.5)
        pool.submit(query()).answer()
    assert pool.figures()["teacher/replicas"] == 2.0


@pytest.mark.parametrize("chunk", [None, 2])
def test_every_byte_of_queries_and_answers_is_counted_once(
    manager: Any, local: TeacherScorer, chunk: int | None
) -> None:
    pool = client(manager, local, chunk_size=chunk)
    asked = query()
    answer = pool.submit(asked).answer()
    sent = asked.x_t.nbytes + asked.t.nbytes + asked.cond.tensors["text"].nbytes
    assert pool.figures()["traffic/teacher_bytes"] == sent + answer.nbytes
    assert pool.figures()["traffic/teacher_bytes"] == 0
    with_gradient = query(grad=True)
    pool.submit(with_gradient).answer().sum().backward()
    # the cotangent goes there, the gradient comes back
    assert pool.figures()["traffic/teacher_bytes"] == sent + answer.nbytes + 2 * asked.x_t.nbytes


def sid_loss(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """A loss whose gradient runs through the teacher's input, as SiD's does (alpha = 1.2)."""
    apart = x0_real - x0_fake
    return (apart * (apart * (1 - 1.2) + x0_fake - x)).flatten(1).sum(1).mean()


@pytest.mark.parametrize("kept_graphs", ["kept", "forgotten"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_gradient_through_the_remote_teacher_is_the_local_one(
    manager: Any, local: TeacherScorer, kept_graphs: str, chunk: int | None
) -> None:
    pool = client(manager, local, chunk_size=chunk)
    gradients, losses = [], []
    for scorer in (local, pool):
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        base = query(4)
        asked = replace(base, x_t=0.6 * x + 0.8 * base.x_t)
        pending = scorer.submit(asked)
        if scorer is pool and kept_graphs == "forgotten":
            # newer graphs push the older ones out, so the backward pass needs a second forward pass
            for _ in range(20):
                pool.submit(query(1, grad=True)).answer()
        if scorer is local and chunk:
            rows = [slice(n, n + chunk) for n in range(0, 4, chunk)]
            x0 = torch.cat(
                [
                    local.answer(
                        replace(
                            asked,
                            x_t=asked.x_t[r],
                            t=asked.t[r],
                            cond=Cond({"text": asked.cond.tensors["text"][r]}),
                        )
                    )
                    for r in rows
                ]
            )
        else:
            x0 = pending.answer()
        loss = sid_loss(x, x0, 0.5 * x)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(x.grad)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradients[0], gradients[1])


def test_remote_denoiser_is_an_ordinary_module(manager: Any, local: TeacherScorer) -> None:
    pool = client(manager, local)
    asked = query(grad=True)
    for ask in ("__call__", "features"):
        expected = getattr(local.denoiser, ask)(asked.x_t, asked.t, asked.cond)
        found = getattr(pool.denoiser, ask)(asked.x_t, asked.t, asked.cond)
        assert torch.equal(found, expected)
        cotangent = torch.ones_like(expected)
        assert torch.equal(
            torch.autograd.grad(found, asked.x_t, cotangent)[0],
            torch.autograd.grad(expected, asked.x_t, cotangent)[0],
        )
    assert pool.denoiser.feature_shape == local.denoiser.feature_shape
    assert not list(pool.denoiser.parameters())


def test_bf16_on_the_wire_costs_its_rounding_only(manager: Any, local: TeacherScorer) -> None:
    asked = query()
    answer = client(manager, local, wire_dtype="bf16").submit(asked).answer()
    expected = local.answer(asked)
    assert not torch.equal(answer, expected)
    assert torch.allclose(answer, expected, atol=0.05)
    array = wire.pack(asked.x_t, "bf16")
    assert array.nbytes * 2 == wire.pack(asked.x_t).nbytes
    assert torch.equal(wire.unpack(array), asked.x_t.bfloat16().float())


def test_replica_killed_over_its_query_costs_nothing(manager: Any, local: TeacherScorer) -> None:
    pool = client(manager, local)
    asked = query(6)
    expected = local.answer(asked)
    pending = [pool.submit(asked) for _ in range(12)]
    handles = ray.get(manager.handles.remote())
    for handle in handles.values():  # both, over the queries they have
        ray.kill(handle, no_restart=False)
    for each in pending:
        assert torch.equal(each.answer(), expected)
    assert pool.figures()["teacher/retries"] > 0
    assert torch.equal(pool.submit(asked).answer(), expected)


def test_direct_transport_carries_the_same_answers_and_gradients(cluster: str, local: TeacherScorer) -> None:
    # nixl on CPUs: the code is that of GPUs, the road between them is another
    manager = start_pool(scenes(teacher_replicas=2, teacher_transport="nixl", teacher_kept_graphs=1))
    assert ray.get(manager.spec.remote()).transport == "nixl"
    pool = client(manager, local, transport="nixl")
    asked = query()
    assert torch.equal(pool.submit(asked).answer(), local.answer(asked))
    gradients = []
    for scorer in (local, pool):
        x = query(4).x_t.clone().requires_grad_()
        # x_t is a node of its own, so that the network's uses of it are added up before the loss's own use of x
        pending = scorer.submit(replace(query(4), x_t=0.6 * x))
        if scorer is pool:  # pushed out of both replicas, so that it is computed again
            for other in [pool.submit(query(1, grad=True)) for _ in range(4)]:
                other.answer()
        sid_loss(x, pending.answer(), 0.5 * x).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
    rounded = client(manager, local, transport="nixl", wire_dtype="bf16").submit(asked).answer()
    assert torch.allclose(rounded, local.answer(asked), atol=0.05)
    assert not torch.equal(rounded, local.answer(asked))
    ray.kill(manager)


def test_direct_transport_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wire.require_transport("nixl") == "nixl"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PlacementError, match=r"placement\.teacher_transport=nixl needs the nixl package"):
        wire.require_transport("nixl")
    assert wire.require_transport("object_store") == "object_store"


class _Room:
    """Takes a CPU."""

    def there(self) -> None:
        pass


def test_replica_that_finds_no_room_again_is_passed_over_until_there_is_room(
    cluster: str, local: TeacherScorer
) -> None:
    manager = start_pool(scenes(teacher_replicas=2, cpus_per_teacher=1.0))
    pool = client(manager, local)
    expected = local.answer(query())

    def until_there_are(replicas: int) -> None:
        deadline = time.monotonic() + 120
        while pool.figures()["teacher/replicas"] != replicas and time.monotonic() < deadline:
            assert torch.equal(pool.submit(query()).answer(), expected)
            time.sleep(0.1)
        assert pool.figures()["teacher/replicas"] == replicas

    until_there_are(2)
    other = ray.remote(_Room).options(num_cpus=1).remote()  # waits for a CPU, and gets that of the replica
    ray.kill(next(iter(ray.get(manager.handles.remote()).values())), no_restart=False)
    ray.get(other.there.remote())
    until_there_are(1)
    retries = pool.figures()["teacher/retries"]
    for _ in range(20):
        assert torch.equal(pool.submit(query()).answer(), expected)
    assert pool.figures()["teacher/retries"] == retries
    ray.kill(other)
    until_there_are(2)
    ray.kill(manager)


def test_manager_killed_is_started_again_with_new_replicas(cluster: str, local: TeacherScorer) -> None:
    manager = start_pool(scenes())
    pool = client(manager, local)
    asked = query()
    expected = pool.submit(asked).answer()
    before = set(ray.get(manager.handles.remote()))
    ray.kill(manager, no_restart=False)
    deadline = time.monotonic() + 60
    while set(ray.get(manager.handles.remote())) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not set(ray.get(manager.handles.remote())) & before
    for _ in range(2):
        assert torch.equal(pool.submit(asked).answer(), expected)
    ray.kill(manager)

    def until_it_is_told() -> None:
        for _ in range(100):
            pool.submit(asked).answer()

    with pytest.raises(PlacementError, match=r"the teacher pool was stopped \(placement\.teacher_service"):
        until_it_is_told()


@pytest.mark.parametrize(
    ("now", "outstanding", "idle_s", "wanted"),
    [
        (1, 0, 0.0, 1),
        (1, 2, 0.0, 1),
        (1, 3, 0.0, 2),
        (4, 99, 0.0, 4),
        (3, 0, 29.0, 3),
        (3, 0, 31.0, 2),
        (1, 0, 99.0, 1),
    ],
)
def test_policy_of_growing_and_shrinking(now: int, outstanding: int, idle_s: float, wanted: int) -> None:
    assert wanted_replicas(now, outstanding, idle_s, minimum=1, maximum=4, rest_s=30.0) == wanted


def test_pool_grows_while_queries_wait_and_shrinks_though_nobody_reports(
    cluster: str, local: TeacherScorer
) -> None:
    manager = start_pool(scenes(teacher_replicas=1, max_teacher_replicas=2, teacher_idle_s=3.0))
    pool = client(manager, local)
    expected = local.answer(query(6))
    deadline = time.monotonic() + 120
    while len(ray.get(manager.handles.remote())) < 2 and time.monotonic() < deadline:
        # as a rank with micro-batches does: a burst, its answers, then other work
        pending = [pool.submit(query(6)) for _ in range(6)]
        assert all(torch.equal(each.answer(), expected) for each in pending)
        time.sleep(0.2)
    assert len(ray.get(manager.handles.remote())) == 2
    deadline = time.monotonic() + 30  # the pool's only client is silent from here on
    while len(ray.get(manager.handles.remote())) > 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ray.get(manager.handles.remote())) == 1
    assert torch.equal(pool.submit(query(6)).answer(), expected)  # by the one that is left
    ray.kill(manager)


@pytest.mark.parametrize("remembered", [None, "127.0.0.1:1"])
def test_listing_services_where_no_cluster_answers_is_one_line_at_once(
    tmp_path: Path, remembered: str | None
) -> None:
    (tmp_path / "ray").mkdir()
    if remembered:
        (tmp_path / "ray" / "ray_current_cluster").write_text(remembered)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "raydistill.cli", "teachers"], capture_output=True, text=True, timeout=60, cwd=ROOT,
        env=environment | {"RAY_TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    where = f"at {remembered}" if remembered else "on this machine"
    assert done.stderr.startswith(f"raydistill: error: no Ray cluster answers {where} (")


OTHER_JOB = """
import json, sys, ray, torch
sys.path.insert(0, {root!r})
from tests.runtime.test_pool import client, query, scenes
from raydistill.runtime.build import build_pipeline, build_teacher
from raydistill.runtime.teachers import require_same_teacher, start_pool
torch.set_num_threads(1)
ray.init(address={address!r}, logging_level="WARNING")
config = scenes(teacher_service="shared")
manager = start_pool(config)
pipeline = build_pipeline(config)
local = build_teacher(config, pipeline, torch.device("cpu"))
require_same_teacher(config, manager, pipeline.fingerprint)
pool = client(manager, local)
scale = float(sys.argv[1])
equal = all(
    torch.equal(pool.submit(query(n, guidance_scale=scale)).answer(), local.answer(query(n, guidance_scale=scale)))
    for _ in range(10) for n in (1, 3, 6)
)
print(json.dumps({{"equal": equal, "manager": manager._actor_id.hex()}}))
"""


def test_two_jobs_share_a_service_and_a_third_with_another_teacher_is_refused(
    cluster: str, local: TeacherScorer
) -> None:
    config = scenes(teacher_service="shared")
    manager = start_pool(config)
    code = OTHER_JOB.format(root=str(ROOT), address=cluster)
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", code, scale], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        for scale in ("1.0", "4.5")
    ]  # fmt: skip
    for job in jobs:
        output, _ = job.communicate(timeout=180)
        assert job.returncode == 0
        assert json.loads(output.splitlines()[-1]) == {"equal": True, "manager": manager._actor_id.hex()}
    # the jobs are over, the service is not
    assert torch.equal(client(manager, local).submit(query()).answer(), local.answer(query()))
    other = replace(config, teacher=replace(config.teacher, dtype="bf16"))
    with pytest.raises(PlacementError, match=r"placement\.teacher_service='shared' serves the teacher"):
        require_same_teacher(other, start_pool(other), build_pipeline(config).fingerprint)
    with pytest.raises(PlacementError, match=r"choose another placement\.teacher_service"):
        require_same_teacher(config, manager, "0" * 64)
    assert services()["shared"]["replicas"] == 1
    stop_service("shared")
    deadline = time.monotonic() + 30
    while services() and time.monotonic() < deadline:
        time.sleep(0.2)
    with pytest.raises(
        PlacementError, match="no teacher service 'shared' runs on this cluster; there are: none"
    ):
        stop_service("shared")


def test_teacher_that_can_not_be_loaded_is_told_as_itself(cluster: str) -> None:
    config = replace(scenes(), teacher=TeacherConfig(path="/nowhere/teacher"))
    with pytest.raises(ConfigError, match=r"teacher\.path='/nowhere/teacher'"):
        start_pool(replace(config, placement=replace(config.placement, teacher_service="misled")))
    assert "misled" not in services()


class Unreadable:
    """Can be sent, and not be read where it arrives, as with a package that a node lacks."""

    def __reduce__(self) -> Any:
        return os.listdir, ("/nowhere/at/all",)


def ask_until_refused(manager: Any) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert manager.handles() == {}


def test_replicas_that_can_not_be_made_are_told_of_and_not_waited_for(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packed, "of", staticmethod(lambda denoiser: Unreadable()))
    manager = _PoolManager(to_dict(scenes(teacher_replicas=2)), [])
    with pytest.raises(
        PlacementError, match=r"no teacher replica can be made .*/nowhere/at/all.*placement\.mode"
    ):
        ask_until_refused(manager)
    # nor started again and again
    assert len(manager._unmade) == 2


def test_what_a_teacher_raises_reaches_the_asker(manager: Any, local: TeacherScorer) -> None:
    bad = replace(query(), cond=Cond({}))
    with pytest.raises(Exception, match="text"):
        client(manager, local).submit(bad).answer()


def test_kept_graphs_are_bounded_and_used_once(local: TeacherScorer) -> None:
    kept = KeptGraphs(local, limit=2)
    for key in ("a", "b", "c"):
        kept.answer(query(1, grad=True), key)
    kept.answer(query(1), "without a gradient")
    assert len(kept) == 2
    assert kept.vjp("a", torch.ones(1, 4, 8, 8)) is None
    assert kept.vjp("c", torch.ones(1, 4, 8, 8)) is not None
    assert kept.vjp("c", torch.ones(1, 4, 8, 8)) is None


def test_identity_names_what_changes_the_answers() -> None:
    config = scenes()
    mine = teacher_identity(config, "f" * 64)
    assert teacher_identity(config, "e" * 64) != mine
    assert teacher_identity(replace(config, teacher=replace(config.teacher, dtype="bf16")), "f" * 64) != mine
    scale = replace(config, teacher=replace(config.teacher, guidance_scale=9.0))
    assert teacher_identity(scale, "f" * 64) == mine
