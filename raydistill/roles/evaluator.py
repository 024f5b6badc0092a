"""The evaluator: an immutable snapshot's weights in, figures of a stated protocol and a picture out.

Evaluation sample n is the same noise and caption whatever the batch size, the weights or the number of evaluators, so
that pictures and figures of different snapshots and runs differ only by the generator.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal
from typing import Protocol as Interface

import torch
from torch import Tensor

from raydistill.checkpoint import Snapshot
from raydistill.errors import ConfigError
from raydistill.eval.detectors import ACCURACY, DetectorName
from raydistill.eval.inception import FILE_NAME
from raydistill.eval.judge import Part
from raydistill.eval.protocol import Protocol, count_label
from raydistill.eval.published import CAPTIONS, TOY, published
from raydistill.eval.reference import batches_of
from raydistill.methods.method import Method
from raydistill.models.pipeline import Pipeline
from raydistill.roles.critic import critic_weights
from raydistill.roles.evaluation_samples import EvaluationSamples
from raydistill.roles.evaluation_setup import set_up
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
    best_by: Literal[
        "toyfid", "toykid", "accuracy", "fid", "kid", "patch_fid", "precision", "recall", "clip_score"
    ] = "toyfid"
    """Figure by which a run's best snapshot is chosen, which is kept, exported and registered: the least distance or
    the most of another. Of a published protocol toyfid means fid, toykid means kid."""
    protocol: str = TOY
    """How figures are made: toy (toyfid, on the embedded data) or a published protocol, for figures that compare with
    papers': gigagan-coco30k, dmd2-sdxl-coco10k, edm-cifar10-50k, edm-in64-50k, dmd2-in64-50k, their proxies of 5,000
    samples gigagan-coco5k, dmd2-sdxl-coco5k, edm-cifar10-5k, edm-in64-5k, dmd2-in64-5k, or NAME@N with N samples."""
    detector_file: str = FILE_NAME
    """NVIDIA's inception-2015-12-05.pt, the detector of published protocols; loaded only if its SHA-256 is right."""
    detector_sha256: str | None = None
    """SHA-256 that detector_file must have; none: that of NVIDIA's file. The file holds code that runs: name a file of
    your own only if you trust it."""
    reference: str | None = None
    """Reference of a published protocol: a .npz of statistics (mu and sigma, as EDM and clean-fid write them), a folder
    of images, or of shards; none: the images of evaluator.coco's split."""
    captions: str | None = None
    """Text file of the captions of a published protocol, one a line; none: the first one of each of evaluator.coco's
    images."""
    clip: str | None = None
    """Folder of a transformers CLIPModel with its processor, for the CLIP score of published text protocols; none:
    no such figure."""
    coco: str = "builtin:scenes"
    """COCO-format folder of the reference images and the captions that are drawn; builtin:scenes and builtin:digits are
    written by the project."""
    split: str = "val"
    """Its split."""
    detector: DetectorName = "scenes"
    """Network in whose features figures are taken, for the embedded data alone: scenes (SceneNet, 32x32 images, prompt
    accuracy) or digits (DigitNet, 8x8 images, label accuracy)."""
    num_samples: int = 1000
    """Images per toy figure; published protocols have their own number. It is part of the metric's name."""
    batch_size: int = 100
    """Images per forward pass; figures don't depend on it."""
    seed: int = 10
    """Seed of the toy protocol's noise, apart from the run's; published protocols have their own."""
    workers: int = 1
    """Evaluators that share the samples of a figure, under Ray; figures don't depend on it."""
    teacher_figure: bool = True
    """Whether the teacher's own figure is made too."""
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
    def samples(self) -> int:
        """Images per figure, the protocol's or num_samples."""
        wanted = published(self.protocol)
        return self.num_samples if wanted is None else wanted.num_samples

    @property
    def reads_coco(self) -> bool:
        """Whether captions or reference images are those of `coco`."""
        wanted = published(self.protocol)
        if wanted is None:
            return True
        return wanted.conditions == CAPTIONS and None in (self.captions, self.reference)

    @property
    def figures(self) -> dict[str, str]:
        """Full names of what is reported of a generator, by what `best_by` calls them, the main distance first."""
        wanted = published(self.protocol)
        if wanted is None:
            names = {
                "toyfid": "toyfid",
                "toykid": "toykid",
                "accuracy": ACCURACY.get(self.detector, "accuracy"),
            }
        else:
            has_features = not (self.reference or "").endswith(".npz")
            reported = ["fid", *["patch_fid"] * bool(wanted.patch_resize)]
            reported += [
                *["kid", "precision", "recall"] * has_features,
                *["clip_score"] * (self.clip is not None),
            ]
            names = {name: name for name in reported}
        return {short: f"eval/{name}_{count_label(self.samples)}" for short, name in names.items()}

    @property
    def quality(self) -> str:
        """The main distance without N: toyfid or fid."""
        return next(iter(self.figures))

    @property
    def best_metric(self) -> str:
        """Full name of the figure that `best_by` means."""
        return self.figures[self._best_by]

    @property
    def _best_by(self) -> str:
        return self.best_by if self.protocol == TOY else self.best_by.removeprefix("toy")

    def __post_init__(self) -> None:
        if self.every < 1 or self.num_samples < 2 or self.batch_size < 1:
            raise ConfigError(
                f"evaluator.every={self.every} and evaluator.batch_size={self.batch_size} must be at least 1, "
                f"evaluator.num_samples={self.num_samples} at least 2"
            )
        for name in ("threads", "teacher_steps", "workers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluator.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.head_start_s <= 500:
            raise ConfigError(
                f"evaluator.head_start_s={self.head_start_s} must be from 0 to 500: "
                "other workers wait for 600 s at most"
            )
        if not 1 <= self.grid_images <= self.samples:
            raise ConfigError(
                f"evaluator.grid_images={self.grid_images} must be from 1 to evaluator.num_samples="
                f"{self.samples}, whose captions it shows"
            )
        if self._best_by not in self.figures:
            raise ConfigError(
                f"evaluator.best_by={self.best_by}: evaluator.protocol={self.protocol} reports "
                f"{', '.join(self.figures)}"
            )


@dataclass(frozen=True)
class Evaluation:
    """Figures under their full metric names, the protocol that made them, and a PNG."""

    metrics: dict[str, float]
    protocol: dict[str, object]
    grid_png: bytes


class Helpers(Interface):
    """Other evaluators of the same figure, which were told which one it is; in `raydistill.runtime.actors`."""

    count: int

    def start(self) -> None:
        """Let each look at its share of the samples."""

    def collect(self) -> Sequence[Part | None]:
        """What they found, in the samples' order; None in the place of one that is lost."""


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
        reference_dir: str | None = None,
        channels_last: bool = True,
    ):
        """cache_dir: where the teacher's figure is kept by the hash of its protocol and weights. reference_dir: where
        features of reference images are kept, by the hash of their content. channels_last: of the networks' memory.

        Raises ConfigError if protocol and teacher don't fit each other, or if what the protocol takes is missing.
        """
        self.config = config
        self.pipeline = pipeline.to(device)
        self.guidance_scale = guidance_scale
        self._cache_dir = Path(cache_dir) if cache_dir else None
        self._setup = set_up(config, pipeline, method, device, Path(reference_dir) if reference_dir else None)
        self._generator = pipeline.copy_denoiser("fp32").to(device).eval().requires_grad_(False)
        self._critic = pipeline.copy_denoiser("fp32").to(device).eval().requires_grad_(False)
        if channels_last:
            for denoiser in (pipeline.denoiser, self._generator, self._critic):
                denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.samples = EvaluationSamples(
            pipeline,
            method,
            self._generator,
            captions=self._setup.captions,
            seeds=self._setup.seeds,
            uint8_rule=self._setup.uint8_rule,
            guidance_scale=guidance_scale,
            teacher_steps=config.teacher_steps,
            device=device,
        )

    @cached_property
    def protocol(self) -> Protocol:
        """Of the generator's figures."""
        return self._setup.protocol()

    def evaluate(self, snapshot: Snapshot, helpers: Helpers | None = None) -> Evaluation:
        """Figures and picture of a snapshot's generator."""
        weights = generator_weights(snapshot, self.config.weights, lambda: self.pipeline)
        metrics = self.figures(weights, helpers)
        self._critic.load_state_dict(critic_weights(snapshot, lambda: self.pipeline))
        picture = self.samples.picture(snapshot.step, self._critic, self.config.grid_images, self.config.seed)
        return Evaluation(metrics, described(self.protocol), picture)

    def figures(self, weights: Mapping[str, Tensor], helpers: Helpers | None = None) -> dict[str, float]:
        """Figures of the generator with these weights of its denoiser."""
        started = time.monotonic()
        self._generator.load_state_dict(weights)
        metrics = self._figures(self.samples.generated, helpers, "")
        return metrics | {"eval/seconds": time.monotonic() - started}

    def evaluate_teacher(self, helpers: Helpers | None = None) -> Evaluation:
        """The teacher's own figures: its sampler, guided, same noise and captions; cached by protocol and weights.

        Raises ConfigError where guidance is asked of a teacher without a null condition.
        """
        sampler, evaluations = self.samples.teacher_sampler()
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
            metrics = self._figures(self.samples.of_teacher, helpers, "teacher_")
            if cached:
                cached.parent.mkdir(parents=True, exist_ok=True)
                partial = cached.with_suffix(".partial")
                partial.write_text(json.dumps({"metrics": metrics, "protocol": protocol.to_dict()}, indent=1))
                partial.replace(cached)
        return Evaluation(metrics, described(protocol), b"")

    def part(self, snapshot: Snapshot | None, worker: int, workers: int) -> Part:
        """A helper's share of a snapshot's samples, or (None) of the teacher's."""
        if snapshot is None:
            return self._part(self.samples.of_teacher, worker, workers)
        self._generator.load_state_dict(
            generator_weights(snapshot, self.config.weights, lambda: self.pipeline)
        )
        return self._part(self.samples.generated, worker, workers)

    def _part(self, generate: Callable[[list[int]], Tensor], worker: int, workers: int) -> Part:
        part = Part()
        for indices in batches_of(self.config.samples, self.config.batch_size, worker, workers):
            captions = [self.samples.captions[index] for index in indices]
            self._setup.judge.look(part, generate(indices), captions)
        return part

    def _figures(
        self, generate: Callable[[list[int]], Tensor], helpers: Helpers | None, who: str
    ) -> dict[str, float]:
        workers = 1 + (helpers.count if helpers else 0)
        if helpers:
            helpers.start()
        whole = self._part(generate, 0, workers)
        for number, part in enumerate(helpers.collect() if helpers else (), 1):
            whole.merge(self._part(generate, number, workers) if part is None else part)
        found = self._setup.judge.figures(whole, self.samples.captions)
        return {self.protocol.key(f"{who}{name}"): value for name, value in found.items()}


def described(protocol: Protocol) -> dict[str, object]:
    """The protocol with its hash, as it is recorded beside a figure."""
    return protocol.to_dict() | {"hash": protocol.hash()}
