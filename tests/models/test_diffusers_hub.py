"""The door to diffusers: any SD-shaped folder in, the same numbers out again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raydistill.diffusion.random import Draws
from raydistill.diffusion.samplers import few_step
from raydistill.errors import ConfigError
from raydistill.models.denoiser import Cond, denoise_guided
from raydistill.models.diffusers_export import export_pipeline, few_step_scheduler
from raydistill.models.diffusers_hub import TextToImage, denoiser_on_meta, load_pipeline
from raydistill.runtime.settings import BUILTIN_TEACHERS

FOLDER = str(BUILTIN_TEACHERS["builtin:scenes"])
PROMPTS = ["a red circle", "a small blue square and a large green ring"]


@pytest.fixture(scope="module")
def pipeline() -> TextToImage:
    return load_pipeline(FOLDER)


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL-shaped pipeline with random weights: two text encoders, pooled embeddings, time ids."""
    import transformers
    from diffusers import UNet2DConditionModel

    folder = tmp_path_factory.mktemp("sdxl") / "pipeline"
    shutil.copytree(FOLDER, folder)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    text = transformers.CLIPTextConfig.from_pretrained(folder / "text_encoder")
    first = transformers.CLIPTextModel(text)
    text.projection_dim = 24
    second = transformers.CLIPTextModelWithProjection(text)
    first.save_pretrained(folder / "text_encoder")
    second.save_pretrained(folder / "text_encoder_2")
    UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * text.hidden_size, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    ).save_pretrained(folder / "unet")  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_bottleneck_features_are_the_mid_blocks_output_in_a_whole_forward_pass(pipeline: TextToImage) -> None:
    seen: list[Tensor] = []
    cond = pipeline.encode_text(PROMPTS)
    x_t, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([20.0, 700.0])
    hook = pipeline.denoiser.unet.mid_block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    pipeline.denoiser(x_t, t, cond)
    hook.remove()
    assert torch.equal(pipeline.denoiser.features(x_t, t, cond), seen[0])
    assert seen[0].shape[1:] == pipeline.denoiser.feature_shape


def test_x0_follows_from_the_networks_own_eps(pipeline: TextToImage) -> None:
    cond = pipeline.encode_text(PROMPTS)
    x_t, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([100.0, 900.0])
    eps = pipeline.denoiser.unet(x_t, t, cond.tensors["text"]).sample
    alpha = pipeline.denoiser.schedule.alpha(t).reshape(-1, 1, 1, 1)
    sigma = pipeline.denoiser.schedule.sigma(t).reshape(-1, 1, 1, 1)
    expected = (x_t.double() - sigma * eps.double()) / alpha
    torch.testing.assert_close(pipeline.denoiser(x_t, t, cond).double(), expected, rtol=1e-5, atol=1e-5)


def test_input_gradients_reach_x_t_and_not_the_frozen_weights(pipeline: TextToImage) -> None:
    x_t = torch.randn(2, *pipeline.latent_shape, requires_grad=True)
    pipeline.denoiser(
        x_t, torch.tensor([100.0, 900.0]), pipeline.encode_text(PROMPTS)
    ).square().sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.abs().sum() > 0
    assert all(p.grad is None for p in pipeline.denoiser.parameters())


def test_guidance_in_one_batch_equals_two_passes(pipeline: TextToImage) -> None:
    cond, null = pipeline.encode_text(PROMPTS), pipeline.null_cond(2)
    x_t, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([300.0, 900.0])
    conditional, unconditional = pipeline.denoiser(x_t, t, cond), pipeline.denoiser(x_t, t, null)
    for scale in (0.0, 1.0, 2.5):
        expected = unconditional + scale * (conditional - unconditional)
        got = denoise_guided(pipeline.denoiser, x_t, t, cond, null, scale)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"teacher\.guidance_scale is 2"):
        denoise_guided(pipeline.denoiser, x_t, t, cond, None, 2.0)


