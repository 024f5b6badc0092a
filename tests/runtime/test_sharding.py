"""placement.sharding=fsdp: the numbers of replicated networks, of which ranks hold shares. Real processes, gloo."""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raydistill.checkpoint import Snapshot, Snapshots, part_name, sharded_part
from raydistill.diffusion.shards import Rows, held_state, is_sharded
from raydistill.errors import CheckpointError, ConfigError, PlacementError, TrainingError
from raydistill.methods.moment_matching import MomentMatchingConfig
from raydistill.methods.sid import SiDConfig
from raydistill.models.edm_pipeline import load_edm_pipeline
from raydistill.roles.generator import generator_weights
from raydistill.roles.world import World
from raydistill.runtime.build import build_pipeline, build_teacher
from raydistill.runtime.commands import export, open_run
from raydistill.runtime.fitting import remedy
from raydistill.runtime.keeper import manifest_of
from raydistill.runtime.loop import resume, write_replay
from raydistill.runtime.placements import compare, sizes
from raydistill.runtime.plan import plan
from raydistill.runtime.settings import PlacementConfig, RunConfig, TeacherConfig, validate
from raydistill.runtime.trainer import Trainer
from tests.tiny import DIGITS, tiny_config, tiny_pipeline, tiny_trainer

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 2
SMOOTH: dict[str, Any] = {"eps": 0.01, "clip_norm": 0.05}
"""Adam without jumps where a gradient is about 0; a norm that is clipped at."""
TRAIN = {"batch_size": 12, "generator_updates": 6}
CASES: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "dmd2, micro-batches, recomputed": {
        "train": TRAIN | {"micro_batch_size": 2, "activation_checkpointing": True}
    },
    "sida": {
        "method": SiDConfig(
            alpha=1.0,
            gan_weight_critic=1.0,
            gan_weight_generator=0.01,
            critic_updates_per_generator=2,
            guidance_scale_critic_training=2.0,
            guidance_scale_critic=2.0,
        )
    },
    "digits": {
        "teacher": DIGITS,
        "method": {"timesteps": (80.0,)},
        "train": TRAIN | {"activation_checkpointing": True},
    },
    "bf16": {"train": TRAIN | {"dtype": "bf16"}},
    "teachers": {"train": TRAIN | {"channels_last": False}, "method": {"gan_features": "teacher"}},
}
CLOCK = ("time/", "throughput/", "memory/", "teacher/", "traffic/")


class Named:
    run_id = "run"
    world = World()


def config_of(name: str, sharding: str) -> RunConfig:
    sections = {"train": TRAIN, "generator": SMOOTH, "critic": SMOOTH} | CASES[name]
    config = tiny_config(**sections)
    return replace(config, placement=replace(config.placement, sharding=sharding))


def trainer_of(name: str, sharding: str, world: World) -> Trainer:
    config = config_of(name, sharding)
    scorer = build_teacher(config, tiny_pipeline(), torch.device("cpu")) if name == "teachers" else None
    return tiny_trainer(config, world, scorer)


def figures(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.startswith(CLOCK)}


def save(trainer: Trainer, step: int, snapshots: Snapshots) -> None:
    if trainer.sharded or trainer.world.rank == 0:
        for part, (tensors, state) in trainer.save().items():
            snapshots.write_part(step, part, tensors, state)
    trainer.world.barrier()
    if trainer.world.rank == 0:
        snapshots.commit(step, manifest_of(trainer, Named()))  # type: ignore[arg-type]
    trainer.world.barrier()


def _learn(world: World, folder: str) -> None:
    """Every case in both layouts, the figures in a file and the weights in snapshots; on from a replicated one."""
    for name in CASES:
        for sharding in ("replicated", "fsdp"):
            trainer = trainer_of(name, sharding, world)
            values = [figures(trainer.window()) for _ in range(UPDATES)]
            save(trainer, UPDATES, Snapshots(f"{folder}/{name}/{sharding}", keep=1))
            torch.save(values, f"{folder}/{name}/{sharding}/{world.rank}.pt")
            if sharding == "fsdp":
                _hold_a_share(trainer)
    _go_on(world, f"{folder}/dmd2/replicated", f"{folder}/to_two.pt")
    _diverge(world, folder)


def _go_on_on_three(world: World, folder: str) -> None:
    """From two ranks' shares; snapshots of what was read, and of what comes of it."""
    trainer = _go_on(world, f"{folder}/dmd2/fsdp", f"{folder}/to_three.pt", f"{folder}/three")
    save(trainer, UPDATES + 1, Snapshots(f"{folder}/three", keep=2))


