"""Samplers on Gaussian data N(m, c^2), whose denoiser, flow map and marginals are known in closed form."""

import math
from itertools import pairwise

import pytest
import torch

from raydistill.diffusion.parametrization import from_x0
from raydistill.diffusion.random import Draws
from raydistill.diffusion.samplers import (
    ancestral,
    ddim,
    ddim_step,
    euler,
    few_step,
    heun,
    karras_times,
    posterior,
    trailing_times,
)
from raydistill.diffusion.schedules import (
    EDMSchedule,
    LinearFlowSchedule,
    VPCosineSchedule,
    VPDiscreteSchedule,
    expand,
)
from raydistill.errors import ConfigError

M, C = 0.4, 1.3
EDM = EDMSchedule(sigma_min=0.01, sigma_max=20.0)
SD = VPDiscreteSchedule()
ZERO_SNR = VPDiscreteSchedule(rescale_betas_zero_snr=True)
COSINE = VPCosineSchedule(log_snr_min=-9, log_snr_max=9)
FLOW = LinearFlowSchedule()
every_schedule = pytest.mark.parametrize(
    "schedule", [EDM, SD, ZERO_SNR, COSINE, FLOW], ids=["edm", "sd", "zero_snr", "cosine", "flow"]
)


def exact_denoiser(schedule):
    def denoise(x_t, t):
        a, s = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
        return (M + a * C**2 / (a**2 * C**2 + s**2) * (x_t.double() - a * M)).to(x_t.dtype)

    return denoise


def flow_map(schedule, x_t, t, s):
    """Where the probability-flow ODE takes x_t: x_s = a_s m + (x_t - a_t m) sqrt(V_s/V_t)."""
    (a_t, a_s), (s_t, s_s) = (f(torch.tensor([t, s])).tolist() for f in (schedule.alpha, schedule.sigma))
    gain = math.sqrt((a_s**2 * C**2 + s_s**2) / (a_t**2 * C**2 + s_t**2))
    return a_s * M + (x_t - a_t * M) * gain


def grid(schedule, n):
    """n steps from t_max down to a level of sigma/alpha near 0.15, smooth in t."""
    if schedule is EDM:
        u = torch.linspace(1, 0, n + 1, dtype=torch.float64)
        return ((0.15 ** (1 / 7) + u * (20 ** (1 / 7) - 0.15 ** (1 / 7))) ** 7).tolist()
    low = schedule.t_from_edm_sigma(torch.tensor(0.15)).item()
    return torch.linspace(schedule.t_max, low, n + 1, dtype=torch.float64).tolist()


def start(schedule, n=8):
    x = torch.linspace(-2, 2, n, dtype=torch.float64).reshape(n, 1, 1, 1)
    return x * schedule.sigma(torch.tensor(schedule.t_max)).item()


def error(sampler, schedule, n):
    times, x_T = grid(schedule, n), start(schedule)
    got = sampler(exact_denoiser(schedule), schedule, times, x_T)
    ends = torch.tensor([times[0], times[-1]], dtype=torch.float32).tolist()  # what the sampler rounds to
    return (got - flow_map(schedule, x_T, *ends)).abs().max().item()


@every_schedule
@pytest.mark.parametrize("sampler", [euler, ddim])
def test_euler_and_ddim_reach_the_exact_flow_map_with_order_one(sampler, schedule):
    errors = [error(sampler, schedule, n) for n in (16, 32, 64)]
    assert errors[-1] < 0.08
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([2, 2], abs=0.15)


@every_schedule
def test_heun_reaches_the_exact_flow_map_with_order_two(schedule):
    errors = [error(heun, schedule, n) for n in (32, 64, 128)]
    assert errors[-1] < 1e-3
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([4, 4], abs=0.6)


@pytest.mark.parametrize("schedule", [EDM, SD, COSINE], ids=["edm", "sd", "cosine"])
def test_ddim_is_euler_in_the_rescaled_variables_of_edm(schedule):
    times, x_T, denoise = grid(schedule, 5), start(schedule), exact_denoiser(schedule)
    t = torch.tensor(times, dtype=torch.float32)
    alpha, level = schedule.alpha(t), schedule.edm_sigma(t)
    y = x_T / alpha[0]
    for i in range(5):
        slope = (y - denoise(alpha[i] * y, t[i].expand(8))) / level[i]
        y = y + (level[i + 1] - level[i]) * slope
    for sampler in (ddim, euler):
        torch.testing.assert_close(
            sampler(denoise, schedule, times, x_T), alpha[-1] * y, rtol=1e-12, atol=1e-12
        )


