"""SD1.5 and SDXL: published shapes without a download, the shipped SDXL-shaped miniature, exports of both kinds."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raydistill.diffusion.samplers import few_step
from raydistill.errors import ConfigError
from raydistill.models.diffusers_export import (
    SINGLE_FILE,
    export_pipeline,
    require_pushable,
    write_single_file,
)
from raydistill.models.diffusers_hub import TextToImage, import_diffusers, load_pipeline
from raydistill.models.random_sd import (
    RandomSDPipeline,
    is_random_sd,
    random_sd_on_meta,
    random_sd_parts,
)
from raydistill.runtime.settings import BUILTIN_TEACHERS

ROOT = Path(__file__).resolve().parents[2]
MINI = str(BUILTIN_TEACHERS["builtin:scenes-xl"])
PROMPTS = ["a red circle above a blue square", "a green ring"]


@pytest.mark.parametrize(
    ("path", "counts", "conditions", "features"),
    [
        (
            "random:sd15",
            {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
            {"text": (77, 768)},
            (1280, 8, 8),
        ),
        (
            "random:sdxl",
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
            {"text": (77, 2048), "pooled": (1280,), "time_ids": (6,)},
            (1280, 32, 32),
        ),
    ],
)
def test_random_teachers_have_the_published_numbers_of_parameters(
    path: str, counts: dict[str, int], conditions: dict[str, tuple[int, ...]], features: tuple[int, ...]
) -> None:
    parts = random_sd_parts(path)
    assert {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()} == counts
    assert all(p.is_meta for part in parts.values() for p in part.parameters())
    denoiser, shapes = random_sd_on_meta(path)
    assert shapes == conditions
    assert denoiser.feature_shape == features


def test_a_random_teachers_conditions_follow_from_the_captions() -> None:
    xl = RandomSDPipeline("random:sdxl:256", weights="none")
    assert xl.image_size == 256
    cond = xl.encode_text(["a cat", "a dog", "a cat"]).tensors
    assert torch.equal(cond["text"][0], cond["text"][2])
    assert not torch.equal(cond["text"][0], cond["text"][1])
    assert cond["time_ids"].tolist() == [[256, 256, 0, 0, 256, 256]] * 3
    null = xl.null_cond(2).tensors
    assert not null["text"].any()
    assert not null["pooled"].any()
    assert torch.equal(null["time_ids"], cond["time_ids"][:2])
    sd = RandomSDPipeline("random:sd15", weights="none")
    assert sd.null_cond(2).tensors["text"].any()  # SD1.5's is the empty prompt
    assert sd.fingerprint != RandomSDPipeline("random:sd15:128", weights="none").fingerprint


def test_a_random_teachers_images_may_be_smaller_and_wrong_names_are_refused() -> None:
    assert random_sd_on_meta("random:sd15:128")[0].sample_shape == (4, 16, 16)
    assert random_sd_on_meta("random:sdxl:256")[0].feature_shape == (1280, 8, 8)
    assert not is_random_sd("random:edm-cifar10")
    for path in ("random:sd15:100", "random:sdxl:", "random:sdxl:0", "random:sd15-x", "random:sd3"):
        with pytest.raises(ConfigError, match=rf"teacher\.path='{path}'"):
            random_sd_on_meta(path)


@pytest.fixture(scope="module")
def mini() -> TextToImage:
    return load_pipeline(MINI)


def test_the_shipped_miniature_is_conditioned_as_sdxl_is(mini: TextToImage) -> None:
    cond = mini.encode_text(PROMPTS).tensors
    assert {name: tuple(tensor.shape) for name, tensor in cond.items()} == {
        "text": (2, 20, 96), "pooled": (2, 24), "time_ids": (2, 6),
    }  # fmt: skip
    null = mini.null_cond(2).tensors
    assert not null["text"].any()
    assert not null["pooled"].any()
    assert torch.equal(null["time_ids"], cond["time_ids"])
    # each of the three reaches the answer
    x_t, t = torch.randn(2, *mini.latent_shape), torch.tensor([100.0, 900.0])
    with torch.no_grad():
        answer = mini.denoiser(x_t, t, mini.encode_text(PROMPTS))
        for name in cond:
            other = replace(mini.encode_text(PROMPTS), tensors=cond | {name: cond[name] + 1})
            assert not torch.equal(answer, mini.denoiser(x_t, t, other)), name


@pytest.mark.parametrize("timesteps", [(399,), (999, 749, 499, 249)], ids=str)
def test_an_exported_sdxl_student_samples_in_plain_diffusers_as_in_training(
    mini: TextToImage, tmp_path: Path, timesteps: tuple[int, ...]
) -> None:
    generator = mini.copy_denoiser("fp32").requires_grad_(False)
    for name, weight in generator.named_parameters():
        if "conv_out" in name:
            weight.mul_(1.05)  # so that the teacher's own weights can't pass for the export
    out = export_pipeline(MINI, generator.state_dict(), tmp_path / "export", timesteps=timesteps)
    assert [file.name for file in (out / "unet").glob("*.safetensors")] == [Path(SINGLE_FILE).name]
    loaded = import_diffusers().DiffusionPipeline.from_pretrained(out)
    assert type(loaded).__name__ == "StableDiffusionXLPipeline"
    loaded.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *mini.latent_shape, generator=torch.Generator().manual_seed(1))
    theirs = loaded(
        PROMPTS, num_inference_steps=len(timesteps), guidance_scale=1.0, latents=noise,
        generator=torch.Generator().manual_seed(2), output_type="pt",
    ).images  # fmt: skip

    cond, fresh = mini.encode_text(PROMPTS), torch.Generator().manual_seed(2)
    with torch.no_grad():
        latents = few_step(
            lambda x_t, t: generator(x_t, t, cond),
            generator.schedule,
            [float(t) for t in timesteps],
            noise,
            noise=lambda step: torch.randn(noise.shape, generator=fresh),
        )
    ours = (mini.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert float((theirs - ours).abs().max()) < 2e-4  # of 1


def test_a_single_file_holds_the_generator_by_diffusers_names(mini: TextToImage, tmp_path: Path) -> None:
    from safetensors import safe_open

    weights: dict[str, Tensor] = mini.denoiser.state_dict()
    file = write_single_file(weights, tmp_path / "new" / "one.safetensors", {"timesteps": "399"})
    unet = import_diffusers().UNet2DConditionModel
    fresh = unet.from_config(unet.load_config(Path(MINI) / "unet"))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"timesteps": "399"}
        fresh.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, weights[f"unet.{name}"]), name


def test_pushing_without_a_token_or_a_hub_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"--push-to someone/model needs a token .*HF_TOKEN"):
        require_pushable("someone/model")
    with pytest.raises(ConfigError, match=r"--push-to 'model' must be of the form owner/name"):
        require_pushable("model")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    closed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\nfrom pathlib import Path\nfrom raydistill.models.diffusers_export import push_folder\n"
            "push_folder(Path(sys.argv[1]), 'someone/model')",
            str(tmp_path),
        ],
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "--push-to someone/model: the Hub could not take it" in closed.stderr.splitlines()[-1]
    assert "hf_secret" not in closed.stderr


@pytest.mark.parametrize(
    ("job", "preset", "teacher"),
    [("dmd2_coco", "sd15_gan", "random:sd15"), ("dmd2_sdxl", "one_step", "random:sdxl")],
)
@pytest.mark.parametrize("as_published", [True, False])
def test_papers_presets_are_planned_without_a_download(
    job: str, preset: str, teacher: str, as_published: bool, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--preset", preset, "--dry-run"]
        + [f"teacher.path={teacher}"] * (not as_published),
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = done.stdout.split("forward equivalents")[0]
    rows = {line.split()[0]: line.split() for line in before.splitlines() if line.strip()}
    gib = {"random:sd15": 3.2020, "random:sdxl": 9.5645}[teacher]
    assert rows["generator"][1] == f"{gib:.4f}"


@pytest.mark.parametrize(
    ("hub_id", "arguments"),
    [
        ("someone/their-model", ("--dry-run", "teacher.path=someone/their-model")),
        ("stabilityai/stable-diffusion-xl-base-1.0", ("evaluator.enabled=false", "placement.session=inline")),
    ],
)
def test_a_hub_id_without_a_network_is_one_line_that_names_teacher_path(
    tmp_path: Path, hub_id: str, arguments: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "dmd2_sdxl.py"), "--preset", "paper", *arguments],
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"teacher.path={hub_id!r}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
