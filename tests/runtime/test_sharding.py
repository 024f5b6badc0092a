"""placement.sharding=fsdp: the numbers of replicated networks, of which ranks hold shares. Real processes, gloo."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raydistill.checkpoint import Snapshot, Snapshots
from raydistill.diffusion.shards import held_state, is_sharded
from raydistill.methods.sid import SiDConfig
from raydistill.roles.world import World
from raydistill.runtime.build import build_teacher
from raydistill.runtime.keeper import manifest_of
from raydistill.runtime.loop import resume
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.trainer import Trainer
from tests.tiny import DIGITS, tiny_config, tiny_pipeline, tiny_trainer

UPDATES = 3
SMOOTH: dict[str, Any] = {"eps": 0.01, "clip_norm": 0.05}
"""Adam without jumps where a gradient is about 0; a norm that is clipped at."""
TRAIN = {"batch_size": 12, "generator_updates": 6}
CASES: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "dmd2, contiguous": {"train": TRAIN | {"channels_last": False}},
    "dmd2, micro-batches, recomputed": {
        "train": TRAIN | {"micro_batch_size": 2, "activation_checkpointing": True}
    },
    "dmd2, teacher's features": {"method": {"gan_features": "teacher"}},
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
    "teachers": {},
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
    for part, (tensors, state) in trainer.save().items():
        snapshots.write_part(step, part, tensors, state)
    trainer.world.barrier()
    if trainer.world.rank == 0:
        snapshots.commit(step, manifest_of(trainer, Named()))  # type: ignore[arg-type]
    trainer.world.barrier()


def _learn(world: World, folder: str) -> None:
    """Every case in both layouts; the figures go to a file, the weights into snapshots."""
    for name in CASES:
        for sharding in ("replicated", "fsdp"):
            trainer = trainer_of(name, sharding, world)
            values = [figures(trainer.window()) for _ in range(UPDATES)]
            there = Snapshots(f"{folder}/{name}/{sharding}", keep=1)
            if sharding == "fsdp" or world.rank == 0:
                for part, (tensors, state) in trainer.save().items():
                    there.write_part(UPDATES, part, tensors, state)
            world.barrier()
            if world.rank == 0:
                there.commit(UPDATES, manifest_of(trainer, Named()))  # type: ignore[arg-type]
            torch.save(values, f"{folder}/{name}/{sharding}/{world.rank}.pt")
            if sharding == "fsdp":
                _hold_a_share(trainer)


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


def _go_on(world: World, folder: str) -> None:
    """From the snapshots in `folder`, each with a window in a layout of its own."""
    for there in sorted(Path(folder).iterdir()):
        trainer = trainer_of("dmd2", "fsdp", world)
        resume(trainer, Snapshots(str(there), keep=2))
        values = figures(trainer.window())
        if world.rank == 0:
            torch.save(values, f"{there}/on_{world.size}.pt")


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
    rel, tolerance = (2e-2, 2e-4) if name == "bf16" else (2e-5, 1e-6)
    for before, after, there in zip(expected, values, other, strict=True):
        assert before.keys() == after.keys()
        assert there == after
        for figure, value in before.items():
            assert after[figure] == pytest.approx(value, rel=rel, abs=1e-6), figure
    assert values[-1]["clipped_steps/generator"] > 0
    require_same_tensors(replicated, sharded, tolerance)
