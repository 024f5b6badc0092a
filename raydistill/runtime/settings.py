"""`RunConfig`: everything a run is, as one frozen tree, checked before anything is allocated."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from raydistill.config import from_dict, to_dict
from raydistill.data.reader import DataConfig
from raydistill.errors import ConfigError, PlacementError
from raydistill.methods import METHODS
from raydistill.methods.dmd2 import DMD2Config
from raydistill.methods.method import MethodConfig
from raydistill.object_store import is_remote, require_endpoint, require_no_credentials
from raydistill.roles.critic import CriticConfig
from raydistill.roles.evaluator import EvaluatorConfig
from raydistill.roles.generator import GeneratorConfig
from raydistill.tracking import TrackingConfig, check_tracking, without_secrets

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUILTIN_TEACHERS = {
    "builtin:scenes": ASSETS / "scenes_teacher",
    "builtin:scenes-xl": ASSETS / "scenes_xl_teacher",
    "builtin:digits": ASSETS / "digits_teacher",
}


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The many-step model that is distilled."""

    path: str = "builtin:scenes"
    """Folder or hub id of an SD- or SDXL-shaped diffusers pipeline; folder or .pkl file of a class-conditional EDM
    network; builtin:scenes, builtin:scenes-xl (SDXL-shaped) and builtin:digits are shipped; random:edm-cifar10,
    random:edm-imagenet64, random:sd15 and random:sdxl have the published shapes and random weights, for measuring
    (random:sd15:256 for images of 256 pixels)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    guidance_scale: float = 3.0
    """s in x0 = uncond + s (cond - uncond); 1 is none. SD1.5: 1.75, SDXL: 8. Papers' w is s - 1."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of its weights and arithmetic."""
    prediction: Literal["auto", "epsilon", "v_prediction", "sample"] = "auto"
    """What its UNet predicts; auto reads the scheduler's configuration."""
    preflight: bool = True
    """Whether it must denoise real training samples well before step 1."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Shards made from a COCO-format folder where data.shards has none yet."""

    coco: str | None = "builtin:scenes"
    """COCO-format folder, builtin:scenes (drawn by the project), or none: the shards must be there."""
    split: str = "train"
    """Its split."""
    samples_per_shard: int = 1000
    """Samples in a shard."""
    max_rejected_share: float = 0.0
    """Share of images that may be left out: without caption, or unreadable."""
    num_train: int = 8000
    """Training images to draw for builtin:scenes."""
    num_val: int = 2000
    """Validation images to draw for builtin:scenes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and arithmetic."""

    generator_updates: int = 1000
    """Optimiser steps of the generator after which the run ends."""
    batch_size: int = 64
    """Samples of one optimiser step, over all ranks and micro-batches, of generator and critic alike."""
    micro_batch_size: int | None = None
    """Samples per forward pass and rank; smaller ones accumulate gradients. none: batch_size / workers."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of generator and critic; bf16 is autocast over fp32 weights."""
    channels_last: bool = True
    """Memory format of the networks."""
    compile: bool = False
    """torch.compile the UNets' whole passes (the encoder half that feeds the GAN head stays as it is): pays for long
    runs, after a minute or more of compilation."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_every: int = 1
    """Generator updates between logged points."""

    def micro_batch(self, ranks: int) -> int:
        """Samples per forward pass where `ranks` share a batch, the default resolved."""
        return self.micro_batch_size or max(1, self.batch_size // ranks)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Snapshots."""

    every: int = 50
    """Generator updates between snapshots; evaluated updates are snapshots too."""
    keep: int = 2
    """Newest snapshots kept; the best one and those waiting for evaluation are kept beside them."""
    uri: str | None = None
    """Where each snapshot is copied to while training goes on, under the run's name: s3://bucket/prefix or another
    fsspec URL. A run whose output_dir has less goes on from there. none: nowhere."""
    endpoint_url: str | None = None
    """Address of an S3 service other than AWS (http://127.0.0.1:9000); its credentials: the environment."""
    retry_max_s: float = 15.0
    """Longest pause in seconds between attempts to copy while the store is away."""
    upload_wait_s: float = 600.0
    """Seconds that a run waits at its end for copies that are still to be made."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Who computes what, where."""

    session: Literal["ray", "inline"] = "ray"
    """ray: Ray Train workers and actors; inline: everything in this process, without Ray."""
    mode: Literal["colocated", "teachers", "disaggregated"] = "colocated"
    """colocated: all roles in every worker; teachers: the teacher in a pool of actors, which score the next batch while
    the critic learns; disaggregated: besides, generator and critic on workers of their own. The losses are the same
    (SiDA's adversarial terms, coupled over a micro-batch as in its paper's code, are for micro-batches of one size)."""
    sharding: Literal["replicated", "fsdp"] = "replicated"
    """replicated: every worker holds generator and critic whole; fsdp (PyTorch's FSDP2), for networks that do not fit:
    each holds 1/N of their weights, gradients, moments and EMA, and gathers a block's weights while it computes with
    it. The losses are the same. The teacher stays whole in every worker unless mode=teachers."""
    critic_ranks: int = 0
    """How many of the workers hold the critic when they are disaggregated; 0: as many as make a window shortest."""
    max_staleness: int = 0
    """Windows by which the critic's answers may lag when it is disaggregated: 0, or 1, with which generator and critic
    work at the same time (version/generator and version/critic in the log say how far apart they are)."""
    workers: int = 0
    """Data-parallel training workers; 0 chooses: one, but under Ray on CPUs two, with half of a node's cores each (a
    step of two threads waits for the slower one at every operation, two workers wait once)."""
    cpus_per_worker: int = 0
    """CPUs (and threads) of a worker; 0 shares a node's CPUs out."""
    gpus_per_worker: int = 0
    """GPUs of a worker."""
    device_gib: float | None = None
    """Memory of a GPU in GiB, which the plan's tensors must fit into; none: that of the driver's, if it has one."""
    evaluator_gpus: float = 0.0
    """GPUs of the evaluator."""
    teacher_replicas: int = 1
    """Replicas that the teacher pool begins with and never falls below."""
    max_teacher_replicas: int = 0
    """Replicas up to which the pool grows while queries wait; 0: as many as it begins with."""
    teacher_idle_s: float = 30.0
    """Seconds after which a pool that has more replicas than it needs ends one."""
    cpus_per_teacher: float = 0.0
    """CPUs that a teacher replica reserves, and its threads (one at least); 0 takes none from the workers' share, so
    that a machine of two cores has room."""
    gpus_per_teacher: float = 0.0
    """GPUs of a teacher replica."""
    teacher_service: str | None = None
    """Name of a teacher pool that outlives the job and is shared by all jobs on the cluster that name it (and have the
    same teacher; guidance scales may differ). none: a pool of this run's own."""
    teacher_chunk_size: int | None = None
    """Samples of one call to a teacher replica, so that several share a micro-batch; none sends it whole."""
    teacher_kept_graphs: int = 4
    """Graphs that a replica keeps for backward passes through the teacher; beyond that it computes the forward pass
    again."""
    teacher_timeout_s: float = 300.0
    """After which a query is also asked of another replica."""
    teacher_transport: Literal["object_store", "nixl"] = "object_store"
    """How samples and answers travel between workers and teachers: object_store through the hosts' memory; nixl from
    GPU to GPU (pip install 'raydistill[gpu]'), but a worker may crash with a replica whose answer it is fetching."""
    wire_dtype: Literal["fp32", "bf16"] = "fp32"
    """Samples and answers between workers and teachers; bf16 halves the traffic and changes the numbers."""
    max_failures: int = 3
    """Restarts of the worker group from the newest snapshot before the run fails."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    name: str
    """Names the folder output_dir/name and the MLflow run; the same name resumes."""
    output_dir: str = "runs"
    """Folder of runs, prepared data and the MLflow database."""
    seed: int = 0
    """Seed of every draw of the run."""
    resume: bool = True
    """Go on from the newest snapshot of this name; false sets an existing run's folder aside and starts anew."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher."""
    method: MethodConfig = field(default_factory=DMD2Config)
    """The method."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The generator's optimiser."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic's optimiser."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch and arithmetic."""
    data: DataConfig
    """Training shards."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Shards from a COCO-format folder."""
    evaluator: EvaluatorConfig = field(default_factory=EvaluatorConfig)
    """Figures along the way."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Snapshots."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Who computes what, where."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    @property
    def run_dir(self) -> str:
        return f"{self.output_dir}/{self.name}"

    @property
    def copies_url(self) -> str | None:
        """Of the run's own folder under checkpoint.uri."""
        uri = self.checkpoint.uri
        return None if uri is None else f"{uri.rstrip('/')}/{self.name}"

    @property
    def micro_batch_size(self) -> int:
        """Samples per forward pass and rank, the default resolved."""
        return self.train.micro_batch(max(1, self.placement.workers))


