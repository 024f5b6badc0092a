"""What does orchestration cost, and does the simulation of the schedules predict it?

    python jobs/bench_orchestration.py --out orchestration.json

Prints, with medians of interleaved rounds:

    calls        a call with 4 MiB each way to a teacher replica, and between two ranks; with a small one beside it they
                 give latency and bandwidth of both roads
    updates      one DMD2 update of the embedded networks in a bare Python loop, in the trainer without Ray, colocated
                 under Ray Train, with the teacher in a pool, and with generator and critic on ranks of their own;
                 forward passes by role; the window that is simulated from the trainer's phases and those roads
    pipeline     the schedule with roles apart at R = 1, 2, 5, 10 and with two ranks of a role, its networks replaced by
                 processes that sleep (two cores can't run three roles at once), against the longest chain of
                 dependencies (ideal) and what is simulated with those roads (predicted)
    pool         queries per second of 1 to 8 sleeping replicas, against so many times what one would answer if calls
                 cost nothing

An update is the trainer's own window. What a run does beside it (figures to the tracker, snapshots, evaluations,
shards) is left out, of the bare loop too.

Each process has --threads threads, one by default: what is measured is the orchestration, and a step with a thread for
each core would wait at every operation for the thread whose core one of Ray's idle processes took. The ratio with as
many threads as cores is printed too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from raydistill.runtime.settings import RunConfig
    from raydistill.runtime.simulate import Network, RoleSeconds

RATIOS = (1, 2, 5, 10)
REPLICAS = (1, 2, 4, 8)
MIB_4, SMALL = (1, 1, 1024, 1024), (1, 1, 16, 16)
RANKS = ((2, 1, 5), (1, 2, 5), (2, 1, 2), (1, 2, 2))
"""(generator ranks, critic ranks, R) of the pipelines with several ranks."""
SLEEP = {
    "generator_update": 0.06, "sample": 0.03, "critic_answer": 0.03, "critic_update": 0.08, "teacher_answer": 0.06,
}  # fmt: skip
"""Seconds that each phase sleeps."""


def main() -> None:
    arguments = parse()
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    from raydistill.runtime.run import connect

    threads = sorted({arguments.threads, os.cpu_count() or 1})
    results: dict[str, Any] = {"machine": machine(), "threads": arguments.threads}
    if "updates" in arguments.only:
        results |= without_ray(arguments.rounds, bench_config(arguments.batch, arguments.ratio), threads)
    connect(num_cpus=16)
    try:
        roads: dict[str, Network] = {}
        if {"calls", "updates", "pipeline"} & set(arguments.only):
            found, roads = calls(arguments.calls)
            results |= found
        if "updates" in arguments.only:
            results |= updates(arguments.rounds, arguments.batch, arguments.ratio, arguments.threads, roads)
        if "pipeline" in arguments.only:
            results |= pipeline(arguments.windows, roads)
        if "pool" in arguments.only:
            results |= pool(arguments.queries)
    finally:
        ray.shutdown()
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        print(f"written: {arguments.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("updates", "calls", "pipeline", "pool")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run (all)")
    parser.add_argument(
        "--rounds", type=int, default=20, help="interleaved rounds of one update each (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples of an update (%(default)s)")
    parser.add_argument("--ratio", type=int, default=2, help="R of the updates (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process that computes (%(default)s)")
    parser.add_argument("--calls", type=int, default=50, help="calls with 4 MiB each way (%(default)s)")
    parser.add_argument(
        "--windows", type=int, default=30, help="windows of the pipeline at each R (%(default)s)"
    )
    parser.add_argument("--queries", type=int, default=16, help="queries for each replica (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    return parser.parse_args()


# ---- updates


def bench_config(batch: int, ratio: int, **placement: Any) -> RunConfig:
    from raydistill.data.reader import DataConfig
    from raydistill.methods.dmd2 import DMD2Config
    from raydistill.runtime.settings import PlacementConfig, RunConfig, TeacherConfig, TrainConfig

    return RunConfig(
        name="bench",
        teacher=TeacherConfig(path="builtin:scenes", guidance_scale=1.5),
        method=DMD2Config(
            critic_updates_per_generator=ratio, gan_weight_generator=0.0, gan_weight_critic=0.0
        ),
        train=TrainConfig(batch_size=batch, generator_updates=10**6),
        data=DataConfig(shards="standard-normal"),
        placement=PlacementConfig(cpus_per_teacher=0.0, **placement),
    )


class BareLoop:
    """The update written out: no roles, no readers, no ranks; batches lie ready."""

    def __init__(self, config: RunConfig):
        import torch

        from raydistill.diffusion.random import Draws
        from raydistill.models.critic import Critic
        from raydistill.runtime import build

        self.config, self.draws = config, Draws(config.seed)
        pipeline = build.build_pipeline(config)
        self.method = build.build_method(config, pipeline)
        networks = [pipeline.copy_denoiser("fp32").train() for _ in range(2)]
        for network in networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's overloads
        self.generator, self.critic = networks[0], Critic(networks[1], head=None)
        self.teacher = build.build_teacher(config, pipeline, torch.device("cpu"))
        self.adam = [torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True) for network in networks]
        self.shape = pipeline.latent_shape
        text = pipeline.encode_text(["a red circle"]).tensors["text"]
        from raydistill.models.denoiser import Cond

        self.cond = Cond({"text": text.repeat(config.train.batch_size, 1, 1)})
        self.step = 0

    def update(self) -> None:
        import torch

        from raydistill.methods.method import PhaseDraws
        from raydistill.models.denoiser import frozen_weights

        method, batch, r = self.method, self.config.train.batch_size, self.method.critic_updates_per_generator
        draws = PhaseDraws(self.draws, "generator", self.step, range(batch), "cpu")
        x_in, t_in = method.generator_input(self.generator, self.cond, self.shape, None, draws)
        x = self.generator(x_in, t_in, self.cond)
        leaf = x.detach().requires_grad_()
        queries = method.queries(leaf, self.cond, None, draws)
        with torch.no_grad():
            fake = queries["fake"]
            with frozen_weights(self.critic):
                answers = {
                    "real": self.teacher.answer(queries["real"]),
                    "fake": self.critic(fake.x_t, fake.t, fake.cond),
                }
        losses = method.generator_losses(leaf, queries, answers)
        (gradient,) = torch.autograd.grad(losses.total(), leaf)
        x.backward(gradient)
        torch.nn.utils.clip_grad_norm_(self.generator.parameters(), 10.0)
        self.adam[0].step()
        self.adam[0].zero_grad()
        for k in range(r):
            draws = PhaseDraws(self.draws, "critic", self.step * r + k, range(batch), "cpu")
            samples = x.detach()
            if k:
                x_in, t_in = method.generator_input(self.generator, self.cond, self.shape, None, draws)
                with torch.no_grad():
                    samples = self.generator(x_in, t_in, self.cond)
            method.critic_losses(self.critic, samples, self.cond, None, draws, {}).total().backward()
            torch.nn.utils.clip_grad_norm_(self.critic.parameters(), 10.0)
            self.adam[1].step()
            self.adam[1].zero_grad()
        self.step += 1


class _Turns:
    """Whose turn it is: one part of the benchmark works, all others wait in a call, without looking again and again."""

    def __init__(self) -> None:
        self._turn: tuple[int, str, int] = (0, "", 0)
        self._changed = asyncio.Condition()
        self._over = -1
        self._ready: dict[str, int] = {}
        self._seconds: dict[str, list[float]] = {}
        self._counts: dict[str, dict[str, float]] = {}

    async def ready(self, name: str) -> None:
        self._ready[name] = self._ready.get(name, 0) + 1

    async def is_ready(self) -> dict[str, int]:
        return dict(self._ready)

    async def give(self, name: str, threads: int) -> None:
        """Return when it is done with its turn."""
        async with self._changed:
            number = self._turn[0] + 1
            self._turn = number, name, threads
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._over >= number)

    async def end(self) -> None:
        async with self._changed:
            self._turn = self._turn[0] + 1, "end", 0
            self._changed.notify_all()

    async def next_turn(self, name: str, after: int) -> tuple[int, int] | None:
        """(number of the turn, threads) of this part's next turn after one, None at the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._turn[0] > after and self._turn[1] in (name, "end"))
            return None if self._turn[1] == "end" else (self._turn[0], self._turn[2])

    async def count(self, name: str, counts: dict[str, float]) -> None:
        self._counts[name] = self._counts.get(name, {}) | counts

    async def done(self, name: str, seconds: float, cpu_seconds: float = 0.0) -> None:
        self._seconds.setdefault(name, []).append(seconds)
        self._seconds.setdefault(f"{name} cpu", []).append(cpu_seconds)
        async with self._changed:
            self._over = self._turn[0]
            self._changed.notify_all()

    async def results(self) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
        return self._seconds, self._counts


