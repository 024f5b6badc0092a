"""How long does a window take on so many ranks and replicas? A discrete-event simulation of the schedules.

Every rank works through its phases in the order of the code (`trainer`, `apart`), each beginning when the rank is free
and what it needs has arrived; teacher replicas serve queries first come, first served. Ranks of one role do the same at
the same time, so one of each is followed, whatever their number. The longest chain of these dependencies is the ideal
that a measured pipeline is compared with: simulate it with a network that costs nothing.

Left out: that a rank is less efficient with few samples (its seconds shrink in proportion, but for the optimiser's
step), the processors' work for what they send, averaging of figures, data, snapshots, and ranks that differ.
"""

from __future__ import annotations

import heapq
import math
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
    generator_step: float = 0.0
    """Of generator_update the optimiser's step, which every rank takes whole, however few samples it has."""
    critic_step: float = 0.0
    """Of critic_update likewise."""
    teacher_for_critic: float = 0.0
    """The teacher's answers to one critic update that waits for them."""

    def window(self, r: int, *, critic_first: bool = False) -> float:
        """One device's work of a window."""
        return (
            self.generator_update
            + self.critic_answer
            + self.teacher_answer
            + (r + critic_first) * self.sample
            + r * (self.critic_update + self.teacher_for_critic)
        )


@dataclass(frozen=True)
class Network:
    """What lies between ranks and replicas; each device has a link of its own, both ways at once."""

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
    """A batch of samples, or of the critic's answers."""
    query: float = 0.0
    """A batch with its conditions, as a teacher needs it."""
    answer: float | None = None
    """A batch of the teacher's answers; none: as large as the samples."""
    answer_gradient: float = 0.0
    """A batch of gradients at the samples that come back through the critic's answers (with a GAN on its features)."""
    generator_gradient: float = 0.0
    critic_gradient: float = 0.0
    bucket: float = 64 * 2**20
    """Gradients that are averaged at once (`World.mean_`)."""


@dataclass(frozen=True)
class Simulated:
    """A window in the steady state."""

    window_s: float
    idle: dict[str, float]
    """Share of a window in which a device of each role waits, for others or the network."""


def simulate(
    seconds: RoleSeconds,
    r: int,
    layout: Layout,
    network: Network | None = None,
    sizes: Sizes | None = None,
    windows: int = 40,
    teacher_network: Network | None = None,
    critic_first: bool = False,
) -> Simulated:
    """Follow `windows` windows and give the mean of those after the first ten.

    critic_first: whether a window's critic updates come before the generator's, each on samples of its own. network:
    costs nothing if None; teacher_network: between ranks and teachers, if it is another one.
    """
    network = network or Network()
    run = _Run(seconds, r, layout, network, teacher_network or network, sizes or Sizes(), critic_first)
    ends = run.colocated(windows) if layout.mode != "disaggregated" else run.apart(windows)
    window = (ends[-1] - ends[_WARM_UP - 1]) / (windows - _WARM_UP)
    return Simulated(window, {role: max(0.0, 1 - busy / window) for role, busy in run.busy().items()})


@dataclass(frozen=True)
class _Asking:
    """The teacher's queries of all ranks of a role, a batch together."""

    ranks: int
    serve: float
    """Seconds between two answers of a replica."""
    query_hop: float
    answer_hop: float