def _go_on(world: World, source: str, file: str, copy: str | None = None) -> Trainer:
    trainer = trainer_of("dmd2", "fsdp", world)
    resume(trainer, Snapshots(source, keep=2))
    if copy:
        save(trainer, UPDATES, Snapshots(copy, keep=2))
    update = trainer.progress.generator_updates
    values = {update: figures(trainer.window())}
    if world.rank == 0:
        torch.save(values, file)
    return trainer


def _diverge(world: World, folder: str) -> None:
    """A rank alone sees what is not finite; all stop, and write their shares."""
    config = replace(config_of("dmd2", "fsdp"), output_dir=folder)
    trainer = tiny_trainer(config, world)
    trainer.window()
    real = trainer.teacher.answer  # type: ignore[attr-defined]
    broken = float("nan") if world.rank else 1.0
    trainer.teacher.answer = lambda query: real(query) * broken  # type: ignore[attr-defined]
    trainer.session.run_id = "run"
    try:
        trainer.window()
    except TrainingError as error:
        Path(f"{folder}/said_{world.rank}").write_text(f"{error}; {write_replay(trainer, config, error)}")


def _hold_a_share(trainer: Trainer) -> None:
    """Between updates a rank has memory for its rows only, of weights, moments and EMA."""
    for network in (trainer.generator.denoiser, trainer.critic.critic.denoiser):
        assert all(map(is_sharded, network.parameters()))
        mine = sum(tensor.untyped_storage().nbytes() for tensor in held_state(network).values())
        whole = sum(4 * weight.numel() for weight in network.parameters())
        assert mine < 0.55 * whole
        assert all(weight.grad is None for weight in network.parameters())
    whole = sum(4 * weight.numel() for weight in trainer.generator.denoiser.parameters())
    head = trainer.critic.critic.head
    for owner, on_each in (
        (trainer.generator, 0),
        (trainer.critic, sum(p.numel() for p in head.parameters()) if head else 0),
    ):
        state = owner.optimizer.optimizer.state
        moments = [
            each[name].untyped_storage().nbytes()
            for each in state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ]
        assert sum(moments) < 0.55 * 2 * whole + 8 * on_each
    assert trainer.generator.ema is not None
    average = trainer.generator.ema.weights().values()
    assert sum(tensor.untyped_storage().nbytes() for tensor in average) < 0.55 * whole


