"""What does orchestration cost? The same update bare, under Ray Train, with a teacher pool and with every role apart.

    python jobs/bench_orchestration.py --out orchestration.json

Prints, with medians of interleaved rounds:

    updates      one DMD2 update of the embedded networks in a bare Python loop, colocated under Ray Train, with the
                 teacher in a pool, and with generator and critic on ranks of their own; forward passes by role
    calls        a call with 4 MiB each way to a teacher replica, and between two ranks
    pipeline     the schedule with roles apart at R = 1, 2, 5, 10, its networks replaced by processes that sleep (two
                 cores can't run three roles at once), against the longest chain of dependencies
    pool         queries per second of 1 to 8 sleeping replicas, against so many times one replica's
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydistill.runtime.settings import RunConfig

RATIOS = (1, 2, 5, 10)
REPLICAS = (1, 2, 4, 8)
MIB_4 = (1, 1, 1024, 1024)
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

    connect(num_cpus=16)
    results: dict[str, Any] = {"machine": machine()}
    try:
        if "updates" in arguments.only:
            results |= updates(arguments.rounds, arguments.batch, arguments.ratio)
        if "calls" in arguments.only:
            results |= calls(arguments.calls)
        if "pipeline" in arguments.only:
            results |= pipeline(arguments.windows)
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
        from raydistill.runtime import build

        self.config, self.draws = config, Draws(config.seed)
        pipeline = build.build_pipeline(config)
        self.method = build.build_method(config, pipeline)
        networks = [
            pipeline.copy_denoiser("fp32").to(memory_format=torch.channels_last).train() for _ in range(2)
        ]
        self.generator, self.critic = networks
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
        queries = method.queries(leaf, self.cond, draws)
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
            method.critic_losses(self.critic, samples, self.cond, None, draws).total().backward()
            torch.nn.utils.clip_grad_norm_(self.critic.parameters(), 10.0)
            self.adam[1].step()
            self.adam[1].zero_grad()
        self.step += 1


class _Turns:
    """Whose turn it is: one part of the benchmark works, all others wait."""

    def __init__(self) -> None:
        self._turn = ""
        self._ready: dict[str, int] = {}
        self._seconds: dict[str, list[float]] = {}
        self._counts: dict[str, dict[str, float]] = {}

    def ready(self, name: str) -> None:
        self._ready[name] = self._ready.get(name, 0) + 1

    def is_ready(self) -> dict[str, int]:
        return dict(self._ready)

    def give(self, name: str) -> None:
        self._turn = name

    def turn(self) -> str:
        return self._turn

    def count(self, name: str, counts: dict[str, float]) -> None:
        self._counts[name] = self._counts.get(name, {}) | counts

    def done(self, name: str, seconds: float) -> None:
        self._seconds.setdefault(name, []).append(seconds)
        self._turn = ""

    def results(self) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
        return self._seconds, self._counts


def updates(rounds: int, batch: int, ratio: int) -> dict[str, Any]:
    """Interleaved updates of the four placements."""
    import ray
    import torch

    from raydistill.runtime import teachers as pools

    threads = os.cpu_count() or 1
    turns = ray.remote(_Turns).options(num_cpus=0).remote()
    base = bench_config(batch, ratio)
    manager = pools.start_pool(bench_config(batch, ratio, mode="teachers"))
    placements = {
        "colocated": (base, None),
        "teachers": (bench_config(batch, ratio, mode="teachers", workers=1), manager),
        "apart": (bench_config(batch, ratio, mode="disaggregated", workers=2, critic_ranks=1), manager),
    }
    fits = [
        threading.Thread(target=train_turns, args=(name, config, teachers, turns, threads), daemon=True)
        for name, (config, teachers) in placements.items()
    ]
    torch.set_num_threads(threads)
    bare = BareLoop(base)
    for fit in fits:
        fit.start()
    expected = {"colocated": 1, "teachers": 1, "apart": 2}
    while ray.get(turns.is_ready.remote()) != expected:
        if not all(fit.is_alive() for fit in fits):
            raise SystemExit("a placement failed to start; its error is above")
        time.sleep(0.5)
    counted = forwards_of(bare)
    seconds: list[float] = []
    names = ["bare", *placements]
    for number in range(rounds + 2):  # two to warm up
        for name in names:
            if name == "bare":
                started = time.perf_counter()
                bare.update()
                seconds.append(time.perf_counter() - started)
                continue
            ray.get(turns.give.remote(name))
            while ray.get(turns.turn.remote()) == name:
                if not all(fit.is_alive() for fit in fits):
                    raise SystemExit("a placement failed; its error is above")
                time.sleep(0.01)
        show_progress(f"updates {number + 1}/{rounds + 2}")
    ray.get(turns.give.remote("end"))
    for fit in fits:
        fit.join(60)
    measured, counts = ray.get(turns.results.remote())
    measured["bare"], counts["bare"] = seconds, counted
    medians = {name: statistics.median(measured[name][2:]) for name in names}
    print(
        f"one update, batch {batch}, R {ratio}, median of {rounds} interleaved rounds (a pool's passes not counted):"
    )
    for name in names:
        passes = ", ".join(f"{role} {count:g}" for role, count in sorted(counts[name].items()))
        ratio_of = medians[name] / medians["bare"]
        print(f"  {name:<10} {medians[name]:.3f} s   {ratio_of:.2f} x bare   forward passes: {passes}")
    return {
        "update_s": medians,
        "colocated_over_bare": medians["colocated"] / medians["bare"],
        "teachers_over_bare": medians["teachers"] / medians["bare"],
        "apart_over_bare": medians["apart"] / medians["bare"],
        "forward_passes": counts,
    }


def forwards_of(bare: BareLoop) -> dict[str, float]:
    """Forward passes of one bare update, counted by hooks in units of its batch."""
    networks = {"generator": bare.generator, "critic": bare.critic, "teacher": bare.teacher.denoiser}
    with counting(networks, bare.config.train.batch_size) as counts:
        bare.update()
    return counts


class counting:  # noqa: N801
    """Counts samples through UNets, in batches."""

    def __init__(self, networks: dict[str, Any], batch: int):
        self._networks, self._batch = networks, batch
        self.counts = dict.fromkeys(networks, 0.0)

    def __enter__(self) -> dict[str, float]:
        def count(role: str, module: Any, args: Any, kwargs: Any) -> None:
            self.counts[role] += len(args[0]) / self._batch

        self._hooks = [
            network.unet.register_forward_pre_hook(partial(count, role), with_kwargs=True)
            for role, network in self._networks.items()
        ]
        return self.counts

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()


def train_turns(name: str, config: RunConfig, teachers: Any, turns: Any, threads: int) -> None:
    """One placement under Ray Train, working when it is its turn."""
    from ray.train import RunConfig as TrainRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    TorchTrainer(
        turn_worker,
        train_loop_config={
            "name": name, "config": config, "teachers": teachers, "turns": turns,
            "threads": max(1, threads // max(1, config.placement.workers)),
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

    torch.set_num_threads(settings["threads"])
    name, config, turns = settings["name"], settings["config"], settings["turns"]
    session = TrainSession(config, None, None, settings["teachers"], "")

    trainer = session.rank(config, normal_samples)
    networks = {role: part_network(part) for role, part in trainer.parts.items()}
    if config.placement.mode == "colocated":
        networks["teacher"] = trainer.teacher.denoiser
    if trainer.goes_on():
        trainer.window()
    ray.get(turns.ready.remote(name))
    while True:
        turn = ray.get(turns.turn.remote())
        if turn == "end":
            return
        if turn != name:
            time.sleep(0.02)
            continue
        with counting(networks, config.train.batch_size) as counts:
            started = time.perf_counter()
            if trainer.goes_on():
                trainer.window()
            seconds = time.perf_counter() - started
        ray.get(turns.count.remote(name, counts))
        session.world.barrier()
        if session.world.rank == 0:
            ray.get(turns.done.remote(name, seconds))
        session.world.barrier()


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


def calls(count: int) -> dict[str, Any]:
    """Milliseconds of calls with 4 MiB each way."""
    import ray

    pool = client_of(replicas(_EchoActor, 1))
    query = a_query(MIB_4)
    remote = []
    for number in range(count + 5):
        started = time.perf_counter()
        pool.submit(query).answer()
        if number >= 5:
            remote.append(1000 * (time.perf_counter() - started))
    turns = ray.remote(_Turns).options(num_cpus=0).remote()
    fit_ranks(rank_calls, {"turns": turns, "calls": count}, workers=2, name="calls")
    ranks = [1000 * seconds for seconds in ray.get(turns.results.remote())[0]["rank"]]
    results = {
        "remote_call_4mib_ms": statistics.median(remote),
        "rank_call_4mib_ms": statistics.median(ranks),
    }
    print(f"4 MiB each way, median of {count} calls:")
    print(f"  to a teacher replica {results['remote_call_4mib_ms']:.1f} ms")
    print(f"  between two ranks    {results['rank_call_4mib_ms']:.1f} ms")
    return results


def rank_calls(settings: dict[str, Any]) -> None:
    import ray
    import ray.train
    import torch

    from raydistill.runtime.lanes import Lanes

    lanes = Lanes(torch.device("cpu"))
    mine = ray.train.get_context().get_world_rank()
    payload = torch.zeros(MIB_4)
    for number in range(settings["calls"] + 5):
        started = time.perf_counter()
        if mine == 0:
            lanes.send(payload, 1)
            lanes.receive(MIB_4, 1)
        else:
            lanes.send(lanes.receive(MIB_4, 0), 0)
        if mine == 0 and number >= 5:
            ray.get(settings["turns"].done.remote("rank", time.perf_counter() - started))
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


def pipeline(windows: int) -> dict[str, Any]:
    """The schedule of roles apart with networks that sleep, against the ideal."""
    import ray

    from raydistill.runtime.simulate import Layout, RoleSeconds, efficiency, simulate

    seconds = RoleSeconds(**SLEEP)
    shares = {}
    print(f"roles apart, sleeping networks, median of {windows} windows:")
    for r in RATIOS:
        manager = replicas(_SleepActor, 1, SLEEP["teacher_answer"])
        turns = ray.remote(_Turns).options(num_cpus=0).remote()
        config = bench_config(8, r, mode="disaggregated", workers=2, critic_ranks=1)
        settings = {"config": config, "teachers": manager, "turns": turns, "windows": windows + 3}
        fit_ranks(sleeping_windows, settings, workers=2, name=f"pipeline{r}")
        measured = statistics.median(ray.get(turns.results.remote())[0]["window"][3:])
        ideal = simulate(seconds, r, Layout("disaggregated", 1, 1, 1))
        shares[str(r)] = efficiency(ideal, measured)
        print(f"  R {r:<3} {measured:.3f} s, ideal {ideal.window_s:.3f} s: {shares[str(r)]:.1%}")
    return {"pipeline_efficiency": shares, "pipeline_role_seconds": SLEEP}


def sleeping_windows(settings: dict[str, Any]) -> None:
    """Windows of this rank with the method's networks replaced by sleep; everything between them is the real thing."""
    import torch

    from raydistill.methods.method import Losses
    from raydistill.runtime import ray_train

    ray_train.require_same_teacher = lambda *unused: None
    config = settings["config"]
    session = ray_train.TrainSession(config, None, None, settings["teachers"], "")

    trainer = session.rank(config, normal_samples)
    zeros = torch.zeros(8, 4, 8, 8)

    def sample(*unused: Any, grad: bool) -> torch.Tensor:
        time.sleep(SLEEP["sample"])
        return zeros.clone().requires_grad_(grad)

    def backward(x: Any, leaf: Any, losses: Any, micro_batches: int, others_done: Callable[[], None]) -> None:
        others_done()
        time.sleep(SLEEP["generator_update"])

    def answer(query: Any) -> torch.Tensor:
        time.sleep(SLEEP["critic_answer"])
        return torch.zeros_like(query.x_t)

    def learn(*unused: Any) -> None:
        time.sleep(SLEEP["critic_update"])

    nothing = Losses({"none": torch.zeros(())})
    trainer.method.generator_losses = lambda *unused: nothing
    trainer.method.critic_losses = lambda *unused: nothing
    if "generator" in trainer.parts:
        trainer.generator.sample, trainer.generator.backward = sample, backward
        trainer.generator.step = lambda *unused, **named: {}
    else:
        trainer.critic.answer, trainer.critic.backward = answer, learn
        trainer.critic.step = lambda **named: {}
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
