"""Refusals that need no network and no device: what no memory holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psutil
import torch

from raydistill.errors import PlacementError
from raydistill.runtime.plan import GIB, ROLES_ON, Plan, plan
from raydistill.runtime.settings import RunConfig

log = logging.getLogger(__name__)

_LOWER = (
    "lower train.micro_batch_size, set train.activation_checkpointing=true, train.dtype=bf16 or generator.moments=bf16 "
    "and critic.moments=bf16, share networks out (placement.sharding=fsdp) or move roles apart (raydistill plan "
    "--device-gib says what fits)"
)


def require_fit(config: RunConfig, node_bytes: Sequence[float]) -> None:
    """Check the memory; raises PlacementError, and ConfigError where teacher and method don't fit each other.

    node_bytes: memory of each node that CPU processes may take.
    """
    require_memory(config, plan(config), node_bytes)


def require_memory(config: RunConfig, planned: Plan, node_bytes: Sequence[float]) -> None:
    """Raise PlacementError, with the figures, if the tensors of the plan are more than the devices hold."""
    placement = config.placement
    counts = {
        "worker": max(1, placement.workers),
        "generator": placement.workers - placement.critic_ranks,
        "critic": placement.critic_ranks,
        "teacher": placement.teacher_replicas,
    }
    on_cpus = 0.0
    for kind, num_bytes in planned.device_bytes.items():
        share = placement.gpus_per_teacher if kind == "teacher" else float(placement.gpus_per_worker)
        if not share:
            # a node's replicas map one copy of the weights
            on_cpus += num_bytes * (min(counts[kind], len(node_bytes)) if kind == "teacher" else counts[kind])
            limit, where = max(node_bytes), "a node has {} GiB"
        else:
            limit, where = _gpu_bytes(placement.device_gib), "a GPU has {} GiB (placement.device_gib)"
            limit *= min(1.0, share)  # of a GPU that it shares with others
        if num_bytes > limit:
            held = " + ".join(
                f"{role} {planned.bytes_by_role[role].total / GIB:.2f}"
                for role in ROLES_ON[planned.mode][kind]
            )
            raise PlacementError(
                f"placement.mode={planned.mode} takes {num_bytes / GIB:.2f} GiB of each {kind} ({held}; tensors "
                f"alone), and {where.format(f'{limit / GIB:.2f}')}: {_LOWER}"
            )
    if on_cpus > sum(node_bytes):
        each = ", ".join(
            f"{counts[kind]} x {kind} {num_bytes / GIB:.2f}"
            for kind, num_bytes in planned.device_bytes.items()
        )
        raise PlacementError(
            f"placement.mode={planned.mode} takes {on_cpus / GIB:.2f} GiB of the nodes' memory ({each}; tensors "
            f"alone), and they have {sum(node_bytes) / GIB:.2f} GiB together: fewer placement.workers or "
            f"replicas, or {_LOWER}"
        )


def _gpu_bytes(device_gib: float | None) -> float:
    if device_gib is not None:
        return device_gib * GIB
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    log.warning("the GPUs' memory is not known here, so it is not checked (placement.device_gib)")
    return float("inf")


def machine_bytes() -> float:
    """Memory of this machine."""
    return float(psutil.virtual_memory().total)
