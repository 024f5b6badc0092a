"""Which placement suits a run? Bytes, transfers, time and waiting of each on the same number of devices.

Times are forward equivalents of the plan, so the comparison needs no measurement; the schedule behind them is simulated
(`raydistill.runtime.simulate`) with a network that costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydistill.errors import PlacementError
from raydistill.runtime.plan import GIB, Plan
from raydistill.runtime.ranks import best_num_critic
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.simulate import Layout, Mode, simulate

MIB = 2**20
MODES: tuple[Mode, ...] = ("colocated", "teachers", "disaggregated")


@dataclass(frozen=True)
class PlacementPlan:
    """One placement on so many devices."""

    layout: Layout
    device_bytes: dict[str, int]
    """Of one device of each kind."""
    transfer_bytes: float
    """Between devices in one window, gradients averaged included."""
    window: float
    """Forward equivalents of the whole batch, one after the other."""
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


def compare(config: RunConfig, plan: Plan, devices: int, teachers: int) -> list[PlacementPlan]:
    """The placements that `devices` allow, `teachers` of them for replicas where there are any."""
    size, micro = config.train.batch_size, config.train.micro_batch_size
    found = []
    if size % (devices * (micro or 1)) == 0:
        found.append(_placed(config, plan, Layout("colocated", devices)))
    ranks = devices - teachers
    if ranks >= 1 and size % (ranks * (micro or 1)) == 0:
        found.append(_placed(config, plan, Layout("teachers", ranks, 0, teachers)))
    if ranks >= 2:
        try:
            critics = best_num_critic(
                ranks, size, micro, plan.seconds, config.method.critic_updates_per_generator
            )
        except PlacementError:
            return found
        lag = config.placement.max_staleness
        found.append(_placed(config, plan, Layout("disaggregated", ranks - critics, critics, teachers, lag)))
    return found


def _placed(config: RunConfig, plan: Plan, layout: Layout) -> PlacementPlan:
    r = config.method.critic_updates_per_generator
    roles = plan.bytes_by_role

    def role_bytes(role: str, ranks: int) -> int:
        # the plan's activations are those of placement.workers ranks
        of = roles[role]
        share = 1.0 if config.train.micro_batch_size else max(1, config.placement.workers) / ranks
        return of.total - of.activations + int(of.activations * share)

    g, c = layout.generators, layout.critics
    gradients = {role: roles[role].gradients for role in ("generator", "critic")}
    if layout.mode == "disaggregated":
        held = {"generator": role_bytes("generator", g), "critic": role_bytes("critic", c)}
        answers_back = plan.sample_bytes * (3 if plan.critic_answer > 1 else 1)  # x_t's gradient, with a GAN
        lanes = float(plan.sample_bytes * r + answers_back)
    else:
        held, lanes = {"worker": role_bytes("generator", g) + role_bytes("critic", g)}, 0.0
        c = g
    if layout.mode == "colocated":
        held["worker"] += roles["teacher"].total
    else:
        held["teacher"] = roles["teacher"].total
        lanes += plan.query_bytes + plan.sample_bytes
    averaged = 2 * ((g - 1) * gradients["generator"] + r * (c - 1) * gradients["critic"])
    simulated = simulate(plan.seconds, r, layout)
    return PlacementPlan(layout, held, lanes + averaged, simulated.window_s, simulated.idle)


def suggested(found: list[PlacementPlan], device_gib: float | None) -> PlacementPlan:
    """The fastest that fits on its devices, the simplest of equals.

    Raises PlacementError, with the figures, if none does.
    """
    limit = math.inf if device_gib is None else device_gib * GIB
    fitting = [each for each in found if max(each.device_bytes.values()) <= limit]
    if not fitting:
        needs = ", ".join(f"{each.layout.mode} {max(each.device_bytes.values()) / GIB:.2f}" for each in found)
        raise PlacementError(
            f"no placement fits into {device_gib:g} GiB a device (GiB of the fullest: {needs}): lower "
            "train.micro_batch_size, set train.activation_checkpointing=true or train.dtype=bf16"
        )
    return min(fitting, key=lambda each: round(each.window, 6))


def table(found: list[PlacementPlan], device_gib: float | None) -> str:
    """For `raydistill plan`."""
    lines = [
        f"{'placement':<15}{'devices':<36}{'GiB of the fullest':>19}{'MiB moved':>11}{'time':>8}  waiting",
    ]
    for each in found:
        waiting = ", ".join(f"{role} {share:.0%}" for role, share in each.idle.items())
        lines.append(
            f"{each.layout.mode:<15}{each.devices:<36}{max(each.device_bytes.values()) / GIB:>19.3f}"
            f"{each.transfer_bytes / MIB:>11.2f}{each.window:>8.2f}  {waiting}"
        )
    left_out = [mode for mode in MODES if mode not in {each.layout.mode for each in found}]
    if left_out:
        lines.append(
            f"left out: {', '.join(left_out)} (their ranks do not divide train.batch_size, or are too few)"
        )
    lines.append("time: of one update in forward equivalents of the whole batch, the network left out")
    best = suggested(found, device_gib)
    lines.append(f"suggestion: placement.mode={best.layout.mode}, {best.devices}")
    return "\n".join(lines)
