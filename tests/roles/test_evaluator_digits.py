"""The evaluator on a class-conditional pixel teacher: its figures, the teacher's own, and what it refuses."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raydistill.checkpoint import Snapshot, Snapshots, prefixed
from raydistill.data.digits import read_digits, write_digits
from raydistill.diffusion.random import Draws
from raydistill.diffusion.samplers import heun, karras_times
from raydistill.errors import ConfigError, DataError
from raydistill.eval.detectors import detector_for
from raydistill.eval.digit_net import digit_net_sha256
from raydistill.eval.frechet import FeatureStatistics, frechet_distance
from raydistill.eval.protocol import to_uint8
from raydistill.methods.dmd2 import DMD2, DMD2Config
from raydistill.models.denoiser import state_for_saving
from raydistill.models.edm_pipeline import EDMPipeline, load_edm_pipeline
from raydistill.roles.evaluator import Evaluator, EvaluatorConfig
from raydistill.runtime.settings import BUILTIN_TEACHERS

TEACHER = Path(BUILTIN_TEACHERS["builtin:digits"])
SAMPLES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", progress=False)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """The teacher's weights as generator and as critic: a run before its first update."""
    weights = state_for_saving(load_edm_pipeline(str(TEACHER)).denoiser)
    snapshots = Snapshots(str(tmp_path_factory.mktemp("run")), keep=1)
    snapshots.write_part(0, "generator", prefixed(weights, "weights/"), {})
    snapshots.write_part(0, "critic", prefixed(weights, "weights/denoiser."), {})
    snapshots.commit(0, {})
    return snapshots.read(0)


def evaluator(
    folder: Path, guidance_scale: float = 1.0, cache_dir: Path | None = None, **settings: Any
) -> Evaluator:
    pipeline = load_edm_pipeline(str(TEACHER))
    method = DMD2(
        DMD2Config(timesteps=(80.0,), gan_weight_generator=0.0, gan_weight_critic=0.0),
        pipeline.denoiser.schedule,
        guidance_scale=1.0,
    )
    defaults = {"coco": str(folder), "detector": "digits", "num_samples": SAMPLES, "teacher_steps": 3}
    config = EvaluatorConfig(**defaults | settings)
    return Evaluator(
        config, pipeline, method, guidance_scale, cache_dir=str(cache_dir) if cache_dir else None
    )


def test_figures_and_protocol_do_not_depend_on_the_batch_size(folder: Path, snapshot: Snapshot) -> None:
    small, large = (evaluator(folder, batch_size=size) for size in (7, 100))
    for ours, theirs in (
        (small.evaluate(snapshot), large.evaluate(snapshot)),
        (small.evaluate_teacher(), large.evaluate_teacher()),
    ):
        ours.metrics.pop("eval/seconds", None)
        for name, value in ours.metrics.items():
            assert value == pytest.approx(theirs.metrics[name], rel=1e-3, abs=1e-4), name
        assert ours.protocol == theirs.protocol


def test_metrics_and_protocol_say_which_detector_judged(folder: Path, snapshot: Snapshot) -> None:
    result = evaluator(folder).evaluate(snapshot)
    assert set(result.metrics) == {
        "eval/toyfid_40", "eval/toykid_40", "eval/label_accuracy_40", "eval/seconds",
    }  # fmt: skip
    assert result.protocol["name"] == "digits-val"
    assert result.protocol["detector"] == "DigitNet"
    assert result.protocol["detector_sha256"] == digit_net_sha256()
    assert (result.protocol["num_reference"], result.protocol["num_samples"]) == (1797, SAMPLES)
    assert (result.protocol["sampler"], result.protocol["num_steps"]) == ("few_step", 1)


def test_the_generators_sampler_is_the_methods(folder: Path) -> None:
    pipeline = load_edm_pipeline(str(TEACHER))
    method = DMD2(
        DMD2Config(timesteps=(80.0, 2.0), gan_weight_generator=0.0, gan_weight_critic=0.0),
        pipeline.denoiser.schedule,
        guidance_scale=1.0,
    )
    method.sampler = "ancestral"
    config = EvaluatorConfig(coco=str(folder), detector="digits", num_samples=SAMPLES)
    protocol = Evaluator(config, pipeline, method, 1.0).protocol
    assert (protocol.sampler, protocol.num_steps) == ("ancestral", 2)


