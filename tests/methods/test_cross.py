"""Methods against each other (methods.md D.12 and 3.2): where their limits meet, so do their values and gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from raydistill.diffusion.schedules import EDMSchedule, NoiseSchedule, VPDiscreteSchedule
from raydistill.methods.dmd2 import DMD2, DMD2Config
from raydistill.methods.method import Method, RealBatch
from raydistill.methods.moment_matching import MomentMatching, MomentMatchingConfig
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Denoiser
from raydistill.models.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from tests.methods.quadrature import NO_COND, FixedDraws, cubature, gauss_hermite, images

# at its last timestep this schedule has no signal at all: z_t is pure noise, and z_s does not depend on it
NO_SIGNAL = VPDiscreteSchedule(rescale_betas_zero_snr=True)
S = 430.0


def dmd2(schedule: NoiseSchedule) -> DMD2:
    steps = (schedule.t_max,)
    return DMD2(DMD2Config(timesteps=steps, gan_weight_generator=0.0, gan_weight_critic=0.0), schedule, 1.0)


def one_step(schedule: NoiseSchedule, **settings: Any) -> MomentMatching:
    config = MomentMatchingConfig(num_steps=1, teacher_regularised=False, **settings)
    return MomentMatching(config, schedule, 1.0)


def draws(forward: Tensor, noise: Tensor, t: float, s: float) -> FixedDraws:
    """Moment matching's pair (t, s), and DMD2's levels s, with the same noise at s."""
    levels = torch.tensor([[t], [s]], dtype=torch.float64).expand(2, len(noise))
    names = ("dm/noise", "dsm/noise", "posterior/noise")
    return FixedDraws(
        {"forward/noise": forward} | dict.fromkeys(names, noise),
        {"pair": levels, "dm/t": levels[1], "dsm/t": levels[1]},
    )


def signal(
    method: Method, x: Tensor, real: RealBatch, fixed: FixedDraws, teacher: Denoiser, critic: Denoiser
) -> Tensor:
    """The gradient at x, times numel; DMD2's without its normaliser."""
    networks = {"teacher": teacher, "critic": critic}
    asked = method.queries(x, NO_COND, real, fixed)
    answers = {name: networks[q.network](q.x_t, q.t, q.cond).detach() for name, q in asked.items()}
    leaf = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(method.generator_losses(leaf, asked, answers).total(), leaf)
    if isinstance(method, DMD2):
        gradient = gradient * (x - answers["real"]).detach().abs().mean((1, 2, 3), keepdim=True)
    return gradient * gradient.numel()


def mixture(schedule: NoiseSchedule) -> GaussianMixtureDenoiser:
    shares = torch.tensor([0.5, 0.3, 0.2])
    means = torch.tensor([[0.6, 0.0], [-0.5, 0.4], [0.1, -0.7]])
    return GaussianMixtureDenoiser(schedule, shares, images(means), torch.tensor([0.3, 0.5, 0.4]))


def gaussian(schedule: NoiseSchedule, mean: float | Tensor, std: float | Tensor) -> GaussianDenoiser:
    mean, std = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, std))
    return GaussianDenoiser(schedule, mean, std)


def test_from_pure_noise_moment_matching_is_unnormalised_dmd_at_every_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    x, data, forward, noise = torch.randn(4, 32, 2, 1, 1, dtype=torch.float64, generator=generator)
    fixed = draws(forward, noise, NO_SIGNAL.t_max, S)
    networks = mixture(NO_SIGNAL), gaussian(NO_SIGNAL, 0.2, 0.7)
    real = RealBatch(data, NO_COND)
    ours = signal(one_step(NO_SIGNAL, weighting="uniform"), x, real, fixed, *networks)
    theirs = signal(dmd2(NO_SIGNAL), x, real, fixed, *networks)
    assert theirs.abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_from_pure_noise_both_critics_have_the_same_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    x, data, forward, noise = torch.randn(4, 32, 2, 1, 1, dtype=torch.float64, generator=generator)
    fixed = draws(forward, noise, NO_SIGNAL.t_max, S)
    real = RealBatch(data, NO_COND)
    critic = Critic(gaussian(NO_SIGNAL, 0.2, 0.7), None)
    ours, theirs = (
        method.critic_losses(critic, x, NO_COND, real, fixed, {}).terms["dsm"]
        for method in (one_step(NO_SIGNAL, weighting="snr"), dmd2(NO_SIGNAL))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 8])
