"""Roles apart: the same losses and weights wherever the networks live. Real processes, gloo between them."""

import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raydistill.errors import PlacementError
from raydistill.methods.moment_matching import MomentMatchingConfig
from raydistill.methods.sid import SiDConfig
from raydistill.roles.world import World
from raydistill.runtime.apart import CriticRank, GeneratorRank
from raydistill.runtime.build import build_teacher
from raydistill.runtime.ranks import best_num_critic, partition, transfers
from raydistill.runtime.settings import RunConfig, validate
from raydistill.runtime.simulate import Layout, Network, RoleSeconds, Sizes, simulate
from tests.tiny import PlainSession, normal_source, tiny_config, tiny_pipeline, tiny_trainer

KAPPA = {"guidance_scale_critic_training": 2.0, "guidance_scale_critic": 2.0}
# their critics learn first
OTHER_METHODS: dict[str, dict[str, Any]] = {
    "sid": {"method": SiDConfig(generator_loss_scale=1.0, critic_updates_per_generator=2)},
    "guided_sida": {
        "method": SiDConfig(
            alpha=1.0,
            gan_weight_critic=1.0,
            gan_weight_generator=0.01,
            generator_rest_updates=1,
            gan_start_update=2,
            **KAPPA,
        )
    },
    "moment_matching": {"method": MomentMatchingConfig(num_steps=4)},
    "instant": {
        "method": MomentMatchingConfig(num_steps=4, variant="instant"),
        "teacher": {"guidance_scale": 1.0},
    },
}
SHORT = {"train": {"batch_size": 8, "generator_updates": 4}}
HALVED = {"train": {"batch_size": 8, "generator_updates": 4, "micro_batch_size": 4}}
CLOCK = ("time/", "throughput/", "memory/", "version/", "teacher/", "traffic/")


def weights(part: Any) -> dict[str, torch.Tensor]:
    tensors, _ = part.save()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def figures(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not name.startswith(CLOCK)}


