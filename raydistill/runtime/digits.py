"""The handwritten-digits benchmark: what every method's run on it has in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raydistill.data.reader import DataConfig
from raydistill.methods.dmd2 import DMD2Config
from raydistill.methods.method import MethodConfig
from raydistill.methods.moment_matching import MomentMatchingConfig
from raydistill.methods.sid import SiDConfig
from raydistill.roles.critic import CriticConfig
from raydistill.roles.evaluator import EvaluatorConfig
from raydistill.roles.generator import GeneratorConfig
from raydistill.runtime.build import method_class
from raydistill.runtime.settings import (
    CheckpointConfig,
    PrepareConfig,
    RunConfig,
    TeacherConfig,
    TrainConfig,
)

IMAGES = 150_000
"""Generated for training in a run, as long as nothing else is said. SiD and SiDA are no better from twice as many:
0.123 (alpha 1) and 0.131, after 0.12 on the way."""
LONG = 600_000
"""Likewise in the long recipe."""
BATCH = 64
NUM_IMAGES = 1797
"""Of the data set, and of a figure."""

_EMA: dict[str, Any] = {"ema_halflife_images": 8000.0, "ema_ramp": 0.05}
_SID: dict[str, Any] = {"betas": (0.0, 0.999), "weight_decay": 0.0, "clip_norm": None, "warmup_steps": 0}
_ADAM = GeneratorConfig(lr=2e-4, lr_schedule="linear", **_SID, **_EMA)
# SiD came to a toyfid of 0.132 from 300,000 images with 4e-4, to 0.100 and 0.113 from 150,000 with 1e-3 and 2e-3
_CRITIC = CriticConfig(lr=1e-3, lr_schedule="linear", **_SID)
_ADAM_W = GeneratorConfig(lr=2e-4, warmup_steps=10, lr_schedule="linear", **_EMA)
_CRITIC_W = CriticConfig(lr=4e-4, warmup_steps=10, lr_schedule="linear")
_MOMENTS: dict[str, Any] = {"betas": (0.0, 0.99), "weight_decay": 0.0, "clip_norm": None, "warmup_steps": 10}
_MOMENT = GeneratorConfig(lr=4e-4, lr_schedule="linear", **_MOMENTS, **_EMA)
# in eight steps, from 150,000 images, 0.108 and 0.098 with 8e-4 and 2e-3
_MOMENT_CRITIC = CriticConfig(lr=2e-3, lr_schedule="linear", **_MOMENTS)


def digits_run(
    name: str,
    method: MethodConfig,
    *,
    images: int,
    generator: GeneratorConfig,
    critic: CriticConfig,
    evaluate: int = 8,
) -> RunConfig:
    """A run on the shipped digits teacher that ends after so many generated images, evaluated `evaluate` times."""
    updates = max(1, images // images_of_update(method))
    every = -(-updates // evaluate)
    return RunConfig(
        name=name,
        teacher=TeacherConfig(path="builtin:digits", guidance_scale=1.0),
        method=method,
        generator=generator,
        critic=critic,
        train=TrainConfig(generator_updates=updates, batch_size=BATCH, channels_last=False, log_every=10),
        data=DataConfig(shards="builtin:digits"),
        prepare=PrepareConfig(coco="builtin:digits"),
        evaluator=EvaluatorConfig(
            detector="digits",
            coco="builtin:digits",
            every=every,
            num_samples=NUM_IMAGES,
            batch_size=599,
            weights="ema",
            teacher_steps=18,
            grid_images=10,
        ),
        checkpoint=CheckpointConfig(every=every),
    )


def images_of_update(method: MethodConfig) -> int:
    """Samples that one generator update with its critic updates takes."""
    return BATCH * (method.critic_updates_per_generator + method_class(method.kind).critic_first)


def dmd2(images: int = IMAGES, **changes: Any) -> RunConfig:
    """DMD2 in one step from sigma 80, as on ImageNet-64; changes: of its settings."""
    method = replace(
        DMD2Config(timesteps=(80.0,), gan_weight_generator=3e-3, gan_weight_critic=1e-2), **changes
    )
    return digits_run("dmd2_digits", method, images=images, generator=_ADAM_W, critic=_CRITIC_W)


def sid(images: int = IMAGES, **changes: Any) -> RunConfig:
    """SiD in one step from sigma 2.5; changes: of its settings."""
    return digits_run(
        "sid_digits", replace(SiDConfig(), **changes), images=images, generator=_ADAM, critic=_CRITIC
    )


def sida(images: int = IMAGES, **changes: Any) -> RunConfig:
    """SiDA: SiD with its discriminator; changes: of its settings.

    Its gates are after 1 % and 2 % of the images (the paper's 100k and 200k of 300M would be no update here). The
    discriminator's weight is the paper's 1 by the ratio of pixels (64 to 3 x 32 x 32), of which the score's loss is a
    sum and the discriminator's a mean: with 1 it outweighed the score's, and toyfid came to 0.128 instead of 0.112.
    """
    update = images_of_update(SiDConfig())
    method = SiDConfig(
        alpha=1.0,
        gan_weight_critic=64 / 3072,
        gan_weight_generator=0.01,
        generator_rest_updates=images // 100 // update,
        gan_start_update=images // 50 // update,
    )
    return replace(sid(images), name="sida_digits", method=replace(method, **changes))


def moment_matching(num_steps: int = 8, images: int = IMAGES, **changes: Any) -> RunConfig:
    """Moment matching in `num_steps` steps; changes: of its settings."""
    method = replace(MomentMatchingConfig(num_steps=num_steps, weighting="sqrt_edm"), **changes)
    return digits_run(
        f"moment_matching_{num_steps}_digits", method, images=images, generator=_MOMENT, critic=_MOMENT_CRITIC
    )


def long(images: int = LONG) -> RunConfig:
    """The best method for longer: moment matching in eight steps, which goes on falling where SiD doesn't."""
    return replace(moment_matching(8, images), name="moment_matching_8_digits_long")
