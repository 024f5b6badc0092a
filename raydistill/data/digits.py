"""Real class-conditional data of a size for two cores: scikit-learn's handwritten digits, 1797 images of 8x8 pixels.

They are the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998,
doi:10.24432/C50P49) and come inside scikit-learn's package, so nothing is downloaded. `write_digits` lays them out as
COCO does, so that they are read through the same code as any other data; an image's caption is its class's number.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from raydistill.data.images import progress_interval_s
from raydistill.errors import DataError

# Raise this whenever a pixel or a caption changes: folders written by another version are then refused.
DIGITS_VERSION = 1
NUM_DIGITS = 1797
IMAGE_SIZE = 8
SPLITS = ("train", "val")
DIGITS_SHA256 = "3218799b862dc4833b0dc8ffd2d63f35720c44661b1c4432f2a1742788b09d96"
"""Of the pixels and labels that `read_digits` returns."""
_MANIFEST = "digits.json"


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [1797, 8, 8, 3] with equal channels, labels int64 [1797] in 0..9), in scikit-learn's order.

    scikit-learn's grey values v in 0..16 become round(255 v / 16); 255 is ink. Raises DataError where the installed
    scikit-learn holds other digits.
    """
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    grey = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1)
    pixels, labels = np.repeat(grey, 3, axis=-1), labels.astype(np.int64)
    sha256 = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    if sha256 != DIGITS_SHA256:
        raise DataError(
            f"the installed scikit-learn holds other digits (sha256 {sha256}, not {DIGITS_SHA256})"
        )
    return pixels, labels


def write_digits(root: str | Path, progress: bool = True) -> Path:
    """Write the digits as a COCO-format folder and return its path; a complete folder is left as it is.

    Both splits hold all 1797 images in the same order: as for CIFAR-10 and ImageNet-64, figures compare generated
    images with the training set.

    Everything is written beside `root` and renamed at the end, so `root` is complete whenever it exists. Several
    processes may call this at once: one writes, the others wait. Raises DataError where `root` holds anything else.
    """
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f".{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_complete(root):
            return root
        partial = root.parent / f".{root.name}.partial"
        if partial.exists():
            shutil.rmtree(partial)  # a second's work: an interrupted call's part isn't worth keeping
        pixels, labels = read_digits()
        hashes = {}
        with tqdm(
            total=len(SPLITS) * NUM_DIGITS,
            desc="digits",
            unit="img",
            disable=not progress,
            mininterval=progress_interval_s(),
        ) as bar:
            for split in SPLITS:
                hashes[split] = _write_split(partial, split, pixels, labels, bar)
        manifest = _wanted() | {"captions_sha256": hashes}
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        os.replace(partial, root)
    return root


def _wanted() -> dict[str, Any]:
    return {"version": DIGITS_VERSION, "sha256": DIGITS_SHA256}


def _is_complete(root: Path) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / _MANIFEST
    if not file.is_file():
        raise DataError(f"{root} exists and was not written by write_digits; give another folder")
    manifest = json.loads(file.read_text())
    if {key: manifest.get(key) for key in _wanted()} != _wanted():
        raise DataError(f"{root} holds other digits ({manifest}) than asked for ({_wanted()}): remove it")
    for split in SPLITS:
        found = len(list((root / split).glob("*.png")))
        if found != NUM_DIGITS:
            raise DataError(f"{root / split} has {found} images instead of {NUM_DIGITS}: remove {root}")
        sha256 = hashlib.sha256((root / "annotations" / f"captions_{split}.json").read_bytes()).hexdigest()
        if sha256 != manifest["captions_sha256"][split]:
            raise DataError(
                f"the captions of {root} ({split}) were changed since they were written: remove {root}"
            )
    return True


def _write_split(partial: Path, split: str, pixels: np.ndarray, labels: np.ndarray, bar: tqdm) -> str:
    (partial / split).mkdir(parents=True)
    (partial / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, str | int]] = []
    annotations: list[dict[str, str | int]] = []
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True), start=1):
        name = f"{number:012d}.png"
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        (partial / split / name).write_bytes(buffer.getvalue())
        images.append({"id": number, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        annotations.append({"id": number, "image_id": number, "caption": str(label)})
        bar.update()
    info = {"description": f"scikit-learn's handwritten digits, {split}", "version": str(DIGITS_VERSION)}
    data = json.dumps({"info": info, "images": images, "annotations": annotations}).encode()
    (partial / "annotations" / f"captions_{split}.json").write_bytes(data)
    return hashlib.sha256(data).hexdigest()
