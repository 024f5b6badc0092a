"""The instant critic: its direction, its forward-mode answers (methods.md D.4b), its snapshots."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from raydistill.diffusion.schedules import EDMSchedule
from raydistill.errors import CheckpointError, ConfigError, TrainingError
from raydistill.methods.method import Losses, Query, RealBatch
from raydistill.methods.moment_matching import MomentMatching, MomentMatchingConfig
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, frozen_weights
from raydistill.models.diffusers_hub import random_pixel_pipeline
from raydistill.roles.critic import CriticConfig
from raydistill.roles.instant_critic import InstantCriticTrainer, Preconditioner
from raydistill.roles.world import World
from raydistill.tracking.names import check_metric_names
from tests.methods.quadrature import NO_COND, AffineDenoiser, FixedDraws, cubature, images

MEAN, C, T, S, KAPPA = -0.4, 1.3, 2.0, 0.7, 0.8
R = (S / T) ** 2
P0, P1 = 0.2, 0.6  # the teacher, right or not
METHOD = MomentMatching(
    MomentMatchingConfig(variant="instant", preconditioner="identity", weighting="uniform"),
    EDMSchedule(),
    1.0,
)
POINTS = cubature(3)


def affine_critic() -> Critic:
    slope, intercept = torch.tensor([[[P1]]], dtype=torch.float64)[0], torch.tensor([P0], dtype=torch.float64)
    return Critic(AffineDenoiser(EDMSchedule(), slope, intercept), None)


def trainer(
    critic: Critic, preconditioner: Preconditioner = "identity", **settings: Any
) -> InstantCriticTrainer:
    return InstantCriticTrainer(critic, CriticConfig(**settings), World(), 10, preconditioner)


class Batch:
    """Samples at some of the cubature's points."""

    def __init__(self, rows: slice = slice(None)):
        data, forward, link = (images(noise) for noise in POINTS[rows].chunk(3, dim=1))
        levels = torch.tensor([[T], [S]], dtype=torch.float64).expand(2, len(data))
        self.draws = FixedDraws({"forward/noise": forward, "posterior/noise": link}, {"pair": levels})
        self.real = RealBatch(MEAN + C * data, NO_COND)
        self.kappa = torch.tensor(KAPPA, dtype=torch.float64, requires_grad=True)
        z_t = self.real.x0 + T * forward
        self.x = MEAN + self.kappa * (z_t - MEAN)
        self.z_s = (R * z_t + (1 - R) * self.x + S * (1 - R) ** 0.5 * link).detach()

    def critic_losses(self, critic: Critic) -> Losses:
        return METHOD.critic_losses(critic, self.x.detach(), NO_COND, self.real, self.draws, {})

    def parameter_gradient(self) -> Tensor:
        """grad_(p0, p1) E(x~ - p0 - p1 z_s)^2, its graph leading to kappa through x~ only."""
        error = self.x - P0 - P1 * self.z_s
        return torch.stack([-2 * error.mean(), -2 * (error * self.z_s).mean()])

    def generator_gradient(self, owner: InstantCriticTrainer) -> float:
        """dL/d kappa by the method."""
        asked = METHOD.queries(self.x, NO_COND, self.real, self.draws)
        answers = {name: owner.answer(query) for name, query in asked.items()}
        losses = METHOD.generator_losses(self.x, asked, answers)
        (gradient,) = torch.autograd.grad(losses.total(), self.kappa, retain_graph=True)
        return gradient.item()


def updated(*batches: Batch) -> InstantCriticTrainer:
    owner = trainer(affine_critic())
    for batch in batches:
        owner.backward(batch.critic_losses(owner.critic), len(batches))
    owner.step(gan_stage=False)
    return owner


def test_generators_gradient_is_a_quarter_of_that_of_the_squared_parameter_gradient() -> None:
    batch = Batch()
    owner = updated(Batch())
    squared = batch.parameter_gradient().square().sum()
    (expected,) = torch.autograd.grad(squared / 4, batch.kappa, retain_graph=True)
    assert abs(expected.item()) > 1e-2
    assert batch.generator_gradient(owner) == pytest.approx(expected.item(), rel=1e-9)


def test_two_batches_estimate_it_without_bias_and_one_batch_for_both_does_not() -> None:
    batches = [Batch(slice(n, n + 1)) for n in range(len(POINTS))]
    exact = Batch().generator_gradient(updated(Batch()))
    owners = [updated(batch) for batch in batches]
    pairs = torch.tensor([[batch.generator_gradient(owner) for batch in batches] for owner in owners])
    assert pairs.mean().item() == pytest.approx(exact, rel=1e-6)
    same = pairs.diagonal().mean().item()
    gradients = [batch.parameter_gradient() for batch in batches]
    biased = torch.stack([gradient.square().sum() for gradient in gradients]).mean() / 4
    biased_slopes = [
        torch.autograd.grad(biased, batch.kappa, retain_graph=True)[0].item() for batch in batches
    ]
    assert same == pytest.approx(sum(biased_slopes), rel=1e-6)
    assert 4 * biased > Batch().parameter_gradient().square().sum() * 1.01
    assert abs(same - exact) > 0.1 * abs(exact)


