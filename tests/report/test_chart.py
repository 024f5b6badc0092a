"""Axes that a person can read, for any range."""

import math
import re

import pytest

from raydistill.report.chart import BOTTOM, LEFT, RIGHT, TOP, Chart, Series, chart, short


def drawn(*points: tuple[float, float], **settings: bool) -> Chart:
    found = chart("t", "s", "x", [Series(0, [(x, y, "") for x, y in points])], **settings)
    assert found is not None
    return found


def value(text: str) -> float:
    number, suffix = re.fullmatch(r"(.*?)([kMG]?)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[suffix]


@pytest.mark.parametrize("low", [0.0, 1e-4, 0.3, 17.0, 99_000.0, -5.0])
@pytest.mark.parametrize("span", [1e-3, 0.7, 9.0, 12345.0])
def test_two_to_seven_different_ticks_stand_within_the_axes(low: float, span: float) -> None:
    found = drawn((0, low), (span, low + span))
    for ticks, (first, last) in ((found.x_ticks, (LEFT, RIGHT)), (found.y_ticks, (TOP, BOTTOM))):
        assert 2 <= len(ticks) <= 7
        assert len({text for _, text in ticks}) == len(ticks) or span / max(abs(low), 1) < 0.01
        assert all(first <= place <= last for place, _ in ticks)


def test_a_tick_stands_where_its_value_is_drawn() -> None:
    for points in (((0, 0.2), (900, 8.0)), ((0, 0.5), (900, 0.9))):
        found = drawn(*points)
        logarithmic = points[1][1] / points[0][1] > 12
        scaled = math.log10 if logarithmic else float
        (dot_low, dot_high) = found.drawn[0].dots
        for place, text in found.y_ticks:
            share = (scaled(value(text)) - scaled(points[0][1])) / (
                scaled(points[1][1]) - scaled(points[0][1])
            )
            assert place == pytest.approx(dot_low.y + share * (dot_high.y - dot_low.y), abs=0.3)


def test_values_that_are_no_numbers_are_not_drawn() -> None:
    found = drawn((0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0))
    assert [dot.x for dot in found.drawn[0].dots] == [LEFT, RIGHT]
    assert chart("t", "s", "x", [Series(0, [(0, math.nan, "")])]) is None


def test_a_single_value_is_in_the_middle() -> None:
    assert drawn((5, 3.0), (7, 3.0)).drawn[0].dots[0].y == (TOP + BOTTOM) / 2


@pytest.mark.parametrize(
    ("number", "text"), [(57600, "57.6k"), (0.25, "0.25"), (2e6, "2M"), (0, "0"), (-1500, "-1.5k")]
)
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text
