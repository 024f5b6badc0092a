"""Which rank holds which role, and which samples travel between them: pure functions, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raydistill.errors import PlacementError
from raydistill.runtime.simulate import Layout, RoleSeconds, simulate

Role = Literal["generator", "critic"]


@dataclass(frozen=True)
class Partition:
    """The ranks of each role, ascending; rank 0 is a generator rank."""

    generator: tuple[int, ...]
    critic: tuple[int, ...]

    def role(self, rank: int) -> Role:
        return "generator" if rank in self.generator else "critic"

    def ranks(self, role: Role) -> tuple[int, ...]:
        return self.generator if role == "generator" else self.critic


@dataclass(frozen=True)
class Transfer:
    """Samples [start, stop) of the global batch, which both ranks hold."""

    generator: int
    critic: int
    start: int
    stop: int


def partition(nodes: Sequence[int], num_critic: int) -> Partition:
    """Deal the critic's ranks evenly over the ranks in the order of their nodes, so that pairs share nodes.

    nodes: the node of each rank. Raises PlacementError if a role would be without a rank.
    """
    world = len(nodes)
    if not 0 < num_critic < world:
        raise PlacementError(
            f"placement.critic_ranks={num_critic} of {world} ranks leaves a role without one: disaggregated needs at "
            "least two workers (placement.workers), one for each role"
        )
    order = sorted(range(world), key=lambda rank: (nodes[rank] != nodes[0], nodes[rank], rank))
    dealt = [n for n in range(world) if (n + 1) * num_critic // world > n * num_critic // world]
    critic = {order[n] for n in dealt}
    # rank 0 logs and writes snapshots of the generator; it comes first, and the first one dealt is never n = 0
    return Partition(
        tuple(rank for rank in range(world) if rank not in critic),
        tuple(rank for rank in range(world) if rank in critic),
    )


def best_num_critic(
    world: int,
    batch_size: int,
    micro_batch_size: int | None,
    seconds: RoleSeconds,
    r: int,
    teachers: int = 1,
    critic_first: bool = False,
) -> int:
    """How many of `world` ranks should hold the critic so that a window is shortest, the fewest of equals.

    teachers: replicas that score beside them. critic_first: as in `simulate`. Raises PlacementError if no division of
    the ranks divides the batch.
    """
    micro = micro_batch_size or 1
    possible = [
        critics
        for critics in range(1, world)
        if batch_size % (critics * micro) == 0 and batch_size % ((world - critics) * micro) == 0
    ]
    if not possible:
        raise PlacementError(
            f"train.batch_size={batch_size} can't be shared by any number of generator and critic ranks that add up to "
            f"placement.workers={world} (micro-batches of {micro}): change one of them"
        )

    def window_s(critics: int) -> float:
        layout = Layout("disaggregated", generators=world - critics, critics=critics, teachers=teachers)
        return simulate(seconds, r, layout, critic_first=critic_first).window_s

    windows = {critics: window_s(critics) for critics in possible}
    shortest = min(windows.values())
    return min(possible, key=lambda critics: (round(windows[critics] / shortest, 6), critics))


def transfers(ranks: Partition, batch_size: int) -> list[Transfer]:
    """Which samples every generator rank shares with every critic rank, by generator rank and position."""
    found = []
    for g, generator in enumerate(ranks.generator):
        low, high = _slice(g, len(ranks.generator), batch_size)
        for c, critic in enumerate(ranks.critic):
            start, stop = _slice(c, len(ranks.critic), batch_size)
            start, stop = max(low, start), min(high, stop)
            if start < stop:
                found.append(Transfer(generator, critic, start, stop))
    return found


def _slice(number: int, of: int, batch_size: int) -> tuple[int, int]:
    each = batch_size // of
    return number * each, (number + 1) * each