class _Alone:
    """A session of one process without Ray."""

    def __init__(self) -> None:
        import torch

        from raydistill.roles.world import World

        self.world, self.device = World(), torch.device("cpu")

    def scorer(self, pipeline: Any) -> None:
        return None


def timed(function: Callable[[], Any], threads: int = 0) -> tuple[float, float]:
    """Seconds, and this thread's on a processor: of one thread's work, what others on the machine can't lengthen."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    started, began = time.perf_counter(), time.thread_time()
    function()
    return time.perf_counter() - started, time.thread_time() - began


def without_ray(rounds: int, config: RunConfig, threads: list[int]) -> dict[str, Any]:
    """The bare loop and the trainer before any process of Ray's runs."""
    from raydistill.runtime.trainer import Trainer

    bare, inline = BareLoop(config), Trainer(config, _Alone(), open_reader=normal_samples)  # type: ignore[arg-type]
    parts = {"bare": bare.update, "inline": inline.window}
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 2):
        for count in threads:
            for name, update in parts.items():
                seconds.setdefault(f"{name}/{count}", []).append(timed(update, count)[0])
        show_progress(f"without Ray {number + 1}/{rounds + 2}")
    found = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    print(f"one update before Ray runs, median of {rounds} interleaved rounds:")
    for count in threads:
        print(
            f"  {count} thread(s): bare {found[f'bare/{count}']:.3f} s, the trainer "
            f"{found[f'inline/{count}'] / found[f'bare/{count}']:.3f} x bare"
        )
    return {"update_without_ray_s": found}


