"""Which placement suits a run? Bytes, transfers, time and waiting of each on the same number of devices.

Times are forward equivalents of the plan, so the comparison needs no measurement, or seconds where role times were
measured (`raydistill.runtime.role_times`). The schedule behind them is simulated (`raydistill.runtime.simulate`); its
network costs nothing unless one is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from raydistill.errors import ConfigError, PlacementError
from raydistill.runtime.build import method_class
from raydistill.runtime.plan import GIB, ROLES_ON, Plan, RoleBytes, bytes_together, share_of
from raydistill.runtime.role_times import RoleTimes
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.simulate import Layout, Mode, Network, RoleSeconds, Sizes, simulate

MIB = 2**20
MODES: tuple[Mode, ...] = ("colocated", "teachers", "disaggregated")
LEFT_OUT = (
    "left out: a rank's lower efficiency with few samples (times shrink in proportion to them, but for the optimiser's "
    "step), packing, data, snapshots, figures, text encoders and the autoencoder"
)


@dataclass(frozen=True)
class PlacementPlan:
    """One placement on so many devices."""

    layout: Layout
    device_bytes: dict[str, int]
    """Of one device of each kind."""
    transfer_bytes: float
    """Between devices in one window, gradients averaged included."""
    window: float
    """Forward equivalents of the whole batch, one after the other, or seconds."""
    idle: dict[str, float]
    """Share of a window in which a device of each kind waits."""

    @property
    def devices(self) -> str:
        """In words."""
        layout = self.layout
        kinds = {
            "colocated": [(layout.generators, "worker")],
            "teachers": [(layout.generators, "worker"), (layout.teachers, "teacher")],
            "disaggregated": [
                (layout.generators, "generator"), (layout.critics, "critic"), (layout.teachers, "teacher"),
            ],
        }[layout.mode]  # fmt: skip
        return ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in kinds)

    @property
    def settings(self) -> str:
        """That choose it."""
        layout = self.layout
        values = {"mode": layout.mode, "workers": layout.generators + layout.critics}
        if layout.critics:
            values["critic_ranks"] = layout.critics
        if layout.teachers:
            values["teacher_replicas"] = layout.teachers
        return " ".join(f"placement.{name}={value}" for name, value in values.items())


def network(latency_us: float | None, gbit_per_s: float | None, times: RoleTimes | None) -> Network | None:
    """The network of two options of the command line, None if neither is given.

    Raises ConfigError where times are forward equivalents, and for values that no network has.
    """
    if latency_us is None and gbit_per_s is None:
        return None
    if times is None:
        raise ConfigError(
            "--latency-us and --gbit-per-s are in seconds and the plan in forward equivalents: give --role-times too "
            "(python jobs/bench_step.py writes them)"
        )
    if latency_us is not None and not 0 <= latency_us < math.inf:
        raise ConfigError(f"--latency-us {latency_us:g} must be at least 0 and finite")
    if gbit_per_s is not None and not gbit_per_s > 0:
        raise ConfigError(f"--gbit-per-s {gbit_per_s:g} must be positive")
    return Network((latency_us or 0.0) / 1e6, (gbit_per_s or math.inf) * 1e9 / 8)


def compare(
    config: RunConfig,
    plan: Plan,
    devices: int,
    teachers: int,
    times: RoleTimes | None = None,
    net: Network | None = None,
) -> list[PlacementPlan]:
    """The placements that `devices` allow, `teachers` of them for replicas where there are any.

    times: seconds instead of forward equivalents; net: costs nothing if None.
    """
    size, micro = config.train.batch_size, config.train.micro_batch_size or 1
    least = 2 if plan.sharded else 1  # ranks that share networks are several, and hold both roles
    layouts = []
    if devices >= least and size % (devices * micro) == 0:
        layouts.append(Layout("colocated", devices))
    ranks = devices - teachers
    if ranks >= least and size % (ranks * micro) == 0:
        layouts.append(Layout("teachers", ranks, 0, teachers))
    found = [_placed(config, plan, layout, times, net) for layout in layouts]
    layouts_apart = () if plan.sharded else _apart(config, ranks, teachers)
    apart = [_placed(config, plan, layout, times, net) for layout in layouts_apart]
    # rounded: of equal times the fewest critic ranks
    shortest = min((each.window for each in apart), default=0.0)
    return found + sorted(apart, key=lambda each: round(each.window / shortest, 6))[:1]


def _apart(config: RunConfig, ranks: int, teachers: int) -> Iterator[Layout]:
    """Every division of the ranks into generators and critics that both divide the batch."""
    size, micro = config.train.batch_size, config.train.micro_batch_size or 1
    for critics in range(1, ranks):
        generators = ranks - critics
        if size % (critics * micro) == 0 and size % (generators * micro) == 0:
            yield Layout("disaggregated", generators, critics, teachers, config.placement.max_staleness)


def _placed(
    config: RunConfig, plan: Plan, layout: Layout, times: RoleTimes | None, net: Network | None
) -> PlacementPlan:
    r = config.method.critic_updates_per_generator
    roles = plan.bytes_by_role
    g, c = layout.generators, layout.critics or layout.generators
    ranks = {"generator": g, "critic": c}

    def role_bytes(role: str) -> RoleBytes:
        of = roles[role]
        if role == "teacher":
            return of
        # the plan's activations are those of its own number of ranks
        share = 1.0 if config.train.micro_batch_size else plan.ranks[role] / ranks[role]
        dealt = plan.sharded.get(role, 0.0)
        of = of.shared(share_of(dealt, ranks[role]) / share_of(dealt, plan.ranks[role]))
        return replace(of, activations=int(of.activations * share))

    held = {
        kind: bytes_together([role_bytes(role) for role in on_it])
        for kind, on_it in ROLES_ON[layout.mode].items()
    }
    moved = sizes(config, plan)
    transfers = 2 * ((g - 1) * moved.generator_gradient + r * (c - 1) * moved.critic_gradient)
    if layout.mode == "disaggregated":
        # R batches to the critic, its x0 back; with a GAN the gradient of its logit as well
        transfers += (r + 1 + plan.critic_first) * moved.batch + 2 * moved.answer_gradient
    if layout.mode != "colocated":
        asked = 1 + (r if plan.seconds.teacher_for_critic else 0)
        transfers += asked * (moved.query + (moved.answer or 0.0))
    simulated = simulate(
        _seconds(config, plan, layout, times), r, layout, net, moved, critic_first=plan.critic_first
    )
    return PlacementPlan(layout, held, transfers, simulated.window_s, simulated.idle)


def sizes(config: RunConfig, plan: Plan) -> Sizes:
    """What travels in a window."""
    to_teacher = 0.5 if config.placement.wire_dtype == "bf16" else 1.0

    def gradient(role: str) -> float:
        held = plan.bytes_by_role[role].gradients
        return held / share_of(plan.sharded.get(role, 0.0), plan.ranks[role])

    return Sizes(
        batch=plan.sample_bytes,
        query=to_teacher * plan.query_bytes,
        answer=to_teacher * plan.sample_bytes,
        answer_gradient=plan.sample_bytes if plan.through_critic else 0.0,
        generator_gradient=gradient("generator"),
        critic_gradient=gradient("critic"),
    )


def _seconds(config: RunConfig, plan: Plan, layout: Layout, times: RoleTimes | None) -> RoleSeconds:
    seconds = times.seconds if times else plan.seconds
    share = config.train.batch_size // layout.generators
    if layout.mode != "colocated" and share > config.train.micro_batch(layout.generators):
        # all micro-batches are asked about ahead, and their samples made again for the backward pass
        seconds = replace(seconds, generator_update=seconds.generator_update + seconds.sample)
    return seconds


def suggested(found: list[PlacementPlan], device_gib: float | None) -> PlacementPlan:
    """The fastest that fits on its devices, the simplest of equals.

    Raises PlacementError, with the figures, if none does.
    """
    limit = math.inf if device_gib is None else device_gib * GIB
    fitting = [each for each in found if max(each.device_bytes.values()) <= limit]
    if not fitting:
        needs = ", ".join(f"{each.layout.mode} {max(each.device_bytes.values()) / GIB:.2f}" for each in found)
        raise PlacementError(
            f"no placement fits into {device_gib:g} GiB a device (GiB of the fullest: {needs})"
        )
    shortest = min(each.window for each in fitting)
    return min(fitting, key=lambda each: round(each.window / shortest, 6))


def table(
    config: RunConfig,
    found: Sequence[tuple[int, list[PlacementPlan]]],
    device_gib: float | None,
    times: RoleTimes | None = None,
    net: Network | None = None,
) -> str:
    """For `raydistill plan`: the placements of each number of devices. Raises PlacementError if nothing fits."""
    first = method_class(config.method.kind).critic_first
    images = config.train.batch_size * (config.method.critic_updates_per_generator + first)
    width = max((len(each.devices) for _, row in found for each in row), default=0) + 2
    heads = (("s/update", 10), ("updates/s", 11), ("images/s", 11)) if times else (("time", 10),)
    lines = [
        f"{'placement':<15}{'devices':<{width}}{'GiB of the fullest':>18}{'MiB moved':>13}"
        + "".join(f"{name:>{of}}" for name, of in heads)
        + "  waiting"
    ]
    suggestions = []
    refused: PlacementError | None = None
    for devices, row in found:
        on = f" for {devices} devices" if len(found) > 1 else ""
        for each in row:
            waiting = ", ".join(f"{role} {share:.0%}" for role, share in each.idle.items())
            cells = (each.window, 1 / each.window, images / each.window) if times else (each.window,)
            lines.append(
                f"{each.layout.mode:<15}{each.devices:<{width}}{max(each.device_bytes.values()) / GIB:>18.3f}"
                f"{each.transfer_bytes / MIB:>13.2f}"
                + "".join(f"{cell:>{of}.4g}" for cell, (_, of) in zip(cells, heads, strict=True))
                + f"  {waiting}"
            )
        left_out = [mode for mode in MODES if mode not in {each.layout.mode for each in row}]
        if left_out:
            suggestions.append(
                f"not possible{on}: {', '.join(left_out)} (their ranks do not divide train.batch_size="
                f"{config.train.batch_size}, or are too few)"
            )
        if row:
            try:
                suggestions.append(f"suggestion{on}: {suggested(row, device_gib).settings}")
            except PlacementError as error:
                if len(found) == 1:
                    raise
                suggestions.append(f"suggestion{on}: none, {error}")
                refused = error
    if refused and not any("suggestion" in line and "placement." in line for line in suggestions):
        raise refused
    lines.append(_unit(times, net))
    lines.append(LEFT_OUT + (", gathering sharded weights" if config.placement.sharding == "fsdp" else ""))
    return "\n".join(lines + suggestions)


def _unit(times: RoleTimes | None, net: Network | None) -> str:
    if times is None:
        return "time: of one update in forward equivalents of the whole batch, the network left out"
    link = "a network that costs nothing (--latency-us, --gbit-per-s)"
    if net is not None:
        speed = "any speed" if math.isinf(net.bytes_per_s) else f"{net.bytes_per_s * 8 / 1e9:g} Gbit/s"
        link = f"{net.latency_s * 1e6:g} us and {speed} a link, gradients averaged by a ring"
    return f"times: {times.source}; {link}; images: batch x R of an update"
