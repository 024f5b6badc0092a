"""How long does a window take on so many ranks and replicas? A discrete-event simulation of the schedules.

Every rank works through its phases in the order of the code (`trainer`, `apart`), each beginning when the rank is free
and what it needs has arrived; teacher replicas serve queries first come, first served. Ranks of one role do the same at
the same time, so one of each is followed, whatever their number. The longest chain of these dependencies is the ideal
that a measured pipeline is compared with: simulate it with a network that costs nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["colocated", "teachers", "disaggregated"]
_WARM_UP = 10


def sampling_order(r: int) -> list[int]:
    """In which order a generator rank makes the samples of a window's critic updates 1 to R-1, and (0) those of its own
    next update.

    Its own go first where the teacher has few critic updates to hide behind, else the critic's first, which waits.
    """
    return list(range(r)) if r < 3 else [1, 0, *range(2, r)]


@dataclass(frozen=True)
class RoleSeconds:
    """Seconds of one device with the whole batch, or any other unit of time."""

    generator_update: float
    """The generator's update, its forward pass and its waiting for others left out."""
    sample: float
    """One batch of samples."""
    critic_answer: float
    """The critic's answers to a generator update and their backward passes."""
    critic_update: float
    """One update of the critic."""
    teacher_answer: float = 0.0
    """The teacher's answers to a generator update."""


@dataclass(frozen=True)
class Network:
    """What lies between ranks and replicas."""

    latency_s: float = 0.0
    bytes_per_s: float = float("inf")

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s

    def all_reduce_seconds(self, num_bytes: float, ranks: int) -> float:
        """A ring's (Patarasu & Yuan 2009): 2 (n - 1) steps of a share 1/n each."""
        return 2 * (ranks - 1) * self.seconds(num_bytes / ranks) if ranks > 1 else 0.0


@dataclass(frozen=True)
class Layout:
    """Who is there. Colocated ranks count as generators."""

    mode: Mode
    generators: int = 1
    critics: int = 0
    teachers: int = 0
    max_staleness: int = 0


@dataclass(frozen=True)
class Sizes:
    """Bytes that travel."""

    batch: float = 0.0
    """A batch of samples."""
    query: float = 0.0
    """A batch with its conditions, as a teacher needs it."""
    generator_gradient: float = 0.0
    critic_gradient: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """A window in the steady state."""

    window_s: float
    idle: dict[str, float]
    """Share of a window in which a device of each role waits."""


def simulate(
    seconds: RoleSeconds,
    r: int,
    layout: Layout,
    network: Network | None = None,
    sizes: Sizes | None = None,
    windows: int = 40,
) -> Simulated:
    """Follow `windows` windows and give the mean of those after the first ten."""
    run = _Run(seconds, r, layout, network or Network(), sizes or Sizes())
    ends = run.colocated(windows) if layout.mode != "disaggregated" else run.apart(windows)
    window = (ends[-1] - ends[_WARM_UP - 1]) / (windows - _WARM_UP)
    return Simulated(window, {role: max(0.0, 1 - busy / window) for role, busy in run.busy().items()})


class _Run:
    def __init__(self, seconds: RoleSeconds, r: int, layout: Layout, network: Network, sizes: Sizes):
        g, c = (
            layout.generators,
            max(1, layout.critics if layout.mode == "disaggregated" else layout.generators),
        )
        self.layout, self.r, self.network, self.sizes = layout, r, network, sizes
        self.update = seconds.generator_update / g + network.all_reduce_seconds(sizes.generator_gradient, g)
        self.sample = seconds.sample / g
        self.answer = seconds.critic_answer / c
        self.learn = seconds.critic_update / c + network.all_reduce_seconds(sizes.critic_gradient, c)
        self.teacher = seconds.teacher_answer / g
        self._replicas = [0.0] * max(1, layout.teachers)
        self.hop = network.seconds(sizes.batch / g)
        self.query_hop = network.seconds(sizes.query / g)

    def busy(self) -> dict[str, float]:
        """Seconds of work of one device of each role in a window."""
        generator = self.update + self.r * self.sample
        critic = self.answer + self.r * self.learn
        teacher = self.teacher * self.layout.generators
        if self.layout.mode == "colocated":
            return {"worker": generator + critic + self.teacher}
        teachers = {"teacher": teacher / max(1, self.layout.teachers)}
        if self.layout.mode == "teachers":
            return {"worker": generator + critic} | teachers
        return {"generator": generator, "critic": critic} | teachers

    def scored(self, sent_at: float) -> float:
        """When the last answer is back to queries that every generator rank sends at this time."""
        arrived, last = sent_at + self.query_hop, sent_at
        for _ in range(self.layout.generators):
            free = max(heapq.heappop(self._replicas), arrived) + self.teacher
            heapq.heappush(self._replicas, free)
            last = max(last, free)
        return last + self.hop

    def colocated(self, windows: int) -> Sequence[float]:
        """Ends of the windows of ranks that hold generator and critic."""
        pooled = self.layout.mode == "teachers"
        now = self.sample
        teacher_at = self.scored(now) if pooled else 0.0
        ends = []
        for _ in range(windows):
            now = max(now + self.answer, teacher_at) if pooled else now + self.teacher + self.answer
            now += self.update
            if pooled:
                now += self.sample
                teacher_at = self.scored(now)
            now += self.learn + (self.r - 1) * (self.sample + self.learn)
            ends.append(now)
            now += 0.0 if pooled else self.sample
        return ends

    def apart(self, windows: int) -> Sequence[float]:
        """Ends of the windows of the critic, which ends them."""
        generator = critic = 0.0
        generator += self.sample
        arrived = [generator + self.hop]
        teacher_at = self.scored(generator)
        ends: list[float] = []
        answered: list[float] = []
        samples: list[list[float]] = []

        def answers(update: int) -> None:
            nonlocal critic
            critic = max(critic, arrived[update]) + self.answer
            answered.append(critic)

        def generate(update: int) -> None:
            nonlocal generator, teacher_at
            generator = max(generator, answered[update] + self.hop, teacher_at) + self.update
            made = []
            for k in sampling_order(self.r):
                generator += self.sample
                if k:
                    made.append(generator + self.hop)
                else:
                    arrived.append(generator + self.hop)
                    teacher_at = self.scored(generator)
            samples.append(made)

        for update in range(windows):
            if len(answered) == update:
                answers(update)
            generate(update)
            if self.layout.max_staleness:
                answers(update + 1)
            critic += self.learn
            for there in samples[update]:
                critic = max(critic, there) + self.learn
            ends.append(critic)
        return ends


def efficiency(ideal: Simulated, measured_window_s: float) -> float:
    """The ideal pipeline's time as a share of the measured one."""
    return ideal.window_s / measured_window_s
