import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from raydistill.errors import DataError
from raydistill.eval.grids import grid_png, read_grid, strip_png


def opened(data: bytes) -> npt.NDArray[np.uint8]:
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def plain(*colours: tuple[int, int, int], size: int = 8) -> torch.Tensor:
    return torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, size, size).contiguous()


def extent(picture: npt.NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """top, bottom, left, right of the pixels of one colour."""
    rows, columns = np.nonzero((picture == colour).all(-1))
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_each_image_stands_in_its_row_and_column_enlarged_without_smoothing() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    picture = opened(grid_png([("first", plain(*colours[:2])), ("second", plain(*colours[2:]))], scale=4))
    boxes = [extent(picture, colour) for colour in colours]
    for (top, bottom, left, right), colour in zip(boxes, colours, strict=True):
        assert (bottom - top + 1, right - left + 1) == (32, 32)
        assert (picture[top : bottom + 1, left : right + 1] == colour).all()
    assert boxes[0][0] == boxes[1][0] < boxes[2][0] == boxes[3][0]
    assert boxes[0][2] == boxes[2][2] < boxes[1][2] == boxes[3][2]


def test_pixels_are_repeated_exactly() -> None:
    image = torch.randint(1, 255, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = opened(grid_png([("noise", image)], scale=3))
    enlarged = image[0].permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
    windows = np.lib.stride_tricks.sliding_window_view(picture, (24, 24, 3))
    assert (windows[:, :, 0] == enlarged).all((-1, -2, -3)).sum() == 1


@pytest.mark.parametrize(("edge", "shown"), [(8, 96), (32, 96), (40, 80), (512, 512)])
def test_without_a_scale_images_become_about_96_pixels_wide(edge: int, shown: int) -> None:
    colour = (200, 0, 0)
    top, bottom, left, right = extent(opened(grid_png([("a", plain(colour, size=edge))])), colour)
    assert (bottom - top + 1, right - left + 1) == (shown, shown)


def dark(region: npt.NDArray[np.uint8]) -> int:
    return int((region.max(-1) < 100).sum())


def test_labels_stand_left_of_their_rows_and_captions_above_their_columns() -> None:
    rows = [
        ("generator, 1 step", plain((200, 0, 0), (0, 200, 0), size=32)),
        ("teacher", plain((0, 0, 200), (0, 200, 200), size=32)),
    ]
    captions = ["a small red circle left of a large blue ring on a dark background", "a ring"]
    picture = opened(grid_png(rows, captions))
    red, green, blue = (extent(picture, colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200)))
    assert dark(picture[red[0] : red[1] + 1, : red[2]]) > dark(picture[blue[0] : blue[1] + 1, : blue[2]]) > 20
    long_caption, short_caption = picture[: red[0], red[2] : green[2]], picture[: red[0], green[2] :]
    assert dark(long_caption) > 3 * dark(short_caption) > 0
    # the long caption is wrapped: its text stays over its own column
    assert dark(picture[: red[0], red[3] + 1 : green[2]]) == 0


def test_a_word_wider_than_its_column_is_broken_not_cut() -> None:
    rows = [("r", plain((200, 0, 0)))]
    wide = opened(grid_png(rows, ["m" * 60]))
    narrow = opened(grid_png(rows, ["m" * 10]))
    assert wide.shape[1] == narrow.shape[1]
    assert wide.shape[0] > narrow.shape[0]


def test_rows_that_do_not_fit_together_are_refused() -> None:
    two = plain((1, 1, 1), (2, 2, 2))
    with pytest.raises(DataError, match="at least one row"):
        grid_png([])
    with pytest.raises(DataError, match="row 'b' holds"):
        grid_png([("a", two), ("b", two[:1])])
    with pytest.raises(DataError, match=r"row 'a' holds torch\.float32"):
        grid_png([("a", two.float())])
    with pytest.raises(DataError, match="1 captions for 2 columns"):
        grid_png([("a", two)], ["only one"])
    with pytest.raises(DataError, match="scale of a grid must be at least 1, got 0"):
        grid_png([("a", two)], scale=0)


@pytest.mark.parametrize("captions", [None, ["one", 'a "<b>" of\u00e9', "three"]])
@pytest.mark.parametrize(("size", "scale"), [(8, None), (8, 1), (40, 2)])
def test_a_grid_is_taken_apart_pixel_for_pixel(
    captions: list[str] | None, size: int, scale: int | None
) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = [
        (label, torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=draw))
        for label in ("first", "second, with a label of several lines", "")
    ]
    found = read_grid(grid_png(rows, captions, scale))
    assert found.captions == (captions or [])
    assert [label for label, _ in found.rows] == [label for label, _ in rows]
    for (_, images), (_, wanted) in zip(found.rows, rows, strict=True):
        assert torch.equal(images, wanted)


def test_another_picture_is_not_taken_apart() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    for data in (buffer.getvalue(), b"no picture"):
        with pytest.raises(DataError, match="does not say where its images are"):
            read_grid(data)


def test_a_strip_holds_its_images_side_by_side_and_large_ones_smaller() -> None:
    images = torch.randint(
        0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    strip = opened(strip_png(images))
    assert strip.shape == (8, 24, 3)
    for number, image in enumerate(images):
        assert (strip[:, 8 * number : 8 * number + 8] == image.permute(1, 2, 0).numpy()).all()
    assert opened(strip_png(images.repeat_interleave(32, 2).repeat_interleave(32, 3))).shape == (128, 384, 3)
