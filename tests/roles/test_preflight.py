"""The preflight accepts a teacher that fits its samples and says what is wrong with one that doesn't."""

import numpy as np
import pytest
import torch
from torch import Tensor

from raydistill.data.scenes import draw, scene
from raydistill.diffusion.random import Draws
from raydistill.errors import ConfigError
from raydistill.models.denoiser import Cond
from raydistill.models.diffusers_hub import TextToImage, UNetDenoiser, load_pipeline
from raydistill.roles.preflight import LEVELS, preflight
from raydistill.runtime.settings import BUILTIN_TEACHERS

COUNT = 32


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    return load_pipeline(str(BUILTIN_TEACHERS["builtin:scenes"]))


@pytest.fixture(scope="module")
def samples(pipeline: TextToImage) -> tuple[Tensor, Cond]:
    content = [scene(0, "val", n) for n in range(COUNT)]
    pixels = torch.from_numpy(np.stack([np.asarray(draw(c)) for c in content])).permute(0, 3, 1, 2)
    latents = pipeline.encode_images(pixels.float() / 127.5 - 1)
    return latents, pipeline.encode_text([c.captions[0] for c in content])


def test_shipped_teacher_beats_the_trivial_answers_at_all_five_levels(
    pipeline: TextToImage, samples: tuple[Tensor, Cond]
) -> None:
    report = preflight(pipeline.denoiser, *samples, Draws(0), pipeline.denoiser.prediction)
    assert set(report.errors) == set(LEVELS)
    assert all(error < 1.0 for error in report.errors.values())
    assert report.errors[1.0] < 0.4


def test_output_read_as_another_prediction_type_is_diagnosed_by_its_name(
    pipeline: TextToImage, samples: tuple[Tensor, Cond]
) -> None:
    wrong = UNetDenoiser(pipeline.denoiser.unet, pipeline.denoiser.schedule, "v")
    with pytest.raises(ConfigError, match=r"set teacher\.prediction=epsilon"):
        preflight(wrong, *samples, Draws(0), "v")


@pytest.mark.parametrize("scale", [0.18215, 1 / 0.18215])
def test_latents_of_another_scale_are_diagnosed(
    pipeline: TextToImage, samples: tuple[Tensor, Cond], scale: float
) -> None:
    latents, cond = samples
    with pytest.raises(ConfigError, match=r"samples are multiplied by .*data\.shards"):
        preflight(pipeline.denoiser, latents * scale, cond, Draws(0), pipeline.denoiser.prediction)


def test_shifted_latents_are_refused(pipeline: TextToImage, samples: tuple[Tensor, Cond]) -> None:
    latents, cond = samples
    with pytest.raises(
        ConfigError, match=r"samples' mean is removed: a shift factor is missing \(data\.shards\)"
    ):
        preflight(pipeline.denoiser, latents + 4.0, cond, Draws(0), pipeline.denoiser.prediction)