def test_for_linear_flow_euler_and_heun_are_those_of_the_velocity_in_t():
    times, x_T, denoise = grid(FLOW, 5), start(FLOW), exact_denoiser(FLOW)
    t = torch.tensor(times, dtype=torch.float32).double()

    def velocity(x, i):
        level = t[i].float().expand(8)
        return from_x0(denoise(x, level), x, level, FLOW, "flow")

    first, second = x_T, x_T
    for i in range(5):
        first = first + (t[i + 1] - t[i]) * velocity(first, i)
        guess = second + (t[i + 1] - t[i]) * velocity(second, i)
        second = second + (t[i + 1] - t[i]) * (velocity(second, i) + velocity(guess, i + 1)) / 2
    torch.testing.assert_close(euler(denoise, FLOW, times, x_T), first, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(heun(denoise, FLOW, times, x_T), second, rtol=1e-10, atol=1e-10)


def test_for_edm_heun_is_algorithm_1_of_its_paper():
    schedule = EDMSchedule()
    times, x = [*karras_times(6, schedule), 0.0], start(schedule)
    t, denoise = torch.tensor(times, dtype=torch.float32).double(), exact_denoiser(schedule)
    got = heun(denoise, schedule, times, x)
    for i in range(6):
        d = (x - denoise(x, t[i].float().expand(8))) / t[i]
        x_next = x + (t[i + 1] - t[i]) * d
        if t[i + 1] > 0:
            d_next = (x_next - denoise(x_next, t[i + 1].float().expand(8))) / t[i + 1]
            x_next = x + (t[i + 1] - t[i]) * (d + d_next) / 2
        x = x_next
    torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)


@every_schedule
@pytest.mark.parametrize("sampler", [euler, heun, ddim])
def test_a_step_to_the_clean_end_returns_the_denoisers_answer(sampler, schedule):
    x_T, denoise = start(schedule), exact_denoiser(schedule)
    got = sampler(denoise, schedule, [schedule.t_max, schedule.t_clean], x_T)
    expected = denoise(x_T, torch.full((8,), schedule.t_max))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_deterministic_samplers_turn_noise_into_the_data_distribution():
    for schedule in (EDM, SD, COSINE, FLOW):
        times = [*grid(schedule, 60), schedule.t_clean]
        gain = heun(
            exact_denoiser(schedule), schedule, times, torch.tensor([[M], [M + 1]], dtype=torch.float64)
        )
        v_T = (schedule.alpha(torch.tensor(schedule.t_max)) * C) ** 2
        v_T = v_T + schedule.sigma(torch.tensor(schedule.t_max)) ** 2
        # The last step is the posterior mean at sigma/alpha = 0.15, which shrinks the deviation.
        shrink = C / math.sqrt(C**2 + 0.15**2)
        assert (gain[1] - gain[0]).item() * math.sqrt(v_T) == pytest.approx(C * shrink, rel=2e-3)


@every_schedule
def test_posterior_is_bayes_rule(schedule):
    t, s = (schedule.t_min + u * (schedule.t_max - schedule.t_min) for u in (0.71, 0.36))
    t, s = torch.tensor([t, t], dtype=torch.float64), torch.tensor([s, s * 0.9], dtype=torch.float64)
    z_t, x0 = (
        torch.tensor([[0.8, -1.1], [2.0, 0.3]]).double(),
        torch.tensor([[0.2, 0.9], [-0.5, 1.0]]).double(),
    )
    mean, variance = posterior(z_t, x0, t, s, schedule)
    a_t, a_s, s_t, s_s = (f(u)[:, None] for f in (schedule.alpha, schedule.sigma) for u in (t, s))
    # q(z_s|x0) q(z_t|z_s), two Gaussians in z_s: precisions add, means are weighed by them.
    a_ts = a_t / a_s
    var_ts = s_t**2 - (a_ts * s_s) ** 2
    precision = 1 / s_s**2 + a_ts**2 / var_ts
    torch.testing.assert_close(variance, 1 / precision, rtol=1e-10, atol=0)
    expected = (a_s * x0 / s_s**2 + a_ts * z_t / var_ts) / precision
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)
    assert variance.shape == (2, 1)


def test_posterior_in_edms_form():
    z_t, x0 = torch.tensor([[1.5]]).double(), torch.tensor([[0.25]]).double()
    mean, variance = posterior(z_t, x0, torch.tensor([2.0]), torch.tensor([0.5]), EDM)
    ratio = 0.5**2 / 2.0**2
    assert mean.item() == pytest.approx(ratio * 1.5 + (1 - ratio) * 0.25, rel=1e-12)
    assert variance.item() == pytest.approx(0.5**2 * (1 - ratio), rel=1e-12)


