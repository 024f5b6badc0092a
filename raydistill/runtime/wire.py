"""How tensors travel to and from services. One file decides.

Through Ray's object store they go as numpy arrays, whose buffers are shared memory on a node (four times faster than
torch tensors, ray.md 2.3) and arrive read-only; bf16 goes as uint16, which numpy knows.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raydistill.methods.method import Query
from raydistill.models.denoiser import DTYPES, Cond

WireDtype = Literal["fp32", "bf16"]


def pack(tensor: Tensor, dtype: WireDtype = "fp32") -> np.ndarray:
    """A tensor of any device as an array that travels; bf16 as the uint16 of the same bits."""
    host = tensor.detach().to("cpu", DTYPES[dtype])
    return (host.view(torch.uint16) if dtype == "bf16" else host).contiguous().numpy()


def unpack(array: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """What `pack` was given, as float32 and writable."""
    host = torch.from_numpy(array.copy())
    return (host.view(torch.bfloat16) if array.dtype == np.uint16 else host).to(device, torch.float32)


def pack_query(query: Query, dtype: WireDtype) -> dict[str, Any]:
    """A query as it travels; noise levels stay exact."""
    return {
        "want": query.want,
        "guidance_scale": query.guidance_scale,
        "x_t": pack(query.x_t, dtype),
        "t": pack(query.t),
        "cond": {name: pack(tensor, dtype) for name, tensor in query.cond.tensors.items()},
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