RESUMABLE_CHANGES = (
    "teacher.path", "teacher.revision",  # the weights themselves are compared
    "resume", "output_dir", "train.log_every", "data.shards", "data.cache_dir",
    "data.num_workers", "data.prefetch_micro_batches", "data.cache_mb", "data.endpoint_url", "data.timeout_s",
    "prepare.", "evaluator.coco", "evaluator.every", "evaluator.may_skip", "evaluator.best_by", "evaluator.batch_size",
    "evaluator.grid_images", "evaluator.detector_file", "evaluator.reference", "evaluator.captions",  # content counts
    "evaluator.workers", "evaluator.teacher_figure", "evaluator.threads", "evaluator.idle_priority",
    "evaluator.head_start_s", "checkpoint.", "placement.", "tracking.",
)  # fmt: skip
"""Settings (or prefixes) that may differ between a snapshot and the run that goes on from it; so may
train.generator_updates, if learning rates don't depend on it."""
NUMERIC_PLACEMENT = ("placement.max_staleness", "placement.wire_dtype", "placement.teacher_chunk_size")
"""Of the placement's settings those that change the numbers."""


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OUR_FOLDERS = ("data", "teacher_figures", "reference_features", "mlflow.db", "mlartifacts")


def validate(config: RunConfig) -> None:
    """Check what can be checked without loading a network; raises ConfigError or PlacementError."""
    if not _NAME.fullmatch(config.name) or config.name in _OUR_FOLDERS:
        raise ConfigError(
            f"name={config.name!r} must be of letters, digits, '.', '_' and '-', begin with a letter or digit, and "
            f"be none of {', '.join(_OUR_FOLDERS)}"
        )
    check_tracking(config.tracking, config.run_dir)
    train = config.train
    for name in ("generator_updates", "batch_size", "log_every"):
        if getattr(train, name) < 1:
            raise ConfigError(f"train.{name}={getattr(train, name)} must be at least 1")
    for name in ("every", "keep"):
        if getattr(config.checkpoint, name) < 1:
            raise ConfigError(f"checkpoint.{name}={getattr(config.checkpoint, name)} must be at least 1")
    _validate_copies(config.checkpoint)
    for name in ("num_train", "num_val", "samples_per_shard"):
        if getattr(config.prepare, name) < 1:
            raise ConfigError(f"prepare.{name}={getattr(config.prepare, name)} must be at least 1")
    if train.micro_batch_size is not None and train.micro_batch_size < 1:
        raise ConfigError(f"train.micro_batch_size={train.micro_batch_size} must be at least 1, or none")
    _validate_placement(config.placement)
    _validate_lora(config)
    require_shardable(config)
    require_divisible(config)
    if config.evaluator.workers > 1 and config.placement.session == "inline":
        raise PlacementError(
            f"evaluator.workers={config.evaluator.workers} needs placement.session=ray; inline is one process"
        )
    if config.evaluator.weights == "ema" and config.generator.ema_halflife_images <= 0:
        raise ConfigError(
            "evaluator.weights=ema needs generator.ema_halflife_images > 0 (it is 0: no EMA is kept)"
        )
    if config.teacher.path.startswith("builtin:") and config.teacher.path not in BUILTIN_TEACHERS:
        raise ConfigError(
            f"teacher.path={config.teacher.path!r}: built in is only {', '.join(BUILTIN_TEACHERS)}"
        )


