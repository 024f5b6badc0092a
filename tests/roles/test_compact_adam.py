"""AdamW with bf16 moments: what rounding to nearest would break, AdamW itself as the measure, exact resumption."""

import copy

import pytest
import torch
from torch import nn

from raydistill.checkpoint import pack_optimizer, unpack_optimizer
from raydistill.roles.compact_adam import CompactAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def test_the_second_moment_of_a_constant_gradient_reaches_its_closed_form() -> None:
    """v_n = g^2 (1 - beta2^n); rounded to nearest it would stop where a thousandth of it is below bf16's spacing."""
    weight = nn.Parameter(torch.zeros(5_000))
    optimizer = CompactAdamW([weight], **SETTINGS)  # type: ignore[arg-type]
    for _ in range(1500):
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg_sq"].dtype == torch.bfloat16
    expected = 4 * (1 - 0.999**1500)
    assert float(state["exp_avg_sq"].float().mean()) == pytest.approx(expected, rel=2e-3)
    nearest = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(1500):
        nearest = (nearest.float() * 0.999 + 0.001 * 4).to(torch.bfloat16)
    assert float(nearest) < 0.75 * expected


def regression(kind: type[torch.optim.Optimizer], steps: int, channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 1, 3))
    if channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = kind(net.parameters(), **SETTINGS)  # type: ignore[call-arg]
    x = torch.randn(16, 3, 8, 8)
    target = x.mean(dim=1, keepdim=True)[..., 2:-2, 2:-2]
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - target).square().mean().backward()
        optimizer.step()
    net.loss = float((net(x) - target).square().mean())  # type: ignore[assignment]
    return net


@pytest.mark.parametrize("channels_last", [False, True])
def test_it_learns_as_adamw_does(channels_last: bool) -> None:
    start = regression(torch.optim.AdamW, 0).loss
    exact = regression(torch.optim.AdamW, 100).loss
    compact = regression(CompactAdamW, 100, channels_last).loss
    assert exact < 0.1 * start  # type: ignore[operator]
    assert compact == pytest.approx(exact, rel=0.15)


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    weight = nn.Parameter(torch.randn(40, 30, generator=torch.Generator().manual_seed(0)))
    optimizer = CompactAdamW([weight], **SETTINGS)  # type: ignore[arg-type]

    def steps(parameter: nn.Parameter, of: CompactAdamW, first: int) -> None:
        for step in range(first, first + 3):
            parameter.grad = torch.randn(40, 30, generator=torch.Generator().manual_seed(step))
            of.step()

    steps(weight, optimizer, 1)
    tensors, state = pack_optimizer(optimizer)
    again = nn.Parameter(weight.detach().clone())
    resumed = CompactAdamW([again], **SETTINGS)  # type: ignore[arg-type]
    unpack_optimizer(resumed, copy.deepcopy(tensors), state)
    assert resumed.state[again]["exp_avg"].dtype == torch.bfloat16
    steps(weight, optimizer, 4)
    steps(again, resumed, 4)
    assert torch.equal(weight, again)