def test_codec_and_latent_scale_invert_each_other_on_drawn_scenes(pipeline: TextToImage) -> None:
    import numpy as np

    from raydistill.data.scenes import draw, scene

    pixels = np.stack([np.asarray(draw(scene(0, "val", n))) for n in range(16)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = pipeline.encode_images(images)
    assert latents.shape == (16, *pipeline.latent_shape)
    assert 0.7 < float(latents.std()) < 1.4
    assert float((pipeline.decode(latents) - images).square().mean()) < 0.01


def test_null_condition_is_the_empty_prompt_for_sd_and_zeros_with_time_ids_for_sdxl(
    pipeline: TextToImage, sdxl_folder: Path
) -> None:
    empty = pipeline.encode_text([""]).tensors["text"]
    assert torch.equal(pipeline.null_cond(3).tensors["text"], empty.expand(3, -1, -1))
    null = load_pipeline(str(sdxl_folder)).null_cond(2).tensors
    assert null["text"].abs().sum() == 0
    assert null["pooled"].abs().sum() == 0
    assert null["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 2


def test_sdxl_shaped_pipeline_denoises_with_pooled_embeddings_and_time_ids(sdxl_folder: Path) -> None:
    pipeline = load_pipeline(str(sdxl_folder))
    cond = pipeline.encode_text(PROMPTS)
    assert {name: tuple(tensor.shape[1:]) for name, tensor in cond.tensors.items()} == {
        "text": (20, 128), "pooled": (24,), "time_ids": (6,),
    }  # fmt: skip
    x_t, t = torch.randn(2, *pipeline.latent_shape), torch.tensor([100.0, 900.0])
    answer = pipeline.denoiser(x_t, t, cond)
    other = dict(cond.tensors) | {"pooled": cond.tensors["pooled"] + 1}
    assert not torch.equal(answer, pipeline.denoiser(x_t, t, Cond(other)))
    assert pipeline.denoiser.features(x_t, t, cond).shape == (2, 32, 4, 4)
    _, shapes = denoiser_on_meta(str(sdxl_folder))
    assert shapes == {"text": (20, 128), "pooled": (24,), "time_ids": (6,)}


@pytest.mark.parametrize("timesteps", [(999,), (625,), (999, 499), (999, 749, 499, 249)], ids=str)
def test_exported_folder_gives_plain_diffusers_the_trainers_samples(
    pipeline: TextToImage, tmp_path: Path, timesteps: tuple[int, ...]
) -> None:
    from diffusers import DiffusionPipeline

    generator = pipeline.copy_denoiser("fp32").requires_grad_(False)
    for name, weight in generator.named_parameters():
        if "conv_out" in name:
            weight.mul_(1.05)  # so that the teacher's own weights can't pass for the export
    out = export_pipeline(FOLDER, generator.state_dict(), tmp_path / "export", timesteps=timesteps)
    loaded = DiffusionPipeline.from_pretrained(out)
    loaded.set_progress_bar_config(disable=True)

    draws, positions = Draws(0), range(len(PROMPTS))
    noise = draws.normal("sample/noise", 0, positions, pipeline.latent_shape)
    cond = pipeline.encode_text(PROMPTS)
    renoise = iter(
        [draws.normal(f"again_{n}", 0, positions, pipeline.latent_shape) for n in range(len(timesteps))]
    )
    kept = []

    def take(*_: object, **__: object) -> Tensor:
        kept.append(next(renoise))
        return kept[-1]

    import diffusers.schedulers.scheduling_lcm as lcm

    original, lcm.randn_tensor = lcm.randn_tensor, take
    try:
        images = loaded(
            PROMPTS, num_inference_steps=len(timesteps), guidance_scale=1.0, latents=noise, output_type="pt"
        ).images
    finally:
        lcm.randn_tensor = original
    ours = few_step(
        lambda x_t, t: generator(x_t, t, cond),
        generator.schedule,
        [float(t) for t in timesteps],
        noise,
        noise=lambda step: kept[step],
    )
    expected = (pipeline.decode(ours) / 2 + 0.5).clamp(0, 1)
    assert float((images - expected).abs().max()) < 2e-4


def test_timesteps_that_no_scheduler_visits_are_refused() -> None:
    config = json.loads((Path(FOLDER) / "scheduler" / "scheduler_config.json").read_text())
    with pytest.raises(ConfigError, match=r"method\.timesteps"):
        few_step_scheduler(config, [999, 600])
    with pytest.raises(ConfigError, match=r"whole timesteps, method\.timesteps=\(624\.5,\)"):
        few_step_scheduler(config, [624.5])


def test_export_keeps_the_prediction_type_that_the_settings_gave_and_zero_terminal_snr(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(FOLDER, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    told = json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}
    file.write_text(json.dumps(told))
    teacher = load_pipeline(str(folder), prediction="v_prediction")
    weights = teacher.denoiser.state_dict()
    for times in ([999], [625]):
        out = export_pipeline(
            str(folder), weights, tmp_path / f"{times[0]}", timesteps=times, prediction="v_prediction"
        )
        scheduler = lcm_scheduler(out)
        assert scheduler.config.prediction_type == "v_prediction"
        ours = teacher.denoiser.schedule.alphas_cumprod[: times[0] + 1]
        assert torch.allclose(scheduler.alphas_cumprod.double(), torch.from_numpy(ours), atol=1e-6)


def lcm_scheduler(folder: Path) -> Any:
    from diffusers import LCMScheduler

    return LCMScheduler.from_pretrained(folder / "scheduler")


def test_bf16_teacher_is_cast_after_its_fingerprint_and_its_copies_stay_exact() -> None:
    exact, pipeline = load_pipeline(FOLDER), load_pipeline(FOLDER)
    copy = pipeline.copy_denoiser("fp32")
    pipeline.denoiser.cast("bf16")
    assert pipeline.fingerprint == exact.fingerprint
    for name, tensor in copy.state_dict().items():
        assert torch.equal(tensor, exact.denoiser.state_dict()[name]), name
    cond = exact.encode_text(PROMPTS)
    x_t, t = torch.randn(2, *exact.latent_shape), torch.tensor([100.0, 700.0])
    rough, fine = pipeline.denoiser(x_t, t, cond), exact.denoiser(x_t, t, cond)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - fine).abs().max()) < 0.3


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("scheduler", "no scheduler/ folder"),
        ("unet", "no unet/ folder"),
        ("model_index.json", "model_index.json is missing"),
    ],
)
def test_incomplete_teacher_folder_is_refused_by_setting_and_part(
    tmp_path: Path, missing: str, named: str
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(FOLDER, folder)
    target = folder / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ConfigError, match=rf"teacher\.path=.*{named}"):
        load_pipeline(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_cut_off_or_missing_are_one_line_that_names_the_part(
    tmp_path: Path, part: str
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(FOLDER, folder)
    (file,) = (folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=rf"teacher\.path=.*{part}/ can't be loaded") as caught:
        load_pipeline(str(folder))
    assert "\n" not in str(caught.value)
    file.unlink()
    with pytest.raises(ConfigError, match=rf"teacher\.path=.*{part}/ can't be loaded"):
        load_pipeline(str(folder))


def test_unknown_prediction_type_and_missing_folder_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(FOLDER, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "noise"}))
    with pytest.raises(ConfigError, match=r"teacher\.path=.*'noise'.*teacher\.prediction"):
        load_pipeline(str(folder))
    with pytest.raises(ConfigError, match=r"teacher\.path='/nowhere/at/all'"):
        load_pipeline("/nowhere/at/all")