class _Run:
    def __init__(
        self,
        seconds: RoleSeconds,
        r: int,
        layout: Layout,
        network: Network,
        teacher_network: Network,
        sizes: Sizes,
        critic_first: bool,
    ):
        g = layout.generators
        c = max(1, layout.critics) if layout.mode == "disaggregated" else g
        self.layout, self.r, self.wire = layout, r, network.latency_s
        self.sample = seconds.sample / g
        self.answer = seconds.critic_answer / c
        self.teacher = seconds.teacher_answer / g
        self.critic_first = critic_first
        self.critic_asks = seconds.teacher_for_critic > 0
        self.for_critic = seconds.teacher_for_critic / c
        self._batches = r + critic_first
        self._update = (seconds.generator_update - seconds.generator_step) / g + seconds.generator_step
        self._learn = (seconds.critic_update - seconds.critic_step) / c + seconds.critic_step
        self.update = self._update + _average_seconds(network, sizes, sizes.generator_gradient, g)
        self.learn = self._learn + _average_seconds(network, sizes, sizes.critic_gradient, c)
        # the side with fewer ranks has more of the batch on each link
        narrow = min(g, c)
        self.hop = network.seconds(sizes.batch / narrow)
        self._carry = sizes.batch / narrow / network.bytes_per_s
        self._lane_free = 0.0
        self.through_answers = (
            self.wire + network.seconds(sizes.answer_gradient / narrow) if sizes.answer_gradient else 0.0
        )
        answer = sizes.batch if sizes.answer is None else sizes.answer

        def asking(ranks: int, seconds: float) -> _Asking:
            # a replica receives, computes and sends at once: the slowest of the three sets its pace
            serve = max(seconds, max(sizes.query, answer) / ranks / teacher_network.bytes_per_s)
            hops = (teacher_network.seconds(size / ranks) for size in (sizes.query, answer))
            return _Asking(ranks, serve, *hops)

        self._generators_ask = asking(g, self.teacher)
        self._critics_ask = asking(c, self.for_critic)
        self._replicas = [(0.0, max(1, layout.teachers))]
        """(free from, how many)"""

    def busy(self) -> dict[str, float]:
        """Seconds of work of one device of each role in a window."""
        generator = self._update + self._batches * self.sample
        critic = self.answer + self.r * self._learn
        critics = self.layout.critics or self.layout.generators
        teacher = self.teacher * self.layout.generators + self.r * self.for_critic * critics
        if self.layout.mode == "colocated":
            return {"worker": generator + critic + self.teacher + self.r * self.for_critic}
        teachers = {"teacher": teacher / max(1, self.layout.teachers)}
        if self.layout.mode == "teachers":
            return {"worker": generator + critic} | teachers
        return {"generator": generator, "critic": critic} | teachers

    def scored(self, sent_at: float) -> float:
        """When the last answer is back to queries that every generator rank sends at this time."""
        return self._answered(sent_at, self._generators_ask)

    def _answered(self, sent_at: float, asking: _Asking) -> float:
        arrived, left, serve = sent_at + asking.query_hop, asking.ranks, asking.serve
        last = arrived
        while left:
            free, count = heapq.heappop(self._replicas)
            while self._replicas and self._replicas[0][0] <= max(free, arrived):
                count += heapq.heappop(self._replicas)[1]
            start = max(free, arrived)
            # where all replicas are alike, whole rounds are one step
            rounds = 1 if self._replicas else max(1, left // count)
            served = min(left, rounds * count)
            last = max(last, start + rounds * serve)
            heapq.heappush(self._replicas, (start + rounds * serve, min(count, served)))
            if served < count:
                heapq.heappush(self._replicas, (start, count - served))
            left -= served
        return last + asking.answer_hop

    def sent(self, at: float) -> float:
        """When samples that leave at this time are at the critic; a link carries one batch after the other."""
        self._lane_free = max(self._lane_free, at) + self._carry
        return self._lane_free + self.wire

    def colocated(self, windows: int) -> Sequence[float]:
        """Ends of the windows of ranks that hold generator and critic."""
        if self.critic_first:
            return self._colocated_critic_first(windows)
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

    def _colocated_critic_first(self, windows: int) -> Sequence[float]:
        pooled = self.layout.mode == "teachers"
        now, ends = 0.0, []
        for _ in range(windows):
            now += self.sample
            teacher_at = self.scored(now) if pooled else 0.0
            for _ in range(self.r):
                now = self._learnt(now + self.sample, pooled=pooled)
            now = max(now + self.answer, teacher_at) if pooled else now + self.teacher + self.answer
            now += self.update
            ends.append(now)
        return ends

    def _learnt(self, now: float, *, pooled: bool) -> float:
        """When a critic update that begins now is over."""
        if pooled and self.critic_asks:
            return self._answered(now, self._critics_ask) + self.learn
        return now + self.for_critic + self.learn

    def _apart_critic_first(self, windows: int) -> Sequence[float]:
        generator, ends = 0.0, []
        for _ in range(windows):
            critic = generator + self.wire
            generator += self.sample
            teacher_at = self.scored(generator)
            for _ in range(self.r):
                generator += self.sample
                critic = self._learnt(max(critic, self.sent(generator)), pooled=True)
            critic = max(critic, self.sent(generator)) + self.answer
            generator = max(generator, critic + self.hop, teacher_at) + self.through_answers + self.update
            ends.append(generator)
        return ends

    def apart(self, windows: int) -> Sequence[float]:
        """Ends of the windows of the critic, which ends them; where it goes first, of the generator."""
        if self.critic_first:
            return self._apart_critic_first(windows)
        critic = 0.0
        generator = self.sample
        teacher_at = self.scored(generator)
        arrived = [self.sent(generator)]  # samples of each generator update, at the critic
        told = [0.0]  # the critic knows that this update takes place
        answered: list[float] = []
        released: list[float] = []  # the generator owes nothing more to the critic's graphs
        samples: list[list[float]] = []
        ends: list[float] = []

        def answers(update: int) -> None:
            nonlocal critic
            critic = max(critic, arrived[update], told[update]) + self.answer
            answered.append(critic)

        def generate(update: int) -> None:
            nonlocal critic, generator, teacher_at
            generator = max(generator, answered[update] + self.hop, teacher_at) + self.through_answers
            released.append(generator + self.wire)
            generator += self.update
            made = []
            for k in sampling_order(self.r):
                generator += self.sample
                if k:
                    made.append(self.sent(generator))
                else:
                    teacher_at = self.scored(generator)
                    arrived.append(self.sent(generator))
            samples.append(made)
            critic = max(critic, released[update])  # it serves until it is released

        def tell(update: int, figures_of: int) -> None:
            """The generator takes the figures of a window that is over, and begins this one."""
            nonlocal generator
            if figures_of >= 0:
                generator = max(generator, ends[figures_of] + self.wire)
            told.append(generator + self.wire)

        for update in range(windows):
            if len(answered) == update:
                answers(update)
                generate(update)
            if self.layout.max_staleness:
                tell(update + 1, figures_of=update - 1)
                answers(update + 1)
                generate(update + 1)
            critic += self.learn
            for there in samples[update]:
                critic = max(critic, there) + self.learn
            ends.append(critic)
            if not self.layout.max_staleness:
                tell(update + 1, figures_of=update)
        return ends


def _average_seconds(network: Network, sizes: Sizes, gradient: float, ranks: int) -> float:
    """Of one role's gradients, bucket by bucket after the backward pass."""
    if not gradient:
        return 0.0
    buckets = math.ceil(gradient / sizes.bucket)
    return buckets * network.all_reduce_seconds(gradient / buckets, ranks)


def efficiency(ideal: Simulated, measured_window_s: float) -> float:
    """The ideal pipeline's time as a share of the measured one."""
    return ideal.window_s / measured_window_s
