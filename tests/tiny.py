"""A tiny real trainer for tests: random UNet on 3x8x8 pixels or the shipped digits network, normal data, no files."""

from dataclasses import is_dataclass, replace
from typing import Any

import torch

from raydistill.data.normal import NormalSource
from raydistill.data.reader import DataConfig
from raydistill.methods.dmd2 import DMD2Config
from raydistill.models.diffusers_hub import PixelPipeline, random_pixel_pipeline
from raydistill.roles.critic import CriticConfig
from raydistill.roles.generator import GeneratorConfig
from raydistill.roles.teacher import Scorer
from raydistill.roles.world import World
from raydistill.runtime.settings import RunConfig, TeacherConfig, TrainConfig
from raydistill.runtime.trainer import Trainer


def normal_source(purpose: str, fields: tuple[str, ...], size: int, micro: int, world: World) -> NormalSource:
    return NormalSource(
        purpose, fields, size, micro,
        latent_shape=(3, 8, 8), cond_shapes={"text": (1, 64)}, rank=world.rank, world_size=world.size,
    )  # fmt: skip


def digits_source(purpose: str, fields: tuple[str, ...], size: int, micro: int, world: World) -> NormalSource:
    return NormalSource(
        purpose, fields, size, micro,
        latent_shape=(1, 8, 8), cond_shapes={"label": ()}, rank=world.rank, world_size=world.size,
    )  # fmt: skip


DIGITS = {"path": "builtin:digits", "guidance_scale": 1.0}
"""Settings of the teacher, an EDM network."""


class PlainSession:
    """One rank without tracker or evaluator."""

    def __init__(self, world: World | None = None, scorer: Scorer | None = None):
        self.world = world or World()
        self.device = torch.device("cpu")
        self._scorer = scorer

    def scorer(self, pipeline: PixelPipeline) -> Scorer | None:
        return self._scorer


def tiny_pipeline(seed: int = 0) -> PixelPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return random_pixel_pipeline(8, (8, 16), 1)[0]


def tiny_config(**sections: Any) -> RunConfig:
    """Small settings that exercise everything: guidance, GAN, EMA. sections: settings to change, or a whole section."""
    config = RunConfig(
        name="tiny",
        teacher=TeacherConfig(guidance_scale=2.0),
        method=DMD2Config(critic_updates_per_generator=2, gan_weight_generator=0.01, gan_weight_critic=0.01),
        generator=GeneratorConfig(lr=1e-3, warmup_steps=2, ema_halflife_images=20.0),
        critic=CriticConfig(lr=1e-3, warmup_steps=2),
        train=TrainConfig(batch_size=8, generator_updates=4),
        data=DataConfig(shards="none"),
    )
    changed = {
        name: section if is_dataclass(section) else replace(getattr(config, name), **section)
        for name, section in sections.items()
    }
    return replace(config, **changed)


def tiny_trainer(config: RunConfig, world: World | None = None, scorer: Scorer | None = None) -> Trainer:
    """On the digits network where teacher.path says so."""
    session = PlainSession(world, scorer)
    if config.teacher.path == "builtin:digits":
        return Trainer(config, session, None, digits_source)  # type: ignore[arg-type]
    return Trainer(config, session, tiny_pipeline(), normal_source)  # type: ignore[arg-type]