def _rank(job: Callable[[World, str], None], rank: int, size: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    job(World(rank, size), folder)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(size: int, job: Callable[[World, str], None], folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(job, rank, size, port, str(folder))) for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    on_ranks(2, _learn, folder)
    return folder


def of(folder: Path, name: str, sharding: str) -> tuple[list[dict[str, float]], Snapshot]:
    there = folder / name / sharding
    return torch.load(there / "0.pt", weights_only=True), Snapshots(str(there), keep=1).read(UPDATES)


def require_same_tensors(one: Snapshot, other: Snapshot, tolerance: float) -> None:
    assert one.roles == other.roles == ["critic", "generator"]
    for role in one.roles:
        tensors, state = one.part(role)
        others, other_state = other.part(role)
        assert tensors.keys() == others.keys()
        assert state == other_state
        for name, tensor in tensors.items():
            assert tensor.shape == others[name].shape
            assert (tensor.float() - others[name].float()).abs().max() <= tolerance, name


@pytest.mark.parametrize("name", CASES)
def test_shards_learn_what_replicas_learn(learnt: Path, name: str) -> None:
    expected, replicated = of(learnt, name, "replicated")
    values, sharded = of(learnt, name, "fsdp")
    other = torch.load(learnt / name / "fsdp" / "1.pt", weights_only=True)
    # in bf16 the first update's losses are equal; then rounding to 8 bits sees other sums
    rel, near_zero, tolerance = (2e-2, 5e-3, 2e-3) if name == "bf16" else (2e-5, 1e-6, 1e-6)
    for before, after, there in zip(expected, values, other, strict=True):
        assert before.keys() == after.keys()
        assert there == after
        for figure, value in before.items():
            assert after[figure] == pytest.approx(value, rel=rel, abs=near_zero), figure
    assert values[-1]["clipped_steps/generator"] > 0
    require_same_tensors(replicated, sharded, tolerance)


def test_one_rank_learns_the_same(learnt: Path) -> None:
    torch.set_num_threads(1)
    values, sharded = of(learnt, "dmd2", "fsdp")
    alone = trainer_of("dmd2", "replicated", World())
    for shared in values:
        for figure, value in figures(alone.window()).items():
            assert shared[figure] == pytest.approx(value, rel=1e-4, abs=1e-6), figure
    alone_there = Snapshots(str(learnt / "alone"), keep=1)
    save(alone, UPDATES, alone_there)
    require_same_tensors(alone_there.read(UPDATES), sharded, 1e-6)


def test_snapshots_are_read_at_any_number_of_ranks_and_in_both_layouts(learnt: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    on_ranks(3, _go_on_on_three, learnt)
    alone = trainer_of("dmd2", "replicated", World())
    expected = [figures(alone.window()) for _ in range(UPDATES + 2)]
    _, two = of(learnt, "dmd2", "fsdp")
    three = Snapshots(str(learnt / "three"), keep=2)
    require_same_tensors(two, three.read(UPDATES), 0.0)
    found = {
        "replicated on 2, then fsdp on 2": torch.load(learnt / "to_two.pt", weights_only=True),
        "fsdp on 2, then fsdp on 3": torch.load(learnt / "to_three.pt", weights_only=True),
    }
    for source, layout in (
        (f"{learnt}/dmd2/fsdp", "fsdp on 2, then alone"),
        (three.root, "fsdp on 3, then alone"),
    ):
        trainer = trainer_of("dmd2", "replicated", World())
        resume(trainer, Snapshots(source, keep=2))
        found[layout] = {trainer.progress.generator_updates: figures(trainer.window())}
    assert [list(values) for values in found.values()] == [[UPDATES], [UPDATES], [UPDATES], [UPDATES + 1]]
    for layout, values in found.items():
        for update, after in values.items():
            for figure, value in expected[update].items():
                assert after[figure] == pytest.approx(value, rel=1e-4, abs=1e-6), (layout, figure)


def test_a_snapshot_is_written_in_shares_without_pickle(learnt: Path) -> None:
    _, snapshot = of(learnt, "dmd2", "fsdp")
    there = learnt / "dmd2" / "fsdp" / f"step_{UPDATES:08d}"
    assert {file.suffix for file in there.iterdir()} == {".safetensors", ".json"}
    first, second = (there / f"generator-0000{rank}-of-00002.safetensors" for rank in range(2))
    whole = sum(tensor.nbytes for tensor in snapshot.part("generator")[0].values())
    assert (
        max(first.stat().st_size, second.stat().st_size) < 0.65 * whole
    )  # their headers are as large as the rows
    tensors, _ = snapshot.part("generator")
    for weights, prefix in (("raw", "weights/"), ("ema", "ema/")):
        read = generator_weights(snapshot, weights, tiny_pipeline)  # type: ignore[arg-type]
        tiny_pipeline().denoiser.load_state_dict(read)
        assert all(torch.equal(tensor, tensors[prefix + name]) for name, tensor in read.items())
    rows = Rows(3, 7, 16)
    name = "weights/unet.conv_in.weight"
    assert tensors[name].shape[0] == 8
    with pytest.raises(CheckpointError, match=r"conv_in.weight has 8 rows, this run's network 16"):
        snapshot.part("generator", {name: rows})
    across, _ = snapshot.part("generator", {name: Rows(3, 7, 8)}, prefix=name)
    assert torch.equal(across[name], tensors[name][3:7])


def test_a_snapshot_without_a_ranks_share_is_refused(tmp_path: Path) -> None:
    snapshots = Snapshots(str(tmp_path), keep=1)
    part = sharded_part({"w": torch.ones(2, 3)}, {}, {"w": Rows(0, 2, 4)}, 0)
    snapshots.write_part(1, part_name("generator", 0, 2), *part)
    with pytest.raises(CheckpointError, match="lacks the parts generator-00001-of-00002"):
        snapshots.commit(1, {}, roles=[part_name("generator", rank, 2) for rank in range(2)])
    snapshots.commit(1, {})
    with pytest.raises(CheckpointError, match="not the parts of all 2 ranks of generator"):
        snapshots.read(1).part("generator")


def test_a_figure_that_is_not_finite_leaves_a_replay_of_all_shares(learnt: Path) -> None:
    replay = Snapshots(f"{learnt}/tiny/replay", keep=1)
    tensors, _ = replay.read(1).part("generator")
    assert tensors["weights/unet.conv_in.weight"].shape[0] == 8
    assert (learnt / "said_0").read_text() == (learnt / "said_1").read_text()
    assert "non-finite" in (learnt / "said_0").read_text()


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        (
            {"placement": {"session": "inline", "workers": 0}},
            PlacementError,
            "placement.sharding=fsdp needs placement.session=ray",
        ),
        ({"placement": {"workers": 1}}, PlacementError, "needs placement.workers of 2 or more .* it is 1"),
        (
            {"placement": {"mode": "disaggregated", "workers": 2}},
            PlacementError,
            "needs placement.mode=colocated or teachers, it is disaggregated",
        ),
        (
            {"generator": {"lora_rank": 4}},
            ConfigError,
            r"generator.lora_rank=4 with placement.sharding=fsdp: .* or generator.lora_rank=0",
        ),
        ({"train": {"compile": True}}, ConfigError, r"train.compile=true with placement.sharding=fsdp"),
    ],
)
def test_where_it_does_not_work_it_is_refused(
    sections: dict[str, Any], error: type[Exception], message: str
) -> None:
    sections = sections | {"placement": {"sharding": "fsdp", "workers": 2} | sections.get("placement", {})}
    with pytest.raises(error, match=message):
        validate(tiny_config(**sections))