def _validate_copies(checkpoint: CheckpointConfig) -> None:
    uri = checkpoint.uri
    if uri is not None and not is_remote(uri):
        raise ConfigError(
            f"checkpoint.uri={uri!r} must be a URL such as s3://bucket/prefix, or none; snapshots are written to "
            "output_dir in any case"
        )
    require_no_credentials(uri or "", "checkpoint.uri")
    require_endpoint(checkpoint.endpoint_url, "checkpoint.endpoint_url")
    if checkpoint.retry_max_s <= 0:
        raise ConfigError(f"checkpoint.retry_max_s={checkpoint.retry_max_s:g} must be above 0")
    if checkpoint.upload_wait_s < 0:
        raise ConfigError(f"checkpoint.upload_wait_s={checkpoint.upload_wait_s:g} must not be negative")


def _validate_lora(config: RunConfig) -> None:
    for role in ("generator", "critic"):
        settings = getattr(config, role)
        rank, alpha, targets = settings.lora_rank, settings.lora_alpha, settings.lora_targets
        if rank < 0:
            raise ConfigError(f"{role}.lora_rank={rank} must not be negative; 0 trains all weights")
        for name, value, given in (
            ("lora_alpha", alpha, alpha is not None),
            ("lora_targets", targets, targets != "attention"),
        ):
            if given and not rank:
                raise ConfigError(
                    f"{role}.{name}={value} has no meaning without {role}.lora_rank, which is 0"
                )
        if alpha is not None and not alpha > 0:
            raise ConfigError(f"{role}.lora_alpha={alpha:g} must be positive, or none for the rank")
        if rank and config.train.compile:
            raise ConfigError(
                f"train.compile=true with {role}.lora_rank={rank}: a network that switches its adapters is not "
                "compiled; set one of them to false or 0"
            )
        if rank and config.teacher.dtype == "bf16" and config.train.dtype == "fp32":
            raise ConfigError(
                f"train.dtype=fp32 with {role}.lora_rank={rank} and teacher.dtype=bf16: adapters compute in the "
                "precision of the base that they share with the teacher; set train.dtype=bf16 or teacher.dtype=fp32"
            )


