"""What a protocol makes of an evaluator's settings: who judges, which conditions and noise samples get, what is
recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raydistill.data.coco import read_coco
from raydistill.data.images import load_image
from raydistill.errors import ConfigError
from raydistill.eval.detectors import detector_for
from raydistill.eval.frechet import FeatureStatistics
from raydistill.eval.inception import Inception
from raydistill.eval.judge import Judge, PublishedJudge, ToyJudge
from raydistill.eval.protocol import Protocol, to_uint8
from raydistill.eval.published import CAPTIONS, Published, published
from raydistill.eval.resize import chain
from raydistill.eval.seeds import CounterBased, GeneratorPerImage, Seeds
from raydistill.methods.method import Method
from raydistill.models.clip_score import ClipScore
from raydistill.models.edm_pipeline import EDMPipeline
from raydistill.models.pipeline import Pipeline
from raydistill.roles.evaluation_inputs import References, captions_for, require_conditions

if TYPE_CHECKING:
    from raydistill.roles.evaluator import EvaluatorConfig


@dataclass
class Setup:
    """One protocol, ready to be used."""

    judge: Judge
    captions: list[str]
    """Of all samples; a class's number where the teacher's conditions are labels."""
    seeds: Seeds
    uint8_rule: str
    protocol: Callable[[], Protocol]
    """Of the generator's figures; it may read all reference images."""


def set_up(
    config: EvaluatorConfig,
    pipeline: Pipeline,
    method: Method,
    device: torch.device | str,
    cache_dir: Path | None,
) -> Setup:
    """cache_dir: where features of reference images are kept.

    Raises ConfigError if teacher and protocol don't fit each other or an input is missing.
    """
    wanted = published(config.protocol)
    if wanted is None:
        return _toy(config, pipeline, method, device)
    return _published(config, wanted, pipeline, method, device, cache_dir)


def _toy(config: EvaluatorConfig, pipeline: Pipeline, method: Method, device: torch.device | str) -> Setup:
    detector = detector_for(config.detector).to(device)
    if pipeline.image_size != detector.image_size:
        edge, wanted = pipeline.image_size, detector.image_size
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
    captions = [image.captions[0] for image in images[: config.num_samples]]
    statistics = FeatureStatistics()
    features: list[Tensor] = []
    digest = hashlib.sha256()
    for start in range(0, len(images), config.batch_size):
        batch = images[start : start + config.batch_size]
        pixels = to_uint8(torch.stack([load_image(image.path, detector.image_size) for image in batch]))
        digest.update(pixels.numpy().tobytes())
        features.append(detector(pixels.to(device))[0])
        statistics.update(features[-1])
    protocol = Protocol(
        name=f"{config.detector}-{config.split}",
        metric="toyfid",
        num_samples=config.num_samples,
        seed=config.seed,
        detector=detector.name,
        detector_sha256=detector.sha256,
        reference=f"{Path(config.coco).name}/{config.split}",
        reference_sha256=digest.hexdigest(),
        num_reference=len(images),
        captions_sha256=_sha256(captions),
        resize="none",
        uint8_rule="round",
        caption_rule="first caption of each image, in order",
        sampler=method.sampler,
        num_steps=len(method.sampling_times),
        guidance_scale=1.0,
        weights=config.weights,
    )
    judge = ToyJudge(detector, statistics, torch.cat(features))
    return Setup(judge, captions, CounterBased(config.seed), "round", lambda: protocol)


def _published(
    config: EvaluatorConfig,
    wanted: Published,
    pipeline: Pipeline,
    method: Method,
    device: torch.device | str,
    cache_dir: Path | None,
) -> Setup:
    classes = pipeline.denoiser.config.label_dim if isinstance(pipeline, EDMPipeline) else None
    require_conditions(config, by_class=classes is not None)
    if wanted.image_size not in (None, pipeline.image_size):
        raise ConfigError(
            f"evaluator.protocol={wanted.name} judges {wanted.image_size}x{wanted.image_size} images, this teacher's "
            f"(teacher.path) are {pipeline.image_size}x{pipeline.image_size}"
        )
    if classes is not None and classes not in (0, wanted.num_classes):
        raise ConfigError(
            f"evaluator.protocol={wanted.name} is of {wanted.num_classes} classes, this teacher (teacher.path) has "
            f"{classes}"
        )
    detector = Inception(config.detector_file, config.detector_sha256).to(device)
    references = References(config, wanted, cache_dir)
    clip = None if config.clip is None else ClipScore(config.clip, device)
    seeds: Seeds = CounterBased(wanted.seed)
    if wanted.seed_rule == "generator-per-image":
        seeds = GeneratorPerImage(wanted.seed, classes or 0, device)
    if wanted.conditions == CAPTIONS:
        captions, rule = captions_for(config, wanted)
    else:
        captions, rule = _labels(wanted, seeds, classes or 0, pipeline.latent_shape)

    def protocol() -> Protocol:
        return Protocol(
            name=wanted.name,
            metric="fid",
            num_samples=wanted.num_samples,
            seed=wanted.seed,
            detector="inception-2015-12-05",
            detector_sha256=detector.sha256,
            reference=references.name,
            reference_sha256=references.sha256,
            num_reference=references.count,
            captions_sha256=_sha256(captions),
            resize=wanted.resize,
            uint8_rule=wanted.uint8_rule,
            caption_rule=rule,
            sampler=method.sampler,
            num_steps=len(method.sampling_times),
            guidance_scale=1.0,
            weights=config.weights,
            seed_rule=seeds.name,
            patch_resize=wanted.patch_resize,
            clip="" if clip is None else clip.name,
            clip_sha256="" if clip is None else clip.sha256,
        )

    judge = PublishedJudge(
        detector,
        {name: chain(each) for name, each in references.chains().items()},
        lambda: references.get(detector, device),
        clip,
        device,
    )
    return Setup(judge, captions, seeds, wanted.uint8_rule, protocol)


def _labels(
    wanted: Published, seeds: Seeds, classes: int, shape: tuple[int, int, int]
) -> tuple[list[str], str]:
    """A class's number for every sample, and the rule."""
    samples = range(wanted.num_samples)
    if not classes:
        return ["0"] * wanted.num_samples, "no labels"
    if wanted.label_rule == "in-turn":
        return [str(number % classes) for number in samples], "classes in turn"
    return [str(seeds.label(number, shape)) for number in samples], "drawn with the sample's noise"


def _sha256(captions: list[str]) -> str:
    return hashlib.sha256("\n".join(captions).encode()).hexdigest()
