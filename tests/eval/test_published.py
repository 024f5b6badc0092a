"""What the published protocols fix, their seeds and labels, precision and recall, and what can't be compared."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from raydistill.errors import ConfigError, DataError
from raydistill.eval.precision_recall import precision_recall
from raydistill.eval.protocol import Protocol, higher_is_better, require_same, second_figure
from raydistill.eval.published import PUBLISHED, published
from raydistill.eval.reference import batches_of
from raydistill.eval.resize import CHAINS
from raydistill.eval.seeds import CounterBased, GeneratorPerImage
from raydistill.tracking import check_metric_names
from tests.eval.test_protocol import PROTOCOL


def test_the_presets_are_those_of_the_papers() -> None:
    rows = {
        name: (
            each.num_samples,
            each.resize,
            each.uint8_rule,
            each.seed_rule,
            each.label_rule,
            each.coco_year,
        )
        for name, each in PUBLISHED.items()
        if each.num_samples != 5000
    }
    own, counted = "generator-per-image", "counter-based"
    assert rows == {
        "edm-cifar10-50k": (50_000, "inside", "round", own, "drawn-per-image", ""),
        "edm-in64-50k": (50_000, "inside", "round", own, "drawn-per-image", ""),
        "dmd2-in64-50k": (50_000, "inside", "floor", counted, "in-turn", ""),
        "gigagan-coco30k": (
            30_000,
            "crop-lanczos256-clean299",
            "floor",
            counted,
            "captions in order",
            "2014",
        ),
        "dmd2-sdxl-coco10k": (
            10_000,
            "crop-lanczos512-clean299",
            "floor",
            counted,
            "captions in order",
            "2014",
        ),
    }
    assert {name for name, each in PUBLISHED.items() if each.patch_resize} == {
        "dmd2-sdxl-coco10k",
        "dmd2-sdxl-coco5k",
    }
    for each in PUBLISHED.values():
        assert {each.resize, each.patch_resize} <= {*CHAINS, ""}
    proxies = {"edm-cifar10-5k", "edm-in64-5k", "dmd2-in64-5k", "gigagan-coco5k", "dmd2-sdxl-coco5k"}
    assert {name for name, each in PUBLISHED.items() if each.num_samples == 5000} == proxies


def test_a_protocol_may_be_shortened_by_its_name_only() -> None:
    assert published("toy") is None
    shorter = published("gigagan-coco30k@200")
    assert shorter == replace(PUBLISHED["gigagan-coco30k"], name="gigagan-coco30k@200", num_samples=200)
    assert published("gigagan-coco30k@30000") == PUBLISHED["gigagan-coco30k"]
    for wrong in ("fid", "gigagan-coco30k@", "gigagan-coco30k@1", "toy@5", "edm-cifar10-50k@x"):
        with pytest.raises(
            ConfigError, match=r"evaluator\.protocol='.*must be toy, one of edm-cifar10-50k"
        ) as caught:
            published(wrong)
        assert "\n" not in str(caught.value)


def test_edms_rule_draws_noise_label_and_noise_again_from_one_generator_an_image() -> None:
    shape = (3, 4, 4)
    seeds = GeneratorPerImage(0, 10, "cpu")
    for index in (0, 1, 49_999):
        generator = torch.Generator("cpu").manual_seed(index)
        noise = torch.randn([3, 4, 4], generator=generator)
        label = int(torch.randint(10, size=[], generator=generator))
        later = [torch.randn([3, 4, 4], generator=generator) for _ in range(2)]
        assert torch.equal(seeds.noise("", 0, [index], shape)[0], noise)
        assert seeds.label(index, shape) == label
        for again, expected in enumerate(later, 1):
            assert torch.equal(seeds.noise("", again, [index], shape)[0], expected)
    together = seeds.noise("", 0, [7, 3], shape)
    assert torch.equal(together, torch.cat([seeds.noise("", 0, [each], shape) for each in (7, 3)]))
    assert seeds.name == "generator-per-image on cpu"
    drawn = np.bincount([seeds.label(index, shape) for index in range(2000)], minlength=10)
    assert drawn.min() > 140
    unlabelled = GeneratorPerImage(0, 0, "cpu").noise("", 1, [5], shape)
    generator = torch.Generator("cpu").manual_seed(5)
    torch.randn([3, 4, 4], generator=generator)
    assert torch.equal(unlabelled[0], torch.randn([3, 4, 4], generator=generator))


def test_counter_based_noise_depends_on_purpose_and_seed() -> None:
    first = CounterBased(10).noise("eval/noise", 0, [4], (1, 2, 2))
    assert not torch.equal(first, CounterBased(11).noise("eval/noise", 0, [4], (1, 2, 2)))
    assert not torch.equal(first, CounterBased(10).noise("eval/renoise_0", 1, [4], (1, 2, 2)))


@pytest.mark.parametrize(("count", "size", "workers"), [(10, 3, 3), (7, 10, 4), (100, 7, 1), (30, 10, 2)])
def test_workers_share_whole_batches_in_order(count: int, size: int, workers: int) -> None:
    shares = [list(batches_of(count, size, worker, workers)) for worker in range(workers)]
    joined = [batch for share in shares for batch in share]
    assert joined == list(batches_of(count, size, 0, 1))
    assert [index for batch in joined for index in batch] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def brute_force(samples: Tensor, manifold: Tensor) -> float:
    inside = 0
    for sample in samples:
        for centre in manifold:
            radius = sorted(math.dist(centre, other) for other in manifold)[3]
            if math.dist(sample, centre) <= radius:
                inside += 1
                break
    return inside / len(samples)


def test_precision_and_recall_are_shares_within_third_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(30, 3, generator=generator)
    fake = 0.5 * torch.randn(25, 3, generator=generator) + 1.0
    precision, recall = precision_recall(fake, real)
    assert (precision, recall) == (brute_force(fake, real), brute_force(real, fake))
    assert 0 < recall < precision < 1
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)
    with pytest.raises(DataError, match="more than 3 samples on each side, there are 3 and 30"):
        precision_recall(real[:3], real)


FID = replace(
    PROTOCOL, name="edm-cifar10-50k", metric="fid", num_samples=50_000, seed_rule="generator-per-image on cpu"
)


def test_figures_of_two_protocols_have_two_names_and_are_refused_together() -> None:
    assert FID.key() == "eval/fid_50k"
    assert FID.hash() != replace(FID, seed_rule="generator-per-image on cuda").hash()
    for other in (PROTOCOL, replace(FID, patch_resize="patch299-clean299"), replace(FID, clip_sha256="dd")):
        with pytest.raises(ConfigError, match="can't be compared, their protocols differ in") as caught:
            require_same([FID, other])
        assert "\n" not in str(caught.value)
    names = [FID.key(f"{who}{name}") for who in ("", "teacher_") for name in
             ("fid", "patch_fid", "kid", "precision", "recall", "clip_score")]  # fmt: skip
    check_metric_names(names)


def test_figures_recorded_before_these_protocols_keep_their_hash() -> None:
    before = {"seed_rule", "patch_resize", "clip", "clip_sha256"}
    assert not before & PROTOCOL.to_dict().keys()
    assert before & FID.to_dict().keys() == {"seed_rule"}
    for each in (PROTOCOL, FID):
        assert Protocol.from_dict(each.to_dict()) == each


def test_which_figure_stands_beside_the_distance_and_which_way_is_up() -> None:
    named = ["eval/fid_5k", "eval/precision_5k", "eval/recall_5k", "eval/teacher_clip_score_5k"]
    assert second_figure(named) == "eval/recall_5k"
    assert second_figure([*named, "eval/clip_score_5k"]) == "eval/clip_score_5k"
    assert second_figure(["eval/fid_5k", "eval/patch_fid_5k", "eval/kid_5k"]) is None
    assert second_figure(["eval/toyfid_2k", "eval/prompt_accuracy_2k"]) == "eval/prompt_accuracy_2k"
    higher = {name for name in [*named, "eval/clip_score_5k", "eval/kid_5k"] if higher_is_better(name)}
    assert higher == {
        "eval/precision_5k",
        "eval/recall_5k",
        "eval/teacher_clip_score_5k",
        "eval/clip_score_5k",
    }