def require_shardable(config: RunConfig) -> None:
    """Raise ConfigError or PlacementError if placement.sharding=fsdp is asked for where it does not work."""
    placement = config.placement
    if placement.sharding != "fsdp":
        return
    if placement.session == "inline":
        raise PlacementError(
            "placement.sharding=fsdp needs placement.session=ray; inline is one process, which holds the networks whole"
        )
    if placement.workers == 1:
        raise PlacementError(
            "placement.sharding=fsdp needs placement.workers of 2 or more to share the networks, it is 1"
        )
    if placement.mode == "disaggregated":
        raise PlacementError(
            "placement.sharding=fsdp needs placement.mode=colocated or teachers, it is disaggregated: critic ranks "
            "answer each on its own, and sharded ones can only compute together"
        )
    for role in ("generator", "critic"):
        rank = getattr(config, role).lora_rank
        if rank:
            raise ConfigError(
                f"{role}.lora_rank={rank} with placement.sharding=fsdp: adapters are small, and their frozen base is "
                f"not sharded; set placement.sharding=replicated or {role}.lora_rank=0"
            )
    if config.train.compile:
        raise ConfigError(
            "train.compile=true with placement.sharding=fsdp: networks that are gathered block by block are not "
            "compiled; set one of them to false or replicated"
        )


def require_divisible(config: RunConfig) -> None:
    """Raise ConfigError unless every role's ranks divide the batch into whole micro-batches."""
    placement, train = config.placement, config.train
    shares = {f"placement.workers={max(1, placement.workers)}": max(1, placement.workers)}
    if placement.mode == "disaggregated":
        critics = placement.critic_ranks
        if placement.workers == 1 or (placement.workers and critics >= placement.workers):
            raise PlacementError(
                f"placement.mode=disaggregated needs a worker for each role: placement.workers={placement.workers} "
                f"with placement.critic_ranks={critics} leaves one without"
            )
        if not (critics and placement.workers):
            return  # they are chosen so that they divide it
        shares = {
            f"placement.critic_ranks={critics}": critics,
            f"{placement.workers - critics} generator ranks (placement.workers={placement.workers} - "
            f"placement.critic_ranks={critics})": placement.workers - critics,
        }
    for name, ranks in shares.items():
        micro = train.micro_batch(max(1, ranks))
        if ranks < 1 or train.batch_size % (ranks * micro):
            raise ConfigError(
                f"train.batch_size={train.batch_size} is not divisible by {name} x train.micro_batch_size={micro} = "
                f"{ranks * micro}"
            )


