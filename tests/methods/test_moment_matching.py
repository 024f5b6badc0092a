"""Moment matching against closed forms (methods.md D.4), with every expectation exact."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from raydistill.diffusion.random import Draws
from raydistill.diffusion.samplers import trailing_times
from raydistill.diffusion.schedules import EDMSchedule, LinearFlowSchedule, NoiseSchedule, VPDiscreteSchedule
from raydistill.diffusion.times import karras_sigma
from raydistill.errors import ConfigError
from raydistill.methods.method import PhaseDraws, RealBatch
from raydistill.methods.moment_matching import MomentMatching, MomentMatchingConfig
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser
from raydistill.models.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from tests.methods.quadrature import NO_COND, AffineDenoiser, FixedDraws, cubature, gauss_hermite, images

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def method_of(
    schedule: NoiseSchedule | None = None, guidance: float = 1.0, **settings: Any
) -> MomentMatching:
    return MomentMatching(MomentMatchingConfig(**settings), schedule or EDMSchedule(), guidance)


def draws(batch: int, phase: str = "generator", first: int = 0, seed: int = 3) -> PhaseDraws:
    return PhaseDraws(Draws(seed), phase, 0, range(first, first + batch), "cpu")


@dataclass(frozen=True)
class Gaussians:
    """Data N(mean, cov) in D dimensions and the generator mean + gain (z_t - mean), at one pair of EDM levels."""

    mean: Tensor
    cov: Tensor
    gain: Tensor
    t: float = 2.0
    s: float = 0.7

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def r(self) -> float:
        return (self.s / self.t) ** 2

    def signal(self, sigma: float) -> Tensor:
        return self.cov + sigma**2 * torch.eye(self.dim, dtype=torch.float64)

    @property
    def h(self) -> Tensor:
        """z_s - mean = h (z_t - mean) + noise."""
        return self.r * torch.eye(self.dim, dtype=torch.float64) + (1 - self.r) * self.gain

    @property
    def cov_z_s(self) -> Tensor:
        noise = self.s**2 * (1 - self.r) * torch.eye(self.dim, dtype=torch.float64)
        return self.h @ self.signal(self.t) @ self.h.T + noise

    @property
    def beta(self) -> Tensor:
        """Slope of E[x~ | z_s]."""
        return self.gain @ self.signal(self.t) @ self.h.T @ torch.linalg.inv(self.cov_z_s)

    @property
    def k_s(self) -> Tensor:
        """Slope of the teacher at s."""
        return self.cov @ torch.linalg.inv(self.signal(self.s))

    def denoiser(self, slope: Tensor) -> AffineDenoiser:
        return AffineDenoiser(EDMSchedule(), slope, self.mean - slope @ self.mean)

    @cached_property
    def real(self) -> RealBatch:
        root = torch.linalg.cholesky(self.cov)
        return RealBatch(images(self.mean + self._noise[0] @ root.T), NO_COND)

    @cached_property
    def draws(self) -> FixedDraws:
        _, forward, link = self._noise
        levels = torch.tensor([[self.t], [self.s]], dtype=torch.float64).expand(2, len(forward))
        return FixedDraws(
            {"forward/noise": images(forward), "posterior/noise": images(link)}, {"pair": levels}
        )

    @property
    def _noise(self) -> tuple[Tensor, ...]:
        return cubature(3 * self.dim).chunk(3, dim=1)

    def sampled(self, method: MomentMatching) -> tuple[Tensor, Tensor]:
        """x~ with its graph, and the gain that it depends on."""
        gain = self.gain.clone().requires_grad_()
        z_t, t = method.generator_input(self.denoiser(gain), NO_COND, (self.dim, 1, 1), self.real, self.draws)
        assert t.eq(self.t).all()
        return images(self.mean + (z_t.flatten(1) - self.mean) @ gain.T), gain

    def generator_gradient(self, method: MomentMatching, critic: Denoiser) -> Tensor:
        """dL/d gain by the method."""
        x, gain = self.sampled(method)
        asked = method.queries(x, NO_COND, self.real, self.draws)
        networks = {"teacher": self.denoiser(self.k_s), "critic": critic}
        answers = {name: networks[q.network](q.x_t, q.t, q.cond) for name, q in asked.items()}
        (gradient,) = torch.autograd.grad(method.generator_losses(x, asked, answers).total(), gain)
        return gradient

    def critic_gradient(self, method: MomentMatching, critic: AffineDenoiser) -> tuple[Tensor, Tensor]:
        """dL/d slope and dL/d intercept by the method."""
        x = self.sampled(method)[0].detach()
        asked = method.critic_queries(x, NO_COND, self.real, self.draws)
        teacher = self.denoiser(self.k_s)
        answers = {name: teacher(q.x_t, q.t, q.cond).detach() for name, q in asked.items()}
        losses = method.critic_losses(Critic(critic, None), x, NO_COND, self.real, self.draws, answers)
        slope, intercept = torch.autograd.grad(losses.total(), (critic.slope, critic.intercept))
        return slope, intercept


def one_dimensional(kappa: float) -> Gaussians:
    return Gaussians(
        torch.tensor([-0.4], dtype=torch.float64),
        torch.tensor([[1.3**2]], dtype=torch.float64),
        torch.tensor([[kappa]], dtype=torch.float64),
    )


def eight_dimensional() -> Gaussians:
    generator = torch.Generator().manual_seed(5)
    root, gain = torch.randn(2, 8, 8, dtype=torch.float64, generator=generator)
    return Gaussians(
        torch.randn(8, dtype=torch.float64, generator=generator),
        root @ root.T / 8 + 0.1 * torch.eye(8, dtype=torch.float64),
        0.4 * torch.eye(8, dtype=torch.float64) + 0.1 * gain,
    )


CASES = {"1-D": one_dimensional(0.8), "8-D": eight_dimensional()}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
regularised = pytest.mark.parametrize("regularised", [True, False], ids=["regularised", "plain"])


def optimum(case: Gaussians, regularised: bool) -> Tensor:
    return (case.beta + case.k_s) / 2 if regularised else case.beta


@cases
@regularised
def test_critics_only_optimum_is_the_conditional_moment_or_half_way_from_it_to_the_teacher(
    case: Gaussians, regularised: bool
) -> None:
    method = method_of(teacher_regularised=regularised, weighting="uniform")
    best = optimum(case, regularised)
    for gradient in case.critic_gradient(method, case.denoiser(best)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)
    off = torch.linspace(-0.3, 0.5, case.dim**2, dtype=torch.float64).reshape(case.dim, case.dim)
    slope, intercept = case.critic_gradient(method, case.denoiser(best + off))
    curvature = (4 if regularised else 2) / case.dim
    torch.testing.assert_close(slope, curvature * off @ case.cov_z_s, **EXACT)
    torch.testing.assert_close(intercept, torch.zeros_like(intercept), **EXACT)


@cases
@regularised
def test_generators_gradient_is_the_moment_gap_through_z_t(case: Gaussians, regularised: bool) -> None:
    method = method_of(teacher_regularised=regularised, weighting="uniform")
    gradient = case.generator_gradient(method, case.denoiser(optimum(case, regularised)))
    gap = (case.beta - case.k_s) * (0.5 if regularised else 1.0)
    torch.testing.assert_close(gradient, gap @ case.h @ case.signal(case.t) / case.dim, **EXACT)


def test_slopes_are_the_specifications_scalar_formulas() -> None:
    kappa, case = 0.8, one_dimensional(0.8)
    c2, v_t = 1.3**2, 1.3**2 + 4
    r = 0.7**2 / 4
    h = r + (1 - r) * kappa
    beta = kappa * h * v_t / (h**2 * v_t + 0.49 * (1 - r))
    k_s = c2 / (c2 + 0.49)
    assert case.beta.item() == pytest.approx(beta, rel=1e-12)
    gradient = case.generator_gradient(
        method_of(weighting="uniform"), case.denoiser((case.beta + case.k_s) / 2)
    )
    assert gradient.item() == pytest.approx(0.5 * (beta - k_s) * h * v_t, rel=1e-9)


def test_generator_rests_at_the_root_between_flow_map_and_identity() -> None:
    def gradient(kappa: float) -> float:
        case = one_dimensional(kappa)
        critic = case.denoiser(optimum(case, regularised=True))
        return case.generator_gradient(method_of(), critic).item()

    low, high = 0.1, 1.0
    assert gradient(low) * gradient(high) < 0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gradient(low) * gradient(middle) > 0 else (low, middle)
    assert low == pytest.approx(0.58512, abs=5e-6)
    c2, v_t, r = 1.69, 5.69, 0.49 / 4
    h = r + (1 - r) * low
    assert low * h * v_t * (c2 + 0.49) == pytest.approx(c2 * (h**2 * v_t + 0.49 * (1 - r)), rel=1e-12)
    posterior_mean, flow_map = c2 / v_t, math.sqrt(c2 / v_t)
    assert (posterior_mean, flow_map) == pytest.approx((0.29701, 0.54499), abs=5e-6)
    assert flow_map < low < 1


@pytest.mark.parametrize("schedule", [EDMSchedule(), VPDiscreteSchedule()], ids=["edm", "vp"])
def test_z_s_has_the_posteriors_mean_and_variance_given_z_t_and_x(schedule: NoiseSchedule) -> None:
    t, s = (2.0, 0.7) if isinstance(schedule, EDMSchedule) else (700.0, 450.0)
    link = images(cubature(3))
    levels = torch.tensor([[t], [s]], dtype=torch.float64)
    a_t, a_s = schedule.alpha(levels).flatten().tolist()
    s_t, s_s = schedule.sigma(levels).flatten().tolist()
    x0, e, x = torch.randn(3, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fixed = FixedDraws(
        {"forward/noise": e.expand(6, 3, 1, 1), "posterior/noise": link}, {"pair": levels.expand(2, 6)}
    )
    real = RealBatch(x0.expand(6, 3, 1, 1), NO_COND)
    z_s = method_of(schedule).queries(x.expand(6, 3, 1, 1), NO_COND, real, fixed)["fake"].x_t
    r = (a_t / s_t) ** 2 * (s_s / a_s) ** 2
    mean = r * a_s / a_t * (a_t * x0 + s_t * e) + (1 - r) * a_s * x
    torch.testing.assert_close(z_s.mean(0), mean, **EXACT)
    deviation = (z_s - mean).flatten(1)
    variance = s_s**2 * (1 - r) * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(deviation.T @ deviation / 6, variance, **EXACT)


@pytest.mark.parametrize("schedule", [EDMSchedule(), VPDiscreteSchedule()], ids=["edm", "vp"])
def test_an_exact_posterior_sampler_gets_no_signal_and_leaves_the_critic_at_the_teacher(
    schedule: NoiseSchedule,
) -> None:
    t, s = (2.0, 0.7) if isinstance(schedule, EDMSchedule) else (700.0, 450.0)
    mean, c = torch.tensor(-0.4, dtype=torch.float64), 1.3
    teacher = GaussianDenoiser(schedule, mean, torch.tensor(c, dtype=torch.float64))
    data, forward, link, sampling = (images(noise) for noise in cubature(4).chunk(4, dim=1))
    levels = torch.tensor([[t], [s]], dtype=torch.float64).expand(2, 8)
    fixed = FixedDraws({"forward/noise": forward, "posterior/noise": link}, {"pair": levels})
    real = RealBatch(mean + c * data, NO_COND)
    method = method_of(schedule)
    z_t, _ = method.generator_input(teacher, NO_COND, (1, 1, 1), real, fixed)
    edm_t = schedule.edm_sigma(levels[0, 0]).item()
    x = (teacher(z_t, levels[0], NO_COND) + sampling * c * edm_t / math.hypot(c, edm_t)).detach()

    asked = method.queries(x.requires_grad_(), NO_COND, real, fixed)
    z_s = asked["fake"].x_t
    alpha, sigma = schedule.alpha(levels[1, 0]).item(), schedule.sigma(levels[1, 0]).item()
    assert z_s.var(correction=0).item() == pytest.approx((alpha * c) ** 2 + sigma**2, rel=1e-9)
    slope = ((x - mean) * (z_s - alpha * mean)).mean() / z_s.var(correction=0)
    assert slope.item() == pytest.approx(alpha * c**2 / ((alpha * c) ** 2 + sigma**2), rel=1e-9)

    answers = {name: teacher(q.x_t, q.t, q.cond).detach() for name, q in asked.items()}
    (gradient,) = torch.autograd.grad(method.generator_losses(x, asked, answers).total(), x)
    assert gradient.abs().max() == 0
    critic = AffineDenoiser(
        schedule, slope.detach().reshape(1, 1), ((1 - alpha * slope) * mean).detach().reshape(1)
    )
    losses = method.critic_losses(
        Critic(critic, None), x.detach(), NO_COND, real, fixed, {"real": answers["real"]}
    )
    for gradient in torch.autograd.grad(losses.total(), list(critic.parameters())):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)


class Displaced(Denoiser):
    """Another denoiser plus a displacement of its own for each sample of a batch."""

    def __init__(self, inner: Denoiser, batch: int):
        super().__init__()
        self.inner = (inner,)
        self.displacement = torch.nn.Parameter(torch.zeros(batch, 2, 1, 1, dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.inner[0](x_t, t, cond) + self.displacement


def test_on_a_mixture_the_teacher_is_the_critics_optimum_for_posterior_samples() -> None:
    t, s = 1.2, 0.9
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[0.6, 0.0], [-0.5, 0.4], [0.1, -0.7]], dtype=torch.float64)
    stds = torch.tensor([0.3, 0.5, 0.4], dtype=torch.float64)
    points, weights = gauss_hermite(4, 16)
    data, noise = points.split(2, dim=1)
    x0 = images((means[:, None] + stds[:, None, None] * data).flatten(0, 1))
    weights = (shares[:, None] * weights).flatten()
    noise = images(noise.repeat(3, 1))
    # given x~ = x0, z_s sees the two noises through one sum only, so one direction in their plane is enough
    r = (s / t) ** 2
    fixed = FixedDraws(
        {"forward/noise": math.sqrt(r) * noise, "posterior/noise": math.sqrt(1 - r) * noise},
        {"pair": torch.tensor([[t], [s]], dtype=torch.float64).expand(2, len(x0))},
    )
    teacher = GaussianMixtureDenoiser(EDMSchedule(), shares, images(means), stds)
    method = method_of(teacher_regularised=False, weighting="uniform")
    real = RealBatch(x0, NO_COND)
    query = method.queries(x0, NO_COND, real, fixed)["fake"]
    z_s = query.x_t
    torch.testing.assert_close(z_s, x0 + s * noise, **EXACT)
    critic = Displaced(teacher, len(x0))
    losses = method.critic_losses(Critic(critic, None), x0, NO_COND, real, fixed, {})
    (error,) = torch.autograd.grad(losses.total(), critic.displacement)
    error = error * error.numel() / 2
    torch.testing.assert_close(error, teacher(z_s, query.t, NO_COND) - x0, **EXACT)
    for change in (torch.ones_like(z_s), z_s, z_s**2, z_s.prod(1, keepdim=True), z_s.sin()):
        assert (weights * (error * change).sum((1, 2, 3))).sum().abs() < 1e-7


def test_x_moves_through_the_product_only() -> None:
    method = method_of(weighting="uniform")
    real = RealBatch(torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1)), NO_COND)
    x = (0.7 * real.x0).requires_grad_()
    asked = method.queries(x, NO_COND, real, draws(4))
    assert not any(query.x_t.requires_grad for query in asked.values())
    weight = torch.tensor(2.0, requires_grad=True)
    answers = {"real": weight * x.square(), "fake": weight * x}
    losses = method.generator_losses(x, asked, answers)
    losses.total().backward()
    gap = (2 * x - 2 * x.square()).detach()
    torch.testing.assert_close(x.grad, gap / gap.numel())
    torch.testing.assert_close(losses.terms["moment"].detach(), (x * gap).mean().detach())
    torch.testing.assert_close(losses.scalars["critic/lag"], gap.abs().mean())
    assert weight.grad is None


def test_critics_losses_move_its_own_weights_only() -> None:
    method = method_of()
    real = RealBatch(torch.randn(4, 1, 1, 1, dtype=torch.float64), NO_COND)
    critic, teacher = (one_dimensional(0.5).denoiser(torch.eye(1, dtype=torch.float64)) for _ in range(2))
    x = real.x0.clone().requires_grad_()
    asked = method.critic_queries(x, NO_COND, real, draws(4))
    answers = {name: teacher(q.x_t, q.t, q.cond) for name, q in asked.items()}
    method.critic_losses(Critic(critic, None), x, NO_COND, real, draws(4), answers).total().backward()
    assert critic.slope.grad is not None
    assert x.grad is None
    assert teacher.slope.grad is None


class Recorder(Denoiser):
    """Answers zero and remembers what it was asked."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.x_t, self.t = x_t, t
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("schedule", [EDMSchedule(), VPDiscreteSchedule()], ids=["edm", "vp"])
@pytest.mark.parametrize("variant", ["alternating", "instant"])
def test_every_part_of_an_update_sees_the_same_pair_however_the_batch_is_split(
    schedule: NoiseSchedule, variant: str
) -> None:
    method = method_of(schedule, variant=variant, num_steps=4)
    x0, x = torch.randn(2, 6, 2, 3, 3, generator=torch.Generator().manual_seed(2))

    def seen(first: int, last: int) -> list[Tensor]:
        real, part = RealBatch(x0[first:last], NO_COND), x[first:last]

        def fresh() -> PhaseDraws:
            return draws(last - first, "critic", first)

        critic = Recorder()
        z_t, t = method.generator_input(critic, NO_COND, (2, 3, 3), real, fresh())
        asked = method.queries(part, NO_COND, real, fresh())
        asked_for_critic = method.critic_queries(part, NO_COND, real, fresh())
        method.critic_losses(Critic(critic, None), part, NO_COND, real, fresh(), {"real": part})
        for query in (*asked.values(), *asked_for_critic.values()):
            assert torch.equal(query.x_t, critic.x_t)
            assert torch.equal(query.t, critic.t)
        again = method.generator_input(critic, NO_COND, (2, 3, 3), real, fresh())
        assert torch.equal(again[0], z_t)
        assert (critic.t <= t).all()
        return [z_t, t, critic.x_t, critic.t]

    halves = [torch.cat(parts) for parts in zip(seen(0, 2), seen(2, 6), strict=True)]
    for whole, joined in zip(seen(0, 6), halves, strict=True):
        assert torch.equal(whole, joined)


