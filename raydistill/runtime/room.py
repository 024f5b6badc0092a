"""How many workers there are, and where services go so that they all fit: looked at before any of them is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ray

from raydistill.errors import PlacementError
from raydistill.runtime.fit import require_fit
from raydistill.runtime.plan import plan
from raydistill.runtime.settings import RunConfig, require_divisible, require_shardable


def with_workers(config: RunConfig) -> RunConfig:
    """The settings with `placement.workers` and `placement.critic_ranks` chosen for the cluster at hand.

    Raises PlacementError if roles on ranks of their own can't share the batch, or one worker is to shard networks.
    """
    placement = config.placement
    if not placement.workers:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        placement = replace(placement, workers=choose_workers(nodes, config))
    if placement.mode == "disaggregated" and not placement.critic_ranks:
        chosen = plan(replace(config, placement=placement)).ranks["critic"]
        placement = replace(placement, critic_ranks=chosen)
    config = replace(config, placement=placement)
    if placement.mode == "disaggregated":
        require_divisible(config)
    require_shardable(config)
    return config


def choose_workers(nodes: Sequence[Mapping[str, float]], config: RunConfig) -> int:
    """What `placement.workers=0` stands for on these nodes."""
    if config.placement.mode == "disaggregated":
        return 2
    if config.placement.gpus_per_worker:
        return 1
    two = replace(config, placement=replace(config.placement, workers=2))
    divisible = config.train.batch_size % (2 * (config.train.micro_batch_size or 1)) == 0
    return 2 if divisible and has_room(nodes, two, max(1, config.placement.cpus_per_worker)) else 1


def worker_cpus(config: RunConfig) -> int:
    """CPUs of one training worker: as set, or the most that leave all of them a place beside the services."""
    if config.placement.cpus_per_worker:
        return config.placement.cpus_per_worker
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=1.0))
    return next((share for share in range(most, 1, -1) if has_room(nodes, config, share)), 1)


def has_room(nodes: Sequence[Mapping[str, float]], config: RunConfig, cpus: int, runs: int = 1) -> bool:
    """Whether `check_room` refuses nothing."""
    try:
        check_room(nodes, config, cpus, runs)
    except PlacementError:
        return False
    return True


@dataclass(frozen=True)
class Room:
    """The nodes for what is started before the workers; Ray, left alone, might take the workers' places."""

    evaluators: tuple[str, ...]
    """Of one each; empty: any."""
    teachers: tuple[str, ...]
    """Of one replica each; empty: any."""


