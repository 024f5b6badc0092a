"""From settings to networks: pipeline, method, roles."""

from __future__ import annotations

import importlib

import torch

from raydistill.diffusion.noise_schedule import NoiseSchedule
from raydistill.errors import ConfigError
from raydistill.methods import METHODS
from raydistill.methods.method import Method
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Denoiser
from raydistill.models.diffusers_hub import TextToImage, UNetDenoiser, load_pipeline, trainable
from raydistill.models.heads import BottleneckHead
from raydistill.roles.critic import CriticTrainer
from raydistill.roles.generator import GeneratorTrainer
from raydistill.roles.teacher import TeacherScorer
from raydistill.roles.world import World
from raydistill.runtime.settings import RunConfig, TrainConfig, teacher_folder


def build_pipeline(config: RunConfig) -> TextToImage:
    """The teacher's pipeline, frozen, in fp32, on the CPU."""
    teacher = config.teacher
    return load_pipeline(teacher_folder(teacher), prediction=teacher.prediction, revision=teacher.revision)


def build_method(config: RunConfig, pipeline: TextToImage) -> Method:
    """The method of a teacher."""
    return method_for(config, pipeline.denoiser.schedule)


def method_for(config: RunConfig, schedule: NoiseSchedule) -> Method:
    """The method, given the teacher's schedule."""
    module, _, name = METHODS[config.method.kind].method.partition(":")
    method: Method = getattr(importlib.import_module(module), name)(
        config.method, schedule, config.teacher.guidance_scale
    )
    return method


def build_generator(
    config: RunConfig, pipeline: TextToImage, world: World, device: torch.device, *, adopt: bool = False
) -> GeneratorTrainer:
    """The generator, a copy of the teacher; `adopt`: the pipeline's own network, where nobody else needs it."""
    denoiser = _trainable(pipeline, config.train, device, adopt)
    return GeneratorTrainer(denoiser, config.generator, world, config.train.generator_updates)


def build_critic(
    config: RunConfig,
    method: Method,
    pipeline: TextToImage,
    world: World,
    device: torch.device,
    *,
    teacher: Denoiser | None = None,
    adopt: bool = False,
) -> CriticTrainer:
    """The critic, a copy of the teacher, with a randomly initialised GAN head where the method has one.

    teacher: where the head reads the teacher's features, if not from the pipeline's own network. adopt: take the
    pipeline's own network, where nobody else needs it.
    """
    denoiser = _trainable(pipeline, config.train, device, adopt)
    head = None
    if method.needs.gan_head:
        size = pipeline.latent_shape[1] // 2 ** (len(denoiser.unet.config.block_out_channels) - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                config.seed
            )  # the head's weights must not depend on what ran before in the process
            head = BottleneckHead(denoiser.feature_channels, size).to(device)
    own_features = getattr(config.method, "gan_features", "critic") == "critic"
    source = None if own_features else teacher or pipeline.denoiser
    steps = config.train.generator_updates * method.critic_updates_per_generator
    return CriticTrainer(Critic(denoiser, head, source), config.critic, world, steps)


def build_teacher(config: RunConfig, pipeline: TextToImage, device: torch.device) -> TeacherScorer:
    """The teacher in this process; to be built last, since generator and critic begin as fp32 copies of it."""
    return TeacherScorer(tuned_teacher(config, pipeline, device), pipeline.null_cond(1).to(device).expand)


def tuned_teacher(config: RunConfig, pipeline: TextToImage, device: torch.device) -> UNetDenoiser:
    """The pipeline's own denoiser on the device, in the arithmetic and memory format of the settings."""
    pipeline.denoiser.cast(config.teacher.dtype).to(device)
    _tune(pipeline.denoiser, config.train)
    return pipeline.denoiser


def _trainable(pipeline: TextToImage, train: TrainConfig, device: torch.device, adopt: bool) -> UNetDenoiser:
    own = pipeline.denoiser
    denoiser = (trainable(own, train.dtype) if adopt else pipeline.copy_denoiser(train.dtype)).to(device)
    if train.activation_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    _tune(denoiser, train)
    return denoiser


def _tune(denoiser: UNetDenoiser, train: TrainConfig) -> None:
    if train.channels_last:
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if train.compile:
        denoiser.unet.compile()


def pick_device(gpus: float, setting: str = "placement.gpus_per_worker") -> torch.device:
    """The process's device. Raises ConfigError when a GPU is asked for and none is there."""
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"{setting}={gpus:g}, but this process sees no GPU")
    return torch.device("cuda", torch.cuda.current_device())
