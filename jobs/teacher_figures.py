"""Figures of the embedded teacher: what `jobs/train_teacher.py` prints and ships beside the weights.

Samples come from plain DDIM (arXiv:2010.02502) over the pipeline's own modules, apart from the package's
samplers, so that the shipped figures are a check on these.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from raydistill.eval.features import load_scene_net, scene_net_sha256
from raydistill.eval.frechet import FeatureStatistics, frechet_distance
from raydistill.eval.prompt_accuracy import named_objects, prompt_matches
from raydistill.eval.protocol import to_uint8


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def to_floats(images: Tensor) -> Tensor:
    """uint8 images as the autoencoder wants them, float in [-1, 1]."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: Any, images: Tensor) -> Tensor:
    """Scaled latents [N, 4, 8, 8] (the posterior's mode) of uint8 images [N, 3, 32, 32]."""
    scale = vae.config.scaling_factor
    return torch.cat(
        [vae.encode(to_floats(part)).latent_dist.mode() * scale for part in batches(images, 256)]
    )


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images uint8 [N, 3, 32, 32] of scaled latents."""
    scale = vae.config.scaling_factor
    return torch.cat([to_uint8(vae.decode(part / scale).sample) for part in batches(latents, 128)])


def batches(values: Tensor, size: int) -> list[Tensor]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def tokenise(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids [N, length], padded to the tokenizer's length."""
    length = tokenizer.model_max_length
    return tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def toyfid(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of SceneNet features [N, 64]."""
    statistics = FeatureStatistics(), FeatureStatistics()
    statistics[0].update(a)
    statistics[1].update(b)
    return round(frechet_distance(*statistics), 4)


@torch.no_grad()
def reconstruction_figures(vae: Any, images: Tensor) -> dict[str, float]:
    """PSNR over images, share in which SceneNet still sees the same objects, toyfid to the originals."""
    net = load_scene_net()
    rebuilt = decode(vae, encode(vae, images))
    mse = (to_floats(images) - to_floats(rebuilt)).square().mean(dim=(1, 2, 3))
    same = (net.objects(images) > 0) == (net.objects(rebuilt) > 0)
    return {
        "psnr_db": round((10 * torch.log10(4 / mse)).mean().item(), 2),
        "same_objects": round(same.all(dim=(1, 2)).float().mean().item(), 4),
        "toyfid": toyfid(net.features(images), net.features(rebuilt)),
    }


class Judge:
    """toyfid and prompt accuracy of a pipeline's samples for the captions of the validation split.

    Image i of the split is represented by its caption number i % 5.
    """

    def __init__(self, images: Tensor, captions: list[list[str]], seed: int) -> None:
        self.net = load_scene_net()
        self.captions = [five[index % len(five)] for index, five in enumerate(captions)]
        with torch.no_grad():
            self.reference = self.net.features(images)
        self.seed = seed

    @torch.no_grad()
    def __call__(
        self,
        pipeline: Any,
        num: int,
        steps: int,
        guidance: float,
        spacing: str = "leading",
        grid: Path | None = None,
    ) -> dict[str, float]:
        """Figures of `num` samples; the first 64 are drawn into `grid`, their captions go beside it."""
        captions = self.captions[:num]
        images = decode(pipeline.vae, self._sample(pipeline, captions, steps, guidance, spacing))
        if grid is not None:
            save_grid(images[:64], grid)
            grid.with_suffix(".txt").write_text("\n".join(captions[:64]) + "\n")
        features, objects = self.net(images)
        right = prompt_matches(objects, captions).float()
        pairs = torch.tensor([len(named_objects(caption)) for caption in captions])
        return {
            "prompt_accuracy": round(right.mean().item(), 4),
            "prompt_accuracy_one_object": round(right[pairs == 1].mean().item(), 4),
            "prompt_accuracy_two_objects": round(right[pairs == 2].mean().item(), 4),
            "toyfid": toyfid(features, self.reference),
        }

    def _sample(
        self, pipeline: Any, captions: list[str], steps: int, guidance: float, spacing: str
    ) -> Tensor:
        text = self._embed(pipeline, captions)
        empty = self._embed(pipeline, [""])
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        noise = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(self.seed + 1))
        latents = []
        for x, cond in zip(batches(noise, 64), batches(text, 64), strict=True):
            both = torch.cat([cond, empty.expand(len(cond), -1, -1)])
            for t in scheduler.timesteps:
                if guidance == 1:
                    eps = pipeline.unet(x, t, cond).sample
                else:
                    with_text, without = pipeline.unet(torch.cat([x, x]), t, both).sample.chunk(2)
                    eps = without + guidance * (with_text - without)
                x = scheduler.step(eps, t, x).prev_sample
            latents.append(x)
        return torch.cat(latents)

    def _embed(self, pipeline: Any, captions: list[str]) -> Tensor:
        ids = batches(tokenise(pipeline.tokenizer, captions), 256)
        return torch.cat([pipeline.text_encoder(part).last_hidden_state for part in ids])


def save_grid(images: Tensor, file: Path, columns: int = 8, zoom: int = 3) -> None:
    """A bare contact sheet: 64 captions would not be legible above 64 images of 32 pixels."""
    rows = [torch.cat(list(row), dim=2) for row in batches(images, columns) if len(row) == columns]
    pixels = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file)


def sampling_figures(
    judge: Judge, pipeline: Any, num: int, steps: int, guidance_scales: list[float], grids: Path
) -> dict[str, Any]:
    """toyfid and prompt accuracy per guidance scale, of the first step alone, and of real images among
    themselves."""
    figures: dict[str, Any] = {"samples": num, "reference_images": len(judge.reference)}
    for guidance in guidance_scales:
        name = f"ddim_{steps}_guidance_{guidance:g}"
        figures[name] = judge(pipeline, num, steps, guidance, grid=grids / f"final_{name}.png")
        print(name, figures[name], flush=True)
    figures["one_step_guidance_1"] = judge(pipeline, num, 1, 1.0, spacing="trailing")
    figures["toyfid_between_val_halves"] = toyfid(judge.reference[::2], judge.reference[1::2])
    return figures


def file_figures(folder: Path) -> dict[str, Any]:
    """Which files the figures belong to."""
    weights = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*.safetensors"))}
    return {
        "scene_net_sha256": scene_net_sha256(),
        "sha256": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in weights.items()},
        "bytes": sum(file.stat().st_size for file in weights.values()),
    }
