"""Pictures for people: labelled rows of small images under their captions, as one PNG that can be taken apart again."""

import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydistill.errors import DataError

_GAP = 4
_FONT_SIZE = 12
_MIN_COLUMN = 84
_IMAGE_WIDTH = 96
_LAYOUT = "raydistill.grid"


@dataclass(frozen=True)
class Grid:
    """What `grid_png` was given: captions (none if it got none) and rows of (label, uint8 images [N, 3, H, W])."""

    captions: list[str]
    rows: list[tuple[str, Tensor]]


def grid_png(
    rows: Sequence[tuple[str, Tensor]], captions: Sequence[str] | None = None, scale: int | None = None
) -> bytes:
    """A PNG of image rows, each with its label at the left, and one caption above each column.

    Args:
        rows: (label, uint8 images [N, 3, H, W]); all rows have the same N, H and W.
        captions: N captions, or None.
        scale: whole factor by which the images are enlarged, without smoothing; None takes the one that makes them
            about 96 pixels wide.

    Raises DataError if the rows don't fit together.
    """
    from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

    count, height, width = _check(rows, captions)
    if scale is None:
        scale = max(1, round(_IMAGE_WIDTH / width))
    if scale < 1:
        raise DataError(f"the scale of a grid must be at least 1, got {scale}")
    font = ImageFont.load_default(_FONT_SIZE)
    line = _FONT_SIZE + 3
    cell_height, cell_width = height * scale, max(width * scale, _MIN_COLUMN if captions else 0)
    label_lines = [_wrap(label, 150, font) for label, _ in rows]
    label_width = max(int(font.getlength(text)) for lines in label_lines for text in lines) + 2 * _GAP
    heads = [_wrap(caption, cell_width, font) for caption in captions or ()]
    head_height = max((len(lines) for lines in heads), default=0) * line + (_GAP if heads else 0)
    # a label may have more lines than its images have room for
    row_heights = [max(cell_height, len(lines) * line) + _GAP for lines in label_lines]

    size = (label_width + count * (cell_width + _GAP) + _GAP, _GAP + head_height + sum(row_heights))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, lines in enumerate(heads):
        x = label_width + column * (cell_width + _GAP)
        # captions stand on the images, not at the top, so that short ones are not far from theirs
        top = head_height - len(lines) * line
        for number, text in enumerate(lines):
            pen.text((x, top + number * line), text, fill="black", font=font)
    y = _GAP + head_height
    tops = []
    for (_, images), lines, row_height in zip(rows, label_lines, row_heights, strict=True):
        top = y + (row_height - _GAP - len(lines) * line) // 2
        for number, text in enumerate(lines):
            pen.text((_GAP, top + number * line), text, fill="black", font=font)
        for column, image in enumerate(images.cpu().permute(0, 2, 3, 1).contiguous().numpy()):
            picture = Image.fromarray(image).resize((width * scale, cell_height), Image.Resampling.NEAREST)
            canvas.paste(picture, (label_width + column * (cell_width + _GAP), y))
        tops.append(y)
        y += row_height
    layout = {
        "captions": list(captions or ()), "labels": [label for label, _ in rows], "tops": tops, "left": label_width,
        "pitch": cell_width + _GAP, "shape": [count, height, width], "scale": scale,
    }  # fmt: skip
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_LAYOUT, json.dumps(layout))
    return _png(canvas, info)


def read_grid(png: bytes) -> Grid:
    """The images of a picture that `grid_png` made, pixel for pixel. Raises DataError for any other picture."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(png))
        layout = json.loads(picture.text[_LAYOUT])  # type: ignore[attr-defined]
    except (OSError, AttributeError, KeyError, ValueError) as error:
        raise DataError(
            f"a picture that does not say where its images are: {type(error).__name__}"
        ) from error
    pixels = np.asarray(picture.convert("RGB"))
    count, height, width = layout["shape"]
    scale, left, pitch = layout["scale"], layout["left"], layout["pitch"]

    def cell(top: int, column: int) -> Tensor:
        x = left + column * pitch
        block = pixels[top : top + height * scale : scale, x : x + width * scale : scale]
        return torch.from_numpy(block.copy()).permute(2, 0, 1)

    rows = [
        (label, torch.stack([cell(top, column) for column in range(count)]))
        for label, top in zip(layout["labels"], layout["tops"], strict=True)
    ]
    return Grid(layout["captions"], rows)


def strip_png(images: Tensor, widest: int = 128) -> bytes:
    """uint8 images [N, 3, H, W] side by side and nothing else; larger ones are brought to `widest` pixels each."""
    from PIL import Image

    count, _, height, width = images.shape
    strip = Image.fromarray(images.permute(2, 0, 3, 1).reshape(height, count * width, 3).contiguous().numpy())
    if width > widest:
        strip = strip.resize(
            (count * widest, max(1, round(height * widest / width))), Image.Resampling.LANCZOS
        )
    return _png(strip)


def _png(picture: Any, info: Any = None) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def _check(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str] | None) -> tuple[int, int, int]:
    if not rows:
        raise DataError("a grid needs at least one row")
    shape = rows[0][1].shape
    for label, images in rows:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape != shape:
            raise DataError(
                f"row {label!r} holds {images.dtype} {list(images.shape)}; all rows need uint8 images of one "
                "shape "
                f"[N, 3, H, W], the first is {list(shape)}"
            )
    if captions is not None and len(captions) != shape[0]:
        raise DataError(f"{len(captions)} captions for {shape[0]} columns")
    return int(shape[0]), int(shape[2]), int(shape[3])


def _wrap(text: str, width: int, font: Any) -> list[str]:
    """Lines of at most `width` pixels; a word that is wider alone is broken."""
    for chars in range(max(len(text), 1), 0, -1):
        lines = textwrap.wrap(text, chars) or [""]
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return [text]