def colocated(config: RunConfig, updates: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    trainer = tiny_trainer(config)
    values = [figures(trainer.window()) for _ in range(updates)]
    return values, weights(trainer.generator) | {f"critic/{n}": t for n, t in weights(trainer.critic).items()}


def config_of(**sections: Any) -> RunConfig:
    return tiny_config(**{"train": {"batch_size": 8, "generator_updates": 30}} | sections)


@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("features", ["critic", "teacher"])
def test_asking_the_teacher_ahead_changes_no_number(micro: int | None, features: str) -> None:
    torch.set_num_threads(1)
    config = config_of(
        train={"generator_updates": 6, "micro_batch_size": micro}, method={"gan_features": features}
    )
    expected, expected_weights = colocated(config, 6)
    scorer = build_teacher(config, tiny_pipeline(), torch.device("cpu"))
    trainer = tiny_trainer(config, scorer=scorer)
    assert trainer.asks_ahead
    assert [figures(trainer.window()) for _ in range(6)] == expected
    critic = {f"critic/{name}": tensor for name, tensor in weights(trainer.critic).items()}
    for name, tensor in (weights(trainer.generator) | critic).items():
        assert torch.equal(tensor, expected_weights[name]), name


@pytest.mark.parametrize("sections", OTHER_METHODS.values(), ids=OTHER_METHODS)
def test_a_teacher_asked_ahead_while_the_critic_learns_first_changes_no_number(
    sections: dict[str, Any],
) -> None:
    torch.set_num_threads(1)
    config = config_of(**sections, **HALVED)
    expected, expected_weights = colocated(config, 4)
    trainer = tiny_trainer(config, scorer=build_teacher(config, tiny_pipeline(), torch.device("cpu")))
    assert [figures(trainer.window()) for _ in range(4)] == expected
    critic = {f"critic/{name}": tensor for name, tensor in weights(trainer.critic).items()}
    for name, tensor in (weights(trainer.generator) | critic).items():
        assert torch.equal(tensor, expected_weights[name]), name


@pytest.mark.parametrize("method", [None, "sid", "moment_matching"])
def test_what_was_asked_ahead_is_asked_again_after_a_resume(method: str | None) -> None:
    torch.set_num_threads(1)
    sections = OTHER_METHODS[method] if method else {}
    config = config_of(**sections | {"train": {"generator_updates": 4}})
    expected, _ = colocated(config, 4)
    scorer = build_teacher(config, tiny_pipeline(), torch.device("cpu"))
    first = tiny_trainer(config, scorer=scorer)
    for _ in range(2):
        first.window()
    second = tiny_trainer(config, scorer=scorer)
    second.generator.load(*first.generator.save())
    second.critic.load(*first.critic.save())
    second.progress = replace(first.progress)
    assert [figures(second.window()) for _ in range(2)] == expected[2:]


def _rank(rank: int, world_size: int, critics: int, port: int, folder: str, sections: dict[str, Any]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    stop_at = sections.pop("stop_at", None)
    config = config_of(**sections)
    ranks = partition([0] * world_size, critics)
    groups = {role: dist.new_group(list(ranks.ranks(role))) for role in ("generator", "critic")}
    role = ranks.role(rank)
    members = ranks.ranks(role)
    world = World(members.index(rank), len(members), groups[role])

    class Log:
        def metrics(self, values: dict[str, float], step: int) -> None:
            late.append(values | {"step": float(step)})

    class Session(PlainSession):
        tracker = Log()

        def should_stop(self, among: World) -> bool:
            return among.any(stop_at is not None and trainer.progress.generator_updates >= stop_at)

    session = Session(World(rank, world_size), build_teacher(config, tiny_pipeline(), torch.device("cpu")))

    kind = GeneratorRank if role == "generator" else CriticRank
    trainer = kind(config, session, ranks, world, tiny_pipeline(), normal_source)  # type: ignore[arg-type]
    values: list[dict[str, float]] = []
    late: list[dict[str, float]] = []
    while trainer.progress.generator_updates < config.train.generator_updates and trainer.goes_on():
        values.append(trainer.window())
    (part,) = trainer.parts.values()
    torch.save(
        {"weights": weights(part), "values": values, "late": late, "role": role}, f"{folder}/{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


def apart(tmp_path: Path, world_size: int, critics: int, **sections: Any) -> list[dict[str, Any]]:
    """What every rank saved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, world_size, critics, port, str(tmp_path), sections))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()
        assert process.exitcode == 0
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "method": {
                "timesteps": (999.0, 499.0),
                "rollout": "real_data",
                "critic_updates_per_generator": 3,
            },
            "train": {"batch_size": 8, "generator_updates": 6, "micro_batch_size": 4},
        },
        OTHER_METHODS["guided_sida"] | SHORT,
        OTHER_METHODS["moment_matching"] | HALVED,
        OTHER_METHODS["instant"] | SHORT,
        {"generator": {"lora_rank": 4, "lora_targets": "all"}, "critic": {"lora_rank": 2}} | SHORT,
    ],
    ids=["gan", "real_data_accumulated", "guided_sida", "moment_matching_accumulated", "instant", "lora"],
)
def test_one_rank_for_each_role_gives_the_losses_and_weights_of_one_process_bit_for_bit(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    config = config_of(**sections)
    updates = config.train.generator_updates
    expected, expected_weights = colocated(config, updates)
    generator, critic = apart(tmp_path, 2, 1, **sections)
    assert [figures(values) for values in generator["values"]] == expected
    found = generator["weights"] | {f"critic/{n}": t for n, t in critic["weights"].items()}
    assert found.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("world_size", "critics"), [(3, 1), (3, 2)])
def test_any_number_of_ranks_differs_by_the_order_of_sums_only(
    tmp_path: Path, world_size: int, critics: int
) -> None:
    torch.set_num_threads(1)
    sections = {"train": {"batch_size": 8, "generator_updates": 3}}
    smooth = {
        "generator": {"eps": 1e-3}, "critic": {"eps": 1e-3},
    }  # fmt: skip
    # Adam divides by the square root of tiny squares; with a large epsilon rounding stays rounding
    expected, expected_weights = colocated(config_of(**sections, **smooth), 3)
    saved = apart(tmp_path, world_size, critics, **sections, **smooth)
    for rank in saved:
        prefix = "critic/" if rank["role"] == "critic" else ""
        for name, tensor in rank["weights"].items():
            assert (tensor - expected_weights[prefix + name]).abs().max() < 1e-5, name
    for found, one in zip(saved[0]["values"], expected, strict=True):
        for name in ("loss/dm", "loss/dsm", "loss/gan_generator", "grad_norm/dm", "sample/absmax"):
            assert found[name] == pytest.approx(one[name], rel=1e-4), name


def test_one_window_of_staleness_is_logged_and_ends_between_snapshots(tmp_path: Path) -> None:
    sections = {
        "train": {"batch_size": 8, "generator_updates": 7},
        "placement": {"max_staleness": 1},
        "checkpoint": {"every": 4},
        "evaluator": {"enabled": False},
    }
    generator, _ = apart(tmp_path, 2, 1, **sections)
    # the critic's figures of a window come with it, or at its own step when it is over
    logged = {step: values for step, values in enumerate(generator["values"], 1) if "loss/dsm" in values}
    logged |= {int(values["step"]): values for values in generator["late"]}
    assert sorted(logged) == [1, 2, 3, 4, 5, 6, 7]
    versions = {
        step: (values["version/generator"], values["version/critic"]) for step, values in logged.items()
    }
    # samples for both critic updates, answers and the GAN's gradient; the rest is numbers
    batch = 8 * 3 * 8 * 8 * 4
    moved = [values["traffic/critic_bytes"] for values in generator["values"]]
    assert all(4 * batch < each < 4.2 * batch for each in moved[1:-1])
    # R = 2; update 4 follows a snapshot, so the critic has finished window 3 before it answers
    assert versions == {1: (0, 0), 2: (1, 0), 3: (2, 2), 4: (3, 4), 5: (4, 8), 6: (5, 8), 7: (6, 10)}


def test_stopping_leaves_both_roles_at_the_same_update_though_one_runs_ahead(tmp_path: Path) -> None:
    saved = apart(tmp_path, 2, 1, stop_at=3, placement={"max_staleness": 1}, evaluator={"enabled": False})
    assert [len(rank["values"]) for rank in saved] == [3, 3]


def test_partition_deals_the_critic_evenly_over_nodes_and_keeps_rank_0_with_the_generator() -> None:
    assert partition([0, 0], 1).critic == (1,)
    ranks = partition([0, 0, 0, 0, 1, 1, 1, 1], 2)
    assert ranks.critic == (3, 7)
    # Ray numbers ranks node by node, but nothing here depends on it
    assert partition([0, 1, 0, 1], 2).critic == (2, 3)
    for world in range(2, 9):
        for critics in range(1, world):
            dealt = partition([0] * world, critics)
            assert 0 in dealt.generator
            assert len(dealt.critic) == critics
            assert sorted(dealt.generator + dealt.critic) == list(range(world))
    for bad in (0, 2):
        with pytest.raises(PlacementError, match=rf"placement\.critic_ranks={bad} of 2 ranks"):
            partition([0, 0], bad)


@pytest.mark.parametrize(("workers", "critics"), [(1, 0), (2, 2), (3, 4)])
def test_a_role_without_a_worker_is_refused(workers: int, critics: int) -> None:
    placement = {"mode": "disaggregated", "workers": workers, "critic_ranks": critics}
    named = rf"placement\.workers={workers} with placement\.critic_ranks={critics} leaves one without"
    with pytest.raises(PlacementError, match=named):
        validate(tiny_config(placement=placement))


@pytest.mark.parametrize(("world", "critics"), [(2, 1), (3, 1), (5, 2), (6, 3)])
def test_transfers_carry_every_sample_once(world: int, critics: int) -> None:
    ranks = partition([0] * world, critics)
    size = 2 * critics * (world - critics)
    seen = [n for transfer in transfers(ranks, size) for n in range(transfer.start, transfer.stop)]
    assert sorted(seen) == list(range(size))


def test_more_critic_updates_get_more_critic_ranks() -> None:
    seconds = RoleSeconds(generator_update=3.0, sample=1.0, critic_answer=1.0, critic_update=3.0)
    chosen = [best_num_critic(8, 840, None, seconds, r) for r in (1, 2, 5, 10)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]
    times = {c: simulate(seconds, 5, Layout("disaggregated", 8 - c, c)).window_s for c in range(1, 8)}
    assert chosen[2] == min(times, key=lambda c: times[c])
    # a teacher that everybody waits for hides what more critic ranks would save; more replicas bring it back
    slow = replace(seconds, teacher_answer=30.0)
    assert best_num_critic(8, 840, None, slow, 5) == 1
    assert best_num_critic(8, 840, None, slow, 5, teachers=100) > 1
    with pytest.raises(PlacementError, match=r"train\.batch_size=7 can't be shared"):
        best_num_critic(4, 7, None, seconds, 5)


SECONDS = RoleSeconds(
    generator_update=0.2, sample=0.1, critic_answer=0.1, critic_update=0.3, teacher_answer=0.4
)


def test_simulated_windows_of_one_device_are_the_sum_of_its_work() -> None:
    alone = simulate(SECONDS, 5, Layout("colocated"))
    assert alone.window_s == pytest.approx(0.2 + 5 * 0.1 + 0.1 + 5 * 0.3 + 0.4)
    assert alone.idle["worker"] == pytest.approx(0.0)
    two = simulate(SECONDS, 5, Layout("colocated", generators=2))
    assert two.window_s == pytest.approx(alone.window_s / 2)


def test_simulated_teachers_hide_behind_the_critic_until_they_can_not() -> None:
    hidden = simulate(SECONDS, 5, Layout("teachers", teachers=1))
    assert hidden.window_s == pytest.approx(0.2 + 5 * 0.1 + 0.1 + 5 * 0.3)
    assert hidden.idle["teacher"] == pytest.approx(1 - 0.4 / hidden.window_s)
    slow = RoleSeconds(0.2, 0.1, 0.1, 0.3, teacher_answer=10.0)
    # sample, ask, wait for the answers, update: nothing else fits beside it
    assert simulate(slow, 5, Layout("teachers", teachers=1)).window_s == pytest.approx(10.0 + 0.2 + 0.1)


@pytest.mark.parametrize("r", [1, 2, 5, 10])
def test_simulated_roles_apart_wait_for_the_longer_chain(r: int) -> None:
    result = simulate(SECONDS, r, Layout("disaggregated", 1, 1, 1))
    # the critic answers and learns; the generator updates, makes the next samples and waits for the teacher's answers
    # (with R = 2 its own samples go first, and the critic waits for its second ones)
    expected = {1: 0.2 + 0.1 + 0.4, 2: 0.1 + 0.3 + 0.1 + 0.3, 5: 0.1 + 5 * 0.3, 10: 0.1 + 10 * 0.3}
    assert result.window_s == pytest.approx(expected[r], rel=1e-6)
    stale = simulate(SECONDS, r, Layout("disaggregated", 1, 1, 1, max_staleness=1))
    assert stale.window_s <= result.window_s + 1e-9


def test_simulated_network_costs_time_and_thousands_of_ranks_are_no_work() -> None:
    sizes = Sizes(batch=64e6, query=128e6, generator_gradient=1e9, critic_gradient=1e9)
    free = simulate(SECONDS, 5, Layout("disaggregated", 512, 512, 512))
    slow = simulate(SECONDS, 5, Layout("disaggregated", 512, 512, 512), Network(50e-6, 10e9), sizes)
    assert slow.window_s > free.window_s
    assert Network(1e-3, 1e9).all_reduce_seconds(8e9, 8) == pytest.approx(14 * (1e-3 + 1.0))
