"""What a run knows of its teacher besides the network: how images, latents and conditions become one another."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from raydistill.models.denoiser import Cond, Denoiser


class Pipeline(ABC):
    """A loaded teacher: denoiser, codec, conditions. A class-conditional model's caption is its label's number."""

    denoiser: Denoiser
    fingerprint: str
    """sha256 over all weights."""
    latent_shape: tuple[int, int, int]
    """Of one sample as the denoiser sees it."""
    stored_encoded: bool = True
    """Whether shards keep latents and text embeddings: worth it where networks make them."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Edge of the square images in pixels."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> samples [B, *latent_shape]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Samples [B, *latent_shape] -> images [B, 3, H, W] in about [-1, 1], not clamped."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Cond:
        """The conditions that the captions stand for. Raises DataError for one that stands for none."""

    @abstractmethod
    def null_cond(self, batch_size: int) -> Cond | None:
        """The unconditional half of guidance; None where the network has none."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """Move all networks."""

    def copy_denoiser(self, dtype: str) -> Denoiser:
        """A trainable copy with fp32 weights of its own, computing in `dtype` ("fp32" or "bf16")."""
        return trainable(copy.deepcopy(self.denoiser), dtype)


def trainable(denoiser: Denoiser, dtype: str) -> Denoiser:
    """This very denoiser with fp32 weights, ready to be trained, computing in `dtype`."""
    for module in denoiser.network.float().modules():
        if isinstance(module, nn.Dropout):
            # it would draw from torch's global generator, and the teacher has none at inference
            module.p = 0.0
    denoiser.dtype = dtype
    return denoiser.requires_grad_(True)


def weights_fingerprint(modules: Sequence[nn.Module]) -> str:
    """sha256 over the names and bytes of all weights."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            raw = tensor.detach().cpu().contiguous()
            digest.update(raw.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
