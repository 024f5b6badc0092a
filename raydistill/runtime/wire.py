"""How tensors travel to and from services. One file decides.

    object_store   as numpy arrays through Ray's object store: shared memory on a node, four times faster than torch
                   tensors (measured for the design). They arrive read-only; bf16 goes as uint16, which numpy knows
    nixl           as tensors, from device to device, through Ray's direct transport; the store holds references only

Between ranks tensors go through torch.distributed (`raydistill.runtime.lanes`): NCCL on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
import torch
from torch import Tensor

from raydistill.errors import PlacementError
from raydistill.methods.method import Query
from raydistill.models.denoiser import DTYPES, Cond

WireDtype = Literal["fp32", "bf16"]
Transport = Literal["object_store", "nixl"]


def require_transport(transport: Transport) -> Transport:
    """The same. Raises PlacementError if its package is not installed."""
    if transport == "nixl" and importlib.util.find_spec("nixl") is None:
        raise PlacementError(
            "placement.teacher_transport=nixl needs the nixl package in every process: pip install 'raydistill[gpu]', "
            "or placement.teacher_transport=object_store"
        )
    return transport


def put(value: Any, transport: Transport) -> Any:
    """A reference to a packed value; its tensors must not be written to while it is there."""
    return ray.put(value, _tensor_transport="nixl") if transport == "nixl" else ray.put(value)


def returning(method: Any, transport: Transport) -> Any:
    """An actor's method whose packed answer goes that way."""
    return method.options(tensor_transport="nixl") if transport == "nixl" else method


def pack(
    tensor: Tensor, dtype: WireDtype = "fp32", transport: Transport = "object_store"
) -> np.ndarray | Tensor:
    """A tensor of any device as it travels; an array of bf16 as the uint16 of the same bits."""
    if transport == "nixl":
        return tensor.detach().to(DTYPES[dtype]).contiguous()
    host = tensor.detach().to("cpu", DTYPES[dtype])
    return (host.view(torch.uint16) if dtype == "bf16" else host).contiguous().numpy()


def unpack(array: np.ndarray | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """What `pack` was given, as float32 and writable."""
    if isinstance(array, Tensor):
        # a copy: the sender's memory may be reused, and a CPU's kernels round by how memory is aligned
        return array.to(device, torch.float32, copy=True)
    host = torch.from_numpy(array.copy())
    return (host.view(torch.bfloat16) if array.dtype == np.uint16 else host).to(device, torch.float32)


def num_bytes(packed: Any) -> int:
    """Of the tensors in a packed value."""
    if isinstance(packed, Mapping):
        return sum(num_bytes(each) for each in packed.values())
    return packed.nbytes if isinstance(packed, np.ndarray | Tensor) else 0


def pack_query(query: Query, dtype: WireDtype, transport: Transport = "object_store") -> dict[str, Any]:
    """A query as it travels; noise levels, class labels and SDXL's sizes stay exact."""
    return {
        "want": query.want,
        "guidance_scale": query.guidance_scale,
        "steps": query.steps,
        "x_t": pack(query.x_t, dtype, transport),
        "t": pack(query.t, "fp32", transport),
        "cond": {
            name: pack(tensor, "fp32" if tensor.ndim == 1 or name == "time_ids" else dtype, transport)
            for name, tensor in query.cond.tensors.items()
        },
    }


def unpack_query(packed: Mapping[str, Any], device: torch.device | str, *, differentiable: bool) -> Query:
    """The query for the service's own network; x_t requires a gradient if `differentiable`."""
    return Query(
        network="teacher",
        want=packed["want"],
        x_t=unpack(packed["x_t"], device).requires_grad_(differentiable),
        t=unpack(packed["t"], device),
        cond=Cond({name: unpack(array, device) for name, array in packed["cond"].items()}),
        guidance_scale=packed["guidance_scale"],
        steps=packed["steps"],
    )


@dataclass(frozen=True)
class PackedWeight:
    """A weight as it lies in memory: channels may come last, and kernels choose their order of summing by it."""

    flat: np.ndarray
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: WireDtype


def pack_weights(weights: Mapping[str, Tensor]) -> dict[str, PackedWeight]:
    """Dense weights of any memory format."""
    packed = {}
    for name, tensor in weights.items():
        host = tensor.detach().cpu()
        flat = host.as_strided((host.numel(),), (1,))
        bf16 = host.dtype == torch.bfloat16
        packed[name] = PackedWeight(
            (flat.view(torch.uint16) if bf16 else flat).numpy(),
            tuple(host.shape),
            tuple(host.stride()),
            "bf16" if bf16 else "fp32",
        )
    return packed


def shared_weights(packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    """The weights as views of the arrays: out of the object store all processes of a node share one copy."""
    weights = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, weight in packed.items():
            flat = torch.from_numpy(weight.flat)
            flat = flat.view(torch.bfloat16) if weight.dtype == "bf16" else flat
            weights[name] = flat.as_strided(weight.shape, weight.stride)
    return weights
