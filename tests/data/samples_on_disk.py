"""A small COCO-format folder, an encoder that is one, and shards made from both."""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

NUM_TOKENS, WIDTH = 5, 4


class PoolEncoder(nn.Module):
    """Average-pooled pixels as latents [3, 8, 8], hashed words looked up in a fixed table as text [5, 4]."""

    fingerprint = hashlib.sha256(b"pool encoder 1").hexdigest()

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.words = nn.Embedding(97, WIDTH)
        nn.init.normal_(self.words.weight, generator=torch.Generator().manual_seed(0))

    def encode_images(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 8) * self.scale

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        ids = torch.tensor([_word_ids(caption) for caption in captions])
        text = self.words(ids)
        return {"text": text, "pooled": text.mean(dim=1)}


def _word_ids(caption: str) -> list[int]:
    words = (caption.split() + [""] * NUM_TOKENS)[:NUM_TOKENS]
    return [hashlib.blake2b(word.encode(), digest_size=2).digest()[0] % 97 for word in words]


def write_coco(
    root: Path,
    split: str,
    images: dict[str, tuple[int, int]],
    captions: dict[int, list[str]],
    folder: str | None = None,
) -> Path:
    """A COCO-format folder with noise images: file name -> (width, height), ids from 1 in that order."""
    place = root / (folder or split)
    place.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (name, (width, height)) in enumerate(images.items(), start=1):
        noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(place / name)
        entries.append({"id": number, "file_name": name})
    flat = [(image_id, text) for image_id, texts in captions.items() for text in texts]
    annotations = [
        {"id": n, "image_id": image_id, "caption": text} for n, (image_id, text) in enumerate(flat)
    ]
    (root / "annotations").mkdir(exist_ok=True)
    content = {"images": entries, "annotations": annotations}
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return root
