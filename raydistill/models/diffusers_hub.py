"""The door to diffusers and transformers: SD-family pipelines in, `TextToImage` out (back: `diffusers_export`).

A pipeline folder (or hub id) holds a UNet2DConditionModel, an AutoencoderKL, one CLIP text encoder (SD) or two (SDXL)
with their tokenizers, and a scheduler whose configuration states the noise schedule and the prediction type.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raydistill.diffusion.parametrization import Prediction, to_x0
from raydistill.diffusion.schedules import NoiseSchedule, schedule_from_diffusers
from raydistill.errors import ConfigError
from raydistill.models.denoiser import DTYPES, Again, Cond, Denoiser
from raydistill.models.pipeline import Pipeline, weights_fingerprint
from raydistill.torchvision_ops import ensure_torchvision_importable

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel


@functools.cache
def import_diffusers() -> Any:
    """The library, quiet. Imported when it is first needed: five seconds that a driver or tracker need not wait."""
    ensure_torchvision_importable()
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


@functools.cache
def import_transformers() -> Any:
    """As `import_diffusers`."""
    ensure_torchvision_importable()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class UNetDenoiser(Denoiser):
    """A diffusers UNet as an x0 denoiser, whatever it predicts."""

    def __init__(
        self, unet: UNet2DConditionModel, schedule: NoiseSchedule, prediction: Prediction, dtype: str = "fp32"
    ):
        """dtype: what the network computes in; fp32 weights then run under autocast."""
        super().__init__()
        self.unet = unet
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.dtype = dtype

    @property
    def network(self) -> nn.Module:
        return self.unet

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its residual blocks, transformers and resamplers."""
        unet = self.unet
        lists = [
            part
            for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
            for part in block.children()
        ]
        return [layer for part in lists if isinstance(part, nn.ModuleList) for layer in part]

    @classmethod
    def import_libraries(cls) -> None:
        import_diffusers()

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        """Attention's projections, or also those that LCM-LoRA (arXiv:2311.05556) and DMD2's SDXL LoRA adapt."""
        attention = ("to_q", "to_k", "to_v", "to_out.0")
        blocks = ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
        convolutions = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")
        return {"attention": attention, "all": attention + blocks + convolutions}

    def checkpoint_activations(self, again: Again = lambda function: function) -> None:
        def run(module: nn.Module, *inputs: Any) -> Any:
            return checkpoint(again(module), *inputs, use_reentrant=False)

        self.unet.enable_gradient_checkpointing(run)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        with self._precision(x_t):
            output = self.unet(
                x_t.to(self._weights_dtype),
                t,
                encoder_hidden_states=cond.tensors["text"].to(self._weights_dtype),
                added_cond_kwargs=self._added(cond),
                return_dict=False,
            )[0]
        return to_x0(output.to(x_t.dtype), x_t, t, self.schedule, self.prediction)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        unet = self.unet
        with self._precision(x_t):
            sample = x_t.to(self._weights_dtype)
            text = cond.tensors["text"].to(self._weights_dtype)
            added = self._added(cond)
            emb = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=t))
            extra = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
            if extra is not None:
                emb = emb + extra
            text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
            sample = unet.conv_in(sample)
            for block in (*unet.down_blocks, unet.mid_block):
                if getattr(block, "has_cross_attention", False):
                    sample = block(sample, emb, encoder_hidden_states=text)
                else:
                    sample = block(sample, emb)
                if block is not unet.mid_block:
                    sample = sample[0]
        return sample

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        size = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), size, size

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        channels = self.unet.config.block_out_channels
        size = self.unet.config.sample_size // 2 ** (len(channels) - 1)
        return int(channels[-1]), size, size

    def _added(self, cond: Cond) -> dict[str, Tensor] | None:
        if self.unet.config.addition_embed_type != "text_time":
            return None
        return {
            "text_embeds": cond.tensors["pooled"].to(self._weights_dtype),
            "time_ids": cond.tensors["time_ids"].to(self._weights_dtype),
        }

    @property
    def _weights_dtype(self) -> torch.dtype:
        # diffusers' own `dtype` walks over all parameters: 5 % of an update of the embedded UNet
        return self.unet.conv_in.weight.dtype

    def _precision(self, x: Tensor) -> AbstractContextManager[None]:
        wanted = DTYPES[self.dtype]
        return nullcontext() if wanted == self._weights_dtype else torch.autocast(x.device.type, dtype=wanted)


