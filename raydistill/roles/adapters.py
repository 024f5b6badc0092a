"""Adapters in snapshots: the part of a role that has one holds the adapter alone; its base is the run's teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from raydistill.checkpoint import Snapshot
from raydistill.errors import CheckpointError
from raydistill.models.lora import merged
from raydistill.models.pipeline import Pipeline
from raydistill.roles.optimizer import OptimizerConfig

SCALE = "lora_scale"


def adapter_state(config: OptimizerConfig) -> dict[str, float]:
    """What a role's JSON state says of its adapter."""
    return {SCALE: config.lora.scale} if config.lora else {}


def whole_weights(
    snapshot: Snapshot, weights: dict[str, Tensor], state: dict[str, Any], teacher: Callable[[], Pipeline]
) -> dict[str, Tensor]:
    """A denoiser's weights of a role's part, an adapter's merged into the teacher's.

    teacher: makes the pipeline as it is loaded, asked only where there is an adapter. Raises CheckpointError if the
    adapter belongs to another one.
    """
    scale = state.get(SCALE)
    if scale is None:
        return weights
    theirs, pipeline = snapshot.manifest["teacher_fingerprint"], teacher()
    if pipeline.fingerprint != theirs:
        raise CheckpointError(
            f"{snapshot.path} holds adapters of the teacher with hash {theirs[:12]}, teacher.path is now one with hash "
            f"{pipeline.fingerprint[:12]}: put that teacher back where it was"
        )
    return merged(pipeline.denoiser.state_dict(), weights, scale)
