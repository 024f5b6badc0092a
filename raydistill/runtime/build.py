"""From settings to networks: pipeline, method, roles."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydistill.diffusion.noise_schedule import NoiseSchedule
from raydistill.errors import ConfigError, PlacementError
from raydistill.methods import METHODS
from raydistill.methods.method import Method
from raydistill.models import diffusers_hub
from raydistill.models.critic import Critic
from raydistill.models.denoiser import Cond, Denoiser
from raydistill.models.edm_pipeline import edm_on_meta, is_edm, load_edm_pipeline
from raydistill.models.heads import BottleneckHead
from raydistill.models.lora import SharedBase
from raydistill.models.pipeline import Pipeline, trainable
from raydistill.models.random_sd import PUBLISHED, RandomSDPipeline, is_random_sd, random_sd_on_meta
from raydistill.roles.critic import CriticTrainer
from raydistill.roles.generator import GeneratorTrainer
from raydistill.roles.instant_critic import InstantCriticTrainer
from raydistill.roles.sharding import shard
from raydistill.roles.teacher import TeacherScorer
from raydistill.roles.world import World
from raydistill.runtime.settings import RunConfig, TeacherConfig, TrainConfig, teacher_folder


def build_pipeline(config: RunConfig) -> Pipeline:
    """The teacher's pipeline, frozen, in fp32, on the CPU."""
    teacher = config.teacher
    if is_edm(teacher_folder(teacher)):
        _require_own_prediction(teacher, "EDM")
        return load_edm_pipeline(teacher_folder(teacher))
    if is_random_sd(teacher.path):
        _require_own_prediction(teacher, "random")
        return RandomSDPipeline(teacher.path)
    return diffusers_hub.load_pipeline(
        teacher_folder(teacher), prediction=teacher.prediction, revision=teacher.revision
    )


def denoiser_on_meta(config: RunConfig) -> tuple[Denoiser, dict[str, tuple[int, ...]]]:
    """The teacher's network without weights, and the shapes of one sample's conditions, from small files.

    Stable Diffusion 1.5 and XL by their hub ids are known here; of other ids the small files are downloaded.

    Raises ConfigError if the teacher can't be read.
    """
    teacher = config.teacher
    path = teacher_folder(teacher)
    if not Path(path).is_dir() and teacher.prediction == "auto" and teacher.revision is None:
        path = PUBLISHED.get(path, path)
    if is_edm(path):
        _require_own_prediction(teacher, "EDM")
        return edm_on_meta(path)
    if is_random_sd(path):
        _require_own_prediction(teacher, "random")
        return random_sd_on_meta(path)
    return diffusers_hub.denoiser_on_meta(path, teacher.prediction, teacher.revision)


def _require_own_prediction(teacher: TeacherConfig, kind: str) -> None:
    if teacher.prediction != "auto":
        raise ConfigError(
            f"teacher.prediction={teacher.prediction}: what the {kind} network teacher.path={teacher.path!r} predicts "
            "is fixed; it must be auto"
        )


def build_method(config: RunConfig, pipeline: Pipeline) -> Method:
    """The method of a teacher. Raises ConfigError if the settings ask of it what it doesn't have."""
    require_guidable(config, pipeline.null_cond(1) is not None)
    return method_for(config, pipeline.denoiser.schedule)


def require_guidable(config: RunConfig, has_null_cond: bool) -> None:
    """Raise ConfigError if the settings guide networks that have no unconditional half."""
    scales = {"teacher.guidance_scale": config.teacher.guidance_scale}
    for name, value in vars(config.method).items():
        if name.startswith("guidance_scale"):
            scales[f"method.{name}"] = value
    for name, scale in scales.items():
        if scale != 1 and not has_null_cond:
            raise ConfigError(
                f"{name}={scale:g} needs an unconditional half, which the networks of "
                f"teacher.path={config.teacher.path!r} don't have: it must be 1"
            )


def method_for(config: RunConfig, schedule: NoiseSchedule) -> Method:
    """The method, given the teacher's schedule. Raises ConfigError where they don't fit each other."""
    make: Any = method_class(config.method.kind)
    method: Method = make(config.method, schedule, config.teacher.guidance_scale)
    if method.critic_first and config.placement.max_staleness:
        raise PlacementError(
            f"placement.max_staleness={config.placement.max_staleness} needs a method whose generator goes first; "
            f"method.kind={config.method.kind} lets its critic learn before it: it must be 0"
        )
    if method.needs.instant_critic and config.placement.sharding == "fsdp":
        raise ConfigError(
            "placement.sharding=fsdp: the critic of method.variant=instant is differentiated forward, which sharded "
            "networks can't be; set placement.sharding=replicated or method.variant=alternating"
        )
    if method.needs.instant_critic and config.critic.lora_rank:
        raise ConfigError(
            f"critic.lora_rank={config.critic.lora_rank}: the critic of method.variant=instant is the teacher itself, "
            "none of its weights are trained; it must be 0"
        )
    ever = method.gan_on(sys.maxsize)
    for role in ("generator", "critic"):
        lr = getattr(config, role).lr_gan_stage
        if lr is not None and not ever:
            raise ConfigError(
                f"{role}.lr_gan_stage={lr:g} has no meaning without adversarial terms: leave it out"
            )
    return method