def test_direction_is_the_whole_batchs_however_it_is_split() -> None:
    whole, split = updated(Batch()), updated(*[Batch(slice(n, n + 2)) for n in (0, 2, 4)])
    for name, nu in whole.optimizer.direction.items():
        torch.testing.assert_close(split.optimizer.direction[name], nu, rtol=1e-12, atol=1e-12)
    nu = torch.cat(
        [whole.optimizer.direction[f"denoiser.{name}"].flatten() for name in ("intercept", "slope")]
    )
    torch.testing.assert_close(nu, -Batch().parameter_gradient().detach())


def test_adams_preconditioner_is_adam_without_momentum_on_weights_that_stand_still() -> None:
    owner = trainer(affine_critic(), "adam", betas=(0.9, 0.8), eps=1e-3)
    start = copy.deepcopy(owner.critic.state_dict())
    reference = [p.detach().clone().requires_grad_() for p in owner.critic.parameters()]
    adam = torch.optim.Adam(reference, lr=1.0, betas=(0.0, 0.8), eps=1e-3)
    for rows in (slice(0, 3), slice(3, 6), slice(1, 4)):
        batch = Batch(rows)
        owner.backward(batch.critic_losses(owner.critic), 1)
        gradients = [p.grad.clone() for p in owner.critic.parameters() if p.grad is not None]
        values = owner.step(gan_stage=False)
        before = [p.detach().clone() for p in reference]
        for p, gradient in zip(reference, gradients, strict=True):
            p.grad = gradient
        adam.step()
        moves = [p.detach() - old for p, old in zip(reference, before, strict=True)]
        for nu, move in zip(owner.optimizer.direction.values(), moves, strict=True):
            torch.testing.assert_close(nu, move)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert values["grad_norm/critic"] == pytest.approx(norm.item())
        assert values["loss/dsm"] == pytest.approx(batch.critic_losses(owner.critic).total().item())
        check_metric_names(values)
    assert owner.optimizer.steps == 3
    for name, weight in owner.critic.state_dict().items():
        assert torch.equal(weight, start[name])
    assert all(p.grad is None for p in owner.critic.parameters())


def unet_critic(dtype: torch.dtype = torch.float64) -> tuple[Critic, Query]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = random_pixel_pipeline(8, (8, 16), 1)[0].copy_denoiser("fp32")
    denoiser.network.to(dtype)
    x_t, e = torch.randn(2, 2, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    cond = Cond({"text": e.mean(1).reshape(2, 1, 64)})
    t = torch.tensor([300.0, 900.0])
    return Critic(denoiser, None), Query(network="critic", want="tangent", x_t=x_t, t=t, cond=cond)


def unet_update(owner: InstantCriticTrainer, query: Query) -> None:
    x0 = owner.critic(query.x_t, query.t, query.cond)
    owner.backward(Losses({"dsm": ((x0 - query.x_t.roll(1)) ** 2).mean()}), 1)
    owner.step(gan_stage=False)


def finite_difference(owner: InstantCriticTrainer, query: Query) -> Tensor:
    norm = torch.stack([nu.norm() for nu in owner.optimizer.direction.values()]).norm().item()
    h = 1e-5 / norm

    def at(step: float) -> Tensor:
        moved = copy.deepcopy(owner.critic)
        with torch.no_grad():
            for name, weight in moved.named_parameters():
                if name in owner.optimizer.direction:
                    weight += step * owner.optimizer.direction[name]
            return moved(query.x_t, query.t, query.cond)

    return (at(h) - at(-h)) / (2 * h)


@pytest.mark.parametrize("preconditioner", ["identity", "adam"])
def test_forward_mode_through_attention_agrees_with_finite_differences(
    preconditioner: Preconditioner,
) -> None:
    critic, query = unet_critic()
    owner = trainer(critic, preconditioner)
    unet_update(owner, query)
    with frozen_weights(owner.critic):
        tangent = owner.answer(query)
    expected = finite_difference(owner, query)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7 * expected.abs().max().item())
    assert not tangent.requires_grad
    assert all(p.grad is None and p.requires_grad for p in owner.critic.parameters())


def test_a_compiled_network_has_a_forward_mode_too() -> None:
    batch = Batch()
    exact = batch.generator_gradient(updated(Batch()))
    owner = trainer(affine_critic())
    owner.critic.denoiser.network.compile(backend="eager")
    owner.backward(batch.critic_losses(owner.critic), 1)
    owner.step(gan_stage=False)
    assert batch.generator_gradient(owner) == pytest.approx(exact, rel=1e-12)


