"""DMD2 against closed forms (methods.md D.1, D.2, D.8)."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from raydistill.diffusion.random import Draws
from raydistill.diffusion.schedules import EDMSchedule, NoiseSchedule, VPDiscreteSchedule, expand
from raydistill.errors import ConfigError
from raydistill.methods.dmd2 import DMD2, DMD2Config, distribution_matching_gradient
from raydistill.methods.method import PhaseDraws, RealBatch
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser
from raydistill.models.gaussian import AffineGenerator, GaussianDenoiser

NO_COND = Cond({})
A, B, C, M = 0.7, 0.4, 1.3, -0.2  # generator x = B + A z, data N(M, C^2)


def gaussian(schedule: NoiseSchedule, mean: float, std: float) -> GaussianDenoiser:
    return GaussianDenoiser(
        schedule, torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64)
    )


def draws(batch: int, step: int = 0, phase: str = "test", seed: int = 3) -> PhaseDraws:
    return PhaseDraws(Draws(seed), phase, step, range(batch), "cpu")


def no_gan(**settings: object) -> DMD2Config:
    return DMD2Config(gan_weight_generator=0.0, gan_weight_critic=0.0, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("sigma", [0.05, 0.6, 3.0, 40.0])
def test_expected_unnormalised_gradient_is_sigma_squared_times_the_kl_gradient(sigma: float) -> None:
    schedule = EDMSchedule()
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z, e = (torch.tensor(grid).reshape(-1, 1, 1, 1) for grid in map(np.ravel, np.meshgrid(nodes, nodes)))
    weight = torch.tensor(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    a, b = (
        torch.tensor(A, dtype=torch.float64, requires_grad=True),
        torch.tensor(B, dtype=torch.float64, requires_grad=True),
    )
    x = b + a * z
    t = torch.full((len(x),), sigma, dtype=torch.float64)
    x_t = x.detach() + sigma * e
    fake, real = (gaussian(schedule, *law)(x_t, t, NO_COND) for law in ((B, A), (M, C)))
    # without its normaliser
    g = distribution_matching_gradient(x.detach(), real, fake) * (x.detach() - real).abs()
    field = (weight.reshape(-1, 1, 1, 1) * g * x).sum()
    ga, gb = torch.autograd.grad(field, (a, b))

    a2, b2 = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (A, B))
    vp, vq = C**2 + sigma**2, a2**2 + sigma**2
    kl = 0.5 * (torch.log(vp / vq) + (vq + (b2 - M) ** 2) / vp - 1)
    ka, kb = torch.autograd.grad(sigma**2 * kl, (a2, b2))
    torch.testing.assert_close(torch.stack([ga, gb]), torch.stack([ka, kb]), rtol=1e-9, atol=1e-9)


def test_gradient_is_divided_by_the_mean_distance_to_the_teacher_per_sample() -> None:
    x, real, fake = torch.randn(
        3, 5, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    g = distribution_matching_gradient(x, real, fake)
    for n in range(len(x)):
        expected = (fake[n] - real[n]) / (x[n] - real[n]).abs().sum() * x[n].numel()
        torch.testing.assert_close(g[n], expected)


def test_loss_value_is_half_the_mean_square_of_g_and_its_gradient_is_g_over_numel() -> None:
    method = DMD2(no_gan(), VPDiscreteSchedule(), guidance_scale=1.0)
    x, real, fake = torch.randn(
        3, 5, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    leaf = x.clone().requires_grad_()
    loss = method.generator_losses(leaf, {}, {"real": real, "fake": fake}).terms["dm"]
    (gradient,) = torch.autograd.grad(loss, leaf)
    g = distribution_matching_gradient(x, real, fake)
    torch.testing.assert_close(loss, 0.5 * (g**2).mean())
    torch.testing.assert_close(gradient, g / x.numel())


def test_generator_equal_to_the_teachers_distribution_gets_zero_signal_at_every_sample() -> None:
    schedule = VPDiscreteSchedule()
    method = DMD2(no_gan(), schedule, guidance_scale=1.0)
    x = (B + A * torch.randn(16, 1, 1, 1, dtype=torch.float64)).requires_grad_()
    queries = method.queries(x, NO_COND, None, draws(16))
    same = gaussian(schedule, B, A)
    answers = {name: same(q.x_t, q.t, q.cond) for name, q in queries.items()}
    losses = method.generator_losses(x, queries, answers)
    (gradient,) = torch.autograd.grad(losses.total(), x)
    assert gradient.abs().max() == 0.0


def test_teacher_is_asked_with_guidance_and_critic_without_on_the_same_noised_sample() -> None:
    method = DMD2(DMD2Config(), VPDiscreteSchedule(), guidance_scale=1.75)
    x = torch.randn(8, 4, 2, 2, requires_grad=True)
    asked = method.queries(x, NO_COND, None, draws(8))
    assert (asked["real"].guidance_scale, asked["fake"].guidance_scale, asked["logit"].guidance_scale) == (
        1.75,
        1.0,
        1.0,
    )
    assert asked["real"].x_t is asked["fake"].x_t
    assert not asked["real"].x_t.requires_grad
    assert asked["logit"].x_t.requires_grad
    assert not torch.equal(asked["logit"].t, asked["real"].t)


@pytest.mark.parametrize("schedule", [VPDiscreteSchedule(), EDMSchedule()], ids=["vp", "edm"])
def test_distribution_matching_levels_stay_within_2_and_98_percent_and_the_critic_sees_all(
    schedule: NoiseSchedule,
) -> None:
    times = (999.0,) if isinstance(schedule, VPDiscreteSchedule) else (80.0,)
    method = DMD2(no_gan(timesteps=times), schedule, guidance_scale=1.0)
    t = method.queries(torch.zeros(20000, 1, 1, 1), NO_COND, None, draws(20000))["real"].t
    low, high = (20.0, 980.0) if isinstance(schedule, VPDiscreteSchedule) else (0.00323, 72.1)
    assert low <= float(t.min()) < 1.02 * low
    assert 0.99 * high < float(t.max()) <= high
    seen = Recorder(schedule)
    method.critic_losses(Critic(seen, None), torch.zeros(20000, 1, 1, 1), NO_COND, None, draws(20000), {})
    assert float(seen.t.min()) < low
    assert float(seen.t.max()) > 0.999 * schedule.t_max


class Recorder(Denoiser):
    """Answers zero and remembers what it was asked."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.t, self.x_t = t, x_t
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("schedule", [VPDiscreteSchedule(), EDMSchedule()], ids=["vp", "edm"])
def test_critics_optimum_is_the_generators_own_denoiser(schedule: NoiseSchedule) -> None:
    times = (999.0,) if isinstance(schedule, VPDiscreteSchedule) else (80.0,)
    method = DMD2(no_gan(timesteps=times), schedule, guidance_scale=1.0)
    count = 200_000
    x = B + A * torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss(mean: float, std: float) -> Tensor:
        critic = Critic(gaussian(schedule, mean, std), None)
        terms = method.critic_losses(critic, x, NO_COND, None, draws(count), {}).terms["dsm"]
        return torch.stack(torch.autograd.grad(terms, tuple(critic.parameters()))).flatten()

    at_optimum, away = loss(B, A), loss(B + 0.3, 1.2 * A)
    assert at_optimum.abs().max() < 0.02 * away.abs().max()