def test_an_instant_critic_is_refused() -> None:
    method = MomentMatchingConfig(num_steps=4, variant="instant")
    config = tiny_config(method=method, teacher={"guidance_scale": 1.0}, placement={"sharding": "fsdp"})
    with pytest.raises(ConfigError, match=r"placement.sharding=replicated or method.variant=alternating"):
        tiny_trainer(config, World(0, 2))


def test_the_plan_divides_by_the_ranks_and_adds_what_is_gathered() -> None:
    config = replace(tiny_config(), teacher=TeacherConfig(path="random:sd15", guidance_scale=1.75))
    whole, halves, quarters = (
        plan(replace(config, placement=PlacementConfig(workers=workers, sharding=sharding)))  # type: ignore[arg-type]
        for workers, sharding in ((2, "replicated"), (2, "fsdp"), (4, "fsdp"))
    )
    generator, half = whole.bytes_by_role["generator"], halves.bytes_by_role["generator"]
    for of in ("weights", "gradients", "optimizer", "ema"):
        assert getattr(half, of) * 2 == getattr(generator, of)
        assert quarters.bytes_by_role["generator"].shared(2.0).weights == half.weights
    assert 0 < half.gathered == quarters.bytes_by_role["generator"].gathered < generator.weights
    assert halves.bytes_by_role["teacher"] == whole.bytes_by_role["teacher"]
    assert (halves.forwards, halves.encoder_share) == (whole.forwards, whole.encoder_share)
    assert quarters.total_bytes < halves.total_bytes < whole.total_bytes
    assert "gathered" in halves.table()
    assert "gathered" not in whole.table()
    found = compare(replace(config, placement=PlacementConfig(sharding="fsdp")), halves, 4, 1)
    assert [each.layout.mode for each in found] == ["colocated"]
    assert found[0].device_bytes["worker"] == pytest.approx(quarters.device_bytes["worker"], rel=1e-3)
    assert sizes(config, halves).critic_gradient == pytest.approx(sizes(config, whole).critic_gradient)


def test_sharding_is_suggested_where_several_devices_hold_what_one_does_not() -> None:
    teacher = TeacherConfig(path="random:edm-cifar10", guidance_scale=1.0)
    config = replace(tiny_config(method={"timesteps": (80.0,)}), teacher=teacher)
    told = remedy(config, [(1, 1), (4, 1)], 0.8)
    assert re.search(r"fit: .* placement.sharding=fsdp placement.mode=colocated placement.workers=4$", told)
    assert "placement.sharding" not in remedy(config, [(1, 1)], 0.8)
    adapters = replace(config, generator=replace(config.generator, lora_rank=4))
    assert "placement.sharding" not in remedy(adapters, [(4, 1)], 0.3)


@pytest.mark.ray
def test_a_run_under_ray_train_and_what_is_made_of_its_snapshots(tmp_path: Path) -> None:
    settings = [
        f"output_dir={tmp_path}", "name=shards", "prepare.num_train=96", "prepare.num_val=48", "train.batch_size=8",
        "method.critic_updates_per_generator=2", "evaluator.enabled=false", "tracking.uri=off", "checkpoint.every=2",
        "method.gan_weight_generator=0.03", "method.gan_weight_critic=0.03", "placement.workers=2",
        "placement.cpus_per_worker=1", "placement.sharding=fsdp", "train.generator_updates=4",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "dmd2_imagenet64.py"), *settings],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    snapshot = Snapshots(f"{tmp_path}/shards/snapshots", keep=2).read(4)
    assert snapshot.roles == ["critic", "generator"]
    assert snapshot.manifest["world_size"] == 2
    config, opened = open_run(f"{tmp_path}/shards", None, None)
    out = export(f"{tmp_path}/shards", f"{tmp_path}/export")
    weights = generator_weights(opened, config.evaluator.weights, partial(build_pipeline, config))
    exported = load_edm_pipeline(str(out)).denoiser.state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in exported.items())
