"""AdamW whose moments are kept in bfloat16: half of its memory, for networks that only just fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 1 << 22
"""Elements worked on at once, which bounds the float32 copies."""


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) over fp32 weights with stochastically rounded bf16 moments.

    Rounding to nearest would stop the second moment: with beta2 = 0.999 it moves by a thousandth of itself, less than
    half of bfloat16's spacing. The rounding's draws follow from the step and the weight's number, so that ranks that
    hold copies round alike, and a resumed run as one that was never interrupted.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the weights that have gradients; `closure` is not called."""
        number = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                number += 1
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group, number)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():  # torch casts them to the weights' precision, without loss
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        step, (beta1, beta2) = state["step"], group["betas"]
        if gradient.stride() != parameter.stride():
            gradient = torch.empty_like(parameter).copy_(gradient)
        # torch's generators on the CPU keep 32 bits of a seed: odd factors spread both numbers over all of them
        seed = (step * 0x9E3779B1 + number * 0x85EBCA77) & 0xFFFFFFFF
        draws = torch.Generator(parameter.device).manual_seed(seed)
        # all four lie in memory alike, whatever the order of their axes
        flat = [_flat(tensor) for tensor in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])]
        for weight, grad, first, second in zip(*(tensor.split(_CHUNK) for tensor in flat), strict=True):
            m = first.float().lerp_(grad.float(), 1 - beta1)
            v = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            first.copy_(_rounded(m.clone(), draws))
            second.copy_(_rounded(v.clone(), draws))
            denominator = v.div_(1 - beta2**step).sqrt_().add_(group["eps"])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,))


def _rounded(value: Tensor, draws: torch.Generator) -> Tensor:
    """float32 rounded up or down to bfloat16's grid, on average to itself; overwrites its argument."""
    bits = value.view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=draws)
    return bits.add_(noise).bitwise_and_(-(1 << 16)).view(torch.float32)