def updates(rounds: int, batch: int, ratio: int, threads: int, roads: dict[str, Network]) -> dict[str, Any]:
    """Interleaved updates of the placements: colocated alone beside the bare loop, then the other two."""
    from raydistill.runtime import teachers

    base = bench_config(batch, ratio)
    counts = sorted({threads, os.cpu_count() or 1})
    first = Rounds(base, threads)
    first.run(rounds, {"colocated": (base, None)}, counts)
    manager = teachers.start_pool(bench_config(batch, ratio, mode="teachers"))
    second = Rounds(base, threads)
    others = {
        "teachers": (bench_config(batch, ratio, mode="teachers", workers=1), manager),
        "apart": (bench_config(batch, ratio, mode="disaggregated", workers=2, critic_ranks=1), manager),
    }
    second.run(rounds, others, [threads])
    print(f"one update, batch {batch}, R {ratio}, median of {rounds} interleaved rounds:")
    first.show()
    second.show()
    results: dict[str, Any] = {
        "update_s": second.medians(),
        "forward_passes": first.counts | second.counts,
    }
    if threads == 1:
        results["update_cpu_s"] = {
            name: first.median(f"{name} cpu") for name in ("bare", "inline", "colocated")
        }
        results["colocated_over_bare_cpu"] = first.median("colocated cpu") / first.median("bare cpu")
        print(
            f"  colocated {results['colocated_over_bare_cpu']:.3f} x bare by the thread's own time on a core"
        )
    results["update_s"] |= first.medians() | {"bare_beside_teachers_and_apart": second.median("bare")}
    for part, names in ((first, ["inline", "colocated"]), (second, ["teachers", "apart"])):
        for name in names:
            results[f"{name}_over_bare"] = part.median(name) / part.median("bare")
    for count in counts[1:]:
        key = f"colocated_over_bare_{count}_threads"
        results[key] = first.median("colocated", count) / first.median("bare", count)
        print(
            f"  with {count} threads, which leave no core to Ray's own processes: bare "
            f"{first.median('bare', count):.3f} s, colocated {results[key]:.3f} x bare"
        )
    phases = {"first": first.phases(), "second": second.phases()}
    results["role_seconds"] = {name: vars(each) for name, each in phases.items()}
    return results | predicted_updates(first, second, ratio, threads, roads)


