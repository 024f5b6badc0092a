"""The ranks that train one role together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class World:
    """Rank and size of a data-parallel group; with one rank nothing is communicated.

    Gradients are averaged after the backward pass, role by role, so that a critic step never moves the generator's
    (a DDP module around several roles reduces every bucket, used or not: peers.md 3.4).
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Average each tensor over the ranks, in place, in buckets."""
        if self.size == 1 or not tensors:
            return
        bucket: list[Tensor] = []
        size = 0
        for tensor in tensors:
            bucket.append(tensor)
            size += tensor.numel() * tensor.element_size()
            if size >= _BUCKET_BYTES:
                self._mean_bucket(bucket)
                bucket, size = [], 0
        if bucket:
            self._mean_bucket(bucket)

    def sum_(self, tensor: Tensor) -> None:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)

    def max_(self, tensor: Tensor) -> None:
        """The largest over the ranks, element by element, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)

    def range(self, number: int) -> tuple[int, int]:
        """The largest and the smallest of the ranks' numbers; a collective call."""
        both = torch.tensor([number, -number])
        self.max_(both)
        return int(both[0]), -int(both[1])

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; a collective call."""
        if self.size == 1:
            return flag
        raised = torch.tensor([int(flag)])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.group)
        return bool(raised.item())

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def _mean_bucket(self, bucket: list[Tensor]) -> None:
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, group=self.group)
        flat /= self.size
        offset = 0
        for tensor in bucket:
            tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
            offset += tensor.numel()