class TextToImage(Pipeline):
    """A loaded text-to-image pipeline: denoiser, image codec, text encoder(s), null condition, fingerprint."""

    def __init__(
        self,
        denoiser: UNetDenoiser,
        vae: AutoencoderKL,
        tokenizers: Sequence[Any],
        text_encoders: Sequence[nn.Module],
        *,
        fingerprint: str,
        zero_null_prompt: bool,
    ):
        self.denoiser = denoiser
        self.vae = vae
        self.tokenizers = list(tokenizers)
        self.text_encoders = list(text_encoders)
        self.fingerprint = fingerprint
        self._zero_null_prompt = zero_null_prompt
        self._null: Cond | None = None
        self.latent_shape = denoiser.sample_shape

    @property
    def image_size(self) -> int:
        return self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> scaled latents [B, C, h, w] (the posterior's mode)."""
        latents = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] -> images [B, 3, H, W] in about [-1, 1], not clamped."""
        z = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Cond:
        """Captions -> `text` [B, L, D]; with SDXL's two encoders also `pooled` [B, P] and `time_ids` [B, 6]."""
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                list(captions),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids.to(next(encoder.parameters()).device)
            if len(self.text_encoders) == 1:
                return Cond({"text": encoder(ids)[0].float()})
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2].float())  # SDXL reads the last but one layer of both
            pooled = output[0].float()
        assert pooled is not None
        return Cond(
            {"text": torch.cat(hidden, dim=-1), "pooled": pooled, "time_ids": self._time_ids(len(captions))}
        )

    def null_cond(self, batch_size: int) -> Cond:
        """The unconditional half of guidance: the empty prompt (SD), zeros with the usual time ids (SDXL)."""
        if self._null is None:
            null = dict(self.encode_text([""]).tensors)
            if self._zero_null_prompt:
                null |= {name: torch.zeros_like(null[name]) for name in ("text", "pooled") if name in null}
            self._null = Cond(null)
        return self._null.expand(batch_size)

    def to(self, device: torch.device | str) -> TextToImage:
        for module in (self.denoiser, self.vae, *self.text_encoders):
            module.to(device)
        self._null = None
        return self

    def _time_ids(self, batch_size: int) -> Tensor:
        size = float(self.image_size)
        device = next(self.denoiser.parameters()).device
        return torch.tensor([[size, size, 0.0, 0.0, size, size]], device=device).expand(batch_size, 6)


def load_pipeline(path: str, *, prediction: str = "auto", revision: str | None = None) -> TextToImage:
    """Load an SD- or SDXL-shaped pipeline from a folder or a hub id: fp32, frozen and in evaluation mode.

    prediction: "auto" reads the scheduler's configuration. revision: of a hub id.

    Raises ConfigError naming `teacher.path` for a folder that is no such pipeline or lacks a part, and
    `teacher.prediction` for a prediction type that is not known.
    """
    folder = local_folder(path, revision)
    index = read_json(folder / "model_index.json", path)
    for part in ("unet", "vae", "scheduler", "tokenizer", "text_encoder"):
        if part not in index or not (folder / part).is_dir():
            raise ConfigError(
                f"teacher.path={path!r} has no {part}/ folder; needed: unet, vae, scheduler, tokenizer, text_encoder"
            )
    schedule, predicted = _schedule(path, scheduler_config(path, prediction=prediction, revision=revision))

    safely = {"use_safetensors": True}
    with _loading(path, "unet"):
        unet = import_diffusers().UNet2DConditionModel.from_pretrained(
            folder / "unet", torch_dtype=torch.float32, **safely
        )
    with _loading(path, "vae"):
        vae = import_diffusers().AutoencoderKL.from_pretrained(
            folder / "vae", torch_dtype=torch.float32, **safely
        )
    encoders: list[nn.Module] = []
    tokenizers = []
    for number in ("", "_2"):
        part = f"text_encoder{number}"
        if (folder / part).is_dir():
            with _loading(path, part):
                encoder_class = getattr(import_transformers(), index[part][1])
                encoders.append(encoder_class.from_pretrained(folder / part, dtype=torch.float32, **safely))
            with _loading(path, f"tokenizer{number}"):
                tokenizers.append(
                    import_transformers().CLIPTokenizer.from_pretrained(folder / f"tokenizer{number}")
                )
    for module in (unet, vae, *encoders):
        module.eval().requires_grad_(False)
    return TextToImage(
        UNetDenoiser(unet, schedule, predicted),
        vae,
        tokenizers,
        encoders,
        fingerprint=weights_fingerprint([unet, vae, *encoders]),
        zero_null_prompt=bool(index.get("force_zeros_for_empty_prompt", False)),
    )


def scheduler_config(path: str, *, prediction: str = "auto", revision: str | None = None) -> dict[str, Any]:
    """A pipeline's scheduler settings, with `prediction` for its own unless auto. Raises ConfigError if it has none."""
    folder = local_folder(path, revision, weights=False)
    config: dict[str, Any] = read_json(folder / "scheduler" / "scheduler_config.json", path)
    return config if prediction == "auto" else config | {"prediction_type": prediction}