def test_the_two_phases_and_the_two_noises_of_a_pair_are_independent() -> None:
    method = method_of()
    real = RealBatch(torch.zeros(64, 2, 3, 3), NO_COND)
    noises = []
    for phase in ("generator", "critic"):
        z_t, t = method.generator_input(Recorder(), NO_COND, (2, 3, 3), real, draws(64, phase))
        query = method.queries(real.x0, NO_COND, real, draws(64, phase))["fake"]
        t, s = (level.reshape(-1, 1, 1, 1) for level in (t, query.t))
        r = (s / t) ** 2
        noises += [z_t / t, (query.x_t - r * z_t) / (s * (1 - r).sqrt())]
    correlations = torch.corrcoef(torch.stack([noise.flatten() for noise in noises]))
    assert (correlations - torch.eye(4)).abs().max() < 0.1


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_pairs_are_at_most_one_step_apart_and_begin_at_the_top_as_the_sampler_does(k: int) -> None:
    schedule = EDMSchedule()
    method = method_of(schedule, num_steps=k)
    n = 4000
    real = RealBatch(torch.zeros(n, 1, 1, 1), NO_COND)
    _, t = method.generator_input(Recorder(), NO_COND, (1, 1, 1), real, draws(n))
    s = method.queries(real.x0, NO_COND, real, draws(n))["fake"].t

    def unit(sigma: Tensor) -> Tensor:
        low, high = schedule.sigma_min ** (1 / 7), schedule.sigma_max ** (1 / 7)
        return (sigma.double() ** (1 / 7) - low) / (high - low)

    step = unit(t) - unit(s)
    assert step.min() >= 0
    assert 0.97 / k < step.max() <= 1 / k + 1e-6
    assert unit(s).mean().item() == pytest.approx(0.5, abs=0.02)
    # t is 1 where s + dt passes it, that is with probability 1 / 2k
    assert (t == method.sampling_times[0]).float().mean().item() == pytest.approx(1 / (2 * k), abs=0.03)


