"""How well does an image fit its caption? The cosine of a CLIP model, as DMD2 and GigaGAN measure it.

Images come cropped to the short edge and resampled to 256 pixels (Lanczos), CLIP's own preparation follows; captions
get the prefix "A photo depicts " (arXiv:2104.08718, DMD2's coco_evaluator.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from raydistill.errors import ConfigError
from raydistill.models.diffusers_hub import import_transformers

PREFIX = "A photo depicts "
WEIGHTS = "model.safetensors"


def require_clip(folder: str | Path) -> None:
    """Raise ConfigError unless the folder holds a CLIP model, its weights as safetensors."""
    # the second of a pair is its name since transformers 5
    wanted = (("config.json",), (WEIGHTS,), ("preprocessor_config.json", "processor_config.json"))
    if missing := [
        names[0] for names in wanted if not any((Path(folder) / name).is_file() for name in names)
    ]:
        raise ConfigError(
            f"evaluator.clip={folder} lacks {', '.join(missing)}: it must be the folder of a transformers CLIPModel "
            "with its processor, for DMD2's score laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
        )


class ClipScore:
    """A frozen CLIP model."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu"):
        """Raises ConfigError for a folder that holds no CLIP model; only safetensors are read."""
        require_clip(folder)
        transformers = import_transformers()
        try:
            model = transformers.CLIPModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True
            )
            self._processor: Any = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"evaluator.clip={folder} can't be read as a CLIP model: {why}") from error
        self._model: Any = model.float().eval().requires_grad_(False).to(device)
        self._device = device
        with (Path(folder) / WEIGHTS).open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.name = f"{model.config.architectures[0]} after crop and Lanczos to 256, prefix {PREFIX!r}"

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Cosines [B] float32 of images and their captions."""
        inputs = self._processor(
            text=[PREFIX + caption for caption in captions],
            images=list(images),
            return_tensors="pt",
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
        ).to(self._device)
        answer = self._model(**inputs)
        cosines: Tensor = torch.nn.functional.cosine_similarity(
            answer.image_embeds, answer.text_embeds, dim=1
        )
        return cosines