def local_folder(path: str, revision: str | None, *, weights: bool = True) -> Path:
    """The folder that `teacher.path` means; a hub id's is downloaded, without weights only its settings.

    Raises ConfigError if there is none or the hub does not give it.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ConfigError(f"teacher.path={path!r} is not a folder (nor a hub id of the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.json", "*.txt", "*/*.json", "*/*.txt"] + ["*/*.safetensors"] * weights
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        if isinstance(error, RevisionNotFoundError):
            why = f"the hub has no teacher.revision={revision!r} of it"
        elif isinstance(error, RepositoryNotFoundError):
            why = "the hub has none of that name, or not for this HF_TOKEN"
        elif isinstance(error, LocalEntryNotFoundError):
            why = (
                "the hub can't be reached (network, HF_ENDPOINT, HF_HUB_OFFLINE): give a folder that holds it"
            )
        else:
            why = f"the hub could not serve it: {type(error).__name__}"
        raise ConfigError(f"teacher.path={path!r} is not a local folder, and {why}") from error


@contextmanager
def _loading(path: str, part: str) -> Iterator[None]:
    """A part that can't be loaded as an error that names the setting."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"teacher.path={path!r}: {part}/ can't be loaded: {reason}") from error


def _schedule(path: str, config: dict[str, Any]) -> tuple[NoiseSchedule, Prediction]:
    try:
        return schedule_from_diffusers(config)
    except ConfigError as error:
        raise ConfigError(
            f"teacher.path={path!r}: {error} (teacher.prediction overrides prediction_type)"
        ) from None


def read_json(file: Path, path: str) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(
            f"teacher.path={path!r} is no diffusers pipeline folder: {file.name} is missing in {file.parent.name}/"
        )
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"teacher.path={path!r}: {file.name} is not JSON ({error})") from error


def denoiser_on_meta(
    path: str, prediction: str = "auto", revision: str | None = None
) -> tuple[UNetDenoiser, dict[str, tuple[int, ...]]]:
    """The pipeline's denoiser without weights, and the shapes of one sample's conditions, from its JSON files alone.

    Raises ConfigError as `load_pipeline` does.
    """
    folder = local_folder(path, revision, weights=False)
    index = read_json(folder / "model_index.json", path)
    schedule, predicted = _schedule(path, scheduler_config(path, prediction=prediction, revision=revision))
    text = read_json(folder / "text_encoder" / "config.json", path)
    config = read_json(folder / "unet" / "config.json", path)
    with torch.device("meta"):
        unet = import_diffusers().UNet2DConditionModel.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {
        "text": (text.get("max_position_embeddings", 77), unet.config.cross_attention_dim)
    }
    if "text_encoder_2" in index:
        second = read_json(folder / "text_encoder_2" / "config.json", path)
        shapes |= {"pooled": (second["projection_dim"],), "time_ids": (6,)}
    return UNetDenoiser(unet, schedule, predicted), shapes


class PixelPipeline(Pipeline):
    """A denoiser of pixels with random weights, for benchmarks: no codec, conditions stand in for text."""

    def __init__(self, denoiser: UNetDenoiser, cond_shapes: dict[str, tuple[int, ...]]):
        self.denoiser = denoiser
        self.fingerprint = "random"
        self.latent_shape = denoiser.sample_shape
        self._cond_shapes = cond_shapes

    @property
    def image_size(self) -> int:
        return self.latent_shape[1]

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def encode_text(self, captions: Sequence[str]) -> Cond:
        return self.null_cond(len(captions))

    def null_cond(self, batch_size: int) -> Cond:
        return Cond({name: torch.zeros(batch_size, *shape) for name, shape in self._cond_shapes.items()})

    def to(self, device: torch.device | str) -> PixelPipeline:
        self.denoiser.to(device)
        return self


def random_pixel_pipeline(
    size: int, channels: Sequence[int], layers: int
) -> tuple[PixelPipeline, UNetDenoiser, dict[str, tuple[int, ...]]]:
    """A random-weight pixel UNet of EDM's proportions (attention in all but the first level), and its meta twin."""
    shapes: dict[str, tuple[int, ...]] = {"text": (1, 64)}
    levels = len(channels)
    settings: dict[str, Any] = {
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (levels - 1),
        "up_block_types": ("CrossAttnUpBlock2D",) * (levels - 1) + ("UpBlock2D",),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "norm_num_groups": min(32, channels[0] // 2),
    }
    schedule, prediction = schedule_from_diffusers(
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
        }
    )
    with torch.device("meta"):
        meta = import_diffusers().UNet2DConditionModel(**settings)
    unet = import_diffusers().UNet2DConditionModel(**settings).eval().requires_grad_(False)
    pipeline = PixelPipeline(UNetDenoiser(unet, schedule, prediction), shapes)
    return pipeline, UNetDenoiser(meta, schedule, prediction), shapes
