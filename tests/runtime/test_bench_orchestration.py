"""The parts of jobs/bench_orchestration.py that need no Ray: roads, turns, networks that sleep."""

import asyncio
import importlib.util
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import torch

from raydistill.runtime.simulate import Network, RoleSeconds

BENCH = Path(__file__).resolve().parents[2] / "jobs" / "bench_orchestration.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_orchestration", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_sizes_of_calls_give_latency_and_bandwidth(bench: ModuleType) -> None:
    network = Network(3e-3, 5e8)
    seconds = {
        f"ranks/{shape[-1]}": 2 * network.seconds(4 * shape[-1] ** 2) for shape in (bench.SMALL, bench.MIB_4)
    }
    found = bench.road(seconds, "ranks")
    assert found.latency_s == pytest.approx(network.latency_s)
    assert found.bytes_per_s == pytest.approx(network.bytes_per_s)
    # where noise hides the bytes they cost nothing, rather than less than that
    assert bench.road({"x/16": 0.2, "x/1024": 0.1}, "x") == Network(0.1)


def test_a_turn_is_taken_by_whose_it_is_and_over_when_he_says_so(bench: ModuleType) -> None:
    async def play() -> None:
        turns = bench._Turns()
        taken: list[tuple[str, int]] = []

        async def part(name: str) -> None:
            number = 0
            while turn := await turns.next_turn(name, number):
                number, threads = turn
                taken.append((name, threads))
                await asyncio.sleep(0.01)
                await turns.done(name, 0.5, 0.25)

        parts = [asyncio.create_task(part(name)) for name in ("a", "b")]
        for name, threads in (("a", 1), ("b", 1), ("b", 2), ("a", 2)):
            before = len(taken)
            await turns.give(name, threads)
            assert taken[before:] == [(name, threads)]
        await turns.end()
        await asyncio.wait_for(asyncio.gather(*parts), 5)
        seconds = {"a": [0.5, 0.5], "b": [0.5, 0.5], "a cpu": [0.25, 0.25], "b cpu": [0.25, 0.25]}
        assert (await turns.results())[0] == seconds

    asyncio.run(play())


def test_sleeping_networks_take_their_seconds_and_little_more(bench: ModuleType) -> None:
    found = bench.sleeping_seconds(1)
    for field in fields(RoleSeconds):
        asleep = bench.SLEEP.get(field.name, 0.0)
        assert asleep <= getattr(found, field.name) < asleep + 0.1, field.name


def test_the_bare_loop_trains_what_the_trainer_trains(bench: ModuleType) -> None:
    loop = bench.BareLoop(bench.bench_config(2, 2))
    before = [
        [weight.clone() for weight in network.parameters()] for network in (loop.generator, loop.critic)
    ]
    loop.update()
    for network, weights in zip((loop.generator, loop.critic), before, strict=True):
        moved = [not torch.equal(new, old) for new, old in zip(network.parameters(), weights, strict=True)]
        assert sum(moved) > 0.9 * len(moved)
    assert loop.step == 1