def predicted_updates(
    first: Rounds, second: Rounds, r: int, threads: int, roads: dict[str, Network]
) -> dict[str, Any]:
    """What the phases of the trainer in this process promise for each placement."""
    from raydistill.runtime.placements import sizes
    from raydistill.runtime.plan import plan
    from raydistill.runtime.simulate import Layout, simulate

    cores = os.cpu_count() or 1
    moved = sizes(first.config, plan(first.config))
    print("simulated from the trainer's phases, timed in the same rounds, and the roads:")
    results = {}
    for part, name, layout in (
        (first, "colocated", Layout("colocated")),
        (second, "teachers", Layout("teachers", 1, 0, 1)),
        (second, "apart", Layout("disaggregated", 1, 1, 1)),
    ):
        seconds = part.phases()
        at_once = {"colocated": threads, "teachers": threads + 1, "apart": 2 * threads + 1}[name]
        if name != "colocated":  # a replica without CPUs of its own has one thread
            seconds = replace(seconds, teacher_answer=part.phases(1).teacher_answer)
        found = simulate(seconds, r, layout, roads["ranks"], moved, teacher_network=roads["teachers"])
        # more threads than cores: no schedule is faster than all the work on all cores
        mine = seconds.window(r) - (seconds.teacher_answer if name != "colocated" else 0.0)
        work = (threads * mine + (seconds.teacher_answer if name != "colocated" else 0.0)) / cores
        crowded = at_once > cores
        window = max(found.window_s, work) if crowded else found.window_s
        measured = part.median(name)
        results[name] = {
            "predicted_s": window, "measured_s": measured, "predicted_over_measured": window / measured,
            "threads_at_once": at_once, "cores": cores,
        }  # fmt: skip
        note = f"   ({at_once} threads at once on {cores} cores: a lower bound)" if crowded else ""
        print(f"  {name:<10} {window:.3f} s, measured {measured:.3f} s: {window / measured:.3f} of it{note}")
    return {"predicted_updates": results}


class Rounds:
    """Updates of several placements and of this process, in turns."""

    def __init__(self, config: RunConfig, threads: int):
        from raydistill.runtime.trainer import Trainer

        self.config, self.threads = config, threads
        self._bare = BareLoop(config)
        self._inline = Trainer(config, _Alone(), open_reader=normal_samples)  # type: ignore[arg-type]
        self._seconds: dict[str, list[float]] = {}
        self._phases: dict[int, list[RoleSeconds]] = {}
        self.counts: dict[str, dict[str, float]] = {}

    def run(
        self, rounds: int, placements: dict[str, tuple[RunConfig, Any]], threads: list[int], warm: int = 2
    ) -> None:
        """Each thread count in each round; the trainer in this process also with one thread."""
        import ray
        import torch

        from raydistill.runtime.role_times import timed_phases, window_phases

        r = self.config.method.critic_updates_per_generator
        turns = ray.remote(_Turns).options(num_cpus=0).remote()
        fits = [
            threading.Thread(target=train_turns, args=(name, config, teachers, turns), daemon=True)
            for name, (config, teachers) in placements.items()
        ]
        for fit in fits:
            fit.start()
        expected = {name: max(1, config.placement.workers) for name, (config, _) in placements.items()}
        while ray.get(turns.is_ready.remote()) != expected:
            self._require_alive(fits)
            time.sleep(0.5)
        self.counts["bare"] = forwards_of(self._bare)
        order: list[str] = []
        with timed_phases(self._inline) as phases:
            for number in range(rounds + warm):
                for count in sorted({1, *threads}):
                    torch.set_num_threads(count)
                    rows = self._phases.setdefault(count, [])
                    _, cpu = timed(lambda: rows.append(window_phases(self._inline, phases)))  # noqa: B023
                    self._add("inline", count, rows[-1].window(r), cpu)
                for count in threads:
                    self._add("bare", count, *timed(self._bare.update, count))
                    for name in placements:
                        turn = turns.give.remote(name, count)
                        while not ray.wait([turn], timeout=5.0)[0]:
                            self._require_alive(fits)
                        order.append(f"{name}/{count}")
                show_progress(f"updates {number + 1}/{rounds + warm}")
        ray.get(turns.end.remote())
        for fit in fits:
            fit.join(60)
        measured, counts = ray.get(turns.results.remote())
        self.counts |= counts
        for name in placements:
            mine = [int(each.partition("/")[2]) for each in order if each.startswith(f"{name}/")]
            for count, took, cpu in zip(mine, measured[name], measured[f"{name} cpu"], strict=True):
                self._add(name, count, took, cpu)
        self._warm, self._names = warm, ["bare", "inline", *placements]

    def _add(self, name: str, threads: int, seconds: float, cpu_seconds: float) -> None:
        self._seconds.setdefault(f"{name}/{threads}", []).append(seconds)
        self._seconds.setdefault(f"{name} cpu/{threads}", []).append(cpu_seconds)

    def _require_alive(self, fits: list[threading.Thread]) -> None:
        if not all(fit.is_alive() for fit in fits):
            raise SystemExit("a placement failed; its error is above")

    def median(self, name: str, threads: int = 0) -> float:
        return statistics.median(self._seconds[f"{name}/{threads or self.threads}"][self._warm :])

    def medians(self) -> dict[str, float]:
        return {name: self.median(name) for name in self._names}

    def phases(self, threads: int = 0) -> RoleSeconds:
        from raydistill.runtime.role_times import medians

        return medians(self._phases[threads or self.threads][self._warm :])

    def show(self) -> None:
        bare = self.median("bare")
        for name in self._names:
            of = self.counts.get(name, {})
            passes = ", ".join(f"{role} {count:g}" for role, count in sorted(of.items()))
            seconds = self.median(name)
            # a placement's own thread waits for others; a step of several threads computes in them too
            whole = self.threads == 1 and name in ("bare", "inline", "colocated")
            cpu = f", {self.median(f'{name} cpu'):.3f} s on a core" if whole else ""
            print(
                f"  {name:<10} {self.threads} thread(s) {seconds:.3f} s   {seconds / bare:.3f} x bare{cpu}"
                + (f"   forward passes: {passes}" if passes else "")
            )


