"""Networks of our own: the GAN head's shapes and the closed-form teachers against Tweedie's formula."""

import pytest
import torch
from torch import Tensor

from raydistill.diffusion.schedules import NoiseSchedule, expand, schedule_from_diffusers
from raydistill.models.denoiser import Cond
from raydistill.models.gaussian import GaussianDenoiser, GaussianMixtureDenoiser
from raydistill.models.heads import BottleneckHead

NOTHING = Cond({})


@pytest.mark.parametrize(
    ("channels", "size", "kernels"),
    [
        (1280, 8, [4, 4, 1]),  # SD1.5 and ImageNet-64: one strided convolution, one that closes, the logit
        (1280, 32, [4, 4, 4, 4, 1]),  # SDXL: three strided ones
        (64, 4, [4, 1]),
        (48, 2, [2, 1]),  # the embedded teacher's is smaller than a kernel
        (16, 1, [1, 1]),
    ],
)
def test_head_closes_any_bottleneck_to_one_logit_a_sample(
    channels: int, size: int, kernels: list[int]
) -> None:
    head = BottleneckHead(channels, size)
    convolutions = [m for m in head.layers if isinstance(m, torch.nn.Conv2d)]
    assert [conv.kernel_size[0] for conv in convolutions] == kernels
    features = torch.randn(3, channels, size, size, requires_grad=True)
    logits = head(features)
    assert logits.shape == (3,)
    (gradient,) = torch.autograd.grad(logits.sum(), features)
    assert all(float(sample.abs().max()) > 0 for sample in gradient)
    # a norm over a 1x1 map must not erase what the sample is
    assert float(logits.std()) > 0


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return schedule_from_diffusers(betas | {"prediction_type": "epsilon"})[0]


def tweedie(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, log_p: object) -> Tensor:
    """E[x0|x_t] = (x_t + sigma^2 grad log p_t(x_t)) / alpha, by automatic differentiation of a known density."""
    x = x_t.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_p(x).sum(), x)  # type: ignore[operator]
    return (x_t + expand(schedule.sigma(t), x_t) ** 2 * score) / expand(schedule.alpha(t), x_t)


@pytest.mark.parametrize("time", [0.0, 50.0, 500.0, 999.0])
def test_mixture_denoiser_is_tweedies_formula_of_its_density(schedule: NoiseSchedule, time: float) -> None:
    torch.manual_seed(0)
    weights, stds = torch.tensor([[0.2, 0.5, 0.3], [0.3, 1.0, 0.6]], dtype=torch.float64)
    means = torch.randn(3, 1, 1, 2, dtype=torch.float64) * 2
    denoiser = GaussianMixtureDenoiser(schedule, weights, means, stds)
    x_t, t = torch.randn(5, 1, 1, 2, dtype=torch.float64), torch.full((5,), time)
    alpha, sigma = schedule.alpha(t)[0], schedule.sigma(t)[0]
    components = torch.distributions.MultivariateNormal(
        alpha * means.flatten(1), torch.diag_embed(((alpha * stds) ** 2 + sigma**2)[:, None].expand(3, 2))
    )
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights.double()), components
    )
    expected = tweedie(schedule, x_t, t, lambda x: mixture.log_prob(x.flatten(1)))
    torch.testing.assert_close(denoiser(x_t, t, NOTHING), expected, rtol=1e-8, atol=1e-8)


def test_mixture_of_one_is_the_gaussian(schedule: NoiseSchedule) -> None:
    mean = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    one = GaussianMixtureDenoiser(schedule, torch.ones(1), mean, torch.tensor([0.7], dtype=torch.float64))
    gaussian = GaussianDenoiser(schedule, mean[0], torch.full((2, 3, 3), 0.7, dtype=torch.float64))
    x_t, t = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.tensor([10.0, 300.0, 700.0, 990.0])
    torch.testing.assert_close(one(x_t, t, NOTHING), gaussian(x_t, t, NOTHING), rtol=1e-9, atol=1e-9)