def test_critic_loss_is_the_plain_eps_error_for_vp_and_edms_weighted_error_for_edm() -> None:
    x = torch.randn(6, 4, 2, 2, dtype=torch.float64)
    for schedule, times in ((VPDiscreteSchedule(), (999.0,)), (EDMSchedule(), (80.0,))):
        method = DMD2(no_gan(timesteps=times), schedule, guidance_scale=1.0)
        net = Recorder(schedule)
        loss = method.critic_losses(Critic(net, None), x, NO_COND, None, draws(6), {}).terms["dsm"]
        alpha, sigma = expand(schedule.alpha(net.t), x), expand(schedule.sigma(net.t), x)
        noise = (net.x_t - alpha * x) / sigma
        if isinstance(schedule, EDMSchedule):
            expected = ((sigma**-2 + 0.5**-2) * (0 - x) ** 2).mean()
        else:
            eps_of_zero = net.x_t / sigma
            expected = ((eps_of_zero - noise) ** 2).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)


class QuadraticHead(torch.nn.Module):
    """l(x) = w x^2 + v x on features that are x itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.v = torch.nn.Parameter(torch.tensor(-0.5, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return (self.w * features**2 + self.v * features).flatten(1).mean(1)


class Transparent(GaussianDenoiser):
    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x_t


def test_generators_gan_gradient_is_minus_sigmoid_of_minus_l_times_dl_dx() -> None:
    schedule = VPDiscreteSchedule()
    method = DMD2(DMD2Config(gan_weight_generator=0.7, gan_weight_critic=0.1), schedule, guidance_scale=1.0)
    head = QuadraticHead()
    x = torch.randn(10, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    query = method.queries(x, NO_COND, None, draws(10))["logit"]
    logit = head(query.x_t)
    zeros = torch.zeros_like(x)
    losses = method.generator_losses(x, {}, {"real": zeros + 1, "fake": zeros + 2, "logit": logit})
    (gradient,) = torch.autograd.grad(losses.terms["gan_generator"], x)
    alpha = expand(schedule.alpha(query.t), x)
    slope = 2 * head.w * query.x_t + head.v
    expected = 0.7 / 10 * -torch.sigmoid(-logit).reshape(-1, 1, 1, 1) * slope * alpha
    torch.testing.assert_close(gradient, expected.detach())


def test_discriminator_loss_has_fake_low_and_real_high_with_independent_times() -> None:
    schedule = VPDiscreteSchedule()
    method = DMD2(DMD2Config(gan_weight_generator=1.0, gan_weight_critic=0.25), schedule, guidance_scale=1.0)
    net = Transparent(schedule, torch.zeros(1).double(), torch.ones(1).double())
    seen: list[Tensor] = []
    net.features = lambda x_t, t, cond: (seen.extend((t, x_t)), x_t)[1]  # type: ignore[assignment, return-value]
    critic = Critic(net, QuadraticHead())
    x, real = torch.randn(2, 9, 1, 1, 1, dtype=torch.float64)
    cond = Cond({"label": torch.arange(9)})
    losses = method.critic_losses(critic, x, cond, RealBatch(real, cond), draws(9), {})
    fake_t, real_t = seen[0].chunk(2)
    assert not torch.equal(fake_t, real_t)
    (found,) = torch.autograd.grad(losses.terms["gan_critic"], critic.head.v)  # type: ignore[union-attr]
    fake_x, real_x = seen[1].chunk(2)
    fake, true = critic.head(fake_x), critic.head(real_x)  # type: ignore[misc]
    # both halves teach the head: dl/dv is the feature itself
    slope = torch.sigmoid(fake) * fake_x.flatten() - torch.sigmoid(-true) * real_x.flatten()
    torch.testing.assert_close(found, 0.25 * slope.mean().detach(), rtol=1e-6, atol=0.0)

    def value(fake_logit: float, real_logit: float) -> tuple[float, float, float]:
        head = torch.nn.Module()
        head.forward = lambda f: torch.tensor([fake_logit] * 9 + [real_logit] * 9)  # type: ignore[method-assign]
        losses = method.critic_losses(Critic(net, head), x, cond, RealBatch(real, cond), draws(9), {})
        accuracies = losses.scalars["critic/fake_accuracy"], losses.scalars["critic/real_accuracy"]
        return float(losses.terms["gan_critic"]), float(accuracies[0]), float(accuracies[1])

    right, wrong = value(-2.0, 3.0), value(3.0, -2.0)
    assert right[0] == pytest.approx(0.25 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(-3))), rel=1e-6)
    assert right[0] < wrong[0]
    assert (right[1:], wrong[1:]) == ((1.0, 1.0), (0.0, 0.0))


def test_gan_starts_with_stage_two_in_both_roles() -> None:
    method = DMD2(
        DMD2Config(gan_start_update=10, critic_updates_per_generator=5),
        VPDiscreteSchedule(),
        guidance_scale=1.0,
    )
    x = torch.zeros(2, 1, 1, 1, requires_grad=True)
    assert "logit" not in method.queries(x, NO_COND, None, draws(2, step=9))
    assert "logit" in method.queries(x, NO_COND, None, draws(2, step=10))
    net = Transparent(method.schedule, torch.zeros(1).double(), torch.ones(1).double())
    critic, real = Critic(net, QuadraticHead()), RealBatch(torch.zeros(2, 1, 1, 1), NO_COND)
    cond = Cond({"label": torch.zeros(2)})
    real = RealBatch(torch.zeros(2, 1, 1, 1), cond)
    assert (
        "gan_critic" not in method.critic_losses(critic, x.detach(), cond, real, draws(2, step=49), {}).terms
    )
    assert "gan_critic" in method.critic_losses(critic, x.detach(), cond, real, draws(2, step=50), {}).terms


def test_one_step_generator_starts_from_unit_noise_for_vp_and_from_sigma_noise_for_edm() -> None:
    vp = DMD2(no_gan(timesteps=(399.0,)), VPDiscreteSchedule(), guidance_scale=1.0)
    noise = torch.randn(4, 1, 1, 1)
    assert torch.equal(vp.pure_noise(noise), noise)
    edm = DMD2(no_gan(timesteps=(80.0,)), EDMSchedule(), guidance_scale=1.0)
    assert torch.equal(edm.pure_noise(noise), 80 * noise)


class Counting(AffineGenerator):
    """Remembers the times at which it was called."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls = [*getattr(self, "calls", []), (float(t[0]), x_t)]
        return super().forward(x_t, t, cond)