def test_sampling_times_are_even_in_unit_time() -> None:
    assert method_of(num_steps=1).sampling_times == (80.0,)
    assert method_of(num_steps=2).sampling_times == pytest.approx((80.0, 2.515), abs=1e-3)
    u = torch.tensor([1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert method_of(num_steps=8).sampling_times == pytest.approx(karras_sigma(u, 0.002, 80.0, 7.0).tolist())
    for k in (1, 2, 4, 8):
        assert list(method_of(VPDiscreteSchedule(), num_steps=k).sampling_times) == trailing_times(k)


@pytest.mark.parametrize("schedule", [EDMSchedule(), VPDiscreteSchedule()], ids=["edm", "vp"])
@pytest.mark.parametrize("k", [1, 4])
def test_samples_come_from_the_ancestral_chain(schedule: NoiseSchedule, k: int) -> None:
    method = method_of(schedule, num_steps=k)
    generator = GaussianDenoiser(
        schedule, torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    )
    start, *noise = torch.randn(
        k, 5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    samples = method.sample(generator, NO_COND, start, lambda number: noise[number])
    times = torch.tensor(method.sampling_times)
    alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    z = start * (80 if isinstance(schedule, EDMSchedule) else 1)
    for i in range(k):
        x = generator(z, times[i].expand(5), NO_COND)
        if i + 1 < k:
            r = (alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])) ** 2
            mean = r * alpha[i + 1] / alpha[i] * z + (1 - r) * alpha[i + 1] * x
            z = mean + sigma[i + 1] * math.sqrt(1 - r) * noise[i]
    torch.testing.assert_close(samples, x.detach(), **EXACT)
    assert not samples.requires_grad


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [("edm", lambda s: s**-2 + 4), ("snr", lambda s: s**-2), ("uniform", lambda s: s**0),
     ("truncated_snr", lambda s: (s**-2).clamp(min=1))],
)  # fmt: skip
def test_each_sample_is_weighted_by_the_signal_in_z_s(weighting: str, expected: Any) -> None:
    method = method_of(weighting=weighting)
    real = RealBatch(torch.zeros(64, 1, 1, 1, dtype=torch.float64), NO_COND)
    x = torch.linspace(1, 2, 64, dtype=torch.float64).reshape(-1, 1, 1, 1).requires_grad_()
    asked = method.queries(x, NO_COND, real, draws(64))
    weight = expected(asked["fake"].t.double()).reshape(-1, 1, 1, 1)
    answers = {"fake": torch.ones_like(x), "real": torch.zeros_like(x)}
    (gradient,) = torch.autograd.grad(method.generator_losses(x, asked, answers).total(), x)
    torch.testing.assert_close(gradient, weight / 64)
    losses = method.critic_losses(
        Critic(Recorder(), None), x.detach(), NO_COND, real, draws(64), {"real": 3 * x.detach()}
    )
    torch.testing.assert_close(losses.terms["dsm"], (weight * x.detach() ** 2).mean())
    torch.testing.assert_close(losses.terms["teacher"], (weight * 9 * x.detach() ** 2).mean())


