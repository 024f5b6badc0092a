"""The embedded data set: captioned 32x32 scenes of one or two coloured shapes, drawn deterministically.

Scene number i of (seed, split) is a pure function of these three: its random numbers are the raw Philox
stream at counter i, so that any scene can be drawn alone and in any order. `write_scenes` lays them out as
COCO does, so that the default job reads them through the same code as real data.
"""

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from raydistill.data.images import progress_interval_s
from raydistill.errors import DataError
from raydistill.eval.features import COLOURS, IMAGE_SIZE, SHAPES

# Raise this whenever a pixel or a caption changes: folders drawn by another version are then refused, not
# mixed.
SCENES_VERSION = 1
SPLITS = ("train", "val")
CAPTIONS_PER_IMAGE = 5
SIZES = {"small": 10.0, "large": 14.0}  # outer diameter in pixels
BACKGROUNDS = {"dark": 40, "gray": 118}
RGB = {
    "red": (225, 35, 35),
    "green": (40, 175, 60),
    "blue": (40, 75, 235),
    "yellow": (245, 225, 40),
    "purple": (150, 50, 205),
    "orange": (250, 135, 20),
    "cyan": (50, 215, 225),
    "white": (245, 245, 245),
}
_SUPERSAMPLE = 8
_ROWS = ("top", "middle", "bottom")
_COLUMNS = ("left", "center", "right")
_MANIFEST = "scenes.json"


@dataclass(frozen=True)
class SceneObject:
    """One shape; centre and diameter in pixels, rgb in 0..255."""

    colour: str
    shape: str
    size: str
    x: float
    y: float
    diameter: float
    rgb: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """What one image shows. `relation` says where the first of two objects lies."""

    objects: tuple[SceneObject, ...]
    background: str
    background_level: int
    position: str | None
    relation: str | None
    captions: tuple[str, ...]


class _Numbers:
    """Uniform numbers of one scene, in the order in which they are asked for."""

    def __init__(self, seed: int, split: str, index: int) -> None:
        digest = hashlib.blake2b(f"raydistill scenes {seed} {split}".encode(), digest_size=16).digest()
        key = np.frombuffer(digest, dtype="<u8")
        self._bits = np.random.Philox(key=key, counter=[0, index, 0, 0])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        # Raw bits rather than numpy's Generator, whose streams may change between numpy versions.
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def index(self, n: int) -> int:
        return int(self.uniform() * n)

    def choice(self, options: tuple[str, ...]) -> str:
        return options[self.index(len(options))]


def scene(seed: int, split: str, index: int) -> Scene:
    """The content of scene `index` (from 0) of a split; raises DataError for an unknown split."""
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; the scenes have {', '.join(SPLITS)}")
    numbers = _Numbers(seed, split, index)
    background = numbers.choice(tuple(BACKGROUNDS))
    level = BACKGROUNDS[background] + round(numbers.uniform(-6, 6))
    if numbers.uniform() < 0.5:
        row, column = numbers.index(3), numbers.index(3)
        # Centres 9, 16 and 23: a large shape with its jitter still lies inside the image.
        x, y = (9 + 7 * cell + numbers.uniform(-1, 1) for cell in (column, row))
        objects = (_object(numbers, x, y, other=None),)
        position = _position(row, column)
        return Scene(
            objects,
            background,
            level,
            position,
            None,
            _one_object_captions(numbers, objects[0], position, background),
        )
    # Two objects sit in the two halves of the image, their centres at least 15 apart, so that they never
    # touch.
    first, second = 8 + numbers.uniform(-0.5, 0.5), 24 + numbers.uniform(-0.5, 0.5)
    across = (16 + numbers.uniform(-6, 6), 16 + numbers.uniform(-6, 6))
    horizontal = numbers.uniform() < 0.5
    centres = (
        ((first, across[0]), (second, across[1])) if horizontal else ((across[0], first), (across[1], second))
    )
    one = _object(numbers, *centres[0], other=None)
    two = _object(numbers, *centres[1], other=one)
    relation = "left of" if horizontal else "above"
    return Scene(
        (one, two),
        background,
        level,
        None,
        relation,
        _two_object_captions(numbers, one, two, relation, background),
    )


