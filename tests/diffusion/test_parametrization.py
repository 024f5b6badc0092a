"""Conversions between x0, eps, v and flow, the score, and EDM's preconditioning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.diffusion.parametrization import PREDICTIONS, EDMPreconditioner, from_x0, score, to_x0
from raydistill.diffusion.schedules import (
    EDMSchedule,
    LinearFlowSchedule,
    VPCosineSchedule,
    VPDiscreteSchedule,
)
from raydistill.errors import ConfigError

SCHEDULES = [
    EDMSchedule(),
    VPDiscreteSchedule(),
    VPDiscreteSchedule(rescale_betas_zero_snr=True),
    VPCosineSchedule(),
    LinearFlowSchedule(),
]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.t_max:g}")
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def a_batch(schedule, n=64, dtype=torch.float64):
    """x0, eps, x_t of n samples whose times cover the schedule but for its last per mille."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, n, 3, 2, 2, generator=generator, dtype=torch.float64)
    t = schedule.t_min + (schedule.t_max - schedule.t_min) * torch.linspace(0, 0.999, n, dtype=torch.float64)
    return x0.to(dtype), eps.to(dtype), schedule.add_noise(x0, t, eps).to(dtype), t


@every_schedule
@every_prediction
def test_conversions_round_trip(schedule, prediction):
    x0, _, x_t, t = a_batch(schedule)
    output = from_x0(x0, x_t, t, schedule, prediction)
    # Where x_t is nearly clean or nearly noise, eps or x0 is the small difference of two large numbers.
    tolerance = 1e-12 * (1 + schedule.edm_sigma(t) + 1 / schedule.edm_sigma(t)).reshape(-1, 1, 1, 1)
    assert ((to_x0(output, x_t, t, schedule, prediction) - x0).abs() <= tolerance).all()
    again = from_x0(to_x0(output, x_t, t, schedule, prediction), x_t, t, schedule, prediction)
    assert ((again - output).abs() <= tolerance * output.abs().amax().clamp(min=1)).all()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from(PREDICTIONS),
    st.floats(0.05, 0.9),
    st.floats(-10, 10),
    st.floats(-10, 10),
)
def test_any_state_round_trips_away_from_the_ends(schedule, prediction, u, x0, x_t):
    t = torch.tensor([schedule.t_min + u * (schedule.t_max - schedule.t_min)], dtype=torch.float64)
    x0, x_t = torch.tensor([[x0]], dtype=torch.float64), torch.tensor([[x_t]], dtype=torch.float64)
    output = from_x0(x0, x_t, t, schedule, prediction)
    torch.testing.assert_close(to_x0(output, x_t, t, schedule, prediction), x0, rtol=1e-12, atol=1e-10)


@every_schedule
def test_outputs_mean_what_their_names_say(schedule):
    x0, eps, x_t, t = a_batch(schedule)
    column = (-1, 1, 1, 1)
    a, s = schedule.alpha(t).reshape(column), schedule.sigma(t).reshape(column)
    da, ds = schedule.d_alpha(t).reshape(column), schedule.d_sigma(t).reshape(column)
    expected = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "flow": da * x0 + ds * eps}
    for prediction, output in expected.items():
        got = from_x0(x0, x_t, t, schedule, prediction)
        torch.testing.assert_close(got, output, rtol=1e-8, atol=1e-9 * (1 + float(output.abs().max())))


