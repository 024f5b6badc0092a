"""Preflight: the teacher denoises real training samples at five noise levels before step 1.

A posterior mean beats both trivial answers, "the noisy input" (squared error s^2, s = sigma/alpha) and "the mean of
the data" (its variance). A teacher that doesn't has been given samples of another scale or shift, or its output is read
as another prediction type than it is; both show at once and are diagnosed by trying the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raydistill.diffusion.parametrization import Prediction, from_x0, to_x0
from raydistill.diffusion.random import Draws
from raydistill.diffusion.schedules import EDMSchedule, NoiseSchedule
from raydistill.errors import ConfigError
from raydistill.models.denoiser import Cond, Denoiser

LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Noise levels s = sigma/alpha, relative to data of unit variance; EDM pixels have sigma_data 0.5."""
_LIMIT = 1.15
_SCALES = (0.13025, 0.18215, 0.3611, 1.5305, 1 / 0.13025, 1 / 0.18215, 0.5, 2.0)


@dataclass(frozen=True)
class PreflightReport:
    """Mean squared error of the teacher's x0 over min(s^2, variance of the data), by level: at most about 1."""

    errors: dict[float, float]
    mean: float
    std: float


@torch.no_grad()
def preflight(
    denoiser: Denoiser, x0: Tensor, cond: Cond, draws: Draws, prediction: Prediction
) -> PreflightReport:
    """Check that the teacher denoises real samples x0 [B, C, H, W] under their own conditions.

    Raises ConfigError with a diagnosis if the relative error passes 1.15 at any level.
    """
    errors = {level: _relative_error(denoiser, x0, cond, draws, level) for level in LEVELS}
    report = PreflightReport(errors, float(x0.mean()), float(x0.std()))
    worst = max(errors, key=lambda level: errors[level])
    if errors[worst] <= _LIMIT:
        return report
    raise ConfigError(
        f"preflight: the teacher's error on real samples is {errors[worst]:.2f} times the trivial answer's at noise "
        f"level {worst:g} (at most {_LIMIT} is sound; samples have mean {report.mean:.2f}, std {report.std:.2f}); "
        + _diagnosis(denoiser, x0, cond, draws, worst, errors[worst], prediction)
        + "; teacher.preflight=false trains all the same"
    )


def _relative_error(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond,
    draws: Draws,
    level: float,
    read_as: tuple[Prediction, Prediction] | None = None,
) -> float:
    schedule = denoiser.schedule
    sigma = level * (0.5 if isinstance(schedule, EDMSchedule) else 1.0)
    t = _time_of(schedule, sigma, len(x0), x0.device)
    noise = draws.normal(f"preflight/{level:g}", 0, range(len(x0)), tuple(x0.shape[1:])).to(x0.device)
    x_t = schedule.add_noise(x0, t, noise)
    answer = denoiser(x_t, t, cond)
    if read_as is not None:
        answer = to_x0(from_x0(answer, x_t, t, schedule, read_as[0]), x_t, t, schedule, read_as[1])
    trivial = min(float((noise * sigma).square().mean()), float((x0 - x0.mean(0)).square().mean()))
    return float((answer - x0).square().mean()) / trivial


def _time_of(schedule: NoiseSchedule, sigma: float, count: int, device: torch.device) -> Tensor:
    t = schedule.t_from_edm_sigma(torch.full((count,), sigma, dtype=torch.float64, device=device))
    return t.clamp(schedule.t_min, schedule.t_max).round().float() if schedule.t_max > 100 else t.float()


def _diagnosis(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond,
    draws: Draws,
    level: float,
    error: float,
    prediction: Prediction,
) -> str:
    """The most helpful of the alternatives, in words."""
    found: list[tuple[float, str]] = []
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    for other, name in names.items():
        if other != prediction:
            tried = _relative_error(denoiser, x0, cond, draws, level, (prediction, other))  # type: ignore[arg-type]
            found.append(
                (
                    tried,
                    f"it falls to {tried:.2f} if the output is read as {name}: set teacher.prediction={name}",
                )
            )
    for scale in _SCALES:
        tried = _relative_error(denoiser, x0 * scale, cond, draws, level)
        words = "latents of another scaling factor; prepare the shards with this teacher (data.shards)"
        found.append((tried, f"it falls to {tried:.2f} if samples are multiplied by {scale:.4g}: {words}"))
    centred = x0 - x0.mean(dim=(0, 2, 3), keepdim=True)
    tried = _relative_error(denoiser, centred, cond, draws, level)
    found.append(
        (
            tried,
            f"it falls to {tried:.2f} if the samples' mean is removed: a shift factor is missing (data.shards)",
        )
    )
    best = min(found)
    if best[0] < min(0.8 * error, _LIMIT):
        return best[1]
    return "no change of prediction type, scale or shift mends it: teacher.path and data.shards don't belong together"
