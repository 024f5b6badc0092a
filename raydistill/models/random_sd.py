"""Stable Diffusion 1.5 and XL in their published shapes with random weights: for plans, dry runs and measuring.

Settings are those of the published configuration files (runwayml/stable-diffusion-v1-5 and
stabilityai/stable-diffusion-xl-base-1.0: unet, vae, text_encoder, text_encoder_2, scheduler). Nothing is downloaded,
and nothing is allocated before it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydistill.diffusion.random import Draws
from raydistill.diffusion.schedules import schedule_from_diffusers
from raydistill.errors import ConfigError
from raydistill.models.denoiser import Cond
from raydistill.models.diffusers_hub import UNetDenoiser, import_diffusers, import_transformers
from raydistill.models.pipeline import Pipeline

_VAE_FACTOR = 8
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
_UNET = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32}
_CLIP_L = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768, "max_position_embeddings": 77,
}  # fmt: skip
_CLIP_BIGG = {
    "vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "max_position_embeddings": 77, "hidden_act": "gelu",
}  # fmt: skip


@dataclass(frozen=True)
class _Shape:
    image_size: int
    unet: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], ...]
    cond_shapes: Mapping[str, tuple[int, ...]]
    scaling_factor: float
    zero_null_prompt: bool
    smallest: int
    """Edge in pixels of the smallest image, of which others are multiples: 8 by the UNet's own halvings."""


_SHAPES = {
    "random:sd15": _Shape(
        image_size=512,
        unet=_UNET
        | {
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        text_encoders=(_CLIP_L,),
        cond_shapes={"text": (77, 768)},
        scaling_factor=0.18215,
        zero_null_prompt=False,
        smallest=64,
    ),
    "random:sdxl": _Shape(
        image_size=1024,
        unet=_UNET
        | {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        text_encoders=(_CLIP_L, _CLIP_BIGG),
        cond_shapes={"text": (77, 2048), "pooled": (1280,), "time_ids": (6,)},
        scaling_factor=0.13025,
        zero_null_prompt=True,
        smallest=32,
    ),
}


PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "random:sd15",
    "runwayml/stable-diffusion-v1-5": "random:sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "random:sdxl",
}
"""Hub ids whose shapes and schedule need no download."""


def is_random_sd(path: str) -> bool:
    """Whether teacher.path means one of these."""
    return path.startswith("random:") and not path.startswith("random:edm-")


class RandomSDPipeline(Pipeline):
    """The UNet in full; captions become normal embeddings keyed by their text, so that no tokenizer is needed.

    The autoencoder has random weights as well and is built when the first image is encoded or decoded.
    """

    denoiser: UNetDenoiser

    def __init__(self, path: str, *, weights: Literal["random", "none"] = "random"):
        """weights: none leaves the UNet on the meta device, where only its shapes are wanted.

        Raises ConfigError for a name or an image size that is none.
        """
        shape, size = _parse(path)
        self._shape, self._size = shape, size
        self._vae: Any = None
        self._device: torch.device | str = "cpu"
        self.denoiser = _denoiser(shape, size, "cpu" if weights == "random" else "meta")
        self.latent_shape = self.denoiser.sample_shape
        self.fingerprint = hashlib.sha256(f"{path} seed 0".encode()).hexdigest()

    @property
    def image_size(self) -> int:
        return self._size

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        latents = self._codec().encode(images).latent_dist.mode().float()
        return latents * self._shape.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        image: Tensor = self._codec().decode(latents / self._shape.scaling_factor, return_dict=False)[0]
        return image.float()

    def encode_text(self, captions: Sequence[str]) -> Cond:
        keys = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") for text in captions]
        cond = {
            name: Draws(0).normal(f"random/{name}", 0, keys, size).to(self._device)
            for name, size in self._shape.cond_shapes.items()
        }
        if "time_ids" in cond:
            edge = float(self._size)
            one = torch.tensor([[edge, edge, 0.0, 0.0, edge, edge]], device=self._device)
            cond["time_ids"] = one.expand(len(keys), -1)
        return Cond(cond)

    def null_cond(self, batch_size: int) -> Cond:
        null = dict(self.encode_text([""]).tensors)
        if self._shape.zero_null_prompt:
            null |= {name: torch.zeros_like(null[name]) for name in ("text", "pooled")}
        return Cond(null).expand(batch_size)

    def to(self, device: torch.device | str) -> RandomSDPipeline:
        self._device = device
        self.denoiser.to(device)
        if self._vae is not None:
            self._vae.to(device)
        return self

    def _codec(self) -> Any:
        if self._vae is None:
            vae = _vae(self._shape).to_empty(device="cpu")
            _fill(vae, torch.Generator().manual_seed(1))
            self._vae = vae.eval().requires_grad_(False).to(self._device)
        return self._vae


def random_sd_on_meta(path: str) -> tuple[UNetDenoiser, dict[str, tuple[int, ...]]]:
    """The denoiser without weights, and the shapes of one sample's conditions. Raises as `RandomSDPipeline`."""
    shape, size = _parse(path)
    return _denoiser(shape, size, "meta"), dict(shape.cond_shapes)


def random_sd_parts(path: str) -> dict[str, nn.Module]:
    """All networks of the pipeline on the meta device: unet, vae, text_encoder and, for SDXL, text_encoder_2."""
    shape, size = _parse(path)
    transformers = import_transformers()
    classes = (
        transformers.CLIPTextModel,
        transformers.CLIPTextModelWithProjection,
    )
    parts = {"unet": _denoiser(shape, size, "meta").unet, "vae": _vae(shape)}
    with torch.device("meta"):
        for name, kind, settings in zip(
            ("text_encoder", "text_encoder_2"), classes, shape.text_encoders, strict=False
        ):
            parts[name] = kind(transformers.CLIPTextConfig(**settings))
    return parts


def _parse(path: str) -> tuple[_Shape, int]:
    name, _, edge = path.removeprefix("random:").partition(":")
    shape = _SHAPES.get(f"random:{name}")
    if shape is None:
        raise ConfigError(
            f"teacher.path={path!r} is not one of {', '.join(_SHAPES)}, or one with :EDGE in pixels"
        )
    if not edge and path.endswith(":"):
        edge = "none"
    if edge and (not edge.isdecimal() or int(edge) < 1 or int(edge) % shape.smallest):
        raise ConfigError(
            f"teacher.path={path!r}: the edge of its images must be a multiple of {shape.smallest} pixels, as in "
            f"random:{name}:{4 * shape.smallest}"
        )
    return shape, int(edge) if edge else shape.image_size


def _denoiser(shape: _Shape, size: int, device: str) -> UNetDenoiser:
    with torch.device("meta"):
        unet = import_diffusers().UNet2DConditionModel(**shape.unet, sample_size=size // _VAE_FACTOR)
    if device != "meta":
        unet.to_empty(device=device)
        _fill(unet, torch.Generator().manual_seed(0))
    schedule, prediction = schedule_from_diffusers(_SCHEDULER)
    return UNetDenoiser(unet.eval().requires_grad_(False), schedule, prediction)


def _vae(shape: _Shape) -> Any:
    with torch.device("meta"):
        return import_diffusers().AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=shape.image_size,
            scaling_factor=shape.scaling_factor,
        )


@torch.no_grad()
def _fill(module: nn.Module, generator: torch.Generator) -> None:
    """Norms as the identity, biases zero, matrices normal with variance 1/inputs: answers stay finite."""
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
