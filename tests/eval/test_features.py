"""The shipped detector sees what is drawn and nothing else; the shipped teacher is the measured one."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from raydistill.data.scenes import draw, scene
from raydistill.errors import DataError
from raydistill.eval.features import (
    COLOURS,
    NUM_FEATURES,
    SCENE_NET_FOLDER,
    SHAPES,
    SceneNet,
    load_scene_net,
    scene_net_sha256,
)

TEACHER_FOLDER = SCENE_NET_FOLDER.parent / "scenes_teacher"
FRESH_SEED = 4711  # not the seed of the shipped net's training scenes


@pytest.fixture(scope="module")
def net() -> SceneNet:
    return load_scene_net()


@pytest.fixture(scope="module")
def fresh() -> tuple[Tensor, Tensor]:
    images, present = [], torch.zeros(500, len(COLOURS), len(SHAPES), dtype=torch.bool)
    for index in range(len(present)):
        content = scene(FRESH_SEED, "val", index)
        images.append(np.asarray(draw(content)))
        for thing in content.objects:
            present[index, COLOURS.index(thing.colour), SHAPES.index(thing.shape)] = True
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), present


def test_more_than_99_percent_of_fresh_scenes_are_read_without_error(
    net: SceneNet, fresh: tuple[Tensor, Tensor]
) -> None:
    images, present = fresh
    assert ((net.objects(images) > 0) == present).all(dim=(1, 2)).float().mean() > 0.99


def test_slight_noise_does_not_change_what_is_seen(net: SceneNet, fresh: tuple[Tensor, Tensor]) -> None:
    images, present = fresh
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * 5
    noisy = (images + noise).clamp(0, 255).round().to(torch.uint8)
    assert ((net.objects(noisy) > 0) == present).all(dim=(1, 2)).float().mean() > 0.98


def test_nothing_is_seen_where_nothing_is_drawn(net: SceneNet, fresh: tuple[Tensor, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    blank = torch.full((1, 3, 32, 32), 40, dtype=torch.uint8)
    noise = torch.randint(0, 256, (100, 3, 32, 32), generator=generator, dtype=torch.uint8)
    order = torch.randperm(1024, generator=generator)
    shuffled = fresh[0][:100].flatten(2)[:, :, order].unflatten(2, (32, 32))
    for images in (blank, noise, shuffled):
        assert (net.objects(images) > 0).any(dim=(1, 2)).float().mean() < 0.05


def test_features_have_the_promised_shape_and_scale(net: SceneNet, fresh: tuple[Tensor, Tensor]) -> None:
    features, logits = net(fresh[0])
    assert features.shape == (500, NUM_FEATURES)
    assert logits.shape == (500, len(COLOURS), len(SHAPES))
    assert torch.equal(features, net.features(fresh[0]))
    assert 0.8 < features.var(dim=0).sum().item() / NUM_FEATURES < 1.2


def test_features_do_not_depend_on_the_batch(net: SceneNet, fresh: tuple[Tensor, Tensor]) -> None:
    alone = torch.cat([net.features(image[None]) for image in fresh[0][:8]])
    assert torch.allclose(alone, net.features(fresh[0][:8]), atol=1e-4)


def test_features_know_where_an_object_is(net: SceneNet, fresh: tuple[Tensor, Tensor]) -> None:
    single = fresh[0][(fresh[1].sum(dim=(1, 2)) == 1)][:100]
    moved = single.flip(3)  # a mirrored scene shows the same objects elsewhere
    apart = (net.features(single) - net.features(moved)).square().sum(dim=1)
    assert apart.median() > 0.1


def test_images_of_another_type_or_size_are_refused(net: SceneNet) -> None:
    with pytest.raises(DataError, match=r"takes uint8 images \[B, 3, 32, 32\], got torch.float32"):
        net.features(torch.zeros(1, 3, 32, 32))
    with pytest.raises(DataError, match=r"evaluator\.enabled"):
        net.objects(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_missing_or_changed_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SceneNet file missing: .*scene_net\.safetensors"):
        load_scene_net(tmp_path)
    shutil.copytree(SCENE_NET_FOLDER, tmp_path / "net")
    weights = tmp_path / "net" / "scene_net.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match="has sha256"):
        load_scene_net(tmp_path / "net")


def test_the_net_is_small_frozen_and_described(net: SceneNet) -> None:
    about = json.loads((SCENE_NET_FOLDER / "scene_net.json").read_text())
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == about["figures"]["parameters"] < 400_000
    assert about["sha256"] == scene_net_sha256()
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_shipped_weights_take_at_most_8_mb() -> None:
    weights = [*SCENE_NET_FOLDER.rglob("*.safetensors"), *TEACHER_FOLDER.rglob("*.safetensors")]
    assert len(weights) == 4
    assert sum(file.stat().st_size for file in weights) <= 8_000_000


def test_the_teachers_figures_belong_to_the_shipped_weights() -> None:
    figures = json.loads((TEACHER_FOLDER / "figures.json").read_text())
    files = {str(f.relative_to(TEACHER_FOLDER)): f for f in TEACHER_FOLDER.rglob("*.safetensors")}
    assert figures["sha256"] == {
        name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items()
    }
    assert figures["bytes"] == sum(file.stat().st_size for file in files.values())
    assert figures["scene_net_sha256"] == scene_net_sha256()


def test_the_teachers_figures_reach_the_bar() -> None:
    figures = json.loads((TEACHER_FOLDER / "figures.json").read_text())
    guided = figures["ddim_25_guidance_2"]
    assert figures["samples"] >= 1000
    assert figures["autoencoder"]["same_objects"] > 0.98
    assert guided["prompt_accuracy"] >= 0.95
    # A distilled generator comes down from the one-step figure; there must be something to come down.
    assert guided["toyfid"] < figures["one_step_guidance_1"]["toyfid"] / 20
