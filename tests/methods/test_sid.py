"""SiD, SiD-LSG and SiDA against closed forms (methods.md D.0, D.1, D.3, D.12), in float64."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raydistill.diffusion.random import Draws
from raydistill.diffusion.schedules import (
    EDMSchedule,
    LinearFlowSchedule,
    NoiseSchedule,
    VPDiscreteSchedule,
    expand,
)
from raydistill.diffusion.times import TimeSampler
from raydistill.errors import ConfigError
from raydistill.methods.dmd2 import DMD2, DMD2Config
from raydistill.methods.method import PhaseDraws, Query, RealBatch
from raydistill.methods.sid import (
    SiD,
    SiDConfig,
    gan_loss_of_critic,
    gan_loss_of_generator,
    sid_loss,
    sid_weight,
)
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser, frozen_weights
from raydistill.models.diffusers_hub import random_pixel_pipeline
from raydistill.models.gaussian import AffineGenerator, GaussianDenoiser, GaussianMixtureDenoiser

NO_COND = Cond({})
LEVELS = [(EDMSchedule(), 0.3), (EDMSchedule(), 2.0), (VPDiscreteSchedule(), 500.0)]
"""(schedule, t); Stable Diffusion's t = 500 has sigma/alpha 1.6."""
LEVEL_IDS = ["edm-0.3", "edm-2", "vp-500"]
ALPHAS = [0.5, 1.0, 1.2, 0.0, -0.5]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


GAUSSIANS = {
    # generator b + a z, data N(m, c^2), one number for each dimension
    "1-d": (vector(0.7), vector(0.4), vector(-0.2), vector(1.3)),
    "8-d": (
        vector(0.7, 0.3, 1.6, 0.9, 0.5, 1.1, 0.2, 2.0),
        vector(0.4, -0.6, 0.1, 0.0, 1.2, -0.3, 0.8, -1.0),
        vector(-0.2, -0.6, 0.5, 0.9, -0.4, 0.3, 0.0, 0.7),
        vector(1.3, 0.3, 0.8, 0.4, 1.0, 0.6, 0.9, 1.5),
    ),
}
"""(a, b, m, c)"""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def draws(batch: int, step: int = 0, phase: str = "test", seed: int = 3) -> PhaseDraws:
    return PhaseDraws(Draws(seed), phase, step, range(batch), "cpu")


class Nodes(PhaseDraws):
    """Nodes of a cubature formula in the place of random noise, at one noise level."""

    def __init__(self, noise: Tensor, t: float, step: int = 0):
        super().__init__(Draws(0), "test", step, range(len(noise)), "cpu")
        self._noise, self._t = noise, t

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        return self._noise.expand(-1, *shape)

    def times(self, name: str, sampler: TimeSampler) -> Tensor:
        return torch.full((self.batch_size,), self._t, dtype=torch.float64)


def gauss_hermite(dims: int, order: int) -> tuple[Tensor, Tensor]:
    """Nodes [N, dims] of independent standard normals and their weights [N]."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    grid = torch.tensor(list(product(nodes, repeat=dims)))
    return grid, torch.tensor(list(product(weights / weights.sum(), repeat=dims))).prod(1)


def frozen(denoiser: Denoiser) -> Denoiser:
    return denoiser.requires_grad_(False)


def gaussian(schedule: NoiseSchedule, mean: Tensor, std: Tensor) -> Denoiser:
    """Of samples [B, D, 1, 1]."""
    return frozen(GaussianDenoiser(schedule, mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)))


def mixture(schedule: NoiseSchedule, weights: Tensor, means: Tensor, stds: Tensor) -> Denoiser:
    return frozen(GaussianMixtureDenoiser(schedule, weights, means.reshape(len(weights), -1, 1, 1), stds))


def ask(queries: Mapping[str, Query], teacher: Denoiser, critic: Denoiser) -> dict[str, Tensor]:
    networks = {"teacher": teacher, "critic": critic}
    return {name: networks[q.network](q.x_t, q.t, q.cond) for name, q in queries.items()}


def gradients(value: Tensor, *inputs: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs)])


class Affine:
    """The oracle of D.3 for generators b + a z: the Fisher divergence F(a, b), also with x_t's law held at (a0, b0)."""

    def __init__(self, schedule: NoiseSchedule, t: float, a: Tensor, b: Tensor, m: Tensor, c: Tensor):
        self.a, self.b, self.m = a, b, m
        self.s2 = float(schedule.edm_sigma(vector(t))) ** 2
        self.kp = c**2 / (c**2 + self.s2)

    def kq(self, a: Tensor) -> Tensor:
        return a**2 / (a**2 + self.s2)

    def fisher(self, a: Tensor, b: Tensor, held: bool = False) -> Tensor:
        a0, b0 = (a.detach(), b.detach()) if held else (a, b)
        gap = self.kp - self.kq(a)
        offset = (1 - self.kp) * self.m + gap * b0 - (1 - self.kq(a)) * b
        return (gap**2 * (a0**2 + self.s2) + offset**2).sum()

    def gradient(self, alpha: float) -> Tensor:
        """d E L_alpha / d(a, b): affine in alpha through its values at 1/2 and 1."""
        a, b = self.a.clone().requires_grad_(), self.b.clone().requires_grad_()
        half = 0.5 * gradients(self.fisher(a, b), a, b)
        one = 0.5 * gradients(self.fisher(a, b, held=True), a, b)
        return 2 * (1 - alpha) * half + (2 * alpha - 1) * one