def forwards_of(bare: BareLoop) -> dict[str, float]:
    """Forward passes of one bare update, counted by hooks in units of its batch."""
    networks = {"generator": bare.generator, "critic": bare.critic.denoiser, "teacher": bare.teacher.denoiser}
    with counting(networks, bare.config.train.batch_size) as counts:
        bare.update()
    return counts


class counting:  # noqa: N801
    """Counts samples through UNets, in batches; those of a teacher pool by the queries that it is sent."""

    def __init__(self, networks: dict[str, Any], batch: int, pool: Any = None):
        self._networks, self._batch, self._pool = networks, batch, pool
        self.counts = dict.fromkeys([*networks, *(["teacher"] if pool else [])], 0.0)

    def __enter__(self) -> dict[str, float]:
        def count(role: str, module: Any, args: Any, kwargs: Any) -> None:
            self.counts[role] += len(args[0]) / self._batch

        self._hooks = [
            network.network.register_forward_pre_hook(partial(count, role), with_kwargs=True)
            for role, network in self._networks.items()
        ]
        if self._pool is not None:
            submit = self._pool.submit

            def counted(query: Any) -> Any:
                halves = 1 if query.guidance_scale == 1 else 2
                self.counts["teacher"] += halves * len(query.x_t) / self._batch
                return submit(query)

            self._pool.submit = counted
        return self.counts

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._pool is not None:
            del self._pool.submit


def train_turns(name: str, config: RunConfig, teachers: Any, turns: Any) -> None:
    """One placement under Ray Train, working when it is its turn."""
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        turn_worker,
        train_loop_config={
            "name": name, "config": config, "teachers": teachers, "turns": turns,
        },
        scaling_config=ScalingConfig(num_workers=max(1, config.placement.workers), resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=TrainRunConfig(name=name, storage_path=tempfile.mkdtemp(prefix="raydistill_bench")),
    ).fit()  # fmt: skip


def normal_samples(purpose: str, fields: tuple[str, ...], size: int, micro: int, world: Any) -> Any:
    """Batches of the embedded teacher's shapes for a rank."""
    from raydistill.data.normal import NormalSource

    return NormalSource(
        purpose, fields, size, micro,
        latent_shape=(4, 8, 8), cond_shapes={"text": (20, 64)}, rank=world.rank, world_size=world.size,
    )  # fmt: skip