def _validate_placement(placement: PlacementConfig) -> None:
    for name in (
        "workers", "cpus_per_worker", "gpus_per_worker", "evaluator_gpus", "max_teacher_replicas", "cpus_per_teacher",
        "gpus_per_teacher", "critic_ranks",
    ):  # fmt: skip
        if getattr(placement, name) < 0:
            raise PlacementError(f"placement.{name}={getattr(placement, name)} must not be negative")
    for name in ("teacher_replicas", "teacher_timeout_s", "teacher_idle_s", "teacher_kept_graphs"):
        if getattr(placement, name) <= 0:
            raise PlacementError(f"placement.{name}={getattr(placement, name)} must be positive")
    if placement.device_gib is not None and not 0 < placement.device_gib < math.inf:
        raise PlacementError(
            f"placement.device_gib={placement.device_gib:g} must be positive and finite, or none"
        )
    if placement.teacher_chunk_size is not None and placement.teacher_chunk_size < 1:
        raise PlacementError(
            f"placement.teacher_chunk_size={placement.teacher_chunk_size} must be at least 1, or none"
        )
    if 0 < placement.max_teacher_replicas < placement.teacher_replicas:
        raise PlacementError(
            f"placement.max_teacher_replicas={placement.max_teacher_replicas} is below placement.teacher_replicas="
            f"{placement.teacher_replicas}"
        )
    if placement.teacher_service is not None and placement.mode == "colocated":
        raise PlacementError(
            f"placement.teacher_service={placement.teacher_service!r} needs placement.mode=teachers or disaggregated; "
            "colocated workers hold the teacher themselves"
        )
    if placement.max_staleness not in (0, 1):
        raise PlacementError(f"placement.max_staleness={placement.max_staleness} must be 0 or 1")
    for name, given, needs, without in (
        ("max_staleness", placement.max_staleness, ("disaggregated",), 0),
        ("critic_ranks", placement.critic_ranks, ("disaggregated",), 0),
        ("wire_dtype", placement.wire_dtype, ("teachers", "disaggregated"), "fp32"),
    ):
        if given != without and placement.mode not in needs:
            raise PlacementError(
                f"placement.{name}={given} needs placement.mode={' or '.join(needs)}, it is {placement.mode}"
            )
    if placement.session == "inline":
        for name, value, alone in (
            ("workers", placement.workers, placement.workers < 2),
            ("mode", placement.mode, placement.mode == "colocated"),
        ):
            if not alone:
                raise PlacementError(
                    f"placement.{name}={value} needs placement.session=ray; inline is one process"
                )


def without_secret_settings(config: RunConfig) -> RunConfig:
    """The settings as they may be shown or written down: no credentials in tracking.uri."""
    if not config.tracking.uri:
        return config
    return replace(config, tracking=replace(config.tracking, uri=without_secrets(config.tracking.uri)))


def teacher_folder(config: TeacherConfig) -> str:
    """`teacher.path` with a built-in name resolved."""
    return str(BUILTIN_TEACHERS.get(config.path, config.path))


def config_from_dict(saved: dict[str, Any]) -> RunConfig:
    """The RunConfig that `to_dict` wrote, with the method's own settings class. Raises ConfigError."""
    kind = saved.get("method", {}).get("kind")
    if kind not in METHODS:
        raise ConfigError(f"method.kind={kind!r} is not one of {', '.join(METHODS)}")
    module, _, name = METHODS[kind].config.partition(":")
    template = RunConfig(
        name="template", data=DataConfig(shards=""), method=getattr(importlib.import_module(module), name)()
    )
    return from_dict(template, saved)


__all__ = ["RunConfig", "config_from_dict", "teacher_folder", "to_dict", "validate"]
