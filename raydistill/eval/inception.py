"""The detector behind FID: Inception as TorchScript, loaded only if its bytes are the ones that are asked for.

A TorchScript file holds code, which runs when the network is called, and is read by an unpickler of torch's; so the
file's SHA-256 is compared before torch sees it, and torch is given the very bytes that were hashed.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydistill.errors import ConfigError, DataError
from raydistill.eval.resize import DETECTOR_SIZE

FILE_NAME = "inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""Of NVIDIA's file, the one that clean-fid, EDM and StyleGAN2-ADA take."""
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE_NAME}"
NUM_FEATURES = 2048


class Inception:
    """The frozen network: bytes of images in, 2048 pooled features out."""

    def __init__(self, file: str | Path, sha256: str | None = None):
        """sha256: of the file, where it is to be another one than NVIDIA's. Raises as `verified` does."""
        data = verified(file, sha256)
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._net: Any = torch.jit.load(io.BytesIO(data), map_location="cpu").eval()
        except RuntimeError as error:
            raise DataError(
                f"evaluator.detector_file={file} is no TorchScript module: {_first(error)}"
            ) from error
        if not hasattr(self._net, "layers"):
            raise DataError(
                f"evaluator.detector_file={file} has no part `layers`, as {FILE_NAME} has; it is another network"
            )

    def to(self, device: torch.device | str) -> Inception:
        self._net.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, 2048] float32, on the images' device.

        Args:
            images: uint8 [B, 3, H, W], which the network resizes as TensorFlow did, or float32 [B, 3, 299, 299] from 0
                to 255, resized already; the two conventions of clean-fid's legacy_tensorflow and clean modes.

        Raises DataError for images or features of another shape.
        """
        if images.dtype == torch.uint8:
            features = self._net(images, return_features=True)
        elif images.shape[1:] == (3, DETECTOR_SIZE, DETECTOR_SIZE):
            features = self._net.layers.forward((images - 128) / 128)
        else:
            raise DataError(f"the detector takes images of {DETECTOR_SIZE} pixels, got {list(images.shape)}")
        features = features.flatten(1)
        if features.shape != (len(images), NUM_FEATURES):
            raise DataError(
                f"the detector gave features {list(features.shape)}, {FILE_NAME} gives [{len(images)}, {NUM_FEATURES}] "
                "(evaluator.detector_file)"
            )
        return features.float()


def verified(file: str | Path, sha256: str | None = None) -> bytes:
    """The file's bytes, if their SHA-256 is `sha256` (None: that of NVIDIA's file); nothing of it is run.

    Raises ConfigError if it is not there, or has another hash.
    """
    wanted = SHA256 if sha256 is None else sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", wanted):
        raise ConfigError(f"evaluator.detector_sha256={sha256!r} must be 64 hexadecimal digits")
    try:
        data = Path(file).read_bytes()
    except OSError as error:
        why = "is not there" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})"
        raise ConfigError(
            f"FID needs the detector {FILE_NAME} (sha256 {wanted}), and {file} {why}: get it from {URL}, put it there "
            "or set evaluator.detector_file; without it evaluator.protocol=toy gives toyfid of the shipped "
            "miniatures, and evaluator.enabled=false none"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != wanted:
        raise ConfigError(
            f"evaluator.detector_file={file} has sha256 {found}, not {wanted}: it is not loaded; get the right file, "
            "or set evaluator.detector_sha256 if you trust this one"
        )
    return data


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