def turn_worker(settings: dict[str, Any]) -> None:
    import ray
    import torch

    from raydistill.runtime.ray_train import TrainSession
    from raydistill.runtime.trainer import Trainer

    name, config, turns = settings["name"], settings["config"], settings["turns"]
    session = TrainSession(config, None, None, settings["teachers"], "")

    trainer = session.rank(config, normal_samples)
    networks = {role: part_network(part) for role, part in trainer.parts.items()}
    if config.placement.mode == "colocated":
        assert isinstance(trainer, Trainer)
        networks["teacher"] = trainer.teacher.denoiser
    torch.set_num_threads(1)
    if trainer.goes_on():
        trainer.window()
    ray.get(turns.ready.remote(name))
    number = 0
    while turn := ray.get(turns.next_turn.remote(name, number)):
        number, threads = turn
        session.world.barrier()
        with counting(networks, config.train.batch_size, pool_client(trainer, config)) as counts:
            seconds, cpu = timed(lambda: trainer.goes_on() and trainer.window(), threads)
        ray.get(turns.count.remote(name, counts))
        session.world.barrier()
        if session.world.rank == 0:
            ray.get(turns.done.remote(name, seconds, cpu))
        session.world.barrier()


def pool_client(trainer: Any, config: RunConfig) -> Any:
    """The rank's side of a pool, if it has one."""
    return getattr(trainer, "teacher", None) if config.placement.mode != "colocated" else None


def part_network(part: Any) -> Any:
    return part.denoiser if hasattr(part, "denoiser") else part.critic.denoiser


# ---- calls


class _EchoActor:
    """A teacher replica that gives back what it is sent: the road without the work."""

    def answer(self, packed: Any, key: str, keep: bool, dtype: str) -> Any:
        return packed["x_t"].copy()


class _SleepActor:
    """A teacher replica that sleeps instead of computing."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def answer(self, packed: Any, key: str, keep: bool, dtype: str) -> Any:
        time.sleep(self._seconds)
        return packed["x_t"].copy()


class _Replicas:
    """Stands where the pool's manager stands, with replicas of this benchmark."""

    def __init__(self, handles: dict[str, Any]):
        self._handles = handles

    def handles(self) -> dict[str, Any]:
        return self._handles

    def report(self, client: str, outstanding: int) -> dict[str, Any]:
        return self._handles


def replicas(actor: Any, count: int, *args: Any) -> Any:
    """A manager of so many replicas, which are there."""
    import ray

    made = {str(n): ray.remote(actor).options(num_cpus=0).remote(*args) for n in range(count)}
    manager = ray.remote(_Replicas).options(num_cpus=0).remote(made)
    ray.get(manager.handles.remote())
    return manager


def a_query(shape: tuple[int, ...]) -> Any:
    import torch

    from raydistill.methods.method import Query
    from raydistill.models.denoiser import Cond

    return Query(network="teacher", want="x0", x_t=torch.zeros(shape), t=torch.zeros(shape[0]), cond=Cond({}))


def client_of(manager: Any) -> Any:
    from raydistill.models.diffusers_hub import random_pixel_pipeline
    from raydistill.runtime.pool import TeacherPool

    return TeacherPool(manager, random_pixel_pipeline(8, (8, 16), 1)[0].denoiser)


def calls(count: int) -> tuple[dict[str, Any], dict[str, Network]]:
    """Milliseconds of calls with 4 MiB each way; latency and bandwidth of both roads."""
    import ray

    pool = client_of(replicas(_EchoActor, 1))
    seconds: dict[str, list[float]] = {}
    for shape in (SMALL, MIB_4):
        query = a_query(shape)
        for number in range(count + 5):
            started = time.perf_counter()
            pool.submit(query).answer()
            if number >= 5:
                seconds.setdefault(f"teachers/{shape[-1]}", []).append(time.perf_counter() - started)
    turns = ray.remote(_Turns).options(num_cpus=0).remote()
    fit_ranks(rank_calls, {"turns": turns, "calls": count}, workers=2, name="calls")
    seconds |= ray.get(turns.results.remote())[0]
    took = {name: statistics.median(values) for name, values in seconds.items()}
    roads = {name: road(took, name) for name in ("teachers", "ranks")}
    results = {
        "remote_call_4mib_ms": 1000 * took[f"teachers/{MIB_4[-1]}"],
        "rank_call_4mib_ms": 1000 * took[f"ranks/{MIB_4[-1]}"],
        "roads": {name: vars(each) for name, each in roads.items()},
    }
    print(f"4 MiB each way, median of {count} calls, and the road that it and a call of 1 KiB give:")
    for name, words, key in (
        ("teachers", "to a teacher replica", "remote_call_4mib_ms"),
        ("ranks", "between two ranks", "rank_call_4mib_ms"),
    ):
        each = roads[name]
        print(
            f"  {words:<21}{results[key]:.1f} ms   {1e3 * each.latency_s:.2f} ms and "
            f"{each.bytes_per_s / 2**30:.2f} GiB/s one way"
        )
    return results, roads


