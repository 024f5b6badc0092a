"""Rows of sharded tensors: what one of several processes holds of a weight.

FSDP2 (torch.distributed.fsdp.fully_shard) deals every weight out along its first dimension: of n rows over N ranks
each holds ceil(n / N), the last ones fewer or none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Rows(NamedTuple):
    """The rows [start, stop) of a tensor that has `of`."""

    start: int
    stop: int
    of: int


def held(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, in the same memory; any other tensor itself."""
    # a DTensor is known by what it offers: to import its class takes half a second
    sharded: Any = tensor
    local: Tensor = sharded.to_local() if is_sharded(tensor) else tensor
    return local


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes hold rows of the tensor."""
    return hasattr(tensor, "to_local")


def held_state(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` with this process's rows of what is sharded."""
    return {name: held(tensor.detach()) for name, tensor in module.state_dict().items()}


def rows_of(tensor: Tensor, rank: int, size: int) -> Rows:
    """The rows that a rank of `size` holds of a sharded tensor [n, ...]."""
    n = tensor.shape[0]
    each = -(-n // size)
    return Rows(min(rank * each, n), min((rank + 1) * each, n), n)
