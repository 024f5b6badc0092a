"""What fits a device of a given memory: the largest micro-batch, and the settings to change where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raydistill.config import apply_overrides, flatten
from raydistill.errors import ConfigError, PlacementError
from raydistill.runtime.placements import PlacementPlan, compare, suggested
from raydistill.runtime.plan import GIB, Plan, plan
from raydistill.runtime.settings import RunConfig, require_shardable

_GENTLEST_FIRST = (
    ("train.micro_batch_size=1",),
    ("train.activation_checkpointing=true",),
    ("placement.sharding=fsdp",),
    ("train.dtype=bf16", "teacher.dtype=bf16"),
    ("generator.moments=bf16", "critic.moments=bf16"),
)
"""What a run may change to need less memory: first what costs time only, then what costs precision."""
_ADAPTERS = (
    (
        "train.micro_batch_size=1", "train.activation_checkpointing=true", "placement.sharding=replicated",
        "generator.lora_rank=64", "generator.lora_alpha=8", "generator.lora_targets=all",
        "critic.lora_rank=64", "critic.lora_alpha=8", "critic.lora_targets=all",
    ),
    ("train.dtype=bf16", "teacher.dtype=bf16"),
)  # fmt: skip
"""Adapters of DMD2's SDXL (methods.md 1.6)."""
MARGIN = 1.07
"""By how much measured peaks were above plans at most (README.md, Limits): a micro-batch is to fit nevertheless."""


@dataclass(frozen=True)
class Fitting:
    """A placement with the micro-batch that fills its devices."""

    micro_batch_size: int
    fullest_bytes: int


def largest_micro_batch(
    config: RunConfig, planned: Plan, chosen: PlacementPlan, teachers: int, device_gib: float
) -> Fitting | None:
    """The largest micro-batch with which a placement's devices hold the plan's tensors, and MARGIN above them; None if
    not even 1 does.

    teachers: replicas, as the placement was compared with.
    """
    layout = chosen.layout
    devices = layout.generators + layout.critics + layout.teachers
    shares = [config.train.batch_size // n for n in (layout.generators, layout.critics) if n]
    for micro in range(min(shares), 0, -1):
        if any(share % micro for share in shares):
            continue
        changed = replace(config, train=replace(config.train, micro_batch_size=micro))
        row = compare(changed, _with_micro_batch(config, planned, micro), devices, teachers)
        same = [each for each in row if each.layout == layout]
        fullest = max((max(each.device_bytes.values()) for each in same), default=0)
        if same and MARGIN * fullest <= device_gib * GIB:
            return Fitting(micro, fullest)
    return None


def remedy(config: RunConfig, devices: Sequence[tuple[int, int]], device_gib: float) -> str:
    """Settings with which some placement on some (devices, teacher replicas) fits, in words, with their figures.

    They are tried one after the other and kept, those first that leave the numbers alone; adapters instead of whole
    networks are what remains where those don't fit.
    """
    whole = _first_that_fits(config, _GENTLEST_FIRST, devices, device_gib)
    if whole.fits:
        return whole.told
    adapters = _first_that_fits(config, _ADAPTERS, devices, device_gib)
    if adapters.fits:
        return f"{whole.told}; adapters instead, which want higher learning rates: {adapters.told}"
    return f"{whole.told}: larger or more devices are needed"


@dataclass(frozen=True)
class _Remedy:
    fits: bool
    told: str


def _first_that_fits(
    config: RunConfig, steps: Sequence[tuple[str, ...]], devices: Sequence[tuple[int, int]], device_gib: float
) -> _Remedy:
    settings: list[str] = []
    smallest = float("inf")
    for step in steps:
        try:
            changed = apply_overrides(config, step)
            _require_shardable(changed, devices)
            planned = plan(changed)
        except (ConfigError, PlacementError):  # a network that can't recompute its activations, or be shared
            continue
        if changed == config:
            continue
        before, after = flatten(config), flatten(changed)
        settings += [each for each in step if before[(name := each.split("=")[0])] != after[name]]
        config = changed
        for number, teachers in devices:
            row = compare(config, planned, number, teachers)
            if not row:
                continue
            smallest = min([smallest, *(max(each.device_bytes.values()) for each in row)])
            try:
                chosen = suggested(row, device_gib)
            except PlacementError:
                continue
            fullest = max(chosen.device_bytes.values()) / GIB
            return _Remedy(True, f"{fullest:.2f} GiB would fit: {' '.join(settings)} {chosen.settings}")
    if not settings:
        return _Remedy(False, "no setting of memory is left to change")
    return _Remedy(False, f"even {' '.join(settings)} takes {smallest / GIB:.2f} GiB of the fullest device")


def _require_shardable(config: RunConfig, devices: Sequence[tuple[int, int]]) -> None:
    """Raise as `require_shardable` does, but for the placement, which is still to be chosen."""
    placement = config.placement
    most = max(number for number, _ in devices)
    require_shardable(
        replace(config, placement=replace(placement, mode="colocated", session="ray", workers=most))
    )


def _with_micro_batch(config: RunConfig, planned: Plan, micro: int) -> Plan:
    """The plan with activations of another micro-batch, to which they are proportional."""
    ranks = planned.ranks | {"teacher": planned.ranks["generator"]}
    return replace(
        planned,
        bytes_by_role={
            role: replace(of, activations=of.activations * micro // config.train.micro_batch(ranks[role]))
            for role, of in planned.bytes_by_role.items()
        },
    )