def _object(numbers: _Numbers, x: float, y: float, other: SceneObject | None) -> SceneObject:
    # A second object of the first one's colour would make "present" ambiguous when one of the two is drawn
    # badly.
    colours = tuple(c for c in COLOURS if other is None or c != other.colour)
    colour, shape, size = numbers.choice(colours), numbers.choice(SHAPES), numbers.choice(tuple(SIZES))
    rgb = tuple(min(255, max(0, channel + round(numbers.uniform(-8, 8)))) for channel in RGB[colour])
    return SceneObject(colour, shape, size, x, y, SIZES[size] + numbers.uniform(-0.5, 0.5), rgb)


def _position(row: int, column: int) -> str:
    if row == 1 or column == 1:
        return _COLUMNS[column] if row == 1 else _ROWS[row]
    return f"{_ROWS[row]} {_COLUMNS[column]}"


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _name(thing: SceneObject, with_size: bool) -> str:
    return _article(
        f"{thing.size} {thing.colour} {thing.shape}" if with_size else f"{thing.colour} {thing.shape}"
    )


def _one_object_captions(
    numbers: _Numbers, thing: SceneObject, position: str, background: str
) -> tuple[str, ...]:
    plain, sized = _name(thing, False), _name(thing, True)
    where = f"in the {position}" if position == "center" else f"at the {position}"
    captions = [
        numbers.choice((plain, f"a picture of {plain}", f"there is {plain}")),
        numbers.choice((sized, f"a picture of {sized}", f"there is {sized}")),
        f"{plain} {where}",
        f"{sized} {where}",
        f"{numbers.choice((plain, sized))} on a {background} background",
    ]
    return _shuffled(numbers, captions)


def _two_object_captions(
    numbers: _Numbers, one: SceneObject, two: SceneObject, relation: str, background: str
) -> tuple[str, ...]:
    inverse = {"left of": "right of", "above": "below"}[relation]

    def pair(with_size: bool, joined_by: tuple[str, str]) -> str:
        forwards = numbers.uniform() < 0.5
        a, b = (one, two) if forwards else (two, one)
        return f"{_name(a, with_size)} {joined_by[0] if forwards else joined_by[1]} {_name(b, with_size)}"

    conjunction = ("and", "and")
    captions = [
        numbers.choice(("", "a picture of ", "there is ")) + pair(False, conjunction),
        pair(True, conjunction),
        pair(False, (relation, inverse)),
        pair(True, (relation, inverse)),
        pair(False, conjunction) + f" on a {background} background",
    ]
    return _shuffled(numbers, captions)


def _shuffled(numbers: _Numbers, captions: list[str]) -> tuple[str, ...]:
    for last in range(len(captions) - 1, 0, -1):
        pick = numbers.index(last + 1)
        captions[last], captions[pick] = captions[pick], captions[last]
    return tuple(captions)


def draw(content: Scene) -> Image.Image:
    """The 32x32 RGB image of a scene, antialiased by drawing it 8 times larger and averaging."""
    image = Image.new("RGB", (IMAGE_SIZE * _SUPERSAMPLE,) * 2, (content.background_level,) * 3)
    pen = ImageDraw.Draw(image)
    for thing in content.objects:
        _PENS[thing.shape](pen, thing)
    return image.reduce(_SUPERSAMPLE)


def _box(thing: SceneObject, half_width: float, half_height: float) -> list[int]:
    left, right = thing.x - half_width, thing.x + half_width
    top, bottom = thing.y - half_height, thing.y + half_height
    # PIL counts the last pixel in.
    return [
        round(edge * _SUPERSAMPLE) - last for edge, last in ((left, 0), (top, 0), (right, 1), (bottom, 1))
    ]


def _circle(pen: ImageDraw.ImageDraw, thing: SceneObject) -> None:
    half = thing.diameter / 2
    pen.ellipse(_box(thing, half, half), fill=thing.rgb)


def _square(pen: ImageDraw.ImageDraw, thing: SceneObject) -> None:
    half = thing.diameter / 2 * 0.92
    pen.rectangle(_box(thing, half, half), fill=thing.rgb)


def _triangle(pen: ImageDraw.ImageDraw, thing: SceneObject) -> None:
    half = thing.diameter / 2
    corners = ((thing.x, thing.y - half), (thing.x + half, thing.y + half), (thing.x - half, thing.y + half))
    pen.polygon([(round(x * _SUPERSAMPLE), round(y * _SUPERSAMPLE)) for x, y in corners], fill=thing.rgb)


