"""Class-conditional pixel teachers: folders of our own, NVIDIA's pickles, and full-size ones with random weights.

A folder holds `edm.json`, the fields of `EDMNetConfig` and perhaps an entry "extra" that nobody here reads, and
`model.safetensors`, the weights by `EDMNet`'s names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raydistill.config import from_dict, to_dict
from raydistill.errors import CheckpointError, ConfigError, DataError
from raydistill.models.denoiser import Cond
from raydistill.models.edm_net import EDMDenoiser, EDMNetConfig
from raydistill.models.edm_pickle import load_edm_pickle
from raydistill.models.pipeline import Pipeline, weights_fingerprint

CONFIG_FILE = "edm.json"
WEIGHTS_FILE = "model.safetensors"
RANDOM_TEACHERS = {
    "random:edm-cifar10": EDMNetConfig.cifar10,
    "random:edm-imagenet64": EDMNetConfig.imagenet64,
}
"""The published shapes with weights drawn from seed 0, for measuring; nothing is downloaded."""


class EDMPipeline(Pipeline):
    """An EDM denoiser of pixels: samples are images, a caption is the number of a class ("7").

    An unconditional network has one class, 0. There is no null condition: EDM's networks were trained without one.
    """

    denoiser: EDMDenoiser
    stored_encoded = False

    def __init__(self, denoiser: EDMDenoiser):
        self.denoiser = denoiser
        self.latent_shape = denoiser.sample_shape
        self.cond_shapes: dict[str, tuple[int, ...]] = {"label": ()}
        """Of one sample's conditions."""
        # noise levels and scale of the data are no weights, and change every answer
        settings = json.dumps(to_dict(denoiser.config), sort_keys=True)
        whole = f"{weights_fingerprint([denoiser.network])} {settings}"
        self.fingerprint = hashlib.sha256(whole.encode()).hexdigest()

    @property
    def image_size(self) -> int:
        return self.latent_shape[1]

    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> the same, or [B, 1, H, W], the mean over colours, for a grey network."""
        return images.mean(dim=1, keepdim=True) if self.latent_shape[0] == 1 else images

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat(1, 3, 1, 1) if self.latent_shape[0] == 1 else latents

    def encode_text(self, captions: Sequence[str]) -> Cond:
        """`label` [B] float32. Raises DataError for a caption that is not a class's number."""
        last = max(self.denoiser.config.label_dim, 1) - 1
        for caption in captions:
            if not re.fullmatch("[0-9]{1,9}", caption) or int(caption) > last:
                raise DataError(
                    f"the caption {caption!r} is no class number: the teacher's classes are 0 to {last} "
                    "(data.shards, or the prompt)"
                )
        device = next(self.denoiser.parameters()).device
        return Cond({"label": torch.tensor([float(caption) for caption in captions], device=device)})

    def null_cond(self, batch_size: int) -> None:
        return None

    def to(self, device: torch.device | str) -> EDMPipeline:
        self.denoiser.to(device)
        return self


def is_edm(path: str) -> bool:
    """Whether teacher.path means one of these, rather than a diffusers pipeline."""
    return path.startswith("random:edm-") or path.endswith(".pkl") or (Path(path) / CONFIG_FILE).is_file()


def load_edm_pipeline(path: str) -> EDMPipeline:
    """The pipeline of a folder, of a network-snapshot-*.pkl or of a name in `RANDOM_TEACHERS`: fp32 and frozen.

    Raises ConfigError naming teacher.path for one that can't be read or is not supported.
    """
    if path.startswith("random:"):
        denoiser = EDMDenoiser.random(_random_config(path), seed=0)
    else:
        if path.endswith(".pkl"):
            config, weights = load_edm_pickle(path)
        else:
            config = _folder_config(path)
            try:
                weights = load_file(Path(path) / WEIGHTS_FILE)
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"teacher.path={path!r}: {WEIGHTS_FILE} can't be read ({error})") from None
        try:
            denoiser = EDMDenoiser.from_weights(config, weights)
        except ConfigError as error:
            raise ConfigError(f"teacher.path={path!r}: {error}") from None
    denoiser.float().eval().requires_grad_(False)
    return EDMPipeline(denoiser)


def edm_on_meta(path: str) -> tuple[EDMDenoiser, dict[str, tuple[int, ...]]]:
    """The denoiser without weights, and the shapes of one sample's conditions. Raises as `load_edm_pipeline`."""
    if path.startswith("random:"):
        config = _random_config(path)
    elif path.endswith(".pkl"):
        config, _ = load_edm_pickle(path)
    else:
        config = _folder_config(path)
    return EDMDenoiser.on_meta(config), {"label": ()}


def save_edm(
    folder: Path, config: EDMNetConfig, weights: Mapping[str, Tensor], extra: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder that `load_edm_pipeline` reads.

    weights: of an `EDMNet` or an `EDMDenoiser`. extra: what else is to be known of them, JSON-able.

    Raises CheckpointError if the folder can't be written.
    """
    prefix = "net."  # of EDMDenoiser's only submodule
    plain = {
        name.removeprefix(prefix): tensor.detach().cpu().contiguous() for name, tensor in weights.items()
    }
    values = to_dict(config) | ({"extra": dict(extra)} if extra else {})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        described = folder / CONFIG_FILE
        described.write_text(json.dumps(values, indent=2) + "\n")
        save_file(plain, folder / WEIGHTS_FILE)
        # safetensors leaves them to their owner alone
        (folder / WEIGHTS_FILE).chmod(described.stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't write the network's folder {folder}: {error}") from error
    return folder


def _random_config(path: str) -> EDMNetConfig:
    if path not in RANDOM_TEACHERS:
        raise ConfigError(f"teacher.path={path!r} is not one of {', '.join(RANDOM_TEACHERS)}")
    return RANDOM_TEACHERS[path]()


def _folder_config(path: str) -> EDMNetConfig:
    try:
        values = json.loads((Path(path) / CONFIG_FILE).read_text())
    except OSError as error:
        raise ConfigError(f"teacher.path={path!r}: {CONFIG_FILE} can't be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"teacher.path={path!r}: {CONFIG_FILE} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"teacher.path={path!r}: {CONFIG_FILE} must hold the fields of a network's configuration"
        )
    values.pop("extra", None)
    try:
        template: Any = EDMNetConfig
        config: EDMNetConfig = from_dict(template, values)
        return config
    except ConfigError as error:
        raise ConfigError(f"teacher.path={path!r}: {CONFIG_FILE}: {error}") from None
