"""The images that an evaluator judges and shows: its generator's, its teacher's, and both side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from raydistill.diffusion.samplers import ddim, heun, karras_times, trailing_times
from raydistill.diffusion.schedules import VPDiscreteSchedule
from raydistill.eval.grids import grid_png
from raydistill.eval.protocol import to_uint8
from raydistill.eval.seeds import CounterBased, Seeds
from raydistill.methods.method import Method
from raydistill.models.denoiser import Cond, Denoiser, denoise_guided
from raydistill.models.pipeline import Pipeline


class EvaluationSamples:
    """Samples by their numbers; each is the same whichever others are asked for with it."""

    def __init__(
        self,
        pipeline: Pipeline,
        method: Method,
        generator: Denoiser,
        *,
        captions: list[str],
        seeds: Seeds,
        uint8_rule: str,
        guidance_scale: float,
        teacher_steps: int,
        device: torch.device | str,
    ):
        self.captions = captions
        self._pipeline = pipeline
        self._method = method
        self._generator = generator
        self._seeds = seeds
        self._uint8_rule = uint8_rule
        self._guidance_scale = guidance_scale
        self._teacher_steps = teacher_steps
        self._device = device
        self._teacher_grid: Tensor | None = None

    def teacher_sampler(self) -> tuple[str, int]:
        """The teacher's own sampler, and its network evaluations per image."""
        steps = self._teacher_steps
        discrete = isinstance(self._pipeline.denoiser.schedule, VPDiscreteSchedule)
        return ("ddim", steps) if discrete else ("heun", 2 * steps - 1)

    def generated(self, indices: list[int]) -> Tensor:
        """The generator's images, uint8 [B, 3, H, W]."""
        return self._bytes(self._sampled(indices, self._cond(indices)))

    @torch.no_grad()
    def of_teacher(self, indices: list[int]) -> Tensor:
        """The teacher's own for the same noise and conditions, uint8 [B, 3, H, W].

        Raises ConfigError where guidance is asked of a teacher without a null condition.
        """
        cond = self._cond(indices)
        null = self._pipeline.null_cond(len(indices))
        denoiser = self._pipeline.denoiser
        schedule, steps = denoiser.schedule, self._teacher_steps

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return denoise_guided(denoiser, x_t, t, cond, null, self._guidance_scale)

        noise = self._noise("eval/noise", 0, indices)
        if isinstance(schedule, VPDiscreteSchedule):
            times = trailing_times(steps, schedule.num_train_timesteps)
            latents = ddim(denoise, schedule, [*times, schedule.t_clean], noise)
        else:
            times = karras_times(steps, schedule)
            x_T = schedule.sigma(torch.tensor(schedule.t_max)).item() * noise
            latents = heun(denoise, schedule, [*times, schedule.t_clean], x_T)
        return self._bytes(latents)

    @torch.no_grad()
    def picture(self, step: int, critic: Denoiser, columns: int, seed: int) -> bytes:
        """PNG of rows for the same noise: generator, what teacher and critic make of its noised samples, teacher's own.

        A report takes the first and the last one.
        """
        indices = list(range(columns))
        if self._teacher_grid is None:
            self._teacher_grid = self.of_teacher(indices).cpu()
        cond = self._cond(indices)
        x = self._sampled(indices, cond)
        schedule = self._generator.schedule
        middle = schedule.t_from_edm_sigma(torch.ones(columns, dtype=torch.float64, device=x.device)).float()
        noise = CounterBased(seed).noise("eval/grid", 0, indices, self._pipeline.latent_shape)
        x_t = schedule.add_noise(x, middle, noise.to(self._device))
        null = self._pipeline.null_cond(columns)
        real = denoise_guided(self._pipeline.denoiser, x_t, middle, cond, null, self._guidance_scale)
        fake = critic(x_t, middle, cond)
        steps = len(self._method.sampling_times)
        rows = [
            (f"generator, {steps} step{'s' * (steps > 1)}, update {step}", x),
            ("teacher's x0 of it at sigma 1", real),
            ("critic's x0 of it at sigma 1", fake),
        ]
        pictures = [(label, self._bytes(latents).cpu()) for label, latents in rows]
        pictures.append((f"teacher, {self._teacher_steps} steps", self._teacher_grid))
        return grid_png(pictures, [self.captions[i] for i in indices])

    def _bytes(self, latents: Tensor) -> Tensor:
        return to_uint8(self._pipeline.decode(latents), self._uint8_rule)

    def _sampled(self, indices: list[int], cond: Cond) -> Tensor:
        return self._method.sample(
            self._generator,
            cond,
            self._noise("eval/noise", 0, indices),
            lambda step: self._noise(f"eval/renoise_{step}", step + 1, indices),
        )

    def _cond(self, indices: list[int]) -> Cond:
        return self._pipeline.encode_text([self.captions[i] for i in indices])

    def _noise(self, purpose: str, again: int, indices: list[int]) -> Tensor:
        return self._seeds.noise(purpose, again, indices, self._pipeline.latent_shape).to(self._device)