def test_the_teachers_figure_is_that_of_heuns_sampler_on_the_evaluators_noise(
    folder: Path, tmp_path: Path
) -> None:
    judge = evaluator(folder, cache_dir=tmp_path)
    sizes: list[int] = []
    judge.pipeline.denoiser.network.register_forward_hook(lambda _net, args, _out: sizes.append(len(args[0])))
    result = judge.evaluate_teacher()
    assert (result.protocol["sampler"], result.protocol["num_steps"]) == ("heun", 5)
    # what the protocol counts is what the network is asked for each image
    assert sizes == [SAMPLES] * 5

    pipeline = load_edm_pipeline(str(TEACHER))
    schedule = pipeline.denoiser.schedule
    noise = Draws(judge.config.seed).normal("eval/noise", 0, range(SAMPLES), (1, 8, 8))
    cond = pipeline.encode_text(judge.samples.captions)
    x = heun(
        lambda x_t, t: pipeline.denoiser(x_t, t, cond),
        schedule,
        [*karras_times(3, schedule), 0.0],
        80 * noise,
    )
    detector = detector_for("digits")
    drawn, real = FeatureStatistics(), FeatureStatistics()
    features, shown = detector(to_uint8(pipeline.decode(x)))
    drawn.update(features)
    real.update(detector(torch.from_numpy(read_digits()[0]).permute(0, 3, 1, 2).contiguous())[0])
    assert result.metrics["eval/teacher_label_accuracy_40"] == detector.accuracy(
        shown, judge.samples.captions
    )
    assert result.metrics["eval/teacher_toyfid_40"] == pytest.approx(frechet_distance(drawn, real), rel=1e-3)
    (cached,) = tmp_path.glob("teacher_*.json")
    assert json.loads(cached.read_text())["metrics"] == result.metrics
    assert evaluator(folder, cache_dir=tmp_path).evaluate_teacher().metrics == result.metrics


def test_the_shipped_teacher_draws_the_digit_it_is_asked_for(folder: Path) -> None:
    result = evaluator(folder, num_samples=200, teacher_steps=8).evaluate_teacher()
    assert result.metrics["eval/teacher_label_accuracy_200"] > 0.95
    mixed = evaluator(folder, num_samples=200, teacher_steps=8)
    mixed.samples.captions = [str((int(caption) + 1) % 10) for caption in mixed.samples.captions]
    same_noise = mixed.evaluate_teacher()
    # another digit of every noise: the label decides, not the noise
    assert same_noise.metrics["eval/teacher_label_accuracy_200"] > 0.95


def test_the_picture_shows_every_row_large_enough_for_people(folder: Path, snapshot: Snapshot) -> None:
    result = evaluator(folder, grid_images=5).evaluate(snapshot)
    picture = np.asarray(Image.open(io.BytesIO(result.grid_png)).convert("RGB"))
    assert picture.shape[0] > 4 * 96
    assert picture.shape[1] > 5 * 96
    # paper is black in these images and white around them
    assert (picture == 0).all(axis=-1).mean() > 0.1


def test_guidance_of_a_teacher_without_a_null_condition_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.guidance_scale is 2\.0") as caught:
        evaluator(folder, guidance_scale=2.0).evaluate_teacher()
    assert "\n" not in str(caught.value)


def test_a_detector_of_other_images_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evaluator\.detector='scenes' judges 32x32 images.* 8x8"
    ) as caught:
        evaluator(folder, detector="scenes")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("caption", ["10", "-1", "seven"])
def test_a_label_out_of_range_is_named_in_one_line(folder: Path, tmp_path: Path, caption: str) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations").mkdir()
    for number in (1, 2):
        file = f"{number:012d}.png"
        (tmp_path / "val" / file).write_bytes((folder / "val" / file).read_bytes())
    table = {
        "images": [{"id": number, "file_name": f"{number:012d}.png"} for number in (1, 2)],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "0"},
            {"id": 2, "image_id": 2, "caption": caption},
        ],
    }
    (tmp_path / "annotations" / "captions_val.json").write_text(json.dumps(table))
    judge = evaluator(tmp_path, num_samples=2, grid_images=1)
    with pytest.raises(DataError, match=f"{caption!r}.* 0 to 9") as caught:
        judge.evaluate_teacher()
    assert "\n" not in str(caught.value)


def test_the_teachers_figures_belong_to_the_shipped_weights_and_reach_the_bar() -> None:
    figures = json.loads((TEACHER / "figures.json").read_text())
    weights = TEACHER / "model.safetensors"
    assert figures["sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert figures["bytes"] == weights.stat().st_size <= 2_000_000
    assert figures["digit_net_sha256"] == digit_net_sha256()
    assert figures["samples"] == figures["reference_images"] == 1797
    best = figures["heun_8"]
    assert best["label_accuracy"] > 0.95
    assert best["toyfid"] < figures["toyfid_real_halves"]
    # it makes digits of its own: samples are no closer to the training images than these are to one another, nearly
    assert figures["rms_to_nearest_real"]["samples"] > 0.5 * figures["rms_to_nearest_real"]["real"]


def test_the_pipeline_is_class_conditional_and_its_shards_hold_pixels() -> None:
    pipeline = load_edm_pipeline(str(TEACHER))
    assert isinstance(pipeline, EDMPipeline)
    assert not pipeline.stored_encoded
    with torch.no_grad():
        zeros = torch.zeros(2, *pipeline.latent_shape)
        x0 = pipeline.denoiser(zeros, torch.full((2,), 80.0), pipeline.encode_text(["0", "1"]))
    assert (x0[0] - x0[1]).abs().mean() > 0.1