@every_schedule
def test_posterior_at_its_limits(schedule):
    z_t, x0 = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(1)).double()
    top, clean = torch.full((2,), schedule.t_max), torch.full((2,), schedule.t_clean)
    mean, variance = posterior(z_t, x0, top, top, schedule)
    assert torch.equal(mean, z_t)
    assert variance.tolist() == [[0], [0]]
    mean, variance = posterior(z_t, x0, top, clean, schedule)
    torch.testing.assert_close(mean, x0, rtol=1e-12, atol=0)
    assert variance.tolist() == [[0], [0]]
    middle = torch.full((2,), (schedule.t_min + schedule.t_max) / 2)
    assert posterior(z_t, x0, middle, top, schedule)[1].isnan().all()


@every_schedule
def test_ancestral_marginals_have_the_variance_that_theory_gives(schedule):
    n = 2000
    times = [*grid(schedule, 12), schedule.t_clean]
    draws = Draws(seed=0)
    t = torch.tensor(times)
    a, s = schedule.alpha(t), schedule.sigma(t)
    x_T = a[0] * M + (a[0] ** 2 * C**2 + s[0] ** 2).sqrt() * draws.normal("start", 0, [0], (n, 1))[0].double()
    got = ancestral(
        exact_denoiser(schedule), schedule, times, x_T, lambda i: draws.normal("noise", i, [0], (n, 1))[0]
    )
    # Each step is affine in z_t: with D = m + k (z_t - a_t m), var(z_s) = gain^2 var(z_t) + var(q).
    variance = a[0] ** 2 * C**2 + s[0] ** 2
    for i in range(len(times) - 1):
        k = a[i] * C**2 / (a[i] ** 2 * C**2 + s[i] ** 2)
        r = (a[i] * s[i + 1] / (s[i] * a[i + 1])) ** 2
        gain = a[i] * s[i + 1] ** 2 / (s[i] ** 2 * a[i + 1]) + (1 - r) * a[i + 1] * k
        variance = gain**2 * variance + s[i + 1] ** 2 * (1 - r)
    assert got.var().item() == pytest.approx(variance.item(), rel=4 * math.sqrt(2 / n))
    assert got.mean().item() == pytest.approx(M, abs=4 * math.sqrt(variance.item() / n))


def test_ancestral_with_many_steps_draws_the_data_distribution():
    n = 2000
    draws = Draws(seed=1)
    x_T = draws.normal("start", 0, [0], (n, 1))[0].double() * EDM.sigma_max
    times = [*karras_times(150, EDM), 0.0]
    got = ancestral(exact_denoiser(EDM), EDM, times, x_T, lambda i: draws.normal("noise", i, [0], (n, 1))[0])
    assert got.std().item() == pytest.approx(C, rel=0.05)
    assert got.mean().item() == pytest.approx(M, abs=0.1)


def test_ancestral_asks_for_noise_on_every_step_but_the_last_to_clean_data():
    asked = []

    def noise(step):
        asked.append(step)
        return torch.zeros(8, 1, 1, 1)

    ancestral(exact_denoiser(FLOW), FLOW, [1.0, 0.7, 0.4, 0.0], start(FLOW), noise)
    ancestral(exact_denoiser(FLOW), FLOW, [1.0, 0.7, 0.4], start(FLOW), noise)
    assert asked == [0, 1, 0, 1]


def test_few_step_renoises_with_fresh_noise_and_returns_the_last_x0():
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(2, 4, 3, 3, generator=generator)
    noises = torch.randn(3, 2, 4, 3, 3, generator=generator)
    seen = []

    def denoise(x_t, t):
        seen.append((x_t, t))
        return x_t * 0.3 + t.reshape(-1, 1, 1, 1) / 1000

    times = trailing_times(4)
    got = few_step(denoise, SD, times, x_T, lambda i: noises[i])
    assert [t.tolist() for _, t in seen] == [[999, 999], [749, 749], [499, 499], [249, 249]]
    assert torch.equal(seen[0][0], x_T)
    for i in range(3):
        x0 = seen[i][0] * 0.3 + times[i] / 1000
        torch.testing.assert_close(seen[i + 1][0], SD.add_noise(x0, seen[i + 1][1], noises[i]))
    assert torch.equal(got, seen[3][0] * 0.3 + seen[3][1].reshape(-1, 1, 1, 1) / 1000)