def test_backward_simulation_rolls_out_to_a_step_that_the_whole_batch_shares() -> None:
    times = (999.0, 749.0, 499.0, 249.0)
    method = DMD2(no_gan(timesteps=times), VPDiscreteSchedule(), guidance_scale=1.0)
    seen = set()
    for step in range(40):
        generator = Counting(method.schedule, torch.tensor([0.1]), torch.tensor([2.0]))
        x_in, t_in = method.generator_input(generator, NO_COND, (1, 4, 4), None, draws(3, step))
        k = times.index(float(t_in[0]))
        seen.add(k)
        assert torch.equal(t_in, torch.full((3,), times[k]))
        assert not x_in.requires_grad
        assert [t for t, _ in getattr(generator, "calls", [])] == list(times[:k])
        # ranks see slices of the batch: the same step index and the same noise for the same positions
        other = Counting(method.schedule, torch.tensor([0.1]), torch.tensor([2.0]))
        rank = PhaseDraws(Draws(3), "test", step, [1], "cpu")
        x_one, t_one = method.generator_input(other, NO_COND, (1, 4, 4), None, rank)
        assert torch.equal(x_one[0], x_in[1])
        assert t_one[0] == t_in[0]
    assert seen == {0, 1, 2, 3}


def test_real_data_rollout_draws_a_step_for_each_sample() -> None:
    method = DMD2(
        no_gan(timesteps=(999.0, 499.0), rollout="real_data"), VPDiscreteSchedule(), guidance_scale=1.0
    )
    assert method.needs.real_data
    real = RealBatch(torch.full((64, 1, 2, 2), 5.0), NO_COND)
    generator = AffineGenerator(method.schedule, torch.ones(1), torch.zeros(1))
    x_in, t_in = method.generator_input(generator, NO_COND, (1, 2, 2), real, draws(64))
    assert set(t_in.tolist()) == {999.0, 499.0}
    noise = draws(64).normal("rollout/noise", (1, 2, 2))
    expected = method.schedule.add_noise(real.x0, t_in, noise)
    # at the first step inference sees pure noise, which a noised sample at t=999 is not (alpha is 0.07)
    first = t_in == 999.0
    assert torch.equal(x_in[first], noise[first])
    assert torch.equal(x_in[~first], expected[~first])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"critic_updates_per_generator": 0}, "method.critic_updates_per_generator=0"),
        ({"timesteps": (249.0, 999.0)}, "method.timesteps"),
        ({"timesteps": ()}, "method.timesteps"),
        ({"dm_min_level": 0.9, "dm_max_level": 0.5}, "method.dm_min_level=0.9"),
        ({"gan_weight_generator": 0.0}, "method.gan_weight_critic"),
        ({"gan_weight_critic": -1.0}, "method.gan_weight_critic=-1.0"),
    ],
)
def test_settings_that_cant_work_are_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        DMD2Config(**settings)