def test_flow_of_linear_flow_is_noise_minus_data():
    x0, eps, x_t, t = a_batch(LinearFlowSchedule())
    torch.testing.assert_close(
        from_x0(x0, x_t, t, LinearFlowSchedule(), "flow"), eps - x0, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("prediction", ["v", "flow", "x0"])
@pytest.mark.parametrize(
    "schedule",
    [LinearFlowSchedule(), VPDiscreteSchedule(rescale_betas_zero_snr=True)],
    ids=["flow", "zero_snr"],
)
def test_x0_is_finite_at_pure_noise(schedule, prediction):
    x0 = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    x_t, t = torch.ones(2, 3), torch.full((2,), schedule.t_max)
    output = from_x0(x0, x_t, t, schedule, prediction)
    torch.testing.assert_close(to_x0(output, x_t, t, schedule, prediction), x0, rtol=1e-6, atol=1e-6)


@every_schedule
def test_score_is_the_gradient_of_the_log_density_of_gaussian_data(schedule):
    m, c = 0.7, 1.3
    _, _, x_t, t = a_batch(schedule)
    x_t = x_t.requires_grad_()
    a, s = (v.reshape(-1, 1, 1, 1) for v in (schedule.alpha(t), schedule.sigma(t)))
    variance = a**2 * c**2 + s**2
    (gradient,) = torch.autograd.grad((-((x_t - a * m) ** 2) / variance / 2).sum(), x_t)
    x0 = m + a * c**2 / variance * (x_t.detach() - a * m)
    torch.testing.assert_close(score(x0, x_t.detach(), t, schedule), gradient, rtol=1e-6, atol=1e-6)


@every_schedule
@every_prediction
def test_results_have_the_dtype_of_x_t_and_float32_loses_no_more_than_its_rounding(schedule, prediction):
    x0, _, x_t, t = a_batch(schedule)
    middle = slice(20, 50)
    x0, x_t, t = x0[middle], x_t[middle], t[middle]
    output = from_x0(x0, x_t, t, schedule, prediction)
    single = to_x0(output.float(), x_t.float(), t, schedule, prediction)
    assert single.dtype == torch.float32
    scale = (1 + schedule.edm_sigma(t)).reshape(-1, 1, 1, 1)
    assert ((single - x0).abs() / scale).max() < 3e-6
    assert from_x0(x0.bfloat16(), x_t.bfloat16(), t, schedule, prediction).dtype == torch.bfloat16


def test_gradients_flow_through_conversions():
    x0, _, x_t, t = a_batch(VPDiscreteSchedule(), n=4)
    output = from_x0(x0, x_t, t, VPDiscreteSchedule(), "eps").requires_grad_()
    x_t.requires_grad_()
    assert torch.autograd.gradcheck(lambda y, x: to_x0(y, x, t, VPDiscreteSchedule(), "eps"), (output, x_t))


@pytest.mark.parametrize("convert", [to_x0, from_x0])
def test_an_unknown_prediction_is_refused(convert):
    x = torch.zeros(1, 3)
    with pytest.raises(ConfigError, match="prediction='epsilon' is not one of x0, eps, v, flow"):
        convert(x, x, torch.ones(1), EDMSchedule(), "epsilon")


SIGMA = torch.logspace(-3, 2, 40, dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
def test_preconditioning_gives_unit_variances(sigma_data):
    p = EDMPreconditioner(sigma_data)
    ones = torch.ones_like(SIGMA)
    # The network's input and its target (x0 - c_skip x)/c_out have unit variance (EDM, appendix B.6).
    torch.testing.assert_close(p.c_in(SIGMA) ** 2 * (sigma_data**2 + SIGMA**2), ones, rtol=1e-12, atol=0)
    target = (1 - p.c_skip(SIGMA)) ** 2 * sigma_data**2 + p.c_skip(SIGMA) ** 2 * SIGMA**2
    torch.testing.assert_close(target, p.c_out(SIGMA) ** 2, rtol=1e-10, atol=0)
    torch.testing.assert_close(p.weight(SIGMA) * p.c_out(SIGMA) ** 2, ones, rtol=1e-12, atol=0)
    torch.testing.assert_close(p.c_noise(SIGMA), SIGMA.log() / 4, rtol=0, atol=0)


def test_preconditioning_with_a_silent_network_is_the_denoiser_of_gaussian_data():
    p = EDMPreconditioner(0.5)
    torch.testing.assert_close(p.c_skip(SIGMA), 0.25 / (0.25 + SIGMA**2), rtol=1e-12, atol=0)


def test_sigma_data_must_be_positive():
    with pytest.raises(ConfigError, match="sigma_data"):
        EDMPreconditioner(0.0)
