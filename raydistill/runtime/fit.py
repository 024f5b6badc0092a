"""Refusals that need no network and no device: what a placement cannot serve, and what no memory holds."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import psutil
import torch

from raydistill.errors import PlacementError
from raydistill.methods.method import Needs
from raydistill.models.diffusers_hub import denoiser_on_meta
from raydistill.runtime.build import method_for
from raydistill.runtime.plan import GIB, ROLES_ON, Plan, plan_for
from raydistill.runtime.settings import RunConfig, teacher_folder

log = logging.getLogger(__name__)

_LOWER = (
    "lower train.micro_batch_size, set train.activation_checkpointing=true or train.dtype=bf16, or move roles apart "
    "(raydistill plan compares the placements)"
)


def require_fit(config: RunConfig, node_bytes: Sequence[float]) -> None:
    """Check method and memory; raises PlacementError.

    node_bytes: memory of each node that CPU processes may take.
    """
    denoiser, cond_shapes = denoiser_on_meta(
        teacher_folder(config.teacher), config.teacher.prediction, config.teacher.revision
    )
    require_served(config, method_for(config, denoiser.schedule).needs)
    require_memory(config, plan_for(config, denoiser, cond_shapes), node_bytes)


def require_served(config: RunConfig, needs: Needs) -> None:
    """Raise PlacementError if the method needs more of a network than a remote one can give."""
    mode = config.placement.mode
    for role, access, remote_in, instead in (
        ("teacher", needs.teacher, ("teachers", "disaggregated"), "colocated"),
        ("critic", needs.critic, ("disaggregated",), "colocated or teachers"),
    ):
        if access == "parameters" and mode in remote_in:
            raise PlacementError(
                f"method.kind={config.method.kind} differentiates through the {role}'s weights, and "
                f"placement.mode={mode} keeps the {role} in another process, which gives answers and gradients of "
                f"samples only: choose placement.mode={instead}"
            )


def require_memory(config: RunConfig, plan: Plan, node_bytes: Sequence[float]) -> None:
    """Raise PlacementError, with the figures, if the tensors of the plan are more than the devices hold."""
    placement = config.placement
    counts = {
        "worker": max(1, placement.workers),
        "generator": placement.workers - placement.critic_ranks,
        "critic": placement.critic_ranks,
        "teacher": placement.teacher_replicas,
    }
    on_cpus = 0.0
    for kind, num_bytes in plan.device_bytes.items():
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
                f"{role} {plan.bytes_by_role[role].total / GIB:.2f}" for role in ROLES_ON[plan.mode][kind]
            )
            raise PlacementError(
                f"placement.mode={plan.mode} takes {num_bytes / GIB:.2f} GiB of each {kind} ({held}; tensors alone), "
                f"and {where.format(f'{limit / GIB:.2f}')}: {_LOWER}"
            )
    if on_cpus > sum(node_bytes):
        each = ", ".join(
            f"{counts[kind]} x {kind} {num_bytes / GIB:.2f}" for kind, num_bytes in plan.device_bytes.items()
        )
        raise PlacementError(
            f"placement.mode={plan.mode} takes {on_cpus / GIB:.2f} GiB of the nodes' memory ({each}; tensors alone), "
            f"and they have {sum(node_bytes) / GIB:.2f} GiB together: fewer placement.workers or replicas, or {_LOWER}"
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