def test_needs_and_work_are_the_variants() -> None:
    cost = {"encoder_share": 0.4, "backward": 2.0, "guided": True}
    method = method_of(guidance=3.0)
    real = RealBatch(torch.zeros(2, 1, 1, 1), NO_COND)
    asked = method.queries(real.x0, NO_COND, real, draws(2))
    for query in (asked["real"], method.critic_queries(real.x0, NO_COND, real, draws(2))["real"]):
        assert (query.network, query.want, query.guidance_scale) == ("teacher", "x0", 3.0)
    assert (asked["fake"].network, asked["fake"].want, asked["fake"].guidance_scale) == ("critic", "x0", 1.0)
    assert method.needs.teacher_for_critic
    assert method.work(**cost).teacher_for_critic == method.work(**cost).teacher_answer == 2  # type: ignore[arg-type]

    plain = method_of(teacher_regularised=False)
    assert plain.critic_queries(real.x0, NO_COND, real, draws(2)) == {}
    assert not plain.needs.teacher_for_critic

    instant = method_of(variant="instant")
    (query,) = instant.queries(real.x0, NO_COND, real, draws(2)).values()
    assert (query.network, query.want) == ("critic", "tangent")
    assert (instant.needs.teacher, instant.needs.critic, instant.needs.instant_critic) == (
        "none",
        "score",
        "adam",
    )
    assert instant.critic_queries(real.x0, NO_COND, real, draws(2)) == {}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_steps": 0}, r"method\.num_steps=0 must lie in 1\.\.64"),
        ({"num_steps": 65}, r"method\.num_steps=65 must lie in 1\.\.64"),
        ({"sigma_data": 0.0}, r"method\.sigma_data=0\.0 must be positive"),
        ({"critic_updates_per_generator": 0}, r"method\.critic_updates_per_generator=0 must be at least 1"),
        (
            {"variant": "instant", "critic_updates_per_generator": 2},
            r"method\.critic_updates_per_generator=2 must be 1 with method\.variant=instant",
        ),
        ({"variant": "instant", "teacher_regularised": False}, r"method\.teacher_regularised=false"),
        ({"preconditioner": "identity"}, r"method\.preconditioner=identity has no meaning"),
    ],
)
def test_settings_that_can_not_work_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        MomentMatchingConfig(**settings)


def test_schedules_and_guidance_that_can_not_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"not for LinearFlowSchedule \(teacher\.path\)"):
        method_of(LinearFlowSchedule())
    with pytest.raises(
        ConfigError, match=r"teacher\.guidance_scale=2\.0 must be 1 with method\.variant=instant"
    ):
        method_of(guidance=2.0, variant="instant")
    with pytest.raises(ConfigError, match=r"method\.num_steps=8 is more than"):
        method_of(VPDiscreteSchedule(num_train_timesteps=4, beta_start=0.1, beta_end=0.5), num_steps=8)
