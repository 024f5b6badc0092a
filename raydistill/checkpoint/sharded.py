"""Parts of a role whose tensors are dealt out over ranks, each of which writes the rows that it holds.

generator-00000-of-00002.safetensors    the first rank's rows, and all tensors that are not sharded
generator-00000-of-00002.json           the role's state; its field "rows" says which rows of which tensors
generator-00001-of-00002.safetensors    the second rank's rows
generator-00001-of-00002.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydistill.checkpoint.tensor_file import TensorReader
from raydistill.diffusion.shards import Rows
from raydistill.errors import CheckpointError

_NAME = re.compile(r"(?P<role>.+)-(?P<rank>\d{5})-of-(?P<size>\d{5})")
_ROWS = "rows"


def part_name(role: str, rank: int, size: int) -> str:
    """Of the part of a role that is sharded over `size` ranks."""
    return f"{role}-{rank:05d}-of-{size:05d}"


def role_of(part: str) -> str:
    """The role that a part belongs to."""
    match = _NAME.fullmatch(part)
    return match["role"] if match else part


def sharded_part(
    tensors: Mapping[str, Tensor], state: Mapping[str, Any], rows: Mapping[str, Rows], rank: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a rank writes of what it holds: its rows, the first rank also what is not sharded."""
    mine = {
        name: tensor for name, tensor in tensors.items() if (tensor.numel() if name in rows else rank == 0)
    }
    return mine, {**state, _ROWS: {name: list(rows[name]) for name in mine if name in rows}}


def join(
    folder: Path, parts: Sequence[str], where: str, wanted: Mapping[str, Rows], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a role from its parts in a local folder; arguments and errors as of `Snapshot.part`.

    where: how errors call the folder.
    """
    _require_all(parts, where)
    states = [json.loads((folder / f"{part}.json").read_text())["state"] for part in parts]
    found: dict[str, list[tuple[Rows, TensorReader]]] = {}
    whole: dict[str, TensorReader] = {}
    with ExitStack() as stack:
        for part, state in zip(parts, states, strict=True):
            name = f"{part}.safetensors"
            file = stack.enter_context(TensorReader(folder / name, f"{where}/{name}"))
            rows = state.pop(_ROWS, {})
            for tensor in file.names():
                if not tensor.startswith(prefix):
                    continue
                if tensor in rows:
                    found.setdefault(tensor, []).append((Rows(*rows[tensor]), file))
                elif tensor in wanted:
                    of = file.shape(tensor)[0]
                    found[tensor] = [(Rows(0, of, of), file)]
                else:
                    whole[tensor] = file
        tensors = {name: file.read(name) for name, file in whole.items()}
        for name, pieces in found.items():
            tensors[name] = _rows(name, pieces, wanted.get(name), where)
    return tensors, states[0]


def _rows(name: str, pieces: list[tuple[Rows, TensorReader]], wanted: Rows | None, where: str) -> Tensor:
    of = pieces[0][0].of
    start, stop, total = wanted or Rows(0, of, of)
    if total != of:
        raise CheckpointError(f"{where}: {name} has {of} rows, this run's network {total}")
    taken = []
    at = 0
    for rows, file in pieces:
        if rows.start != at:
            raise CheckpointError(f"{where}: rows {at} to {rows.start} of {name} are in none of its parts")
        at = rows.stop
        low, high = max(start, rows.start), min(stop, rows.stop)
        if low < high:
            taken.append(file.read(name, slice(low - rows.start, high - rows.start)))
    if at != of:
        raise CheckpointError(f"{where}: rows {at} to {of} of {name} are in none of its parts")
    if not taken:  # this rank holds none of them
        return pieces[0][1].read(name, slice(0, 0))
    return torch.cat(taken) if len(taken) > 1 else taken[0]


def _require_all(parts: Sequence[str], where: str) -> None:
    match = _NAME.fullmatch(parts[0])
    if match is None:
        return
    size = int(match["size"])
    missing = [name for rank in range(size) if (name := part_name(match["role"], rank, size)) not in parts]
    if missing or len(parts) != size:
        raise CheckpointError(
            f"snapshot {where} holds {', '.join(parts)}, not the parts of all {size} ranks of {match['role']}"
        )
