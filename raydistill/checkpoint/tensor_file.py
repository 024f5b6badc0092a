"""Safetensors files, written as a stream (one tensor in host memory at a time, hashed on the way) and read
checked.

The library's own writer wants the whole file in memory or a local path; snapshots also go to object stores.
Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

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


class TensorReader:
    """A local safetensors file that is read tensor by tensor, or in rows; for a `with` statement.

    Raises CheckpointError for a file of another kind.
    """

    def __init__(self, path: Path, name: str) -> None:
        """name: how errors call it."""
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{name} is not safetensors ({error}); pickled weights are never loaded"
            ) from error

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *of_error: Any) -> None:
        self._file.__exit__(*of_error)

    def names(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> list[int]:
        shape: list[int] = self._file.get_slice(name).get_shape()
        return shape

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or rows of it, in memory of its own: the file is mapped, and retention may delete it."""
        tensor: Tensor = self._file.get_tensor(name) if rows is None else self._file.get_slice(name)[rows]
        return tensor.clone()


def prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under names that begin with prefix, to lie beside others in one part."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def unprefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
