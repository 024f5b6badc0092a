"""The protocols of published figures: what each fixes besides the model, as evaluator.protocol names them.

FID of one generator under two of these differs by more than methods do, so a figure is comparable with a paper's only
under the paper's own. Where a protocol here departs from its source, `departs` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from raydistill.errors import ConfigError

TOY = "toy"
"""The protocol of the embedded data."""
CLASSES, CAPTIONS = "class labels", "captions"
SeedRule = Literal["counter-based", "generator-per-image"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """One protocol: its samples, their conditions, and the way from an image to a feature."""

    name: str
    num_samples: int
    conditions: str
    """CLASSES or CAPTIONS."""
    label_rule: str
    """Which condition sample n has; of labels a rule of `raydistill.eval.seeds`."""
    seed_rule: SeedRule
    seed: int
    uint8_rule: str
    resize: str
    """A chain of `raydistill.eval.resize`."""
    patch_resize: str = ""
    """The chain of patch-FID."""
    image_size: int | None = None
    """Edge of the generator's images in pixels; None: any."""
    num_classes: int = 0
    """Of class-conditional teachers."""
    coco_year: str = ""
    """Year of the COCO captions and reference images."""
    reference: str
    """What evaluator.reference is to be, for people."""
    num_reference: int
    """Images that published statistics are of, whose files don't say."""
    source: str
    departs: str = ""


_EDM = Published(
    name="edm-cifar10-50k",
    num_samples=50_000,
    conditions=CLASSES,
    label_rule="drawn-per-image",
    seed_rule="generator-per-image",
    seed=0,
    uint8_rule="round",
    resize="inside",
    image_size=32,
    num_classes=10,
    reference="EDM's cifar10-32x32.npz",
    num_reference=50_000,
    source="arXiv:2206.00364, generate.py and fid.py",
)
_EDM_IN64 = replace(
    _EDM,
    name="edm-in64-50k",
    image_size=64,
    num_classes=1000,
    reference="EDM's imagenet-64x64.npz",
    num_reference=1_281_167,
)
_DMD2_IN64 = replace(
    _EDM_IN64,
    name="dmd2-in64-50k",
    label_rule="in-turn",
    seed_rule="counter-based",
    seed=10,
    uint8_rule="floor",
    source="arXiv:2405.14867, main/edm/test_folder_edm.py",
    departs="noise of sample n is counter-based: theirs depends on batch size and number of GPUs",
)
_GIGAGAN = Published(
    name="gigagan-coco30k",
    num_samples=30_000,
    conditions=CAPTIONS,
    label_rule="captions in order",
    seed_rule="counter-based",
    seed=10,
    uint8_rule="floor",
    resize="crop-lanczos256-clean299",
    coco_year="2014",
    reference="the folder val2014 of COCO, all of its images",
    num_reference=40_504,
    source="arXiv:2303.05511, as DMD2 evaluates (arXiv:2405.14867, main/test_folder_sd.py)",
    departs="noise of sample n is counter-based: theirs depends on the batch size",
)
_SDXL = replace(
    _GIGAGAN,
    name="dmd2-sdxl-coco10k",
    num_samples=10_000,
    resize="crop-lanczos512-clean299",
    patch_resize="patch299-clean299",
    reference="the folder of COCO 2014 images that the prompts describe",
    num_reference=10_000,
    source="arXiv:2405.14867, its SDXL evaluation (eval_res 512, patch-FID)",
)


def _proxy(protocol: Published) -> Published:
    """With 5,000 samples: FID falls with N, so its figures have names of their own."""
    return replace(protocol, name=f"{protocol.name.rpartition('-')[0]}-5k", num_samples=5_000)


PUBLISHED = {each.name: each for full in (_EDM, _EDM_IN64, _DMD2_IN64) for each in (full, _proxy(full))} | {
    each.name: each
    for full, short in ((_GIGAGAN, "gigagan-coco5k"), (_SDXL, "dmd2-sdxl-coco5k"))
    for each in (full, replace(full, name=short, num_samples=5_000))
}
"""By the names that evaluator.protocol takes."""


def published(name: str) -> Published | None:
    """The protocol of that name, NAME@N with N samples instead of its own; None for the toy protocol.

    Raises ConfigError for any other name.
    """
    if name == TOY:
        return None
    base, given, count = name.partition("@")
    if base not in PUBLISHED or (given and not (count.isdecimal() and 2 <= int(count) <= 10**7)):
        raise ConfigError(
            f"evaluator.protocol={name!r} must be {TOY}, one of {', '.join(PUBLISHED)}, or NAME@N with N samples "
            "instead of its own"
        )
    if not given or int(count) == PUBLISHED[base].num_samples:
        return PUBLISHED[base]
    return replace(PUBLISHED[base], name=f"{base}@{int(count)}", num_samples=int(count))