def find_room(config: RunConfig) -> Room:
    """Where workers, teachers and evaluator fit on the cluster together, before any of them is started.

    Raises PlacementError if they don't: Ray itself would wait for ever, or processes be killed for their memory.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    require_fit(config, [node["Resources"].get("memory", float("inf")) for node in nodes])
    taken = check_room([node["Resources"] for node in nodes], config, worker_cpus(config))
    ids = {name: tuple(nodes[n]["NodeID"] for n in where) for name, where in taken.items()}
    return Room(ids["evaluator"], ids["teachers"])


def check_room(
    nodes: Sequence[Mapping[str, float]], config: RunConfig, cpus: int, runs: int = 1
) -> dict[str, tuple[int, ...]]:
    """`find_room` for these nodes' resources and CPUs of a worker: numbers of the nodes of evaluator and teachers.

    Empty for a service that takes neither CPU nor GPU. runs: how many such runs there are to be at a time; a teacher
    service they share.
    """
    placement = config.placement
    worker = {"CPU": float(cpus), "GPU": float(placement.gpus_per_worker)}
    teachers = 0 if placement.mode == "colocated" else placement.teacher_replicas
    teachers *= 1 if placement.teacher_service else runs
    workers = placement.workers * runs
    evaluators = runs * config.evaluator.workers * config.evaluator.enabled
    services = [
        (
            "evaluator", evaluators, f"evaluator.workers={evaluators} x " if evaluators > runs else "",
            {"GPU": ("evaluator_gpus", placement.evaluator_gpus)},
        ),
        (
            "teachers", teachers, f"placement.teacher_replicas={teachers} x ",
            {
                "CPU": ("cpus_per_teacher", placement.cpus_per_teacher),
                "GPU": ("gpus_per_teacher", placement.gpus_per_teacher),
            },
        ),
    ]  # fmt: skip
    free = [_Free.of(node) for node in nodes]
    there = {
        kind: f"the nodes have {', '.join(f'{node.get(kind, 0.0):g}' for node in nodes)} {kind}s"
        for kind in worker
    }
    taken: dict[str, tuple[int, ...]] = {}
    beside = dict.fromkeys(worker, "")
    for name, count, times, takes in services:
        amounts = {kind: amount for kind, (_, amount) in takes.items() if amount}
        named = {kind: f"{times}placement.{takes[kind][0]}={amount:g}" for kind, amount in amounts.items()}
        where: list[int] = []
        for _ in range(count if amounts else 0):
            fitting = [n for n, node in enumerate(free) if node.places(amounts)]
            if not fitting:
                # the kind that is short, or both where only a node with enough of both is missing
                short = [kind for kind in amounts if not any(n.places({kind: amounts[kind]}) for n in free)]
                kinds = short[:1] or list(amounts)
                raise PlacementError(
                    f"{' with '.join(named[kind] for kind in kinds)} does not fit"
                    f"{''.join(beside[kind] for kind in kinds)}: {'; '.join(there[kind] for kind in kinds)}; "
                    "lower one of them or add nodes"
                )
            best = min(fitting, key=lambda n: free[n].cost(worker, amounts))
            free[best] = free[best].without(amounts)
            where.append(best)
        taken[name] = tuple(where)
        for kind in amounts if count else ():
            beside[kind] += f" beside {named[kind]}"
    if sum(node.places(worker) for node in free) < workers:
        amounts = {kind: amount for kind, amount in worker.items() if amount}
        short = [k for k in amounts if sum(n.places({k: amounts[k]}) for n in free) < workers]
        kinds = short[:1] or list(amounts)
        each = " with ".join(f"placement.{kind.lower()}s_per_worker={worker[kind]:g}" for kind in kinds)
        raise PlacementError(
            f"placement.workers={workers} x {each}{''.join(beside[kind] for kind in kinds)} does not fit: "
            f"{'; '.join(there[kind] for kind in kinds)}; lower one of them or add nodes"
        )
    return taken


@dataclass(frozen=True)
class _Free:
    """What is left of a node, in ten-thousandths as Ray counts it: sums of floats fall short."""

    cpus: int
    gpus: tuple[int, ...]
    """Of each GPU: a share is of one of them, whole ones are untouched ones."""

    @classmethod
    def of(cls, node: Mapping[str, float]) -> _Free:
        return cls(_parts(node.get("CPU", 0.0)), (_parts(1.0),) * int(node.get("GPU", 0.0)))

    def places(self, amounts: Mapping[str, float]) -> int:
        """How many times the amounts fit."""
        found = []
        if cpus := _parts(amounts.get("CPU", 0.0)):
            found.append(self.cpus // cpus)
        if gpus := _parts(amounts.get("GPU", 0.0)):
            whole = gpus // _parts(1.0)
            untouched = self.gpus.count(_parts(1.0))
            found.append(untouched // whole if whole else sum(left // gpus for left in self.gpus))
        return min(found)

    def without(self, amounts: Mapping[str, float]) -> _Free:
        """One time less."""
        gpus = _parts(amounts.get("GPU", 0.0))
        left = sorted(self.gpus)  # the fullest that has room, as Ray does
        whole = gpus // _parts(1.0)
        for _ in range(whole):
            left.remove(_parts(1.0))
        if gpus and not whole:
            taken = next(n for n, amount in enumerate(left) if amount >= gpus)
            left[taken] -= gpus
        else:
            left += [0] * whole
        return _Free(self.cpus - _parts(amounts.get("CPU", 0.0)), tuple(left))

    def cost(self, worker: Mapping[str, float], amounts: Mapping[str, float]) -> tuple[int, ...]:
        """Workers' places lost by taking the amounts from this node, then what is left of it."""
        left = self.without(amounts)
        return self.places(worker) - left.places(worker), left.cpus, sum(left.gpus)


def _parts(amount: float) -> int:
    return round(amount * 10_000)