def test_a_channels_last_network_has_a_forward_mode_too() -> None:
    critic, query = unet_critic(torch.float32)
    owner = trainer(critic)
    unet_update(owner, query)
    tangent = owner.answer(query)
    critic.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(
        owner.answer(query), tangent, rtol=1e-4, atol=1e-4 * tangent.abs().max().item()
    )
    unet_update(owner, query)
    torch.testing.assert_close(
        owner.answer(query), tangent, rtol=1e-4, atol=1e-4 * tangent.abs().max().item()
    )


def test_checkpointed_and_bfloat16_networks_have_a_forward_mode_too() -> None:
    critic, query = unet_critic(torch.float32)
    owner = trainer(critic)
    unet_update(owner, query)
    tangent = owner.answer(query)
    critic.denoiser.checkpoint_activations()
    torch.testing.assert_close(owner.answer(query), tangent)
    critic.denoiser.dtype = "bf16"
    torch.testing.assert_close(owner.answer(query), tangent)
    assert critic.denoiser.dtype == "bf16"
    unet_update(owner, query)
    error = (owner.answer(query) - tangent).norm() / tangent.norm()
    assert 0 < error < 0.1


def test_tangent_is_differentiable_where_the_query_asks_for_it() -> None:
    owner = updated(Batch())
    x_t = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    query = Query(network="critic", want="tangent", x_t=x_t, t=torch.ones(1), cond=NO_COND)
    with torch.no_grad():
        tangent = owner.answer(query)
    tangent.sum().backward()
    assert x_t.grad is not None
    torch.testing.assert_close(x_t.grad.flatten(), owner.optimizer.direction["denoiser.slope"].flatten())
    assert all(p.grad is None for p in owner.critic.parameters())


def test_other_queries_are_answered_by_the_teachers_weights() -> None:
    owner = updated(Batch())
    x_t = torch.tensor([[[[1.5]]]], dtype=torch.float64)
    query = Query(network="critic", want="x0", x_t=x_t, t=torch.ones(1), cond=NO_COND)
    assert owner.answer(query).item() == pytest.approx(P0 + P1 * 1.5, rel=1e-12)


def test_what_is_not_finite_stops_before_the_direction_changes() -> None:
    owner = trainer(affine_critic(), "adam")
    owner.backward(Batch().critic_losses(owner.critic), 1)
    owner.step(gan_stage=False)
    tensors, state = copy.deepcopy(owner.save())
    bad = Batch()
    bad.x = bad.x * float("nan")
    owner.backward(bad.critic_losses(owner.critic), 1)
    with pytest.raises(TrainingError, match=r"critic step 1 stopped .* loss/dsm=nan.*lower generator\.lr"):
        owner.step(gan_stage=False)
    after, same = owner.save()
    assert same == state
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert all(p.grad is None for p in owner.critic.parameters())


@pytest.mark.parametrize("preconditioner", ["identity", "adam"])
def test_a_snapshot_brings_back_direction_and_moments(preconditioner: Preconditioner) -> None:
    one, other = (trainer(affine_critic(), preconditioner) for _ in range(2))
    one.backward(Batch(slice(0, 3)).critic_losses(one.critic), 1)
    one.step(gan_stage=False)
    tensors, state = copy.deepcopy(one.save())
    assert {"weights/denoiser.slope", "nu/denoiser.slope"} <= set(tensors)
    other.load(tensors, state)
    batch = Batch()
    assert other.optimizer.steps == 1
    assert (
        other.answer(next(iter(METHOD.queries(batch.x, NO_COND, batch.real, batch.draws).values())))
        .abs()
        .max()
        > 0
    )
    for owner in (one, other):
        owner.backward(Batch(slice(2, 5)).critic_losses(owner.critic), 1)
        owner.step(gan_stage=False)
    for name, nu in one.optimizer.direction.items():
        assert torch.equal(other.optimizer.direction[name], nu)
    if preconditioner == "adam":
        assert not torch.equal(
            tensors["second_moment/denoiser.slope"], other.save()[0]["second_moment/denoiser.slope"]
        )


def test_a_snapshot_of_another_kind_of_critic_is_refused() -> None:
    tensors, state = updated(Batch()).save()
    with pytest.raises(CheckpointError, match=r"preconditioner identity, this run's adam \(method\.variant"):
        trainer(affine_critic(), "adam").load(tensors, state)


def test_queries_that_it_can_not_answer() -> None:
    query = Query(
        network="critic", want="tangent", x_t=torch.zeros(1, 1, 1, 1), t=torch.ones(1), cond=NO_COND
    )
    with pytest.raises(ValueError, match="no direction yet"):
        trainer(affine_critic()).answer(query)
    guided = Query(
        network="critic", want="tangent", x_t=query.x_t, t=query.t, cond=NO_COND, guidance_scale=2.0
    )
    with pytest.raises(ConfigError, match=r"teacher\.guidance_scale=2\.0 must be 1"):
        updated(Batch()).answer(guided)
