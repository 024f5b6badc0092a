"""One kind of chart, points over two axes, as coordinates for the page's template, which draws and escapes.

Drawn as SVG in the page itself rather than as a picture of matplotlib's: it takes the page's colours, light or dark,
its text has the page's size on a telephone as well, each point says its value, and it weighs a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 388, 10, 212
STYLES = 8
"""Colours; runs beyond them differ by dashes."""
_LOG_FROM = 12.0
_MAX_TICKS = 6


@dataclass(frozen=True)
class Series:
    """style: the run's number, the same in every chart, None in the text's colour; points: (x, y, what they say to a
    pointer over them)."""

    style: int | None
    points: Sequence[tuple[float, float, str]]
    line: bool = True
    dots: bool = True
    labels: Sequence[str] = ()
    """Written beside the points."""


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    says: str
    label: str


@dataclass(frozen=True)
class Drawn:
    """A series in the chart's units."""

    style: int | None
    path: str
    dots: list[Dot]


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn; `says` is its text for who can't see it."""

    title: str
    says: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    drawn: list[Drawn]
    levels: list[tuple[float, str]]


def chart(
    title: str,
    says: str,
    x_label: str,
    series: Sequence[Series],
    *,
    levels: Sequence[tuple[float, str]] = (),
    from_zero: bool = True,
    log: bool = True,
) -> Chart | None:
    """A chart of series and of horizontal lines (value, what it is); None if there is no finite point.

    from_zero: whether x is a counter and begins at 0. log: whether y, and x that is no counter, is logarithmic where it
    spans more than a factor of 12.
    """
    finite = [
        (each, [number for number, point in enumerate(each.points) if all(map(math.isfinite, point[:2]))])
        for each in series
    ]
    kept = [each.points[number] for each, numbers in finite for number in numbers]
    if not kept:
        return None
    x_values = [x for x, _, _ in kept] + [0.0] * from_zero
    x_axis = _Axis(x_values, LEFT, RIGHT, log=log and not from_zero, pad=0.0 if from_zero else 0.08)
    y_axis = _Axis([y for _, y, _ in kept] + [y for y, _ in levels], BOTTOM, TOP, log=log, pad=0.05)
    drawn = []
    for each, numbers in finite:
        dots = [
            Dot(
                x_axis.place(each.points[number][0]),
                y_axis.place(each.points[number][1]),
                each.points[number][2],
                each.labels[number] if each.labels else "",
            )
            for number in numbers
        ]
        path = "M" + " ".join(f"{dot.x},{dot.y}" for dot in dots) if each.line and len(dots) > 1 else ""
        drawn.append(Drawn(each.style, path, dots if each.dots else []))
    lines = [(y_axis.place(value), text) for value, text in levels]
    return Chart(title, says, x_label, x_axis.ticks(), y_axis.ticks(), drawn, lines)


class _Axis:
    def __init__(self, values: Sequence[float], first: float, last: float, *, log: bool, pad: float):
        low, high = min(values), max(values)
        self._log = log and low > 0 and high / low > _LOG_FROM
        low, high = self._scaled(low), self._scaled(high)
        margin = pad * (high - low) or (abs(high) or 1.0) * 0.1 * (high == low)
        self._low, self._high = low - margin, high + margin
        self._first, self._last = first, last

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self._low) / (self._high - self._low)
        return round(self._first + share * (self._last - self._first), 1)

    def ticks(self) -> list[tuple[float, str]]:
        values = _log_ticks(self._low, self._high) if self._log else _linear_ticks(self._low, self._high)
        return [(self.place(value), short(value)) for value in values]


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / (_MAX_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    for factors in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        values = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in values if low <= math.log10(value) <= high]
        if len(inside) <= _MAX_TICKS:
            break
    return inside[:: -(-len(inside) // _MAX_TICKS)]


def short(value: float) -> str:
    """A number for an axis: 57600 is 57.6k."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"