def method_class(kind: str) -> type[Method]:
    """The class of a registered method."""
    module, _, name = METHODS[kind].method.partition(":")
    found: type[Method] = getattr(importlib.import_module(module), name)
    return found


def build_generator(
    config: RunConfig,
    method: Method,
    world: World,
    networks: Networks,
) -> GeneratorTrainer:
    """The generator, which begins as the teacher."""
    denoiser = networks.trained["generator"]
    # a linear learning rate ends with the run, also of a generator that rests
    updates = config.train.generator_updates
    steps = sum(not method.generator_rests(update) for update in range(updates))
    return GeneratorTrainer(denoiser, config.generator, world, max(1, steps))


def build_critic(
    config: RunConfig,
    method: Method,
    pipeline: Pipeline,
    world: World,
    device: torch.device,
    networks: Networks,
) -> CriticTrainer:
    """The critic, which begins as the teacher, with a randomly initialised GAN head where the method has one."""
    denoiser = networks.trained["critic"]
    head = None
    if method.needs.gan_head:
        channels, size, _ = denoiser.feature_shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                config.seed
            )  # the head's weights must not depend on what ran before in the process
            head = BottleneckHead(channels, size).to(device)
    source = None if method.needs.head_features == "critic" else networks.teacher
    steps = config.train.generator_updates * method.critic_updates_per_generator
    critic = Critic(denoiser, head, source, _null(pipeline, device))
    if method.needs.instant_critic:
        return InstantCriticTrainer(critic, config.critic, world, steps, method.needs.instant_critic)
    return CriticTrainer(critic, config.critic, world, steps)


def build_teacher(config: RunConfig, pipeline: Pipeline, device: torch.device) -> TeacherScorer:
    """The teacher on its own in this process."""
    return scorer(pipeline, tuned_teacher(config, pipeline, device), device)


def scorer(pipeline: Pipeline, teacher: Denoiser, device: torch.device) -> TeacherScorer:
    """A teacher that answers queries in this process."""
    return TeacherScorer(teacher, _null(pipeline, device))


def _null(pipeline: Pipeline, device: torch.device) -> Callable[[int], Cond] | None:
    null = pipeline.null_cond(1)
    return None if null is None else null.to(device).expand


def tuned_teacher(config: RunConfig, pipeline: Pipeline, device: torch.device) -> Denoiser:
    """The pipeline's own denoiser on the device, in the arithmetic and memory format of the settings."""
    pipeline.denoiser.cast(config.teacher.dtype).to(device)
    _tune(pipeline.denoiser, config.train)
    return pipeline.denoiser


@dataclass(frozen=True)
class Networks:
    """What the roles of one process compute with."""

    trained: dict[str, Denoiser]
    teacher: Denoiser
    """Its own network, or where it lives elsewhere, what asks it."""


def build_networks(
    config: RunConfig,
    pipeline: Pipeline,
    device: torch.device,
    roles: Sequence[str],
    world: World,
    elsewhere: Denoiser | None = None,
) -> Networks:
    """The trained roles of this process and their teacher; the pipeline's own network becomes one of them.

    Roles with adapters share one frozen network, which is the teacher's too, unless it answers `elsewhere`. The others
    have copies of their own, in fp32, or with placement.sharding=fsdp shares of them. world: the ranks of these roles.
    """
    adapters = {role: lora for role in roles if (lora := getattr(config, role).lora)}
    full = [role for role in roles if role not in adapters]
    # copies are made before the network itself is cast, tuned or given adapters
    owner = full[-1] if full and not adapters and elsewhere is not None else None
    trained = {}
    for role in full:
        denoiser = _trainable(pipeline, config.train, adopt=role == owner)
        if config.placement.sharding == "fsdp":
            trained[role] = shard(denoiser, world, device, channels_last=config.train.channels_last)
        else:
            trained[role] = denoiser.to(device)
            _tune(denoiser, config.train)
    if not adapters:
        return Networks(trained, elsewhere or tuned_teacher(config, pipeline, device))
    base = SharedBase(pipeline.denoiser.cast(config.teacher.dtype))
    for role, lora in adapters.items():
        trained[role] = base.add(role, lora, dtype=config.train.dtype, seed=config.seed)
    if config.train.activation_checkpointing:
        base.checkpoint_activations()
    base.denoiser.to(device)
    _tune(base.denoiser, config.train)
    return Networks(trained, elsewhere or base.teacher())


def _trainable(pipeline: Pipeline, train: TrainConfig, adopt: bool) -> Denoiser:
    own = pipeline.denoiser
    denoiser = trainable(own, train.dtype) if adopt else pipeline.copy_denoiser(train.dtype)
    if train.activation_checkpointing:
        denoiser.checkpoint_activations()
    return denoiser


def _tune(denoiser: Denoiser, train: TrainConfig) -> None:
    if train.channels_last:
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if train.compile:
        denoiser.network.compile()


def pick_device(gpus: float, setting: str = "placement.gpus_per_worker") -> torch.device:
    """The process's device. Raises ConfigError when a GPU is asked for and none is there."""
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"{setting}={gpus:g}, but this process sees no GPU")
    return torch.device("cuda", torch.cuda.current_device())
