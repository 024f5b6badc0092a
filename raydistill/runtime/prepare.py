"""The data of a run: the embedded scenes or digits where they are asked for, and shards where there are none yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from raydistill.data.digits import write_digits
from raydistill.data.prepare import prepare_coco
from raydistill.data.scenes import write_scenes
from raydistill.errors import ConfigError
from raydistill.models.pipeline import Pipeline
from raydistill.runtime.build import build_pipeline
from raydistill.runtime.settings import RunConfig

_SCENES, _DIGITS = "builtin:scenes", "builtin:digits"
_SCENES_XL = "builtin:scenes-xl"
"""Shards of the same scenes, encoded by the SDXL-shaped teacher."""


class PipelineEncoder:
    """A pipeline's codec and text encoder, as `prepare_coco` wants them."""

    def __init__(self, pipeline: Pipeline, device: str = "cpu"):
        self.fingerprint = pipeline.fingerprint
        self._pipeline = pipeline.to(device)
        self._device = device

    def encode_images(self, images: Tensor) -> Tensor:
        return self._pipeline.encode_images(images.to(self._device)).cpu()

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        return dict(self._pipeline.encode_text(captions).to("cpu").tensors)


def builtin_paths(config: RunConfig) -> RunConfig:
    """`builtin:scenes` and `builtin:digits` replaced by folders under output_dir/data."""
    folders = _folders(config)
    changes: dict[str, Any] = {}
    if config.prepare.coco in folders:
        changes["prepare"] = replace(config.prepare, coco=str(folders[config.prepare.coco] / "coco"))
    if config.evaluator.coco in folders:
        changes["evaluator"] = replace(config.evaluator, coco=str(folders[config.evaluator.coco] / "coco"))
    if config.data.shards in folders:
        changes["data"] = replace(config.data, shards=str(folders[config.data.shards] / "shards"))
    if config.data.shards == _SCENES_XL:
        changes["data"] = replace(config.data, shards=str(folders[_SCENES] / "shards-xl"))
    return replace(config, **changes)


def _folders(config: RunConfig) -> dict[str, Path]:
    data = Path(config.output_dir) / "data"
    return {
        _SCENES: data / f"scenes-{config.prepare.num_train}-{config.prepare.num_val}",
        _DIGITS: data / "digits",
    }


def prepare_builtin(config: RunConfig) -> None:
    """Write the scenes or digits, where the run uses them, if they are not there; shows its progress."""
    evaluated = config.evaluator.enabled and config.evaluator.reads_coco
    used = [config.prepare.coco] + [config.evaluator.coco] * evaluated
    folders = {name: folder / "coco" for name, folder in _folders(config).items()}
    if str(folders[_SCENES]) in used:
        write_scenes(folders[_SCENES], num_train=config.prepare.num_train, num_val=config.prepare.num_val)
    if str(folders[_DIGITS]) in used:
        write_digits(folders[_DIGITS])


def prepare_shards(config: RunConfig) -> None:
    """Write the shards of prepare.coco if they are not there; shows its progress. Raises DataError and ConfigError.

    Latents and text embeddings are stored for pipelines that need networks for them; others make them batch by batch.
    """
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
        encoder=PipelineEncoder(pipeline) if pipeline.stored_encoded else None,
        image_size=pipeline.image_size,
        max_rejected_share=config.prepare.max_rejected_share,
        progress=True,
    )