def test_timesteps_outside_the_teachers_schedule_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.timesteps"):
        DMD2(no_gan(timesteps=(1200.0,)), VPDiscreteSchedule(), guidance_scale=1.0)


def test_critic_weightings_are_the_eps_error_the_v_error_and_edms() -> None:
    schedule = VPDiscreteSchedule()
    t = torch.tensor([20.0, 300.0, 700.0, 980.0])
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    error = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=torch.float64)  # of x0
    eps = DMD2(DMD2Config(), schedule, guidance_scale=1.0)._dsm_weight(t)
    v = DMD2(DMD2Config(critic_weighting="snr_plus_one"), schedule, guidance_scale=1.0)._dsm_weight(t)
    # eps = (x_t - alpha x0)/sigma and v = alpha eps - sigma x0 = (alpha x_t - x0)/sigma at one x_t
    torch.testing.assert_close(eps * error**2, (alpha / sigma * error) ** 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(v * error**2, (error / sigma) ** 2, rtol=1e-9, atol=0)
    edm = DMD2(DMD2Config(timesteps=(80.0,)), EDMSchedule(), guidance_scale=1.0)
    levels = torch.tensor([0.1, 1.0, 40.0])
    torch.testing.assert_close(edm._dsm_weight(levels), levels.double() ** -2 + 4, rtol=1e-6, atol=0)