def road(seconds: dict[str, float], name: str) -> Network:
    """From calls with two sizes each way; a way is half a call."""
    from raydistill.runtime.simulate import Network

    small, large = seconds[f"{name}/{SMALL[-1]}"] / 2, seconds[f"{name}/{MIB_4[-1]}"] / 2
    small_bytes, large_bytes = 4 * SMALL[-1] ** 2, 4 * MIB_4[-1] ** 2
    per_byte = max(large - small, 0.0) / (large_bytes - small_bytes)
    return Network(max(small - small_bytes * per_byte, 0.0), 1 / per_byte if per_byte else float("inf"))


def rank_calls(settings: dict[str, Any]) -> None:
    import ray
    import ray.train
    import torch

    from raydistill.runtime.lanes import Lanes

    lanes = Lanes(torch.device("cpu"))
    mine = ray.train.get_context().get_world_rank()
    for shape in (SMALL, MIB_4):
        payload = torch.zeros(shape)
        for number in range(settings["calls"] + 5):
            started = time.perf_counter()
            if mine == 0:
                lanes.send(payload, 1)
                lanes.receive(shape, 1)
            else:
                lanes.send(lanes.receive(shape, 0), 0)
            if mine == 0 and number >= 5:
                took = time.perf_counter() - started
                ray.get(settings["turns"].done.remote(f"ranks/{shape[-1]}", took))
    for _ in range(2):
        lanes.begin_window()


def fit_ranks(function: Any, settings: dict[str, Any], workers: int, name: str) -> None:
    """Run a function on ranks of Ray Train."""
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        function,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo"),
        run_config=TrainRunConfig(name=name, storage_path=tempfile.mkdtemp(prefix="raydistill_bench")),
    ).fit()


# ---- pipeline


def pipeline(windows: int, roads: dict[str, Network]) -> dict[str, Any]:
    """The schedule of roles apart with networks that sleep, against the ideal and the predicted window."""
    import ray

    from raydistill.runtime.placements import sizes
    from raydistill.runtime.plan import plan
    from raydistill.runtime.simulate import Layout, RoleSeconds, efficiency, simulate

    asleep, seconds = RoleSeconds(**SLEEP), sleeping_seconds(windows)
    shares, cases = {}, []
    print(
        f"roles apart, sleeping networks, median of {windows} windows; predicted from the phases in one process (an "
        f"update of the critic {seconds.critic_update:.4f} s where it sleeps {SLEEP['critic_update']} s) and the roads:"
    )
    for generators, critics, r in (*((1, 1, r) for r in RATIOS), *RANKS):
        manager = replicas(_SleepActor, 1, SLEEP["teacher_answer"] / generators)
        turns = ray.remote(_Turns).options(num_cpus=0).remote()
        config = bench_config(8, r, mode="disaggregated", workers=generators + critics, critic_ranks=critics)
        settings = {"config": config, "teachers": manager, "turns": turns, "windows": windows + 3}
        fit_ranks(sleeping_windows, settings, generators + critics, f"pipeline{generators}_{critics}_{r}")
        measured = statistics.median(ray.get(turns.results.remote())[0]["window"][3:])
        layout = Layout("disaggregated", generators, critics, 1)
        ideal = simulate(asleep, r, layout)
        moved = sizes(config, plan(config))
        # nothing is averaged where networks sleep
        moved = replace(moved, generator_gradient=0.0, critic_gradient=0.0)
        predicted = simulate(seconds, r, layout, roads["ranks"], moved, teacher_network=roads["teachers"])
        error = predicted.window_s / measured - 1
        if generators == critics == 1:
            shares[str(r)] = efficiency(ideal, measured)
        cases.append(
            {
                "generators": generators, "critics": critics, "r": r, "ideal_s": ideal.window_s,
                "predicted_s": predicted.window_s, "measured_s": measured, "relative_error": error,
                "efficiency": efficiency(ideal, measured),
            }
        )  # fmt: skip
        print(
            f"  {generators} + {critics} ranks, R {r:<3} {measured:.3f} s, ideal {ideal.window_s:.3f} s: "
            f"{efficiency(ideal, measured):.1%}; predicted {predicted.window_s:.3f} s: {error:+.1%}"
        )
    worst = max(abs(case["relative_error"]) for case in cases)
    print(f"  largest error of a prediction {worst:.1%}")
    measured_phases = {"pipeline_measured_role_seconds": vars(seconds)}
    return {
        "pipeline_efficiency": shares,
        "pipeline": cases,
        "pipeline_role_seconds": SLEEP,
    } | measured_phases


