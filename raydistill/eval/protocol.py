"""What a figure means: everything that changes a Frechet distance besides the model. Figures compare only
under one.

Published figures disagree by far more than methods do because of these choices (arXiv:2104.11222); so the
protocol is a value with a hash, goes into the metric's name with N, and is logged beside every figure.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from raydistill.errors import ConfigError

UINT8_RULES = ("round", "floor")
METHOD_PROTOCOL = ("sampler", "num_steps")
"""Fields in which figures of different methods may differ."""
SAMPLER_FIELDS = ("sampler", "num_steps", "guidance_scale", "weights")
"""The fields in which a teacher's figure differs from its generator's."""


@dataclass(frozen=True)
class Protocol:
    """One way to compute a figure. Two figures may share an axis only if their protocols are equal.

    The sampler's fields say how the images were made; `teacher` figures differ from a generator's only there.
    """

    name: str
    """Short name for people."""
    metric: str
    """Metric without N: "fid" for a published protocol, "toyfid" for the shipped detectors."""
    num_samples: int
    """Generated images."""
    seed: int
    """Seed of the counter-based noise; sample n is the same at any batch size and worker count."""
    detector: str
    """Feature network."""
    detector_sha256: str
    """Hash of its weights file."""
    reference: str
    """Data set and split of the reference images."""
    reference_sha256: str
    """Hash of their pixels, or of the statistics file."""
    num_reference: int
    """Reference images."""
    captions_sha256: str
    """Hash of the captions, or labels, in order."""
    resize: str
    """Resizing between the images and the detector."""
    uint8_rule: str
    """How floats become bytes: a rule of `to_uint8`."""
    caption_rule: str
    """Which caption or label conditions which sample."""
    sampler: str
    """Sampler of the generated images."""
    num_steps: int
    """Its network evaluations per image, without guidance."""
    guidance_scale: float
    """Guidance; 1 is none."""
    weights: Literal["ema", "raw"]
    """Weights of the generator."""
    covariance_ddof: int = 1
    """Divisor of the covariance: N - ddof."""
    dtype: str = "float32"
    """Precision of the networks that sample."""
    seed_rule: str = "counter-based"
    """How noise follows from seed and sample."""
    patch_resize: str = ""
    """Between the images and the detector for patch-FID; "" without one."""
    clip: str = ""
    """Model and preparation of the CLIP score; "" without one."""
    clip_sha256: str = ""
    """Hash of its weights file."""

    def __post_init__(self) -> None:
        if self.num_samples < 2 or self.num_reference < 2:
            raise ConfigError(
                f"a Frechet distance needs at least 2 samples (evaluator.num_samples={self.num_samples}) and "
                "2 "
                f"reference images (there are {self.num_reference})"
            )
        if self.uint8_rule not in UINT8_RULES:
            raise ConfigError(f"uint8_rule is {self.uint8_rule!r}; the rules are {', '.join(UINT8_RULES)}")
        if self.weights not in ("ema", "raw"):
            raise ConfigError(f"evaluator.weights is {self.weights!r}; the choices are ema, raw")

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for MLflow and files.

        Fields that came later are left out at their defaults: figures that were recorded before keep their hash.
        """
        return {name: value for name, value in asdict(self).items() if _LATER.get(name) != value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Protocol":
        """From `to_dict`; raises ConfigError for unknown or missing fields."""
        names = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if unknown := values.keys() - names:
            raise ConfigError(
                f"a protocol has no {', '.join(sorted(unknown))}; its fields are {', '.join(sorted(names))}"
            )
        if missing := required - values.keys():
            raise ConfigError(f"the protocol lacks {', '.join(sorted(missing))}")
        return cls(**values)

    def hash(self) -> str:
        """Sha256 of the canonical JSON; equal exactly for equal protocols."""
        # 1 and 1.0 are the same scale and must not be two protocols
        values = self.to_dict() | {"guidance_scale": float(self.guidance_scale)}
        return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def key(self, metric: str | None = None) -> str:
        """The metric's full name with N, for instance eval/toyfid_2k or eval/prompt_accuracy_500."""
        return f"eval/{metric or self.metric}_{count_label(self.num_samples)}"


_LATER = {"seed_rule": "counter-based", "patch_resize": "", "clip": "", "clip_sha256": ""}


def count_label(num_samples: int) -> str:
    """N as metric names have it: 500 is "500", 2000 is "2k"."""
    thousands, rest = divmod(num_samples, 1000)
    return str(num_samples) if rest else f"{thousands}k"


_HIGHER = ("accuracy", "clip_score", "recall", "precision")


def higher_is_better(metric: str) -> bool:
    """Of a figure by its name: true of accuracies, scores, precision and recall, false of distances."""
    return any(word in metric for word in _HIGHER)


def second_figure(names: Iterable[str]) -> str | None:
    """Of a generator's figures (full names) the one that is shown beside the distance, None where there is no other."""
    own = [name for name in names if "teacher_" not in name]
    return next((name for word in _HIGHER for name in own if f"{word}_" in name), None)


def cost(metric: str, value: float) -> float:
    """A figure as what is to be small: an accuracy with its sign changed."""
    return -value if higher_is_better(metric) else value


def require_same(protocols: Sequence[Protocol], but: Sequence[str] = ()) -> None:
    """Raise ConfigError, naming each field that differs, unless all figures may share an axis.

    Args:
        protocols: those of the figures to be compared.
        but: fields that the comparison is about, for instance num_steps for a teacher beside its student.
    """
    if unknown := set(but) - {field.name for field in fields(Protocol)}:
        raise ConfigError(f"a protocol has no {', '.join(sorted(unknown))}")
    differing = []
    for field in fields(Protocol):
        # dict.fromkeys keeps the order in which values come
        values = list(dict.fromkeys(getattr(protocol, field.name) for protocol in protocols))
        if len(values) > 1 and field.name not in but:
            differing.append(f"{field.name} ({', '.join(map(repr, values))})")
    if differing:
        raise ConfigError(
            f"these figures can't be compared, their protocols differ in {'; '.join(differing)}; evaluate "
            "again with "
            "equal evaluator settings"
        )


def to_uint8(images: Tensor, rule: str = "round") -> Tensor:
    """Float images in [-1, 1] as bytes, same shape.

    Args:
        images: [B, 3, H, W]; values outside [-1, 1] saturate, as in any picture file.
        rule: "round" takes the nearest level, x * 127.5 + 128 truncated (EDM, SiD, FastGen); "floor" takes
            (x + 1) * 127.5 truncated (DMD2's EDM evaluator), half a level darker.

    Raises ConfigError for another rule and ValueError if a value is not finite or the images are bytes
    already.
    """
    if rule not in UINT8_RULES:
        raise ConfigError(f"uint8_rule is {rule!r}; the rules are {', '.join(UINT8_RULES)}")
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes floats in [-1, 1], got {images.dtype}")
    scaled = images.float() * 127.5 + (128.0 if rule == "round" else 127.5)
    if not torch.isfinite(scaled).all():
        raise ValueError(f"{int((~torch.isfinite(scaled)).sum())} pixel values of the images are not finite")
    return scaled.clamp(0, 255).to(torch.uint8)
