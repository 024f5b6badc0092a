"""The evaluator: an immutable snapshot's weights in, figures of a stated protocol and a picture out.

Evaluation sample n is the same noise and caption whatever the batch size or the weights, so that pictures and figures
of different snapshots and runs differ only by the generator.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from raydistill.checkpoint import Snapshot
from raydistill.data.coco import read_coco
from raydistill.data.images import load_image
from raydistill.diffusion.random import Draws
from raydistill.diffusion.samplers import ddim, heun, karras_times, trailing_times
from raydistill.diffusion.schedules import VPDiscreteSchedule
from raydistill.errors import ConfigError
from raydistill.eval.detectors import ACCURACY, DetectorName, detector_for
from raydistill.eval.frechet import FeatureStatistics, frechet_distance
from raydistill.eval.grids import grid_png
from raydistill.eval.kid import kernel_distance
from raydistill.eval.protocol import Protocol, count_label, to_uint8
from raydistill.methods.method import Method
from raydistill.models.denoiser import Cond, denoise_guided
from raydistill.models.pipeline import Pipeline
from raydistill.roles.critic import critic_weights
from raydistill.roles.generator import Weights, generator_weights


@dataclass(frozen=True, kw_only=True)
class EvaluatorConfig:
    """What is evaluated, how often, and with what."""

    enabled: bool = True
    """Whether snapshots are evaluated at all."""
    every: int = 50
    """Generator updates between evaluated snapshots; the first and the last one always are."""
    may_skip: bool = True
    """Pass over snapshots while a newer one waits, where the evaluator is slower than training; false: each that is due
    gets its figures, which sweeps need to compare trials at the same update."""
    best_by: Literal["toyfid", "toykid", "accuracy"] = "toyfid"
    """Figure by which a run's best snapshot is chosen, which is kept, exported and registered: the least distance or
    the most accuracy."""
    coco: str = "builtin:scenes"
    """COCO-format folder of the reference images and the captions that are drawn; builtin:scenes and builtin:digits are
    written by the project."""
    split: str = "val"
    """Its split."""
    detector: DetectorName = "scenes"
    """Network in whose features figures are taken, for the embedded data alone: scenes (SceneNet, 32x32 images, prompt
    accuracy) or digits (DigitNet, 8x8 images, label accuracy)."""
    num_samples: int = 1000
    """Images per figure; it is part of the metric's name."""
    batch_size: int = 100
    """Images per forward pass; figures don't depend on it."""
    seed: int = 10
    """Seed of the evaluation noise, apart from the run's."""
    weights: Weights = "raw"
    """Which weights of the generator: as trained, or their EMA."""
    teacher_steps: int = 25
    """Steps of the teacher's own figure: of DDIM for teachers with discrete timesteps, otherwise of EDM's Heun sampler,
    whose n steps evaluate the network 2n - 1 times."""
    grid_images: int = 8
    """Columns of the picture."""
    threads: int = 2
    """CPU threads of the evaluator's process."""
    idle_priority: bool = True
    """Take only what the trainers leave of the CPUs, under Ray; false on a machine that is busy with something else,
    where nothing would be left."""
    head_start_s: float = 60.0
    """Seconds that training waits at most for the teacher's figure and the first snapshot's, where the evaluator has no
    GPU: beside training they would take many times as long, and slow it down."""

    @property
    def figures(self) -> dict[str, str]:
        """Full names of what is reported of a generator, by what `best_by` calls them."""
        names = {"toyfid": "toyfid", "toykid": "toykid", "accuracy": ACCURACY.get(self.detector, "accuracy")}
        return {short: f"eval/{name}_{count_label(self.num_samples)}" for short, name in names.items()}

    @property
    def best_metric(self) -> str:
        """Full name of the figure that `best_by` means."""
        return self.figures[self.best_by]

    def __post_init__(self) -> None:
        if self.every < 1 or self.num_samples < 2 or self.batch_size < 1:
            raise ConfigError(
                f"evaluator.every={self.every} and evaluator.batch_size={self.batch_size} must be at least 1, "
                f"evaluator.num_samples={self.num_samples} at least 2"
            )
        for name in ("threads", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluator.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.head_start_s <= 500:
            raise ConfigError(
                f"evaluator.head_start_s={self.head_start_s} must be from 0 to 500: "
                "other workers wait for 600 s at most"
            )
        if not 1 <= self.grid_images <= self.num_samples:
            raise ConfigError(
                f"evaluator.grid_images={self.grid_images} must be from 1 to evaluator.num_samples="
                f"{self.num_samples}, whose captions it shows"
            )


@dataclass(frozen=True)
class Evaluation:
    """Figures under their full metric names, the protocol that made them, and a PNG."""

    metrics: dict[str, float]
    protocol: dict[str, object]
    grid_png: bytes


class Evaluator:
    """Holds the pipeline, the detector, the reference statistics and the captions of one protocol."""

    def __init__(
        self,
        config: EvaluatorConfig,
        pipeline: Pipeline,
        method: Method,
        guidance_scale: float,
        *,
        device: torch.device | str = "cpu",
        cache_dir: str | None = None,
        channels_last: bool = True,
    ):
        """cache_dir: where the teacher's figure is kept by the hash of its protocol and weights. channels_last: of the
        networks' memory.

        Raises ConfigError if the reference has too few captions or the images are not of the detector's size.
        """
        self.config = config
        self.pipeline = pipeline.to(device)
        self.method = method
        self.guidance_scale = guidance_scale
        self.device = device
        self._cache_dir = Path(cache_dir) if cache_dir else None
        self._generator = pipeline.copy_denoiser("fp32").to(device).eval().requires_grad_(False)
        self._critic = pipeline.copy_denoiser("fp32").to(device).eval().requires_grad_(False)
        if channels_last:
            for denoiser in (pipeline.denoiser, self._generator, self._critic):
                denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._draws = Draws(config.seed)
        self._detector = detector_for(config.detector).to(device)
        if pipeline.image_size != self._detector.image_size:
            edge, wanted = pipeline.image_size, self._detector.image_size
            raise ConfigError(
                f"evaluator.detector={config.detector!r} judges {wanted}x{wanted} images, this teacher's are "
                f"{edge}x{edge}: choose the one for its data, or set evaluator.enabled=false"
            )

        images = [image for image in read_coco(config.coco, config.split) if image.captions]
        if len(images) < config.num_samples:
            raise ConfigError(
                f"evaluator.num_samples={config.num_samples}, but {config.coco} ({config.split}) has only "
                f"{len(images)} captioned images"
            )
        self.captions = [image.captions[0] for image in images[: config.num_samples]]
        self._reference = FeatureStatistics()
        reference: list[Tensor] = []
        digest = hashlib.sha256()
        for start in range(0, len(images), config.batch_size):
            batch = [
                load_image(image.path, self._detector.image_size)
                for image in images[start : start + config.batch_size]
            ]
            pixels = to_uint8(torch.stack(batch))
            digest.update(pixels.numpy().tobytes())
            reference.append(self._detector(pixels.to(device))[0])
            self._reference.update(reference[-1])
        self._reference_features = torch.cat(reference)
        self.protocol = Protocol(
            name=f"{config.detector}-{config.split}",
            metric="toyfid",
            num_samples=config.num_samples,
            seed=config.seed,
            detector=self._detector.name,
            detector_sha256=self._detector.sha256,
            reference=f"{Path(config.coco).name}/{config.split}",
            reference_sha256=digest.hexdigest(),
            num_reference=len(images),
            captions_sha256=hashlib.sha256("\n".join(self.captions).encode()).hexdigest(),
            resize="none",
            uint8_rule="round",
            caption_rule="first caption of each image, in order",
            sampler=method.sampler,
            num_steps=len(method.sampling_times),
            guidance_scale=1.0,
            weights=config.weights,
        )
        self._teacher_grid: Tensor | None = None

    def evaluate(self, snapshot: Snapshot) -> Evaluation:
        """Figures and picture of a snapshot's generator."""
        metrics = self.figures(generator_weights(snapshot, self.config.weights, lambda: self.pipeline))
        self._critic.load_state_dict(critic_weights(snapshot, lambda: self.pipeline))
        return Evaluation(metrics, described(self.protocol), self._picture(snapshot.step))

    def figures(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Figures of the generator with these weights of its denoiser."""
        started = time.monotonic()
        self._generator.load_state_dict(weights)
        metrics = self._figures(self._generate, self.protocol, "")
        return metrics | {"eval/seconds": time.monotonic() - started}

    def evaluate_teacher(self) -> Evaluation:
        """The teacher's own figures: its sampler, guided, same noise and captions; cached by protocol and weights.

        Raises ConfigError where guidance is asked of a teacher without a null condition.
        """
        steps = self.config.teacher_steps
        discrete = isinstance(self.pipeline.denoiser.schedule, VPDiscreteSchedule)
        sampler, evaluations = ("ddim", steps) if discrete else ("heun", 2 * steps - 1)
        protocol = replace(
            self.protocol,
            sampler=sampler,
            num_steps=evaluations,
            guidance_scale=self.guidance_scale,
            weights="raw",
        )
        made_by = f"{protocol.hash()} {self.pipeline.fingerprint} {self.pipeline.denoiser.prediction}"
        key = hashlib.sha256(made_by.encode()).hexdigest()[:16]
        cached = self._cache_dir / f"teacher_{key}.json" if self._cache_dir else None
        if cached and cached.is_file():
            metrics = json.loads(cached.read_text())["metrics"]
        else:
            metrics = self._figures(self._generate_teacher, protocol, "teacher_")
            if cached:
                cached.parent.mkdir(parents=True, exist_ok=True)
                partial = cached.with_suffix(".partial")
                partial.write_text(json.dumps({"metrics": metrics, "protocol": protocol.to_dict()}, indent=1))
                partial.replace(cached)
        return Evaluation(metrics, described(protocol), b"")

    def _figures(
        self, generate: Callable[[list[int]], Tensor], protocol: Protocol, who: str
    ) -> dict[str, float]:
        statistics = FeatureStatistics()
        drawn: list[Tensor] = []
        shown: list[Tensor] = []
        for indices in self._batches():
            features, objects = self._detector(generate(indices))
            statistics.update(features)
            drawn.append(features)
            shown.append(objects.cpu())
        accuracy = self._detector.accuracy(torch.cat(shown), self.captions)
        return {
            protocol.key(f"{who}toyfid"): frechet_distance(statistics, self._reference),
            protocol.key(f"{who}toykid"): kernel_distance(torch.cat(drawn), self._reference_features),
            protocol.key(f"{who}{self._detector.accuracy_metric}"): accuracy,
        }

    def _batches(self) -> Iterator[list[int]]:
        for start in range(0, self.config.num_samples, self.config.batch_size):
            yield list(range(start, min(start + self.config.batch_size, self.config.num_samples)))

    def _generate(self, indices: list[int]) -> Tensor:
        return to_uint8(self.pipeline.decode(self._samples(indices, self._cond(indices))))

    def _samples(self, indices: list[int], cond: Cond) -> Tensor:
        return self.method.sample(
            self._generator,
            cond,
            self._noise("eval/noise", indices),
            lambda step: self._noise(f"eval/renoise_{step}", indices),
        )

    @torch.no_grad()
    def _generate_teacher(self, indices: list[int]) -> Tensor:
        cond = self._cond(indices)
        null = self.pipeline.null_cond(len(indices))
        denoiser = self.pipeline.denoiser
        schedule, steps = denoiser.schedule, self.config.teacher_steps

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return denoise_guided(denoiser, x_t, t, cond, null, self.guidance_scale)

        noise = self._noise("eval/noise", indices)
        if isinstance(schedule, VPDiscreteSchedule):
            times = trailing_times(steps, schedule.num_train_timesteps)
            latents = ddim(denoise, schedule, [*times, schedule.t_clean], noise)
        else:
            times = karras_times(steps, schedule)
            x_T = schedule.sigma(torch.tensor(schedule.t_max)).item() * noise
            latents = heun(denoise, schedule, [*times, schedule.t_clean], x_T)
        return to_uint8(self.pipeline.decode(latents))

    @torch.no_grad()
    def _picture(self, step: int) -> bytes:
        """Rows for the same noise: generator, what teacher and critic make of its noised samples, teacher's own.

        A report takes the first and the last one.
        """
        indices = list(range(self.config.grid_images))
        if self._teacher_grid is None:
            self._teacher_grid = self._generate_teacher(indices).cpu()
        cond = self._cond(indices)
        x = self._samples(indices, cond)
        schedule = self._generator.schedule
        middle = schedule.t_from_edm_sigma(
            torch.ones(len(indices), dtype=torch.float64, device=x.device)
        ).float()
        x_t = schedule.add_noise(x, middle, self._noise("eval/grid", indices))
        null = self.pipeline.null_cond(len(indices))
        real = denoise_guided(self.pipeline.denoiser, x_t, middle, cond, null, self.guidance_scale)
        fake = self._critic(x_t, middle, cond)
        rows = [
            (f"generator, {len(self.method.sampling_times)} step, update {step}", x),
            ("teacher's x0 of it at sigma 1", real),
            ("critic's x0 of it at sigma 1", fake),
        ]
        pictures = [(label, to_uint8(self.pipeline.decode(latents)).cpu()) for label, latents in rows]
        pictures.append((f"teacher, {self.config.teacher_steps} steps", self._teacher_grid))
        return grid_png(pictures, [self.captions[i] for i in indices])

    def _cond(self, indices: list[int]) -> Cond:
        return self.pipeline.encode_text([self.captions[i] for i in indices])

    def _noise(self, purpose: str, indices: list[int]) -> Tensor:
        return self._draws.normal(purpose, 0, indices, self.pipeline.latent_shape).to(self.device)


def described(protocol: Protocol) -> dict[str, object]:
    """The protocol with its hash, as it is recorded beside a figure."""
    return protocol.to_dict() | {"hash": protocol.hash()}