def fall_asleep(trainer: Any) -> None:
    """Replace the networks of whatever roles a rank holds."""
    import torch

    from raydistill.methods.method import Losses

    size = trainer.config.train.batch_size
    mine = size // trainer.world.size
    zeros = torch.zeros(mine, 4, 8, 8)

    def sleep(phase: str, samples: int) -> None:
        time.sleep(SLEEP[phase] * samples / size)

    def sample(*unused: Any, grad: bool) -> torch.Tensor:
        sleep("sample", mine)
        return zeros.clone().requires_grad_(grad)

    def backward(x: Any, leaf: Any, losses: Any, micro_batches: int, others_done: Callable[[], None]) -> None:
        others_done()
        sleep("generator_update", mine)

    def answer(phase: str, query: Any) -> torch.Tensor:
        sleep(phase, len(query.x_t))
        return torch.zeros_like(query.x_t)

    def learn(*unused: Any) -> None:
        sleep("critic_update", mine)

    nothing = Losses({"none": torch.zeros(())})
    trainer.method.generator_losses = lambda *unused: nothing
    trainer.method.critic_losses = lambda *unused: nothing
    if "generator" in trainer.parts:
        trainer.generator.sample, trainer.generator.backward = sample, backward
        trainer.generator.step = lambda *unused, **named: {}
        trainer.teacher.answer = partial(answer, "teacher_answer")  # where it lives elsewhere nobody calls it
    if "critic" in trainer.parts:
        trainer.critic.answer, trainer.critic.backward = partial(answer, "critic_answer"), learn
        trainer.critic.step = lambda **named: {}


def sleeping_seconds(windows: int) -> RoleSeconds:
    """The phases of sleeping networks in one process, with what the trainer does around them."""
    import torch

    from raydistill.runtime.role_times import measure
    from raydistill.runtime.trainer import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(bench_config(8, 5), _Alone(), open_reader=normal_samples)  # type: ignore[arg-type]
    fall_asleep(trainer)
    trainer.window()
    return measure(trainer, windows)


def sleeping_windows(settings: dict[str, Any]) -> None:
    """Windows of this rank with the method's networks replaced by sleep; everything between them is the real thing."""
    import torch

    from raydistill.runtime import ray_train

    config = settings["config"]
    session = ray_train.TrainSession(config, None, None, settings["teachers"], "")

    # replicas that sleep are nobody's teacher
    served = SimpleNamespace(transport="object_store")
    with mock.patch.object(ray_train, "require_same_teacher", return_value=served):
        trainer = session.rank(config, normal_samples)
    torch.set_num_threads(1)
    fall_asleep(trainer)
    last = time.perf_counter()
    for _ in range(settings["windows"]):
        if not trainer.goes_on():
            break
        trainer.window()
        now = time.perf_counter()
        if session.world.rank == 0:
            settings["turns"].done.remote("window", now - last)
        last = now
    session.world.barrier()


# ---- pool


def pool(queries: int) -> dict[str, Any]:
    """Queries per second of sleeping replicas."""
    each = 0.1
    rates = {}
    print(f"teacher pool, replicas that sleep {each} s, {queries} queries for each:")
    for count in REPLICAS:
        client = client_of(replicas(_SleepActor, count, each))
        query = a_query((1, 4, 8, 8))
        for pending in [client.submit(query) for _ in range(count)]:  # all processes are there
            pending.answer()
        started = time.perf_counter()
        for pending in [client.submit(query) for _ in range(queries * count)]:
            pending.answer()
        rates[count] = queries * count / (time.perf_counter() - started)
    shares = {str(count): rate * each / count for count, rate in rates.items()}
    for count, rate in rates.items():
        print(
            f"  {count} replicas {rate:6.1f} queries/s, {shares[str(count)]:.1%} of {count} times 1/{each} s"
        )
    return {"pool_efficiency": shares}


def show_progress(text: str) -> None:
    import sys

    end = "\n" if not sys.stderr.isatty() else ""
    print(f"\r{text}", end=end, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    import torch

    return {"cpus": os.cpu_count(), "processor": platform.processor(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
