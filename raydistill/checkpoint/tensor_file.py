"""Safetensors files, written as a stream (one tensor in host memory at a time, hashed on the way) and read
checked.

The library's own writer wants the whole file in memory or a local path; snapshots also go to object stores.
Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from raydistill.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFile:
    """The safetensors file of `weights`, laid out but not yet written; `num_bytes` is its size."""

    def __init__(self, weights: dict[str, Tensor], what: str) -> None:
        for name, tensor in weights.items():
            if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
                raise CheckpointError(
                    f"{what}: {name!r} is {tensor.dtype} in {tensor.layout} layout; safetensors can't hold "
                    "that"
                )
        # widest types first keeps every tensor aligned, as the library does
        self._names = sorted(weights, key=lambda name: (-weights[name].element_size(), name))
        self._weights = weights
        entries: dict[str, Any] = {}
        offset = 0
        for name in self._names:
            tensor = weights[name]
            end = offset + tensor.nbytes
            entries[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self.num_bytes = len(self._header) + offset

    def write(self, file: BinaryIO) -> str:
        """Write the file and return its sha256."""
        digest = hashlib.sha256(self._header)
        file.write(self._header)
        for name in self._names:
            flat = self._weights[name].detach().cpu().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        return digest.hexdigest()


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a local safetensors file; `name` is how errors call it.

    Raises CheckpointError for any other.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # cloned, since safe_open maps the file, which retention may delete
            return {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{name} is not safetensors ({error}); pickled weights are never loaded"
        ) from error


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under names that begin with prefix, to lie beside others in one part."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unprefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
