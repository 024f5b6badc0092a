"""What evaluators make of images: each its part of a figure, which merge, and the figures of the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from raydistill.eval.detectors import Detector
from raydistill.eval.frechet import FeatureStatistics, frechet_distance
from raydistill.eval.inception import Inception
from raydistill.eval.kid import kernel_distance
from raydistill.eval.precision_recall import NEIGHBOURS, precision_recall
from raydistill.eval.reference import Reference
from raydistill.eval.resize import Chain, lanczos256

WHOLE, PATCH = "fid", "patch_fid"
Score = Callable[[Sequence[Image.Image], Sequence[str]], Tensor]
"""Cosines [B] of images, cropped and resampled to 256 pixels, and their captions."""


@dataclass
class Part:
    """What is kept of some samples, in their order; float64 sums and float32 features, on the CPU.

    `statistics` and `features` by the distance that they are for.
    """

    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    """Batch by batch, as are the others."""
    shown: list[Tensor] = field(default_factory=list)
    """What a toy detector found in the images."""
    cosines: list[Tensor] = field(default_factory=list)
    """With the captions."""

    def add(self, name: str, features: Tensor) -> None:
        """More features [B, D]."""
        self.statistics.setdefault(name, FeatureStatistics()).update(features)
        self.features.setdefault(name, []).append(features.detach().float().cpu())

    def merge(self, later: Part) -> None:
        """Take in the samples that follow these."""
        for name, statistics in later.statistics.items():
            self.statistics.setdefault(name, FeatureStatistics()).merge(statistics)
            self.features.setdefault(name, []).extend(later.features[name])
        self.shown += later.shown
        self.cosines += later.cosines


class Judge(Protocol):
    """Looks at samples batch by batch; `figures` are of all of them."""

    def look(self, part: Part, images: Tensor, captions: Sequence[str]) -> None:
        """Add uint8 images [B, 3, H, W] to a part."""

    def figures(self, part: Part, captions: Sequence[str]) -> dict[str, float]:
        """By their names without N; captions: of all samples."""


class ToyJudge:
    """toyfid, toykid and an accuracy in the features of a shipped detector."""

    def __init__(self, detector: Detector, reference: FeatureStatistics, features: Tensor):
        self._detector = detector
        self._reference = reference
        self._features = features

    def look(self, part: Part, images: Tensor, captions: Sequence[str]) -> None:
        features, shown = self._detector(images)
        part.add("toyfid", features)
        part.shown.append(shown.cpu())

    def figures(self, part: Part, captions: Sequence[str]) -> dict[str, float]:
        return {
            "toyfid": frechet_distance(part.statistics["toyfid"], self._reference),
            "toykid": kernel_distance(torch.cat(part.features["toyfid"]), self._features),
            self._detector.accuracy_metric: self._detector.accuracy(torch.cat(part.shown), captions),
        }


class PublishedJudge:
    """FID by a published protocol, and what its features and a CLIP model say besides."""

    def __init__(
        self,
        detector: Inception,
        chains: dict[str, Chain],
        references: Callable[[], Mapping[str, Reference]],
        score: Score | None,
        device: torch.device | str,
    ):
        """chains: of WHOLE, and of PATCH where the protocol has it. references: for each of them, asked for when the
        figures of a whole are due, which workers that see a part never are."""
        self._detector = detector
        self._chains = chains
        self._references = references
        self._score = score
        self._device = device

    def look(self, part: Part, images: Tensor, captions: Sequence[str]) -> None:
        pictures = list(images.movedim(1, -1).cpu().numpy())
        for name, chain in self._chains.items():
            part.add(name, self._detector(chain(pictures).to(self._device)))
        if self._score is not None:
            prepared = [lanczos256(Image.fromarray(picture)) for picture in pictures]
            part.cosines.append(self._score(prepared, captions).double().cpu())

    def figures(self, part: Part, captions: Sequence[str]) -> dict[str, float]:
        references = self._references()
        found = {
            name: frechet_distance(part.statistics[name], references[name].statistics)
            for name in self._chains
        }
        drawn, real = torch.cat(part.features[WHOLE]), references[WHOLE].features
        if real is not None:
            found["kid"] = kernel_distance(drawn, real)
            if min(len(drawn), len(real)) > NEIGHBOURS:
                found["precision"], found["recall"] = precision_recall(drawn, real, device=self._device)
        if self._score is not None:
            found["clip_score"] = float(torch.cat(part.cosines).mean())
        return found
