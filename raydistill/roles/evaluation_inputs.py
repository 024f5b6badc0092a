"""What a published protocol takes besides the generator: detector, conditions, reference images; checked early.

`require_conditions` and `require_files` need no network and no device, so that a run that lacks a file ends before
anything is allocated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raydistill.data.coco import CocoFiles, find_coco, read_captions
from raydistill.data.images import first_line
from raydistill.data.shard_file import RejectedSample
from raydistill.data.shards import INDEX_NAME, ShardSet
from raydistill.errors import ConfigError, DataError
from raydistill.eval.inception import Inception, verified
from raydistill.eval.judge import PATCH, WHOLE
from raydistill.eval.published import CAPTIONS, CLASSES, PUBLISHED, Published, published
from raydistill.eval.reference import (
    ReadImage,
    Reference,
    content_sha256,
    image_files,
    measured,
    read_statistics,
)
from raydistill.eval.resize import chain
from raydistill.models.clip_score import require_clip

if TYPE_CHECKING:
    from raydistill.roles.evaluator import EvaluatorConfig

log = logging.getLogger(__name__)


def require_conditions(config: EvaluatorConfig, *, by_class: bool) -> None:
    """Raise ConfigError if the protocol's conditions are not the teacher's. by_class: those are class labels."""
    protocol = published(config.protocol)
    if protocol is None:
        return
    if by_class != (protocol.conditions == CLASSES):
        teacher = CLASSES if by_class else CAPTIONS
        fitting = [name for name, each in PUBLISHED.items() if each.conditions == teacher]
        raise ConfigError(
            f"evaluator.protocol={config.protocol} conditions on {protocol.conditions}, this teacher (teacher.path) on "
            f"{teacher}: choose toy, {', '.join(fitting)}"
        )
    if by_class and config.clip is not None:
        raise ConfigError(
            f"evaluator.clip={config.clip} scores captions, this teacher's conditions are class labels"
        )


def require_files(config: EvaluatorConfig) -> None:
    """Raise ConfigError or DataError if a file that the protocol takes is missing, or is not what it must be."""
    protocol = published(config.protocol)
    if protocol is None:
        return
    verified(config.detector_file, config.detector_sha256)
    if protocol.conditions == CAPTIONS:
        captions_for(config, protocol)
    find_reference(config, protocol)
    if config.clip is not None:
        require_clip(config.clip)


def captions_for(config: EvaluatorConfig, protocol: Published) -> tuple[list[str], str]:
    """The first N captions and the rule that they follow. Raises ConfigError for too few, DataError for an unreadable
    file."""
    if config.captions is not None:
        where, rule = f"evaluator.captions={config.captions}", "lines of a file, in order"
        try:
            text = Path(config.captions).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"{where} can't be read: {first_line(error)}") from error
        captions = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        files = coco_of(config, protocol)
        where = f"evaluator.coco={config.coco} ({files.split})"
        rule = "first caption of each image, in order"
        captions = [image.captions[0] for image in read_captions(files) if image.captions]
    if len(captions) < protocol.num_samples:
        raise ConfigError(
            f"{where} has {len(captions)} captions, evaluator.protocol={protocol.name} takes {protocol.num_samples}: "
            f"give more (evaluator.captions), or fewer samples by name, {protocol.name.partition('@')[0]}@N"
        )
    return captions[: protocol.num_samples], rule


def coco_of(config: EvaluatorConfig, protocol: Published) -> CocoFiles:
    """The split of the protocol's year. Raises ConfigError for another year's, DataError for what is no COCO folder."""
    year, split = protocol.coco_year, config.split
    wanted = split if re.search(r"[0-9]{4}$", split) else split + year
    if config.coco.startswith("builtin:"):
        raise ConfigError(
            f"evaluator.coco={config.coco} is not COCO: evaluator.protocol={protocol.name} takes {wanted}; give its "
            "folder, or evaluator.captions and evaluator.reference"
        )
    annotations = Path(config.coco) / "annotations"
    if not wanted.endswith(year) or not (annotations / f"captions_{wanted}.json").is_file():
        there = sorted(file.stem.removeprefix("captions_") for file in annotations.glob("captions_*.json"))
        raise ConfigError(
            f"evaluator.protocol={protocol.name} takes captions of COCO {year}; evaluator.split={split} of "
            f"evaluator.coco={config.coco} is not: it has captions of {', '.join(there) or 'no split'}"
        )
    files = find_coco(config.coco, wanted)
    _require_year(files, year)
    return files


def _require_year(files: CocoFiles, year: str) -> None:
    """Raise ConfigError if the file's own words, or its images, are of another year."""
    try:
        found = json.loads(files.annotations.read_bytes())
        says = found.get("info", {}).get("year")
        name = str(found["images"][0]["file_name"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return  # what is wrong with it read_captions says
    what = f"{files.annotations} (evaluator.coco)"
    if says is not None and str(says) != year:
        raise ConfigError(f"{what} holds captions of COCO {says}, this protocol takes those of {year}")
    if not (files.images / name).is_file():
        raise ConfigError(
            f"{what} lists {name}, which {files.images} lacks: captions and images are of different years, or the "
            "folder is incomplete"
        )


@dataclass(frozen=True)
class ReferenceSource:
    """Where the reference comes from: a file of statistics, or images."""

    name: str
    statistics: Path | None
    images: list[ReadImage]


def find_reference(config: EvaluatorConfig, protocol: Published) -> ReferenceSource:
    """Raises ConfigError if it is not there or does not serve, DataError for shards that can't be read."""
    if config.reference is None:
        if protocol.conditions == CLASSES:
            raise ConfigError(
                f"evaluator.reference=none: evaluator.protocol={protocol.name} compares with {protocol.reference}; "
                "give its file, or a folder of the images"
            )
        files = coco_of(config, protocol)
        # all of them, also those without a caption of their own
        return _folder(files.images, f"{Path(config.coco).name}/{files.split}", config)
    path = Path(config.reference)
    if path.suffix == ".npz":
        if not path.is_file():
            raise ConfigError(
                f"evaluator.reference={path} is not there; evaluator.protocol={protocol.name} compares with "
                f"{protocol.reference}"
            )
        if protocol.patch_resize:
            raise ConfigError(
                f"evaluator.reference={path} is one set of statistics, evaluator.protocol={protocol.name} takes two "
                "(patch-FID has its own): give the folder of the images"
            )
        return ReferenceSource(path.name, path, [])
    if (path / INDEX_NAME).is_file():
        shards = ShardSet(config.reference)
        images = [
            partial(_from_shard, shards, shard, sample)
            for shard, count in enumerate(shards.counts)
            for sample in range(count)
        ]
        return ReferenceSource(path.name, None, list(images))
    return _folder(path, path.name, config)


def _folder(path: Path, name: str, config: EvaluatorConfig) -> ReferenceSource:
    files = image_files(path) if path.is_dir() else []
    if len(files) < 2:
        raise ConfigError(
            f"evaluator.reference={config.reference or path} holds {len(files)} images; it must be a folder of images "
            "or of shards, or a .npz of statistics"
        )
    return ReferenceSource(name, None, [file.read_bytes for file in files])


def _from_shard(shards: ShardSet, shard: int, sample: int) -> bytes:
    try:
        return shards.open(shard).image(sample)
    except RejectedSample as rejected:
        raise DataError(f"evaluator.reference: a sample of {shards.url(shard)}: {rejected}") from rejected


class References:
    """The reference of a protocol, by its content; features are made when they are asked for."""

    def __init__(self, config: EvaluatorConfig, protocol: Published, cache_dir: Path | None):
        self._source = find_reference(config, protocol)
        self._protocol = protocol
        self._batch_size = config.batch_size
        self._cache_dir = cache_dir
        self._found: dict[str, Reference] | None = None
        self.name = self._source.name
        self.count = len(self._source.images) or protocol.num_reference

    @cached_property
    def sha256(self) -> str:
        """Of the statistics file, or of the images' bytes; workers that see a part of the samples never ask."""
        if self._source.statistics is not None:
            return hashlib.sha256(self._source.statistics.read_bytes()).hexdigest()
        return content_sha256(self._source.images)

    def chains(self) -> dict[str, str]:
        """Names of the chains by the distance that they are for."""
        patch = {PATCH: self._protocol.patch_resize} if self._protocol.patch_resize else {}
        return {WHOLE: self._protocol.resize} | patch

    def get(self, detector: Inception, device: torch.device | str) -> Mapping[str, Reference]:
        """By the distance that each is for."""
        if self._found is None and self._source.statistics is not None:
            self._found = {WHOLE: read_statistics(self._source.statistics)}
        elif self._found is None:
            log.info("reference features of %d images (%s)", self.count, self.name)
            self._found = {
                name: measured(
                    self._source.images,
                    self.sha256,
                    chain(each),
                    detector,
                    batch_size=self._batch_size,
                    device=device,
                    cache_dir=self._cache_dir,
                )
                for name, each in self.chains().items()
            }
        return self._found
