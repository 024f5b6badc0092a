"""Pixel teachers: a folder written is the folder read, captions are class numbers, mistakes are told in one line."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydistill.errors import CheckpointError, ConfigError, DataError
from raydistill.models.denoiser import Cond, parameter_count
from raydistill.models.edm_net import EDMDenoiser, EDMNetConfig
from raydistill.models.edm_pipeline import EDMPipeline, edm_on_meta, is_edm, load_edm_pipeline, save_edm

DIGITS = EDMNetConfig.digits()
COLOURED = replace(DIGITS, channels=3, sigma_max=40.0)


def written(folder: Path, config: EDMNetConfig = DIGITS) -> tuple[Path, EDMDenoiser]:
    denoiser = EDMDenoiser.random(config, seed=3)
    return save_edm(folder / "teacher", config, denoiser.network.state_dict()), denoiser.eval()


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_folder_gives_back_what_was_written(tmp_path: Path) -> None:
    folder, denoiser = written(tmp_path, COLOURED)
    assert is_edm(str(folder))
    pipeline = load_edm_pipeline(str(folder))
    assert pipeline.denoiser.config == COLOURED
    assert pipeline.denoiser.schedule.sigma_max == 40.0
    assert (pipeline.latent_shape, pipeline.image_size) == ((3, 8, 8), 8)
    assert not any(weight.requires_grad for weight in pipeline.denoiser.parameters())
    x, sigma, cond = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 9.0]), pipeline.encode_text(["7", "0"])
    assert torch.equal(pipeline.denoiser(x, sigma, cond), denoiser(x, sigma, cond))
    meta, shapes = edm_on_meta(str(folder))
    assert meta.config == COLOURED
    assert shapes == pipeline.cond_shapes == {name: value.shape[1:] for name, value in cond.tensors.items()}
    assert all(weight.is_meta for weight in meta.parameters())


def test_a_generators_weights_are_saved_with_what_else_is_known_of_them(tmp_path: Path) -> None:
    denoiser = EDMDenoiser.random(DIGITS, seed=4)
    folder = save_edm(tmp_path / "made" / "here", DIGITS, denoiser.state_dict(), {"sigmas": [2.5]})
    assert json.loads((folder / "edm.json").read_text())["extra"] == {"sigmas": [2.5]}
    assert load_edm_pipeline(str(folder)).fingerprint == EDMPipeline(denoiser).fingerprint
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1


def test_the_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    one = EDMPipeline(EDMDenoiser.random(DIGITS, seed=1)).fingerprint
    assert one == EDMPipeline(EDMDenoiser.random(DIGITS, seed=1)).fingerprint
    assert one != EDMPipeline(EDMDenoiser.random(DIGITS, seed=2)).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", one)


def test_a_grey_networks_samples_are_the_mean_over_colours_and_become_colours_again() -> None:
    pipeline = EDMPipeline(EDMDenoiser.on_meta(DIGITS).to_empty(device="cpu"))
    images = torch.rand(2, 3, 8, 8)
    latents = pipeline.encode_images(images)
    torch.testing.assert_close(latents, (images[:, :1] + images[:, 1:2] + images[:, 2:]) / 3)
    decoded = pipeline.decode(latents)
    assert decoded.shape == (2, 3, 8, 8)
    assert torch.equal(decoded[:, 2:], latents)


def test_a_coloured_networks_samples_are_the_images() -> None:
    pipeline = EDMPipeline(EDMDenoiser.on_meta(COLOURED).to_empty(device="cpu"))
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(pipeline.encode_images(images), images)
    assert torch.equal(pipeline.decode(images), images)


def test_a_caption_is_a_class_number(tmp_path: Path) -> None:
    pipeline = load_edm_pipeline(str(written(tmp_path)[0]))
    label = pipeline.encode_text(["7", "0", "9"]).tensors["label"]
    assert label.tolist() == [7.0, 0.0, 9.0]
    assert label.dtype == torch.float32
    assert pipeline.null_cond(3) is None


@pytest.mark.parametrize("caption", ["10", "-1", "7.0", "seven", "", " 7", "7\n", "\u0667", "1" * 5000])
def test_a_caption_that_is_no_class_is_refused(tmp_path: Path, caption: str) -> None:
    pipeline = EDMPipeline(EDMDenoiser.on_meta(DIGITS).to_empty(device="cpu"))
    with pytest.raises(
        DataError, match=r"the teacher's classes are 0 to 9 \(data.shards, or the prompt\)"
    ) as error:
        pipeline.encode_text(["3", caption])
    assert repr(caption) in one_line(error)


def test_an_unconditional_network_has_one_class() -> None:
    pipeline = EDMPipeline(EDMDenoiser.random(replace(DIGITS, label_dim=0), seed=0).eval())
    cond = pipeline.encode_text(["0"])
    assert pipeline.denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1), cond).shape == (1, 1, 8, 8)
    with pytest.raises(DataError, match="classes are 0 to 0"):
        pipeline.encode_text(["1"])


def test_a_copy_is_trained_without_touching_the_teacher(tmp_path: Path) -> None:
    pipeline = load_edm_pipeline(str(written(tmp_path)[0]))
    copy = pipeline.copy_denoiser("fp32")
    copy(torch.randn(2, 1, 8, 8), torch.ones(2), Cond({"label": torch.zeros(2)})).sum().backward()
    assert any(weight.grad is not None for weight in copy.parameters())
    assert not any(weight.requires_grad for weight in pipeline.denoiser.parameters())
    assert next(copy.parameters()).data_ptr() != next(pipeline.denoiser.parameters()).data_ptr()


def test_the_published_shapes_are_there_without_a_download() -> None:
    pipeline = load_edm_pipeline("random:edm-cifar10")
    assert is_edm("random:edm-cifar10")
    assert parameter_count(pipeline.denoiser) == 55_735_299
    assert pipeline.latent_shape == (3, 32, 32)
    meta, _ = edm_on_meta("random:edm-imagenet64")
    assert (meta.sample_shape, meta.feature_shape) == ((3, 64, 64), (768, 8, 8))


@pytest.mark.parametrize("path", ["builtin:scenes", "owner/name", "/nowhere"])
def test_other_teachers_are_left_to_diffusers(path: str) -> None:
    assert not is_edm(path)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def apply(folder: Path) -> None:
        values = json.loads((folder / "edm.json").read_text())
        change(values)
        (folder / "edm.json").write_text(json.dumps(values))

    return apply


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["embed0.bias"]
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(lambda v: v.update(novelty=1)), "novelty"),
        (edit(lambda v: v.pop("image_size")), "image_size"),
        (edit(lambda v: v.update(image_size="8")), "image_size"),
        (edit(lambda v: v.update(image_size=7)), "image_size=7 can't be halved"),
        (edit(lambda v: v.update(base_channels=20)), "weight "),
        (lambda folder: (folder / "edm.json").write_text("{"), "edm.json is not JSON"),
        (lambda folder: (folder / "edm.json").write_text("[]"), "must hold the fields"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors can't be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12"), "model.safetensors can't be read"),
        (drop_a_weight, "weight embed0.bias has shape missing"),
    ],
)
def test_a_folder_that_is_damaged_is_told_in_one_line(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    folder, _ = written(tmp_path)
    damage(folder)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        load_edm_pipeline(str(folder))
    assert one_line(error).startswith(f"teacher.path={str(folder)!r}")


def test_an_unknown_random_teacher_is_refused_with_those_that_are_there() -> None:
    for load in (load_edm_pipeline, edm_on_meta):
        with pytest.raises(
            ConfigError, match="is not one of random:edm-cifar10, random:edm-imagenet64"
        ) as error:
            load("random:edm-mnist")
        assert "teacher.path='random:edm-mnist'" in one_line(error)


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't write the network's folder") as error:
        save_edm(tmp_path / "file" / "teacher", DIGITS, EDMDenoiser.random(DIGITS, seed=0).state_dict())
    one_line(error)
