"""FSDP2: a network's weights, gradients, moments and EMA dealt out over the ranks that train it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydistill.diffusion.shards import Rows, held_state, is_sharded, rows_of
from raydistill.errors import CheckpointError
from raydistill.models.denoiser import Denoiser
from raydistill.roles.world import World


def shard(denoiser: Denoiser, world: World, device: torch.device, *, channels_last: bool) -> Denoiser:
    """Leave 1/N of the denoiser's weights on the device, in place; N: the ranks of `world`, which all call this.

    A block's weights are gathered while it computes, those outside of blocks during a whole pass; the backward pass
    leaves gradients averaged over the ranks. channels_last: memory format of what its convolutions compute.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    group = world.group or dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    denoiser.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in (*denoiser.blocks, denoiser):
        # gathered again for the backward pass, the root's weights too: between passes only rows are held
        sharded: Any = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no averages
    register_fsdp_forward_method(denoiser, "features")
    if channels_last:
        for module in denoiser.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(_channels_last)
    return denoiser


def _channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # sharded weights must be contiguous: the format comes with the activations
    return tuple(each.contiguous(memory_format=torch.channels_last) for each in inputs)


def load_held(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy a state dict into a module, where it is sharded this rank's rows.

    Raises CheckpointError if names or shapes differ from the module's.
    """
    mine = held_state(module)
    differing = sorted(mine.keys() ^ weights.keys())
    differing = differing or [name for name in mine if mine[name].shape != weights[name].shape]
    if differing:
        raise CheckpointError(f"the snapshot's weights are of another network: {differing[0]} differs")
    for name, tensor in mine.items():
        tensor.copy_(weights[name])


def state_rows(module: nn.Module, world: World) -> dict[str, Rows]:
    """Which rows of which sharded tensors of its state dict this rank holds."""
    return {
        name: rows_of(tensor, world.rank, world.size)
        for name, tensor in module.state_dict().items()
        if is_sharded(tensor)
    }