def expected_loss(
    method: SiD,
    t: float,
    a: Tensor,
    b: Tensor,
    teacher: Denoiser,
    critic: Denoiser,
    *,
    detached: bool = False,
) -> Tensor:
    """E over (z, e) of the unweighted loss, through the method's own queries, by Gauss-Hermite quadrature.

    Loss and denoisers treat the dimensions one by one, so all of them may share the nodes of a single one.
    """
    nodes, weights = gauss_hermite(2, 20)
    z, e = nodes[:, :1, None, None], nodes[:, 1:, None, None]
    x = b.reshape(-1, 1, 1) + a.reshape(-1, 1, 1) * z
    queries = method.queries(x.detach() if detached else x, NO_COND, None, Nodes(e, t))
    answers = ask(queries, teacher, critic)
    return (weights * sid_loss(x, answers["real"], answers["fake"], method.config.alpha)).sum()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("schedule", "t"), LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("dims", GAUSSIANS)
def test_gaussian_loss_is_one_minus_alpha_times_the_fisher_divergence_and_its_gradient_d3s_combination(
    dims: str, schedule: NoiseSchedule, t: float, alpha: float
) -> None:
    a0, b0, m, c = GAUSSIANS[dims]
    oracle = Affine(schedule, t, a0, b0, m, c)
    method = SiD(SiDConfig(alpha=alpha), schedule, 1.0)
    a, b = a0.clone().requires_grad_(), b0.clone().requires_grad_()
    value = expected_loss(method, t, a, b, gaussian(schedule, m, c), gaussian(schedule, b0, a0))
    torch.testing.assert_close(value, (1 - alpha) * oracle.fisher(a0, b0), rtol=1e-9, atol=1e-9)
    found = gradients(value, a, b)
    torch.testing.assert_close(found, oracle.gradient(alpha), rtol=1e-9, atol=1e-9)
    # the same, written out (D.3)
    kp, kq = oracle.kp, oracle.kq(a0)
    at = {
        0.5: -((1 - kp) ** 2) * (m - b0),
        1.0: -(1 - kq) * (1 - kp) * (m - b0),
        0.0: (1 - kp) * (m - b0) * ((1 - kq) - 2 * (1 - kp)),
    }
    if alpha in at:
        torch.testing.assert_close(found[len(a0) :], at[alpha], rtol=1e-9, atol=1e-9)
    # the oracle's F is that of D.3
    divergence = (kp - kq) ** 2 * (a0**2 + oracle.s2) + ((1 - kp) * (m - b0)) ** 2
    torch.testing.assert_close(oracle.fisher(a0, b0), divergence.sum(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("schedule", "t"), LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("dims", GAUSSIANS)
def test_with_x_t_detached_the_gradient_is_dmds_and_not_sids(
    dims: str, schedule: NoiseSchedule, t: float, alpha: float
) -> None:
    a0, b0, m, c = GAUSSIANS[dims]
    oracle = Affine(schedule, t, a0, b0, m, c)
    method = SiD(SiDConfig(alpha=alpha), schedule, 1.0)
    a, b = a0.clone().requires_grad_(), b0.clone().requires_grad_()
    networks = gaussian(schedule, m, c), gaussian(schedule, b0, a0)
    found = gradients(expected_loss(method, t, a, b, *networks, detached=True), a, b)
    degenerate = torch.cat([(oracle.kq(a0) - oracle.kp) * a0, -(1 - oracle.kp) * (m - b0)])
    torch.testing.assert_close(found, degenerate, rtol=1e-9, atol=1e-9)
    # D.2: sigma^2 times the gradient of KL(q || p), whatever alpha
    a2, b2 = a0.clone().requires_grad_(), b0.clone().requires_grad_()
    vp, vq = c**2 + oracle.s2, a2**2 + oracle.s2
    kl = 0.5 * (torch.log(vp / vq) + (vq + (b2 - m) ** 2) / vp - 1).sum()
    torch.testing.assert_close(found, oracle.s2 * gradients(kl, a2, b2), rtol=1e-9, atol=1e-9)
    assert (found - oracle.gradient(alpha)).norm() > 0.05 * found.norm()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_mixture_gradient_is_that_of_the_fisher_divergence_by_other_quadrature(alpha: float) -> None:
    schedule, sigma = EDMSchedule(), 1.5
    law = vector(0.5, 0.2, 0.3)
    data = mixture(schedule, law, torch.stack([vector(0.9, -0.3), vector(-0.5, 0.6), vector(0.1, -0.8)]),
                   vector(0.6, 0.9, 0.7))  # fmt: skip
    starts, widths = (
        torch.stack([vector(0.3, 0.5), vector(-0.6, -0.2), vector(0.7, -0.4)]),
        vector(0.5, 0.8, 0.6),
    )
    share = vector(0.4, 0.35, 0.25)
    a0, b0 = vector(0.8), vector(0.2, -0.1)

    def of_generator(a: Tensor, b: Tensor) -> Denoiser:
        """Exact denoiser of b + a (start_k + width_k z) with component k drawn by its share."""
        return mixture(schedule, share, b + a * starts, a * widths)

    a, b = a0.clone().requires_grad_(), b0.clone().requires_grad_()
    method = SiD(SiDConfig(alpha=alpha), schedule, 1.0)
    critic = of_generator(a0, b0)
    nodes, weights = gauss_hermite(4, 16)
    z, e = nodes[:, :2], nodes[:, 2:]
    value = torch.zeros((), dtype=torch.float64)
    for k in range(3):
        x = (b + a * (starts[k] + widths[k] * z))[..., None, None]
        answers = ask(method.queries(x, NO_COND, None, Nodes(e[..., None, None], sigma)), data, critic)
        value = value + share[k] * (weights * sid_loss(x, answers["real"], answers["fake"], alpha)).sum()

    nodes2, weights2 = gauss_hermite(2, 60)
    t = torch.full((len(nodes2),), sigma, dtype=torch.float64)

    def fisher(a: Tensor, b: Tensor, a_held: Tensor, b_held: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for k in range(3):
            spread = ((a_held * widths[k]) ** 2 + sigma**2).sqrt()
            y = (b_held + a_held * starts[k] + spread * nodes2)[..., None, None]
            apart = data(y, t, NO_COND) - of_generator(a, b)(y, t, NO_COND)
            total = total + share[k] * (weights2 * apart.square().flatten(1).sum(1)).sum()
        return total

    a2, b2 = a0.clone().requires_grad_(), b0.clone().requires_grad_()
    half = 0.5 * gradients(fisher(a2, b2, a2, b2), a2, b2)
    held = 0.5 * gradients(fisher(a2, b2, a0, b0), a2, b2)
    expected = 2 * (1 - alpha) * half + (2 * alpha - 1) * held
    torch.testing.assert_close(value.detach(), (1 - alpha) * fisher(a0, b0, a0, b0), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gradients(value, a, b), expected, rtol=1e-7, atol=1e-9)
    assert (half - held).norm() > 0.05 * half.norm()  # or the test could not tell alphas apart


@pytest.mark.parametrize("alpha", ALPHAS)
def test_generator_equal_to_the_teacher_gets_zero_signal_at_every_sample(alpha: float) -> None:
    schedule = VPDiscreteSchedule()
    method = SiD(SiDConfig(alpha=alpha), schedule, 1.0)
    a, b, _, _ = GAUSSIANS["8-d"]
    x = (b + a * normal(16, 8))[..., None, None].requires_grad_()
    queries = method.queries(x, NO_COND, None, draws(16))
    losses = method.generator_losses(x, queries, ask(queries, *[gaussian(schedule, b, a)] * 2))
    assert losses.total().item() == 0.0
    assert float(torch.autograd.grad(losses.total(), x)[0].abs().max()) == 0.0
    # an equal distribution that is written in another way
    one = mixture(schedule, vector(0.3, 0.7), vector(0.4, 0.4), vector(0.7, 0.7))
    x1 = (0.4 + 0.7 * normal(16, 1, 1, 1)).requires_grad_()
    queries = method.queries(x1, NO_COND, None, draws(16))
    losses = method.generator_losses(
        x1, queries, ask(queries, gaussian(schedule, vector(0.4), vector(0.7)), one)
    )
    assert float(torch.autograd.grad(losses.total(), x1)[0].abs().max()) < 1e-9


def test_where_the_networks_agree_at_a_point_only_the_loss_vanishes_but_not_its_gradient() -> None:
    # f_p = f_q = 0 at x_t = 0, with other slopes: w (kp - kq) (f_p - x_g) remains, which needs both input gradients
    schedule, sigma = EDMSchedule(), 1.0
    method = SiD(SiDConfig(generator_loss_scale=1.0), schedule, 1.0)
    x = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64, requires_grad=True)
    queries = method.queries(x, NO_COND, None, Nodes(-x.detach() / sigma, sigma))
    zero = vector(0.0)
    answers = ask(queries, gaussian(schedule, zero, vector(2.0)), gaussian(schedule, zero, vector(1.0)))
    loss = method.generator_losses(x, queries, answers).total()
    assert loss.item() == 0.0
    assert float(torch.autograd.grad(loss, x)[0]) == pytest.approx((4 / 5 - 1 / 2) * -0.7 / 0.7, rel=1e-12)


def three_samples(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    x, real, fake = normal(3, 5, 4, 2, 2, seed=seed)
    return x, real, fake


def test_loss_is_affine_in_alpha_sample_by_sample() -> None:
    x, real, fake = three_samples()
    for n in range(len(x)):
        expected = sum(
            (p - q) * ((p - g) - 1.2 * (p - q))
            for g, p, q in zip(
                x[n].flatten().tolist(), real[n].flatten().tolist(), fake[n].flatten().tolist(), strict=True
            )
        )
        assert float(sid_loss(x, real, fake, 1.2)[n]) == pytest.approx(expected, rel=1e-12)
    for alpha in (0.5, 1.2, -0.7):
        between = (1 - alpha) * sid_loss(x, real, fake, 0.0) + alpha * sid_loss(x, real, fake, 1.0)
        torch.testing.assert_close(sid_loss(x, real, fake, alpha), between, rtol=1e-12, atol=1e-12)
    # at alpha 1 the teacher's distance to the sample becomes the critic's
    product_form = ((real - fake) * (fake - x)).flatten(1).sum(1)
    torch.testing.assert_close(sid_loss(x, real, fake, 1.0), product_form, rtol=1e-12, atol=1e-12)


def test_weight_is_one_over_the_mean_distance_of_sample_and_teacher_without_a_graph() -> None:
    x, real, _ = three_samples()
    real[2] = x[2]
    real[3] = x[3] + 3e-6
    weight = sid_weight(x.requires_grad_(), real.requires_grad_())
    assert not weight.requires_grad
    for n in (0, 1, 4):
        expected = x[n].numel() / (x[n] - real[n]).abs().sum()
        torch.testing.assert_close(weight[n], expected.detach(), rtol=1e-12, atol=0.0)
    assert weight[2:4].tolist() == pytest.approx([1e5, 1e5], rel=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
@pytest.mark.parametrize("schedule", [VPDiscreteSchedule(), EDMSchedule()], ids=["vp", "edm"])
def test_gradient_at_the_sample_is_that_of_the_published_cotangents(
    schedule: NoiseSchedule, alpha: float
) -> None:
    # g_x = -w d + a (J_p^T cot_p + J_q^T cot_q), methods.md 2.3; the Jacobians of Gaussian denoisers are diagonal
    method = SiD(SiDConfig(alpha=alpha), schedule, 1.0)
    a, b, m, c = GAUSSIANS["8-d"]
    x = normal(6, 8, 1, 1).requires_grad_()
    queries = method.queries(x, NO_COND, None, draws(6))
    answers = ask(queries, gaussian(schedule, m, c), gaussian(schedule, b, a))
    losses = method.generator_losses(x, queries, answers)
    (found,) = torch.autograd.grad(losses.terms["sid"], x)
    real, fake = answers["real"].detach(), answers["fake"].detach()
    w = 1 / (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    d = real - fake
    s2 = expand(schedule.edm_sigma(queries["real"].t), x) ** 2
    kp, kq = (std.reshape(-1, 1, 1) ** 2 / (std.reshape(-1, 1, 1) ** 2 + s2) for std in (c, a))
    cot_p = w * ((real - x.detach()) + (1 - 2 * alpha) * d)
    cot_q = w * (-(real - x.detach()) + 2 * alpha * d)
    # a network's Jacobian is k / a for a k in terms of x_t / a
    expected = 100.0 / 6 * (-w * d + kp * cot_p + kq * cot_q)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    value = 100.0 * (w.flatten() * sid_loss(x.detach(), real, fake, alpha)).mean()
    torch.testing.assert_close(losses.terms["sid"].detach(), value, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(losses.scalars["critic/lag"], d.abs().mean())


def test_queries_carry_the_graph_to_the_sample_and_the_networks_weights_get_none() -> None:
    schedule = VPDiscreteSchedule()
    method = SiD(SiDConfig(guidance_scale_critic=1.5), schedule, 4.5)
    assert (method.needs.teacher, method.needs.critic, method.needs.real_data) == ("vjp", "vjp", False)
    x = normal(5, 1, 1, 1).requires_grad_()
    queries = method.queries(x, NO_COND, None, draws(5))
    assert {n: (q.network, q.want, q.guidance_scale) for n, q in queries.items()} == {
        "real": ("teacher", "x0", 4.5),
        "fake": ("critic", "x0", 1.5),
    }
    assert torch.equal(queries["real"].x_t, queries["fake"].x_t)
    assert torch.equal(queries["real"].t, queries["fake"].t)
    alpha = expand(schedule.alpha(queries["real"].t), x)
    for query in queries.values():
        assert query.x_t.requires_grad
        torch.testing.assert_close(torch.autograd.grad(query.x_t.sum(), x, retain_graph=True)[0], alpha)
    teacher = frozen(GaussianDenoiser(schedule, vector(0.1), vector(0.9)))
    critic = GaussianDenoiser(schedule, vector(0.3), vector(0.6))
    with frozen_weights(critic):
        losses = method.generator_losses(x, queries, ask(queries, teacher, critic))
        losses.total().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert [p.grad for p in (*teacher.parameters(), *critic.parameters())] == [None] * 4
    assert not any(scalar.requires_grad for scalar in losses.scalars.values())


class _Elsewhere(torch.autograd.Function):
    """A network in another process: its answer crosses without a graph, its vector-Jacobian product comes back."""

    @staticmethod
    def forward(ctx: Any, x_t: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            ctx.there = x_t.detach().requires_grad_()
            ctx.answer = network(ctx.there)
        return ctx.answer.detach()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return torch.autograd.grad(ctx.answer, ctx.there, cotangents[0])[0], None


def unet(seed: int) -> Denoiser:
    """Of 3x8x8 pixels, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return frozen(random_pixel_pipeline(8, (8, 16), 1)[0].denoiser)


@pytest.mark.parametrize("gan", [False, True], ids=["sid", "sida"])
def test_wherever_teacher_and_critic_live_losses_and_gradients_are_the_same_bits(gan: bool) -> None:
    teacher, critic = unet(0), Critic(unet(1), None)
    config = SiDConfig(gan_weight_generator=0.01, gan_weight_critic=1.0) if gan else SiDConfig()
    method = SiD(config, teacher.schedule, 1.0)
    cond = Cond({"text": normal(4, 1, 64, seed=2).float()})
    start = normal(4, 3, 8, 8, seed=1).float()

    def run(remote: set[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
        x = start.clone().requires_grad_()
        queries = method.queries(x, cond, None, draws(4))
        answers = {}
        # the runtime takes the critic's answers first where the teacher is elsewhere, else in the queries' order
        for name in sorted(queries, key=lambda n: queries[n].network in remote):
            query = queries[name]

            def network(x_t: Tensor, query: Query = query) -> Tensor:
                if query.network == "teacher":
                    return teacher(x_t, query.t, query.cond)
                asked = critic if query.want == "x0" else critic.logit_map
                return asked(x_t, query.t, query.cond)

            away = query.network in remote
            answers[name] = _Elsewhere.apply(query.x_t, network) if away else network(query.x_t)  # type: ignore[no-untyped-call]
        losses = method.generator_losses(x, queries, answers)
        found = [torch.autograd.grad(term, x, retain_graph=True)[0] for term in losses.terms.values()]
        return {name: term.detach() for name, term in losses.terms.items()}, found

    here, at_x = run(set())
    assert set(here) == ({"sid", "gan_generator"} if gan else {"sid"})
    for remote in ({"teacher"}, {"critic"}, {"teacher", "critic"}):
        values, found = run(remote)
        assert all(torch.equal(values[name], here[name]) for name in here)
        assert all(torch.equal(g, h) for g, h in zip(found, at_x, strict=True))


class Line(Denoiser):
    """intercept + slope x_t, trainable for each dimension; another line where the label is 0, "no label"."""

    def __init__(self, schedule: NoiseSchedule, dims: int):
        super().__init__()
        self.schedule = schedule
        self.line = torch.nn.Parameter(torch.full((2, dims), 0.2, dtype=torch.float64))
        self.null_line = torch.nn.Parameter(torch.full((2, dims), 0.3, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        label = cond.tensors.get("label", torch.ones(len(x_t)))
        intercept, slope = torch.where((label == 0)[:, None, None], self.null_line, self.line).unbind(1)
        return intercept[..., None, None] + slope[..., None, None] * x_t


def no_label(batch_size: int) -> Cond:
    return Cond({"label": torch.zeros(batch_size)})


def quadratic_minimum(loss: Callable[[], Tensor], parameter: Tensor) -> Tensor:
    """Where a quadratic loss has its minimum in one parameter: one Newton step."""
    value = loss()
    (gradient,) = torch.autograd.grad(value, parameter, create_graph=True)
    rows = [torch.autograd.grad(g, parameter, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    step = torch.linalg.solve(torch.stack(rows), gradient.detach().flatten())
    return parameter.detach() - step.reshape(parameter.shape)


SIGNS = torch.tensor(list(product([-1.0, 1.0], repeat=2)), dtype=torch.float64)
"""Nodes (z, e) of equal weight that have the moments of two standard normals up to the second, all that the expectation
of a square of affine functions asks for."""


@pytest.mark.parametrize(("schedule", "t"), LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("dims", GAUSSIANS)
def test_critics_optimum_is_the_generators_own_denoiser(dims: str, schedule: NoiseSchedule, t: float) -> None:
    a, b, _, _ = GAUSSIANS[dims]
    method = SiD(SiDConfig(), schedule, 1.0)
    x = (b + a * SIGNS[:, :1])[..., None, None]
    network = Line(schedule, len(a))

    def loss() -> Tensor:
        nodes = Nodes(SIGNS[:, 1:, None, None], t)
        return method.critic_losses(Critic(network, None), x, NO_COND, None, nodes, {}).terms["dsm"]

    intercept, slope = quadratic_minimum(loss, network.line)
    kq = a**2 / (a**2 + schedule.edm_sigma(vector(t)) ** 2)
    torch.testing.assert_close(slope, kq / schedule.alpha(vector(t)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(intercept, b * (1 - kq), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [VPDiscreteSchedule(), EDMSchedule()], ids=["vp", "edm"])
def test_critic_loss_is_the_sum_of_edms_weighted_error_or_of_the_eps_error_and_dmd2s_but_for_the_mean(
    schedule: NoiseSchedule,
) -> None:
    x, _, noise = three_samples(1)
    t = 2.0 if isinstance(schedule, EDMSchedule) else 300.0
    method = SiD(SiDConfig(critic_loss_scale=3.0), schedule, 1.0)
    network = frozen(GaussianDenoiser(schedule, vector(0.3), vector(0.6)))
    at = Nodes(noise, t)
    loss = method.critic_losses(Critic(network, None), x, NO_COND, None, at, {}).terms["dsm"]
    times = torch.full((5,), t, dtype=torch.float64)
    x_t = schedule.add_noise(x, times, noise)
    x0 = network(x_t, times, NO_COND)
    if isinstance(schedule, EDMSchedule):
        error = (t**2 + 0.5**2) / (t * 0.5) ** 2 * (x0 - x) ** 2
    else:
        alpha, sigma = float(schedule.alpha(vector(t))), float(schedule.sigma(vector(t)))
        error = ((x_t - alpha * x0) / sigma - noise) ** 2
    torch.testing.assert_close(loss, 3.0 * error.sum() / 5, rtol=1e-9, atol=0.0)
    steps = (80.0,) if isinstance(schedule, EDMSchedule) else (999.0,)
    dmd2 = DMD2(DMD2Config(timesteps=steps, gan_weight_generator=0.0, gan_weight_critic=0.0), schedule, 1.0)
    other = dmd2.critic_losses(Critic(network, None), x, NO_COND, None, at, {}).terms["dsm"]
    torch.testing.assert_close(loss, 3.0 * 16 * other, rtol=1e-9, atol=0.0)


class Recorder(Denoiser):
    """Answers zero and remembers what it was asked."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule
        self.asked: list[tuple[Tensor, Tensor, Cond]] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.asked.append((x_t, t, cond))
        return torch.zeros_like(x_t)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.asked.append((x_t, t, cond))
        return x_t


def test_noise_levels_are_karras_below_u_max_and_log_normal_for_edm_and_20_to_979_for_discrete_times() -> (
    None
):
    count, zeros = 20000, torch.zeros(20000, 1, 1, 1)

    def levels(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        method = SiD(SiDConfig(), schedule, 1.0)
        seen = Recorder(schedule)
        method.critic_losses(Critic(seen, None), zeros, NO_COND, None, draws(count), {})
        return method.queries(zeros, NO_COND, None, draws(count))["fake"].t, seen.asked[0][1]

    generator, critic = levels(EDMSchedule())
    u = (generator.double() ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    assert -1e-6 < float(u.min()) < 0.001
    assert 0.799 < float(u.max()) < 0.800001
    assert float(u.mean()) == pytest.approx(0.4, abs=4 * 0.8 / math.sqrt(12 * count))
    log = critic.double().log()
    assert float(log.mean()) == pytest.approx(-1.2, abs=4 * 1.2 / math.sqrt(count))
    assert float(log.std()) == pytest.approx(1.2, rel=4 / math.sqrt(2 * count))
    for t in levels(VPDiscreteSchedule()):
        assert (float(t.min()), float(t.max())) == (20.0, 979.0)
        assert float(t.mean()) == pytest.approx(499.5, abs=4 * 960 / math.sqrt(12 * count))


class ByLabel(Denoiser):
    """Gaussians of labels 1, 2, 3, each with its exact denoiser, and for label 0, "no label", their mixture's."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule
        means, stds = vector(-1.0, 0.2, 1.4), vector(0.5, 0.8, 0.3)
        self.each = [gaussian(schedule, mean, std) for mean, std in zip(means, stds, strict=True)]
        self.all = mixture(schedule, vector(1.0, 1.0, 1.0), means, stds)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        answers = torch.stack([network(x_t, t, cond) for network in (self.all, *self.each)], dim=1)
        return answers[torch.arange(len(x_t)), cond.tensors["label"].long()]


@pytest.mark.parametrize("kappa", [1.0, 1.5, 4.5])
def test_critic_is_trained_in_guided_form(kappa: float) -> None:
    schedule, t = VPDiscreteSchedule(), 500.0
    method = SiD(SiDConfig(guidance_scale_critic_training=kappa, prompt_dropout=0.0), schedule, 1.0)
    cond = Cond({"label": torch.tensor([1.0, 2.0, 3.0, 2.0])})
    x, noise = normal(2, 4, 1, 1, 1, seed=4)
    network = ByLabel(schedule)
    critic = Critic(network, None, null_cond=no_label)
    loss = method.critic_losses(critic, x, cond, None, Nodes(noise, t), {}).terms["dsm"]
    alpha, sigma = float(schedule.alpha(vector(t))), float(schedule.sigma(vector(t)))
    expected = 0.0
    for n, label in enumerate((0, 1, 2, 1)):
        row = (alpha * x[n : n + 1] + sigma * noise[n : n + 1], vector(t), NO_COND)
        given, uncond = (
            float((row[0] - alpha * f(*row)) / sigma) for f in (network.each[label], network.all)
        )
        expected += (uncond + kappa * (given - uncond) - float(noise[n])) ** 2 / 4
    assert float(loss) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kappa", [1.5, 3.0])
def test_guided_critics_optimum_has_the_conditional_branch_kappa_times_nearer_the_unconditional_one(
    kappa: float,
) -> None:
    # D_u + kappa (D_c - D_u) must be the generator's denoiser; both branches learn it, in shares kappa and 1 - kappa
    schedule, t = EDMSchedule(), 2.0
    a, b, _, _ = GAUSSIANS["8-d"]
    method = SiD(SiDConfig(guidance_scale_critic_training=kappa, prompt_dropout=0.0), schedule, 1.0)
    x = (b + a * SIGNS[:, :1])[..., None, None]
    network = Line(schedule, 8)
    cond = Cond({"label": torch.ones(4)})

    def loss() -> Tensor:
        critic = Critic(network, None, null_cond=no_label)
        return method.critic_losses(critic, x, cond, None, Nodes(SIGNS[:, 1:, None, None], t), {}).terms[
            "dsm"
        ]

    kq = a**2 / (a**2 + t**2)
    own = torch.stack([b * (1 - kq), kq])
    null = network.null_line.detach()
    found = quadratic_minimum(loss, network.line)
    torch.testing.assert_close(found, null + (own - null) / kappa, rtol=1e-9, atol=1e-9)
    of_cond, of_null = torch.autograd.grad(loss(), (network.line, network.null_line))
    torch.testing.assert_close(kappa * of_null, (1 - kappa) * of_cond, rtol=1e-9, atol=1e-12)
    assert of_cond.abs().min() > 0


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.0),
        ({"guidance_scale_critic_training": 2.0}, 0.1),
        ({"guidance_scale_critic": 2.0}, 0.1),
        ({"guidance_scale_critic_training": 2.0, "prompt_dropout": 0.3}, 0.3),
    ],
)
def test_guided_critic_sees_a_share_of_samples_without_their_prompts(
    settings: dict[str, float], share: float
) -> None:
    count = 4000
    schedule = VPDiscreteSchedule()
    method = SiD(SiDConfig(**settings), schedule, 2.0)  # type: ignore[arg-type]
    network = Recorder(schedule)
    critic = Critic(network, None, null_cond=no_label)
    zeros, cond = torch.zeros(count, 1, 1, 1), Cond({"label": torch.arange(count) + 1.0})
    method.critic_losses(critic, zeros, cond, None, draws(count), {})
    seen = network.asked[0][2].tensors["label"][:count]
    dropped = seen == 0
    assert torch.equal(seen[~dropped], cond.tensors["label"][~dropped])
    assert float(dropped.double().mean()) == pytest.approx(share, abs=4 * math.sqrt(share / count))
    # another rank's slice of the batch drops the same samples
    method.critic_losses(critic, zeros[:7], Cond({"label": cond.tensors["label"][100:107]}), None,
                         PhaseDraws(Draws(3), "test", 0, range(100, 107), "cpu"), {})  # fmt: skip
    assert torch.equal(network.asked[1][2].tensors["label"][:7], seen[100:107])
    # the generator's update drops none
    queries = method.queries(zeros, cond, None, draws(count))
    assert all(torch.equal(q.cond.tensors["label"], cond.tensors["label"]) for q in queries.values())


def test_guided_critic_without_a_null_condition_is_refused() -> None:
    method = SiD(SiDConfig(guidance_scale_critic_training=2.0), VPDiscreteSchedule(), 2.0)
    critic = Critic(Recorder(method.schedule), None)
    with pytest.raises(ConfigError, match=r"null condition.*\(teacher\.path\)"):
        method.critic_losses(critic, torch.zeros(2, 1, 1, 1), no_label(2), None, draws(2), {})


def sida(**settings: Any) -> SiDConfig:
    return SiDConfig(alpha=1.0, gan_weight_generator=0.01, gan_weight_critic=1.0, **settings)


def bce(logit: float, target: int) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if target else 1 - p)


def test_generators_adversarial_term_couples_the_samples_and_is_mixed_with_half_of_each() -> None:
    schedule = EDMSchedule()
    method = SiD(sida(), schedule, 1.0)
    x, real, fake = three_samples(2)
    logits = torch.tensor(
        [[[12.0, -0.5]], [[3.0, 0.0]], [[-20.0, 1.0]], [[0.3, -2.0]], [[9.9, 2.0]]]
    ).double()
    logits.requires_grad_()
    losses = method.generator_losses(x, {}, {"real": real, "fake": fake, "logit_map": logits})
    flat = logits.detach().flatten().tolist()
    entropy = sum(bce(min(max(logit, -10.0), 10.0), 1) for logit in flat) / 10
    distances = [(x[n] - real[n]).abs().mean().item() for n in range(5)]
    expected = 0.5 * 0.01 * 16 * sum(entropy / distance for distance in distances) / 5
    assert losses.terms["gan_generator"].item() == pytest.approx(expected, rel=1e-9)
    # beyond the clamp nothing is learnt; within it the slope is -sigmoid(-l), with every sample's weight
    (slope,) = torch.autograd.grad(losses.terms["gan_generator"], logits)
    mean_weight = sum(1 / distance for distance in distances) / 5
    for found, logit in zip(slope.flatten().tolist(), flat, strict=True):
        inside = -10 < logit < 10
        right = -0.5 * 0.01 * 16 * mean_weight / 10 / (1 + math.exp(logit)) if inside else 0.0
        assert found == pytest.approx(right, rel=1e-9)
    alone = method.generator_losses(x, {}, {"real": real, "fake": fake}).terms
    assert set(alone) == {"sid"}
    torch.testing.assert_close(losses.terms["sid"], 0.5 * alone["sid"], rtol=1e-12, atol=0.0)
    assert losses.total().item() == pytest.approx(0.5 * alone["sid"].item() + expected, rel=1e-9)
    one_by_one = gan_loss_of_generator(logits.detach(), sid_weight(x, real), 16)
    assert float(one_by_one) == pytest.approx(expected / 0.5 / 0.01, rel=1e-9)


class Channels(GaussianDenoiser):
    """Features are the noised sample, turned by a number of its own so that the discriminator learns too."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__(schedule, vector(0.3), vector(0.6))
        self.turn = torch.nn.Parameter(vector(0.7))

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.turn * x_t


def test_critics_adversarial_term_is_edms_weight_times_half_the_sum_of_two_mean_cross_entropies() -> None:
    schedule = EDMSchedule()
    method = SiD(SiDConfig(gan_weight_generator=0.01, gan_weight_critic=2.5), schedule, 1.0)
    x, real, _ = three_samples(3)
    labels = Cond({"label": torch.arange(5)})
    network = Channels(schedule)
    losses = method.critic_losses(Critic(network, None), x, labels, RealBatch(real, labels), draws(5), {})
    recorder = Recorder(schedule)
    own = Cond({"label": torch.arange(5) + 10})
    again = method.critic_losses(Critic(recorder, None), x, labels, RealBatch(real, own), draws(5), {})
    assert set(losses.terms) == set(again.terms) == {"dsm", "gan_critic"}
    (x_t, t, _), (both, t_both, cond_both) = recorder.asked
    fake_t, real_t = both.chunk(2)
    # one noise, one level: that of the denoising loss
    assert torch.equal(fake_t, x_t)
    torch.testing.assert_close(fake_t - x, real_t - real, rtol=0.0, atol=1e-9)
    assert torch.equal(t_both, torch.cat([t, t]))
    assert cond_both.tensors["label"].tolist() == [*range(5), *range(10, 15)]

    logits = 0.7 * both.mean(1)
    fakes, reals = (half.flatten().tolist() for half in logits.chunk(2))
    entropy = sum(bce(logit, 1) for logit in reals) / 20 + sum(bce(logit, 0) for logit in fakes) / 20
    weights = [(s**2 + 0.25) / (0.5 * s) ** 2 for s in t.tolist()]
    expected = 2.5 * 0.5 * entropy * sum(weights) / 5
    # logits come in float32
    assert losses.terms["gan_critic"].item() == pytest.approx(expected, rel=1e-6)
    # both halves teach it: d BCE(l, y) / dl = sigmoid(l) - y, and a logit is the turn times the sample's mean
    means = both.mean(1).flatten().tolist()
    slopes = [1 / (1 + math.exp(-logit)) - (n >= 20) for n, logit in enumerate(fakes + reals)]
    by_hand = 2.5 * 0.5 * sum(s * m for s, m in zip(slopes, means, strict=True)) / 20 * sum(weights) / 5
    (found,) = torch.autograd.grad(losses.terms["gan_critic"], network.turn)
    assert float(found) == pytest.approx(by_hand, rel=1e-6)
    assert float(losses.scalars["critic/real_accuracy"]) == pytest.approx(sum(r > 0 for r in reals) / 20)
    assert float(losses.scalars["critic/fake_accuracy"]) == pytest.approx(sum(f < 0 for f in fakes) / 20)
    right, wrong = (
        gan_loss_of_critic(sign * -vector(3.0), sign * vector(2.0), vector(1.0)) for sign in (1, -1)
    )
    assert float(right) == pytest.approx((bce(-3.0, 0) + bce(2.0, 1)) / 2, rel=1e-12)
    assert right < wrong


def test_sidas_gates_let_the_critic_learn_first_then_the_generator_then_its_adversarial_term() -> None:
    method = SiD(sida(generator_rest_updates=391, gan_start_update=782), EDMSchedule(), 1.0)
    assert method.needs.real_data
    assert not method.needs.gan_head
    x = torch.zeros(2, 1, 1, 1, requires_grad=True)
    steps = (0, 390, 391, 781, 782, 5000)
    assert [method.generator_rests(u) for u in steps] == [True, True, False, False, False, False]
    asked = ["logit_map" in method.queries(x, NO_COND, None, draws(2, step=u)) for u in steps]
    assert asked == [False, False, False, False, True, True]
    # the discriminator learns from the first update on, which needs real images
    assert all(method.reads_real(u) for u in steps)
    assert [method.gan_on(u) for u in steps] == asked
    real = RealBatch(torch.ones(2, 1, 1, 1), Cond({"label": torch.zeros(2)}))
    critic = Critic(Recorder(method.schedule), None)
    terms = method.critic_losses(critic, x.detach(), real.cond, real, draws(2), {}).terms
    assert set(terms) == {"dsm", "gan_critic"}
    plain = SiD(SiDConfig(), EDMSchedule(), 1.0)
    assert not plain.gan_on(10**6)
    assert not plain.generator_rests(0)


def test_discriminators_logits_are_asked_at_the_score_losss_own_noised_sample() -> None:
    method = SiD(sida(guidance_scale_critic=2.0), VPDiscreteSchedule(), 2.0)
    x = normal(4, 2, 2, 2).float().requires_grad_()
    queries = method.queries(x, NO_COND, None, draws(4))
    logits, fake = queries["logit_map"], queries["fake"]
    assert (logits.network, logits.want) == ("critic", "logit_map")
    assert torch.equal(logits.x_t, fake.x_t)
    assert torch.equal(logits.t, fake.t)
    assert torch.autograd.grad(logits.x_t.sum(), x)[0].abs().min() > 0


def test_generator_starts_from_noise_of_its_level_and_critic_learns_first_one_to_one() -> None:
    noise = normal(4, 1, 2, 2).float()
    edm = SiD(SiDConfig(), EDMSchedule(), 1.0)
    assert torch.equal(edm.pure_noise(noise), 2.5 * noise)
    vp = SiD(SiDConfig(), VPDiscreteSchedule(), 1.0)
    at = vector(625.0)
    assert float(vp.schedule.edm_sigma(at)) == pytest.approx(2.5, abs=0.01)
    torch.testing.assert_close(vp.pure_noise(noise), float(vp.schedule.sigma(at)) * noise)
    for method, t in ((edm, 2.5), (vp, 625.0)):
        assert method.critic_first
        assert method.critic_updates_per_generator == 1
        assert method.sampling_times == (t,)
        generator = AffineGenerator(method.schedule, torch.full((1,), 0.5), torch.ones(1))
        x_in, t_in = method.generator_input(generator, NO_COND, (1, 2, 2), None, draws(4))
        assert torch.equal(x_in, method.pure_noise(draws(4).normal("rollout/noise", (1, 2, 2))))
        assert t_in.tolist() == [t] * 4
        image = method.sample(generator, NO_COND, noise, lambda n: torch.full_like(noise, math.nan))
        assert torch.equal(image, 1 + 0.5 * method.pure_noise(noise))


def test_work_counts_both_branches_of_guidance_and_gradients_to_inputs() -> None:
    plain = SiD(SiDConfig(), EDMSchedule(), 1.0).work(encoder_share=0.4, backward=2.0, guided=False)
    assert (plain.critic_answer, plain.critic_update, plain.teacher_answer) == (2.0, 3.0, 2.0)
    assert (plain.rollout, plain.teacher_for_critic, plain.critic_graphs) == (0.0, 0.0, 1.0)
    kappas = SiDConfig(guidance_scale_critic_training=2.0, guidance_scale_critic=2.0)
    lsg = SiD(kappas, VPDiscreteSchedule(), 2.0).work(encoder_share=0.4, backward=2.0, guided=True)
    assert (lsg.critic_answer, lsg.critic_update, lsg.teacher_answer, lsg.critic_graphs) == (
        4.0,
        6.0,
        4.0,
        2.0,
    )
    gan = SiD(sida(), EDMSchedule(), 1.0).work(encoder_share=0.4, backward=2.0, guided=False)
    assert gan.critic_answer == pytest.approx(2.8)
    assert gan.critic_update == pytest.approx(3 * 1.8)
    assert gan.critic_graphs == pytest.approx(1.8)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"alpha": 2.5}, r"method\.alpha=2\.5 must lie in -1 to 2"),
        ({"alpha": -1.5}, r"method\.alpha=-1\.5"),
        ({"alpha": math.nan}, r"method\.alpha=nan"),
        ({"u_max": 0.0}, r"method\.u_max=0\.0"),
        ({"u_max": 1.2}, r"method\.u_max=1\.2"),
        ({"sigma_init": -2.5}, r"method\.sigma_init=-2\.5"),
        ({"generator_loss_scale": 0.0}, r"method\.generator_loss_scale=0\.0"),
        ({"prompt_dropout": 1.0}, r"method\.prompt_dropout=1\.0"),
        ({"guidance_scale_critic": math.inf}, r"method\.guidance_scale_critic=inf"),
        ({"gan_weight_critic": 1.0}, r"method\.gan_weight_generator and method\.gan_weight_critic must both"),
        ({"gan_weight_generator": -0.01}, r"method\.gan_weight_generator=-0\.01"),
        ({"gan_start_update": -1}, r"method\.gan_start_update=-1"),
        ({"critic_updates_per_generator": 0}, r"method\.critic_updates_per_generator=0"),
    ],
)
def test_settings_that_cant_work_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        SiDConfig(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "settings", "named"),
    [
        (EDMSchedule(), {"sigma_init": 100.0}, r"method\.sigma_init=100\.0 must lie within .* 0\.002 to 80"),
        (VPDiscreteSchedule(), {"init_timestep": 1000.0}, r"method\.init_timestep=1000\.0 must lie within"),
        (VPDiscreteSchedule(num_train_timesteps=500), {}, r"method\.max_timestep=979 .* <= 499"),
        (VPDiscreteSchedule(), {"min_timestep": 990}, r"method\.min_timestep=990"),
        (LinearFlowSchedule(), {}, r"not for LinearFlowSchedule \(teacher\.path\)"),
    ],
)
def test_teacher_whose_schedule_does_not_fit_is_refused(
    schedule: NoiseSchedule, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        SiD(SiDConfig(**settings), schedule, 1.0)
    # what belongs to other teachers' schedules is not looked at
    SiD(SiDConfig(init_timestep=5000.0, max_timestep=5000), EDMSchedule(), 1.0)
    SiD(SiDConfig(sigma_init=500.0), VPDiscreteSchedule(), 1.0)
