"""The shipped detector of digits: what it reads, what toyfid in its features notices, and the contract of detectors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raydistill.data.digits import read_digits
from raydistill.errors import ConfigError, DataError
from raydistill.eval.detectors import ACCURACY, detector_for
from raydistill.eval.digit_net import (
    DIGIT_NET_FOLDER,
    NUM_FEATURES,
    DigitNet,
    digit_net_sha256,
    label_accuracy,
    load_digit_net,
)
from raydistill.eval.frechet import FeatureStatistics, frechet_distance


@pytest.fixture(scope="module")
def net() -> DigitNet:
    return load_digit_net()


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, list[str]]:
    pixels, labels = read_digits()
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [
        str(label) for label in labels.tolist()
    ]


def to_bytes(images: Tensor) -> Tensor:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def toyfid(a: Tensor, b: Tensor) -> float:
    statistics = FeatureStatistics(), FeatureStatistics()
    statistics[0].update(a)
    statistics[1].update(b)
    return frechet_distance(*statistics)


def test_almost_all_digits_are_read(net: DigitNet, real: tuple[Tensor, list[str]]) -> None:
    features, logits = net(real[0])
    assert features.shape == (1797, NUM_FEATURES)
    assert label_accuracy(logits, real[1]) > 0.99
    # shifted by one place, labels belong to other images: the figure is about the pixels
    assert label_accuracy(logits, [*real[1][1:], real[1][0]]) < 0.2


def test_features_have_the_promised_scale_and_do_not_depend_on_the_batch(
    net: DigitNet, real: tuple[Tensor, list[str]]
) -> None:
    features = net.features(real[0])
    assert features.var(dim=0).sum().item() == pytest.approx(NUM_FEATURES, rel=0.01)
    alone = torch.cat([net.features(image[None]) for image in real[0][:8]])
    assert torch.allclose(alone, features[:8], atol=1e-4)


def test_toyfid_grows_with_noise_and_blur(net: DigitNet, real: tuple[Tensor, list[str]]) -> None:
    reference = net.features(real[0])
    images = real[0].float() / 127.5 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), value=-1.0), 3, stride=1)
    for ladder in (
        [images + level * noise for level in (0.1, 0.3, 0.6)],
        [torch.lerp(images, blurred, share) for share in (0.1, 0.3, 1.0)],
    ):
        distances = [toyfid(net.features(to_bytes(step)), reference) for step in ladder]
        assert 0 < distances[0] < distances[1] / 3 < distances[2] / 9


def test_toyfid_notices_what_a_classifier_forgets(net: DigitNet, real: tuple[Tensor, list[str]]) -> None:
    """A generator that makes one image a class, leaves a class out, or makes few of each is far from the data."""
    images, captions = real
    labels = torch.tensor([int(caption) for caption in captions])
    reference = net.features(images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    means = torch.stack([images[labels == c].float().mean(dim=0) for c in range(10)]).round().to(torch.uint8)
    assert toyfid(net.features(means[labels]), reference) > 5
    without_threes = (labels != 3).nonzero().flatten()
    few = torch.cat([(labels == c).nonzero().flatten()[:20] for c in range(10)])
    for chosen in (without_threes, few):
        as_many = toyfid(reference[order[: len(chosen)]], reference)
        assert toyfid(reference[chosen], reference) > 2 * as_many


def test_held_out_digits_are_no_further_from_the_reference_than_those_it_was_trained_on() -> None:
    figures = json.loads((DIGIT_NET_FOLDER / "digit_net.json").read_text())["figures"]
    assert figures["held_out_accuracy_clean"] > 0.97
    assert figures["toyfid_held_out_to_seen"] < 1.2 * figures["toyfid_seen_to_seen"]


def test_the_net_is_small_frozen_and_described(net: DigitNet) -> None:
    about = json.loads((DIGIT_NET_FOLDER / "digit_net.json").read_text())
    assert sum(p.numel() for p in net.parameters()) == about["figures"]["parameters"]
    assert about["sha256"] == digit_net_sha256()
    assert (DIGIT_NET_FOLDER / "digit_net.safetensors").stat().st_size < 300_000
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_missing_or_changed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DigitNet file missing: .*digit_net\.safetensors"):
        load_digit_net(tmp_path)
    shutil.copytree(DIGIT_NET_FOLDER, tmp_path / "net")
    weights = tmp_path / "net" / "digit_net.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="has sha256"):
        load_digit_net(tmp_path / "net")


def test_images_of_another_type_or_size_are_refused(net: DigitNet) -> None:
    with pytest.raises(DataError, match=r"takes uint8 images \[B, 3, 8, 8\], got torch.float32"):
        net.features(torch.zeros(1, 3, 8, 8))
    with pytest.raises(DataError, match=r"evaluator\.detector"):
        net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_label_accuracy_counts_and_names_what_is_no_digit() -> None:
    logits = torch.eye(10)
    assert label_accuracy(logits[[1, 2, 3, 4]], ["1", "2", " 3", "5"]) == 0.75
    with pytest.raises(DataError, match="caption '10' names no digit; label accuracy knows 0 to 9"):
        label_accuracy(logits[:1], ["10"])
    with pytest.raises(DataError, match="'a red circle' names no digit"):
        label_accuracy(logits[:1], ["a red circle"])
    with pytest.raises(DataError, match="2 captions"):
        label_accuracy(logits[:1], ["1", "2"])
    with pytest.raises(DataError, match="0 captions"):
        label_accuracy(logits[:0], [])


@pytest.mark.parametrize(
    ("name", "caption", "other"), [("scenes", "a red circle", "a blue ring"), ("digits", "7", "3")]
)
def test_every_detector_keeps_the_contract(name: str, caption: str, other: str) -> None:
    detector = detector_for(name)
    assert detector.to("cpu") is detector
    assert ACCURACY[name] == detector.accuracy_metric
    edge = detector.image_size
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, edge, edge), dtype=torch.uint8, generator=draw)
    features, shown = detector(images)
    assert features.ndim == 2
    assert len(features) == len(shown) == 6
    assert 0 <= detector.accuracy(shown, [caption, other] * 3) <= 1
    with pytest.raises(DataError):
        detector(images.float())
    with pytest.raises(DataError):
        detector.accuracy(shown, ["nothing at all"] * 6)


def test_detectors_are_told_apart_by_their_protocol_fields() -> None:
    detectors = [detector_for(name) for name in ACCURACY]
    for field in ("name", "sha256", "accuracy_metric"):
        assert len({getattr(detector, field) for detector in detectors}) == len(ACCURACY)
    with pytest.raises(ConfigError, match=r"evaluator\.detector='faces' is not one of scenes, digits"):
        detector_for("faces")
