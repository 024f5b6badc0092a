"""What the roles let gradients through, and how micro-batches add up to a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raydistill.diffusion.schedules import EDMSchedule
from raydistill.methods.method import Losses, Query
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser
from raydistill.roles.critic import CriticConfig, CriticTrainer
from raydistill.roles.generator import GeneratorConfig, GeneratorTrainer
from raydistill.roles.teacher import KeptGraphs, TeacherScorer
from raydistill.roles.world import World

NO_COND = Cond({})


class Square(Denoiser):
    """x0 = w x_t^2 and features w x_t^3 on two channels: both change with the sample and with the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = EDMSchedule()
        self.w = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.w * x_t**2

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return torch.cat([self.w * x_t**3, 3 * self.w * x_t**3], dim=1)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return (self.v * features).flatten(1).sum(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def asked(network: Any, want: Any, *, grad: bool = True) -> Query:
    return Query(
        network=network, want=want, x_t=normal(3, 1, 2, 2).requires_grad_(grad), t=torch.ones(3), cond=NO_COND
    )


def cotangent_of(want: str) -> Tensor:
    shapes = {"x0": (3, 1, 2, 2), "logit": (3,), "logit_map": (3, 2, 2), "features": (3, 2, 2, 2)}
    return normal(*shapes[want], seed=1)


def by_hand(want: str, x: Tensor) -> Tensor:
    """J^T cotangent of `Square`'s and `Head`'s formulas at x."""
    cotangent, slope = cotangent_of(want), 3 * 0.7 * x**2
    if want == "x0":
        return 2 * 0.7 * x * cotangent
    if want == "logit":
        return 0.5 * 4 * slope * cotangent.reshape(3, 1, 1, 1)
    if want == "logit_map":
        return 4 / 2 * slope * cotangent[:, None]
    return slope * (cotangent[:, :1] + 3 * cotangent[:, 1:])


@pytest.mark.parametrize("want", ["x0", "logit", "logit_map"])
def test_critics_answers_carry_gradients_to_the_sample_and_none_to_its_weights(want: str) -> None:
    owner = CriticTrainer(Critic(Square(), Head()), CriticConfig(), World(), 10)
    query = asked("critic", want)
    answer = owner.answer(query)
    answer.backward(cotangent_of(want).to(answer.dtype))
    assert query.x_t.grad is not None
    # maps of logits are float32, whatever the network computes in
    torch.testing.assert_close(query.x_t.grad, by_hand(want, query.x_t.detach()), rtol=1e-6, atol=1e-7)
    assert all(p.grad is None and p.requires_grad for p in owner.critic.parameters())
    assert not owner.answer(asked("critic", want, grad=False)).requires_grad


@pytest.mark.parametrize("want", ["x0", "features"])
def test_teachers_answers_carry_gradients_to_the_sample_and_none_to_its_weights(want: str) -> None:
    network = Square()
    scorer = TeacherScorer(network, None)
    query = asked("teacher", want)
    scorer.submit(query).answer().backward(cotangent_of(want))
    assert query.x_t.grad is not None
    torch.testing.assert_close(query.x_t.grad, by_hand(want, query.x_t.detach()), rtol=1e-12, atol=1e-12)
    assert network.w.grad is None
    assert not network.w.requires_grad
    assert not scorer.answer(asked("teacher", want, grad=False)).requires_grad


@pytest.mark.parametrize("want", ["x0", "features"])
def test_kept_graphs_give_the_gradient_of_the_answer_that_was_sent_without_one(want: str) -> None:
    kept = KeptGraphs(TeacherScorer(Square(), None), limit=2)
    query = asked("teacher", want)
    answer = kept.answer(query, "key")
    assert not answer.requires_grad
    found = kept.vjp("key", cotangent_of(want))
    assert found is not None
    torch.testing.assert_close(found, by_hand(want, query.x_t.detach()), rtol=1e-12, atol=1e-12)
    assert kept.vjp("key", cotangent_of(want)) is None


def test_micro_batches_of_the_critic_add_up_to_the_gradient_of_the_mean_loss() -> None:
    owner = CriticTrainer(Critic(Square(), None), CriticConfig(), World(), 10)
    x = normal(6, 1, 2, 2)
    for part in x.chunk(3):
        error = owner.critic(part, torch.ones(2), NO_COND) - part
        owner.backward(Losses({"dsm": error.square().mean(), "other": error.mean()}), 3)
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    error = w * x**2 - x
    (expected,) = torch.autograd.grad(error.square().mean() + error.mean(), w)
    torch.testing.assert_close(owner.critic.denoiser.w.grad, expected, rtol=1e-12, atol=1e-12)


def test_micro_batches_and_terms_of_the_generator_add_up_to_the_gradient_of_the_mean_loss() -> None:
    owner = GeneratorTrainer(Square(), GeneratorConfig(), World(), 10)
    z = normal(6, 1, 2, 2)
    calls = []
    for part in z.chunk(3):
        x = owner.denoiser(part, torch.ones(2), NO_COND)
        leaf = x.detach().requires_grad_()
        losses = Losses({"one": leaf.square().mean(), "other": leaf.sin().mean()})
        owner.backward(x, leaf, losses, 3, lambda: calls.append(owner.denoiser.w.grad))
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = w * z**2
    (expected,) = torch.autograd.grad(x.square().mean() + x.sin().mean(), w)
    torch.testing.assert_close(owner.denoiser.w.grad, expected, rtol=1e-12, atol=1e-12)
    # other networks are released before the generator differentiates itself
    assert len(calls) == 3
    assert calls[0] is None
