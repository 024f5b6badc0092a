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


@dataclass
class Expected:
    """A receive that was posted."""

    work: Any
    buffer: Tensor

    def take(self) -> Tensor:
        """The tensor, once it has arrived."""
        self.work.wait()
        return self.buffer


class Lanes:
    """This rank's lanes to the others. Samples travel as float32: both sides must work at the same points."""

    def __init__(self, device: torch.device):
        self._device = device
        self._leaving: list[tuple[Any, Tensor]] = []
        self._left_before: list[tuple[Any, Tensor]] = []
        self._bytes = 0

    def send(self, tensor: Tensor, to: int) -> None:
        """Returns at once; the tensor must not be changed in place afterwards."""
        self._post(tensor.detach().to(self._device, torch.float32), to)

    def expect(self, shape: Sequence[int], source: int) -> Expected:
        """Post a receive."""
        buffer = torch.empty(tuple(shape), device=self._device)
        self._bytes += buffer.nbytes
        return Expected(dist.irecv(buffer, source), buffer)

    def receive(self, shape: Sequence[int], source: int) -> Tensor:
        return self.expect(shape, source).take()

    def send_numbers(self, numbers: Sequence[int], to: int) -> None:
        """Over the host's process group: what is small must not wait for a GPU."""
        self._post(torch.tensor(numbers, dtype=torch.int64), to)

    def receive_numbers(self, count: int, source: int) -> list[int]:
        buffer = torch.empty(count, dtype=torch.int64)
        dist.recv(buffer, source)
        return [int(number) for number in buffer]

    def send_values(self, values: Mapping[str, float], to: int) -> None:
        """Named figures, exactly."""
        data = json.dumps({name: float(value).hex() for name, value in values.items()}).encode()
        self.send_numbers([len(data)], to)
        self._post(torch.frombuffer(bytearray(data), dtype=torch.uint8), to)

    def receive_values(self, source: int) -> dict[str, float]:
        (size,) = self.receive_numbers(1, source)
        buffer = torch.empty(size, dtype=torch.uint8)
        dist.recv(buffer, source)
        parsed = json.loads(buffer.numpy().tobytes())
        return {name: float.fromhex(value) for name, value in parsed.items()}

    def take_bytes(self) -> int:
        """Bytes of what was sent and of the tensors that were expected, since this was last asked."""
        moved, self._bytes = self._bytes, 0
        return moved

    def begin_window(self) -> None:
        """Let go of what was sent in the window before the last one: the other side has asked for all of it."""
        for work, _ in self._left_before:
            work.wait()
        self._left_before, self._leaving = self._leaving, []

    def _post(self, tensor: Tensor, to: int) -> None:
        buffer = tensor.contiguous()
        self._bytes += buffer.nbytes
        # gloo does not copy: the buffer must live until it has left
        self._leaving.append((dist.isend(buffer, to), buffer))
