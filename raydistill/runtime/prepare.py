"""The data of a run: the embedded scenes where they are asked for, and shards where there are none yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from raydistill.data.prepare import prepare_coco
from raydistill.data.scenes import write_scenes
from raydistill.errors import ConfigError
from raydistill.models.diffusers_hub import TextToImage
from raydistill.runtime.build import build_pipeline
from raydistill.runtime.settings import RunConfig

_SCENES = "builtin:scenes"


class PipelineEncoder:
    """A pipeline's codec and text encoder, as `prepare_coco` wants them."""

    def __init__(self, pipeline: TextToImage, device: str = "cpu"):
        self.fingerprint = pipeline.fingerprint
        self._pipeline = pipeline.to(device)
        self._device = device

    def encode_images(self, images: Tensor) -> Tensor:
        return self._pipeline.encode_images(images.to(self._device)).cpu()

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        return dict(self._pipeline.encode_text(captions).to("cpu").tensors)


def builtin_paths(config: RunConfig) -> RunConfig:
    """`builtin:scenes` replaced by folders under output_dir/data."""
    data = _scenes_folder(config)
    changes: dict[str, Any] = {}
    if config.prepare.coco == _SCENES:
        changes["prepare"] = replace(config.prepare, coco=str(data / "coco"))
    if config.evaluator.coco == _SCENES:
        changes["evaluator"] = replace(config.evaluator, coco=str(data / "coco"))
    if config.data.shards == _SCENES:
        changes["data"] = replace(config.data, shards=str(data / "shards"))
    return replace(config, **changes)


def _scenes_folder(config: RunConfig) -> Path:
    return Path(config.output_dir) / "data" / f"scenes-{config.prepare.num_train}-{config.prepare.num_val}"


def prepare_scenes(config: RunConfig) -> None:
    """Draw the scenes, where the run uses them, if they are not there; shows its progress."""
    scenes = _scenes_folder(config) / "coco"
    if str(scenes) in [config.prepare.coco] + [config.evaluator.coco] * config.evaluator.enabled:
        write_scenes(scenes, num_train=config.prepare.num_train, num_val=config.prepare.num_val)


def prepare_shards(config: RunConfig) -> None:
    """Write the shards of prepare.coco if they are not there; shows its progress. Raises DataError and ConfigError."""
    if config.prepare.coco is None:
        return
    if "://" in config.data.shards or any(mark in config.data.shards for mark in "*?["):
        raise ConfigError(
            f"data.shards={config.data.shards!r} can't be prepared during a run; use jobs/prepare_coco.py and "
            "prepare.coco=none"
        )
    pipeline = build_pipeline(config)
    prepare_coco(
        config.prepare.coco,
        config.prepare.split,
        config.data.shards,
        samples_per_shard=config.prepare.samples_per_shard,
        encoder=PipelineEncoder(pipeline),
        image_size=pipeline.image_size,
        max_rejected_share=config.prepare.max_rejected_share,
        progress=True,
    )
