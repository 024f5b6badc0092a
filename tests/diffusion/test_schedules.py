"""Noise schedules: published values, inverses, derivatives, ranges, and diffusers' own tables."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.diffusion.schedules import (
    EDMSchedule,
    LinearFlowSchedule,
    VPCosineSchedule,
    VPDiscreteSchedule,
    expand,
    schedule_from_config,
    schedule_from_diffusers,
)
from raydistill.errors import ConfigError

ZERO_SNR = VPDiscreteSchedule(rescale_betas_zero_snr=True)
SCHEDULES = {
    "edm": EDMSchedule(),
    "vp_discrete": VPDiscreteSchedule(),
    "vp_discrete_linear": VPDiscreteSchedule(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
    "vp_discrete_cosine": VPDiscreteSchedule(beta_schedule="squaredcos_cap_v2"),
    "vp_discrete_zero_snr": ZERO_SNR,
    "vp_discrete_short": VPDiscreteSchedule.from_alphas_cumprod([0.9, 0.7, 0.4, 0.0]),
    "vp_cosine": VPCosineSchedule(),
    "linear_flow": LinearFlowSchedule(),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def times(schedule, n=501):
    """Times from t_min to t_max, even in time, off the integers."""
    return torch.linspace(schedule.t_min, schedule.t_max, n, dtype=torch.float64)


@every_schedule
def test_time_is_recovered_from_its_edm_sigma(schedule):
    t = torch.cat([torch.tensor([schedule.t_clean], dtype=torch.float64), times(schedule)])
    recovered = schedule.t_from_edm_sigma(schedule.edm_sigma(t))
    torch.testing.assert_close(recovered, t, rtol=1e-11, atol=1e-9 * schedule.t_max)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0.0, 1.0))
def test_edm_sigma_is_recovered_from_its_time(name, u):
    schedule = SCHEDULES[name]
    # The squared-cosine table ends at an edm_sigma of 2e4; all others but EDM's own lie below that too.
    low, high = 1e-4, float(min(schedule.edm_sigma(torch.tensor(schedule.t_max)), torch.tensor(1e4)))
    sigma = torch.tensor(low * (high / low) ** u, dtype=torch.float64)
    torch.testing.assert_close(schedule.edm_sigma(schedule.t_from_edm_sigma(sigma)), sigma, rtol=1e-9, atol=0)


@every_schedule
def test_derivatives_agree_with_finite_differences(schedule):
    h = 1e-6 * (schedule.t_max - schedule.t_min)
    t = times(schedule, n=200)[1:-1]
    t = torch.cat([t, torch.tensor([schedule.t_clean + 0.4 * (schedule.t_min - schedule.t_clean)])])
    if isinstance(schedule, VPDiscreteSchedule):
        t = t[(t - t.round()).abs() > 2 * h]  # the log-SNR has a kink at each integer
    for value, derivative in ((schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)):
        numerical = (value(t + h) - value(t - h)) / (2 * h)
        scale = derivative(t).abs().max() + 1e-12
        torch.testing.assert_close(derivative(t) / scale, numerical / scale, rtol=1e-5, atol=1e-6)


@every_schedule
def test_noise_grows_and_signal_falls_with_time(schedule):
    t = times(schedule)
    assert (schedule.edm_sigma(t).diff() > 0).all()
    assert (schedule.sigma(t).diff() > 0).all()
    assert (schedule.alpha(t).diff() <= 0).all()


@every_schedule
def test_clean_time_is_clean(schedule):
    t = torch.tensor([schedule.t_clean])
    assert schedule.alpha(t).item() == 1
    assert schedule.sigma(t).item() == 0
    assert schedule.t_clean < schedule.t_min


@pytest.mark.parametrize("schedule", [s for n, s in SCHEDULES.items() if n.startswith("vp")], ids=str)
def test_variance_is_preserved(schedule):
    t = torch.cat([times(schedule), torch.tensor([schedule.t_clean, schedule.t_clean / 2])])
    torch.testing.assert_close(
        schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=1e-14, atol=0
    )


@every_schedule
def test_coefficients_are_float64_for_float32_times_of_any_shape(schedule):
    t = times(schedule, n=6).float().clamp(schedule.t_min, schedule.t_max).reshape(2, 3)
    for method in (
        schedule.alpha,
        schedule.sigma,
        schedule.d_alpha,
        schedule.d_sigma,
        schedule.edm_sigma,
        schedule.t_from_edm_sigma,
    ):
        answer = method(t * 0.01 + schedule.t_min if method == schedule.t_from_edm_sigma else t)
        assert answer.dtype == torch.float64
        assert answer.shape == (2, 3)


@every_schedule
def test_config_survives_json(schedule):
    assert schedule_from_config(json.loads(json.dumps(schedule.to_config()))) == schedule


def test_stable_diffusions_published_values():
    schedule = VPDiscreteSchedule()
    t = torch.tensor([999.0, 625.0, 399.0, 20.0, 980.0])
    assert schedule.alpha(t[:1]).item() ** 2 == pytest.approx(0.00466, abs=5e-6)
    assert schedule.alpha(t[1:3]).pow(2).tolist() == pytest.approx([0.1378, 0.426], abs=5e-4)
    expected = [14.61, 2.502, 1.16, 0.138, 13.04]
    assert schedule.edm_sigma(t).tolist() == pytest.approx(expected, abs=6e-3)


def test_at_integers_the_discrete_schedule_is_its_table():
    for schedule in (SCHEDULES["vp_discrete"], SCHEDULES["vp_discrete_cosine"], ZERO_SNR):
        t = torch.arange(1000)
        assert schedule.alpha(t).pow(2).numpy() == pytest.approx(schedule.alphas_cumprod, rel=1e-9, abs=1e-30)


def test_between_integers_the_log_snr_is_linear():
    t = torch.tensor([417.0, 417.25, 418.0], dtype=torch.float64)
    low, quarter, high = (-2 * VPDiscreteSchedule().edm_sigma(t).log()).tolist()
    assert quarter == pytest.approx(0.75 * low + 0.25 * high, rel=1e-12)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("steps", [1000, 50])
def test_the_table_equals_diffusers(beta_schedule, rescale, steps):
    from diffusers import DDIMScheduler

    betas = {"trained_betas": np.linspace(0.001, 0.02, steps).tolist()} if beta_schedule == "trained" else {}
    scheduler = DDIMScheduler(
        num_train_timesteps=steps,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear" if beta_schedule == "trained" else beta_schedule,
        rescale_betas_zero_snr=rescale,
        prediction_type="v_prediction",
        **betas,
    )
    schedule, prediction = schedule_from_diffusers(json.loads(scheduler.to_json_string()))
    assert prediction == "v"
    # its table is made in float32, whose rounding depends on the processor: its own steps again, in float64
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    plain = DDIMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=False).betas.double()
    theirs = (1 - (rescale_zero_terminal_snr(plain) if rescale else plain)).cumprod(0)
    assert np.abs(schedule.alphas_cumprod - theirs.numpy()).max() < 1e-6


def test_a_published_scheduler_configuration_is_read():
    # Stable Diffusion 1.5's file, which has no prediction_type.
    config = {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.6.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
        "clip_sample": False,
    }
    assert schedule_from_diffusers(config) == (VPDiscreteSchedule(), "eps")
    assert schedule_from_diffusers(config | {"prediction_type": "sample"})[1] == "x0"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
        ({"beta_schedule": None, "_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscrete"),
        ({"beta_start": None}, "beta_start"),
        ({"beta_end": None}, "beta_end"),
        ({"timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 1.5]}, "betas"),
    ],
)
def test_a_scheduler_configuration_that_can_not_be_read_is_refused_by_key(change, named):
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    with pytest.raises(ConfigError, match=named):
        schedule_from_diffusers(config | change)


def test_a_schedule_can_be_made_from_alphas_cumprod():
    for abar in (VPDiscreteSchedule().alphas_cumprod, ZERO_SNR.alphas_cumprod, torch.tensor([0.9, 0.5, 0.0])):
        schedule = VPDiscreteSchedule.from_alphas_cumprod(abar)
        assert schedule.alphas_cumprod == pytest.approx(np.asarray(abar), rel=1e-6, abs=1e-15)
        assert schedule.num_train_timesteps == len(abar)
    for abar in ([0.5, 0.6], [1.0, 0.5], [0.5, -0.1], [0.5], [[0.5, 0.2]]):
        with pytest.raises(ConfigError, match="alphas_cumprod"):
            VPDiscreteSchedule.from_alphas_cumprod(abar)


def test_zero_terminal_snr_is_pure_noise_at_the_end_and_finite_elsewhere():
    end = torch.tensor([999.0])
    assert ZERO_SNR.alpha(end).item() == 0
    assert ZERO_SNR.sigma(end).item() == 1
    assert ZERO_SNR.edm_sigma(end).item() == math.inf
    assert ZERO_SNR.t_from_edm_sigma(torch.tensor([math.inf])).item() == 999
    noise = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ZERO_SNR.add_noise(torch.ones(1, 3, 2, 2), end, noise), noise)
    # Continuous where the interpolation changes, at 998.
    t = torch.tensor([998 - 1e-9, 998, 998 + 1e-9], dtype=torch.float64)
    assert ZERO_SNR.alpha(t).diff().abs().max() < 1e-9
    assert VPDiscreteSchedule().alphas_cumprod[0] == pytest.approx(ZERO_SNR.alphas_cumprod[0], rel=1e-12)


def test_edm_sigma_rounded_to_float32_at_the_noisy_end_is_accepted_and_beyond_refused():
    schedule = VPDiscreteSchedule()
    top = schedule.edm_sigma(torch.tensor([999.0]))
    assert schedule.t_from_edm_sigma(top * (1 + 6e-8)).item() == 999
    with pytest.raises(ConfigError, match="vp_discrete"):
        schedule.t_from_edm_sigma(top * 1.01)


@pytest.mark.parametrize(
    ("schedule", "t"),
    [
        (EDMSchedule(), -0.1),
        (VPDiscreteSchedule(), 999.01),
        (VPDiscreteSchedule(), -1.01),
        (VPDiscreteSchedule(), math.nan),
        (VPCosineSchedule(), 1.001),
        (LinearFlowSchedule(), -0.001),
    ],
)
def test_a_time_outside_the_schedule_is_refused(schedule, t):
    with pytest.raises(ConfigError, match=r"noise level t=.* outside .* schedule"):
        schedule.alpha(torch.tensor([0.5, t]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_an_accelerator_coefficients_are_the_same_and_a_time_outside_gives_nan():
    for schedule in SCHEDULES.values():
        t = times(schedule)
        for method in (schedule.alpha, schedule.sigma, schedule.d_alpha, schedule.d_sigma):
            torch.testing.assert_close(method(t.cuda()).cpu(), method(t), rtol=1e-12, atol=1e-12)
        assert schedule.sigma(torch.tensor([schedule.t_clean - 1], device="cuda")).isnan().all()


def test_add_noise_weighs_signal_and_noise_per_sample_in_the_dtype_of_x0():
    schedule = LinearFlowSchedule()
    x0, noise = torch.full((2, 1, 2, 2), 4.0), torch.full((2, 1, 2, 2), -1.0)
    x_t = schedule.add_noise(x0, torch.tensor([0.25, 1.0]), noise)
    assert x_t[:, 0, 0, 0].tolist() == [0.75 * 4 - 0.25, -1.0]
    assert schedule.add_noise(x0.bfloat16(), torch.tensor([0.25, 1.0]), noise).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one noise level per sample"):
        schedule.add_noise(x0, torch.tensor([0.25]), noise)


def test_expand_gives_the_dimensions_of_the_batch():
    assert expand(torch.arange(3.0), torch.empty(3, 4, 5, 6)).shape == (3, 1, 1, 1)
    assert expand(torch.arange(3.0), torch.empty(3, 4)).shape == (3, 1)
    assert expand(torch.arange(3.0), torch.empty(3)).shape == (3,)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"name": "vp"}, "schedule.name='vp'"),
        ({"name": "edm", "sigma_mim": 1.0}, "schedule.sigma_mim"),
        ({"name": "edm", "sigma_min": 5.0, "sigma_max": 1.0}, "sigma_min"),
        ({"name": "linear_flow", "t_max": 1.5}, "t_max"),
        ({"name": "vp_cosine", "log_snr_min": 30.0}, "log_snr_min"),
        ({"name": "vp_discrete", "beta_end": 1.2}, "beta_end"),
        ({"name": "vp_discrete", "beta_schedule": "cosine"}, "beta_schedule='cosine'"),
        ({"name": "vp_discrete", "beta_schedule": "trained"}, "trained_betas"),
        ({"name": "vp_discrete", "beta_schedule": "trained", "trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"name": "vp_discrete", "num_train_timesteps": 1}, "num_train_timesteps"),
    ],
)
def test_a_wrong_schedule_setting_is_refused_by_name(config, named):
    with pytest.raises(ConfigError, match=named):
        schedule_from_config(config)
