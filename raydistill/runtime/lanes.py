"""Tensors from rank to rank, over torch.distributed: gloo between CPUs, NCCL between GPUs (never through the host).

Both sides name the same transfers in the same order, pair by pair: NCCL has no tags, so order is all there is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raydistill.models.denoiser import DTYPES
from raydistill.runtime.wire import WireDtype


@dataclass
class Expected:
    """A receive that was posted."""

    work: Any
    buffer: Tensor

    def take(self) -> Tensor:
        """The tensor, once it has arrived; float32 if it travelled as bf16."""
        self.work.wait()
        return self.buffer.float() if self.buffer.dtype == torch.bfloat16 else self.buffer


class Lanes:
    """This rank's lanes to the others."""

    def __init__(self, device: torch.device, dtype: WireDtype):
        self._device = device
        self._dtype = DTYPES[dtype]
        self._leaving: list[tuple[Any, Tensor]] = []

    def send(self, tensor: Tensor, to: int) -> None:
        """Returns at once; the tensor must not be changed in place afterwards."""
        self._post(tensor.detach().to(self._device, self._dtype), to)

    def expect(self, shape: Sequence[int], source: int) -> Expected:
        """Post a receive; floats travel in the wire's dtype."""
        buffer = torch.empty(tuple(shape), dtype=self._dtype, device=self._device)
        return Expected(dist.irecv(buffer, source), buffer)

    def receive(self, shape: Sequence[int], source: int) -> Tensor:
        return self.expect(shape, source).take()

    def send_numbers(self, numbers: Sequence[int], to: int) -> None:
        self._post(torch.tensor(numbers, dtype=torch.int64, device=self._device), to)

    def receive_numbers(self, count: int, source: int) -> list[int]:
        buffer = torch.empty(count, dtype=torch.int64, device=self._device)
        dist.recv(buffer, source)
        return [int(number) for number in buffer]

    def send_values(self, values: Mapping[str, float], to: int) -> None:
        """Named figures, exactly."""
        data = json.dumps({name: float(value).hex() for name, value in values.items()}).encode()
        self.send_numbers([len(data)], to)
        self._post(torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device), to)

    def receive_values(self, source: int) -> dict[str, float]:
        (size,) = self.receive_numbers(1, source)
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        dist.recv(buffer, source)
        parsed = json.loads(buffer.cpu().numpy().tobytes())
        return {name: float.fromhex(value) for name, value in parsed.items()}

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._leaving:
            work.wait()
        self._leaving.clear()

    def _post(self, tensor: Tensor, to: int) -> None:
        self._leaving = [(work, buffer) for work, buffer in self._leaving if not work.is_completed()]
        buffer = tensor.contiguous()
        self._leaving.append((dist.isend(buffer, to), buffer))
