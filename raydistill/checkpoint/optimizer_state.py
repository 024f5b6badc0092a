"""An optimiser's state as tensors and JSON, exactly and without pickle."""

from typing import Any

import torch
from torch import Tensor

from raydistill.errors import CheckpointError


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's whole state as named tensors and JSON, for `Snapshots.write_part`.

    The tensors are the live ones (`<parameter index>.<name>`, and `group<i>.<name>` for tensors among the
    settings): write them before the next step. Raises CheckpointError for state that is neither tensor nor
    JSON.
    """
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in content["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values.setdefault(str(index), {})[name] = _encode(value, f"state {index}.{name}")
    groups = []
    for number, group in enumerate(content["param_groups"]):
        tensors |= {
            f"group{number}.{key}": value for key, value in group.items() if isinstance(value, Tensor)
        }
        settings = {key: value for key, value in group.items() if not isinstance(value, Tensor)}
        groups.append({key: _encode(value, f"setting {key!r}") for key, value in settings.items()})
    kind = type(optimizer).__name__
    return tensors, {"optimizer": kind, "groups": groups, "values": values, "shapes": _shapes(optimizer)}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    shapes: list[list[list[int]]] | None = None,
) -> None:
    """Put what `pack_optimizer` returned into an optimiser over parameters of the same shapes in the same
    order.

    shapes: of the whole parameters by group, where the optimiser and `tensors` hold rows of them.

    The settings (learning rate, betas, ...) become the saved ones too. Raises CheckpointError if the kind of
    optimiser, the number of parameters or a parameter's shape differs.
    """
    kind = type(optimizer).__name__
    if state["optimizer"] != kind:
        raise CheckpointError(
            f"the snapshot holds the state of {state['optimizer']}, this run's optimiser is {kind}"
        )
    saved, here = state["shapes"], shapes or _shapes(optimizer)
    if [len(group) for group in saved] != [len(group) for group in here]:
        raise CheckpointError(
            f"the snapshot's {kind} has {[len(group) for group in saved]} parameters per group, this run's "
            "has "
            f"{[len(group) for group in here]}"
        )
    for number, (old, new) in enumerate(zip(saved, here, strict=True)):
        for index, (was, now) in enumerate(zip(old, new, strict=True)):
            if was != now:
                raise CheckpointError(
                    f"{kind} group {number}, parameter {index}: {was} in the snapshot, {now} here"
                )
    groups = [{key: _decode(value) for key, value in group.items()} for group in state["groups"]]
    entries: dict[int, dict[str, Any]] = {
        int(index): {name: _decode(value) for name, value in values.items()}
        for index, values in state["values"].items()
    }
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        owner, name = key.split(".", 1)
        # cloned, since load_state_dict keeps the tensor itself and the next step would change the caller's
        if owner.startswith("group"):
            groups[int(owner.removeprefix("group"))][name] = tensor.clone()
        else:
            entries.setdefault(int(owner), {})[name] = _laid_out_as(parameters[int(owner)], tensor)
    optimizer.load_state_dict({"state": entries, "param_groups": groups})


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A copy with the parameter's strides: a fused step pairs elements as they lie in memory (channels_last)."""
    if tensor.shape != parameter.shape:
        return tensor.clone()
    return torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def _encode(value: Any, what: str) -> Any:
    # JSON has no tuples, and optimisers unpack theirs (betas)
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, what) for item in value]}
    if isinstance(value, list):
        return [_encode(item, what) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"optimiser {what} is a {type(value).__name__}; only tensors and JSON values can be saved"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_decode(item) for item in value["tuple"])
    return [_decode(item) for item in value] if isinstance(value, list) else value