def _cross(pen: ImageDraw.ImageDraw, thing: SceneObject) -> None:
    half, bar = thing.diameter / 2, thing.diameter / 6
    pen.rectangle(_box(thing, half, bar), fill=thing.rgb)
    pen.rectangle(_box(thing, bar, half), fill=thing.rgb)


def _ring(pen: ImageDraw.ImageDraw, thing: SceneObject) -> None:
    half = thing.diameter / 2
    pen.ellipse(_box(thing, half, half), outline=thing.rgb, width=round(thing.diameter * 0.21 * _SUPERSAMPLE))


_PENS: dict[str, Callable[[ImageDraw.ImageDraw, SceneObject], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}


def draw_jpeg(content: Scene) -> bytes:
    """The scene as JPEG of quality 95 without colour subsampling, which would smear shapes of ten pixels."""
    buffer = io.BytesIO()
    draw(content).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_scenes(
    root: str | Path, num_train: int = 8000, num_val: int = 2000, seed: int = 0, progress: bool = True
) -> Path:
    """Draw the data set into a COCO-format folder and return its path; a complete folder is left as it is.

    Everything is written beside `root` and renamed at the end, so `root` is complete whenever it exists; what
    an interrupted call has drawn is kept for the next one. Several processes may call this at once: one
    draws, the others wait. Raises DataError where `root` holds anything else than these scenes.
    """
    root = Path(root)
    if num_train < 1 or num_val < 1:
        raise DataError(
            f"write_scenes needs at least one image per split, got train {num_train}, val {num_val}"
        )
    wanted = {"version": SCENES_VERSION, "seed": seed, "num_train": num_train, "num_val": num_val}
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f".{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_complete(root, wanted):
            return root
        partial = root.parent / f".{root.name}.partial"
        if partial.exists() and not _belongs_to(partial, wanted):
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        _write(partial / _MANIFEST, json.dumps(wanted).encode())
        hashes = {}
        with tqdm(
            total=num_train + num_val,
            desc="scenes",
            unit="img",
            disable=not progress,
            mininterval=progress_interval_s(),
        ) as bar:
            for split, count in (("train", num_train), ("val", num_val)):
                hashes[split] = _write_split(partial, split, count, seed, bar)
        _write(partial / _MANIFEST, json.dumps(wanted | {"captions_sha256": hashes}, indent=1).encode())
        os.replace(partial, root)
    return root


def _belongs_to(partial: Path, wanted: dict[str, int]) -> bool:
    manifest = partial / _MANIFEST
    if not manifest.is_file():
        return False
    found = json.loads(manifest.read_text())
    return {key: found.get(key) for key in wanted} == wanted


def _is_complete(root: Path, wanted: dict[str, int]) -> bool:
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    manifest_file = root / _MANIFEST
    if not manifest_file.is_file():
        raise DataError(f"{root} exists and was not written by write_scenes; give another folder")
    manifest = json.loads(manifest_file.read_text())
    if {key: manifest.get(key) for key in wanted} != wanted:
        raise DataError(
            f"{root} holds other scenes ({manifest}) than asked for ({wanted}); remove it or name another"
        )
    for split in SPLITS:
        found = len(list((root / split).glob("*.jpg")))
        if found != wanted[f"num_{split}"]:
            raise DataError(
                f"{root / split} has {found} images, its manifest says {wanted[f'num_{split}']}: remove it"
            )
        sha256 = hashlib.sha256((root / "annotations" / f"captions_{split}.json").read_bytes()).hexdigest()
        if sha256 != manifest["captions_sha256"][split]:
            raise DataError(
                f"the captions of {root} ({split}) were changed since they were written; remove {root}"
            )
    return True


def _write_split(partial: Path, split: str, count: int, seed: int, bar: tqdm) -> str:
    (partial / split).mkdir(exist_ok=True)
    (partial / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, str | int]] = []
    annotations: list[dict[str, str | int]] = []
    for index in range(count):
        content = scene(seed, split, index)
        name = f"{index + 1:012d}.jpg"
        file = partial / split / name
        if not file.exists():
            _write(file, draw_jpeg(content))
        images.append({"id": index + 1, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        for caption in content.captions:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "caption": caption})
        bar.update()
    info = {"description": f"raydistill scenes, {split}", "version": str(SCENES_VERSION), "seed": seed}
    data = json.dumps({"info": info, "images": images, "annotations": annotations}).encode()
    _write(partial / "annotations" / f"captions_{split}.json", data)
    return hashlib.sha256(data).hexdigest()


def _write(file: Path, data: bytes) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, file)