def test_from_pure_noise_both_critics_have_their_optimum_at_the_generators_denoiser(dim: int) -> None:
    a = torch.linspace(0.4, 1.1, dim, dtype=torch.float64).reshape(dim, 1, 1)
    b = torch.linspace(-0.5, 0.8, dim, dtype=torch.float64).reshape(dim, 1, 1)
    z, forward, noise = (images(part) for part in cubature(3 * dim).chunk(3, dim=1))
    fixed = draws(forward, noise, NO_SIGNAL.t_max, S)
    for method in (one_step(NO_SIGNAL), dmd2(NO_SIGNAL)):
        critic = gaussian(NO_SIGNAL, b, a)
        loss = method.critic_losses(
            Critic(critic, None), b + a * z, NO_COND, RealBatch(z, NO_COND), fixed, {}
        )
        for gradient in torch.autograd.grad(loss.total(), list(critic.parameters())):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method", [one_step(NO_SIGNAL, weighting="uniform"), dmd2(NO_SIGNAL)], ids=["mm", "dmd2"]
)
def test_with_an_exact_critic_both_give_the_gradient_of_the_kl_divergence_to_a_mixture(
    method: Method,
) -> None:
    alpha, sigma = (float(f(torch.tensor(S))) for f in (NO_SIGNAL.alpha, NO_SIGNAL.sigma))
    points, weights = gauss_hermite(4, 14)
    z, noise = points.split(2, dim=1)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.2, -0.1], dtype=torch.float64, requires_grad=True)
    x = images(b + a * z)
    teacher = mixture(NO_SIGNAL)
    critic = gaussian(NO_SIGNAL, b.detach().reshape(2, 1, 1), a.detach())
    fixed = draws(images(noise), images(noise), NO_SIGNAL.t_max, S)
    field = signal(method, x, RealBatch(x.detach(), NO_COND), fixed, teacher, critic)
    gradients = torch.autograd.grad((weights[:, None] * (field * x).flatten(1)).sum(), (a, b))

    y = alpha * (b + a * z) + sigma * noise
    means, variance = alpha * teacher.means.flatten(1), alpha**2 * teacher.stds**2 + sigma**2
    distance = ((y[:, None] - means) ** 2).sum(-1)
    log_p = torch.logsumexp(teacher.weights.log() - distance / (2 * variance) - variance.log(), dim=1)
    entropy = torch.log(alpha**2 * a**2 + sigma**2)
    kl = -entropy - (weights * log_p).sum()
    # score difference = (alpha / sigma^2) (D_f - D_r), and dy/dx = alpha
    expected = torch.autograd.grad(kl, (a, b))
    for got, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(got * (alpha / sigma) ** 2, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 8])
def test_as_sigma_t_grows_the_gradient_tends_to_dmds(dim: int) -> None:
    a = torch.linspace(0.4, 1.1, dim, dtype=torch.float64).reshape(dim, 1, 1)
    m, c, s = -0.3, 1.3, 0.7
    start, data, link = (images(part) for part in cubature(3 * dim).chunk(3, dim=1))
    errors = []
    for sigma_max in (1e2, 1e4, 1e6):
        schedule = EDMSchedule(sigma_max=sigma_max)
        teacher, critic = gaussian(schedule, m, c), gaussian(schedule, m, a)
        real = RealBatch(m + c * data, NO_COND)
        scale = a.clone().requires_grad_()
        kappa = scale / math.hypot(c, sigma_max)
        gradients = []
        for method in (one_step(schedule, weighting="uniform"), dmd2(schedule)):
            fixed = draws(start, link, sigma_max, s)
            z_t, _ = one_step(schedule).generator_input(critic, NO_COND, (dim, 1, 1), real, fixed)
            x = m + kappa * (z_t - m)
            field = signal(method, x, real, fixed, teacher, critic) / len(x)
            gradients.append(torch.autograd.grad((field * x).sum(), scale, retain_graph=True)[0])
        closed_form = s**2 * a * (1 / (c**2 + s**2) - 1 / (a**2 + s**2))
        errors.append((gradients[0] - closed_form).abs().max().item())
        assert (gradients[1] - closed_form).abs().max() < 1e-9
    assert errors[1] < 0.02 * errors[0]
    assert errors[2] < 1e-6


@pytest.mark.parametrize("schedule", [EDMSchedule(), VPDiscreteSchedule()], ids=["edm", "vp"])
def test_critic_equal_to_the_teacher_means_zero_signal_at_every_sample(schedule: NoiseSchedule) -> None:
    t, s = (2.0, 0.7) if isinstance(schedule, EDMSchedule) else (700.0, 450.0)
    generator = torch.Generator().manual_seed(2)
    x, data, forward, noise = torch.randn(4, 16, 2, 1, 1, dtype=torch.float64, generator=generator)
    fixed = draws(forward, noise, t, s)
    for method in (one_step(schedule), dmd2(schedule)):
        field = signal(method, x, RealBatch(data, NO_COND), fixed, mixture(schedule), mixture(schedule))
        assert field.abs().max() == 0