def test_few_step_needs_no_clean_end_and_ignores_one():
    x_T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))

    def sample(times):
        return few_step(exact_denoiser(SD), SD, times, x_T, lambda i: torch.full((2, 4), i + 1.0))

    assert torch.equal(sample([999, 499]), sample([999, 499, SD.t_clean]))
    assert torch.equal(sample([999]), exact_denoiser(SD)(x_T, torch.tensor([999.0, 999.0])))


def test_ddim_step_keeps_the_exact_trajectory_when_x0_and_noise_are_the_true_ones():
    x0, eps = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    t, s = torch.tensor([900.0, 500.0, 20.0]), torch.tensor([300.0, 499.0, -1.0])
    x_s = ddim_step(SD.add_noise(x0, t, eps), x0, t, s, SD)
    torch.testing.assert_close(x_s, SD.add_noise(x0, s, eps), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sampler", [euler, heun, ddim, ancestral, few_step])
def test_denoisers_see_float32_times_and_the_dtype_of_the_start(sampler):
    seen = set()

    def denoise(x_t, t):
        seen.add((x_t.dtype, t.dtype, tuple(x_t.shape), tuple(t.shape)))
        return x_t * 0.5

    noise = [lambda i: torch.zeros(2, 3)] if sampler in (ancestral, few_step) else []
    got = sampler(denoise, FLOW, [1.0, 0.5, 0.0], torch.ones(2, 3, dtype=torch.bfloat16), *noise)
    assert seen == {(torch.bfloat16, torch.float32, (2, 3), (2,))}
    assert got.dtype == torch.bfloat16


def test_gradients_reach_the_start_and_the_denoiser():
    x_T = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    few_step(lambda x, t: weight * x, FLOW, [1.0, 0.5], x_T, lambda i: torch.zeros(2, 3)).sum().backward()
    # x1 = w (1 - 0.5) w x_T: d/dw = 2 * 0.5 w x_T summed, d/dx_T = 0.5 w^2.
    assert weight.grad.item() == pytest.approx(6 * 0.5, rel=1e-12)
    assert x_T.grad.tolist() == [[0.125] * 3] * 2


def test_karras_times_are_edms_grid():
    got = karras_times(18, EDMSchedule())
    expected = [
        (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)
    ]  # arXiv:2206.00364, eq. 5
    assert got == pytest.approx(expected, rel=1e-12)
    assert (got[0], got[-1]) == (80.0, 0.002)


def test_karras_times_of_stable_diffusion_lie_on_its_levels():
    times = torch.tensor(karras_times(10, SD), dtype=torch.float64)
    assert (times[0].item(), times[-1].item()) == (999, 0)
    root = SD.edm_sigma(times) ** (1 / 7)
    torch.testing.assert_close(root.diff(), root.diff()[0].expand(9), rtol=1e-9, atol=0)
    assert karras_times(1, SD) == [999]
    assert karras_times(2, SD) == [999, 0]


@pytest.mark.parametrize("schedule", [FLOW, ZERO_SNR], ids=["flow", "zero_snr"])
def test_karras_times_without_an_upper_end_are_refused(schedule):
    with pytest.raises(ConfigError, match="no signal left"):
        karras_times(4, schedule)


def test_trailing_times():
    assert trailing_times(4) == [999, 749, 499, 249]
    assert trailing_times(1) == [999]
    assert trailing_times(2) == [999, 499]
    assert trailing_times(3, T=10) == [9, 6, 2]
    assert trailing_times(1000) == list(range(999, -1, -1))
    for n in (0, 1001):
        with pytest.raises(ConfigError, match="sampling steps"):
            trailing_times(n)


@pytest.mark.parametrize("n", [1, 3, 4, 7, 20, 30, 50])
def test_trailing_times_equal_diffusers(n):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(n)
    assert trailing_times(n) == scheduler.timesteps.tolist()


def test_ddim_equals_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        clip_sample=False,
        prediction_type="sample",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(10)
    x = x_T = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    denoise = exact_denoiser(SD)
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t.float().expand(2)), t, x).prev_sample
    got = ddim(denoise, SD, [*trailing_times(10), SD.t_clean], x_T)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ([0.5, 1.0], "descend"),
        ([1.0, 1.0], "descend"),
        ([0.5, 0.5 - 1e-9], "descend"),  # equal once rounded to float32
        ([1.0], "at least 2"),
        ([1.5, 0.5], "outside"),
    ],
)
def test_times_that_can_not_be_sampled_are_refused(times, named):
    with pytest.raises(ConfigError, match=named):
        ddim(exact_denoiser(FLOW), FLOW, times, torch.ones(1, 2))


def test_few_step_without_times_is_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        few_step(exact_denoiser(FLOW), FLOW, [], torch.ones(1, 2), lambda i: torch.ones(1, 2))
