"""A picture of the Grafana dashboard without Grafana: each panel's queries are asked of a Prometheus and drawn.

    python dashboards/draw.py --prometheus http://127.0.0.1:9090 --run dmd2_coco --minutes 30 --out dashboard.png

It draws what the dashboard's JSON says, in its places, with matplotlib: time series as lines, stats as numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "raydistill.json"
_ROW_INCHES = 0.29
_STEPS = 240


@dataclass(frozen=True)
class Series:
    """One line of a panel; times in seconds since 1970."""

    legend: str
    labels: dict[str, str]
    times: list[float]
    values: list[float]


@dataclass(frozen=True)
class Window:
    """What is looked at."""

    start: float
    end: float
    run: str = ".+"
    """Regular expression of the runs' names."""
    scrape_s: float = 5.0

    @property
    def step(self) -> float:
        return max((self.end - self.start) / _STEPS, 1.0)

    def expand(self, query: str) -> str:
        """The query with Grafana's variables filled in."""
        variables = {
            "$__rate_interval": f"{max(self.step + self.scrape_s, 4 * self.scrape_s):.0f}s",
            "$__range": f"{self.end - self.start:.0f}s",
            "$run": self.run,
        }
        for name, value in variables.items():
            query = query.replace(name, value)
        return query


def load_panels(path: Path = DASHBOARD) -> list[dict[str, Any]]:
    """The dashboard's panels in its order, rows among them."""
    panels: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
    return panels


def ask(prometheus: str, target: Mapping[str, Any], window: Window) -> list[Series]:
    """What a panel's query returns. Raises SystemExit in one line if Prometheus does not answer or refuses it."""
    question = urllib.parse.urlencode(
        {
            "query": window.expand(target["expr"]),
            "start": window.start,
            "end": window.end,
            "step": f"{window.step:.3f}",
        }
    )
    try:
        with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{question}", timeout=30) as answer:
            result = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        raise SystemExit(
            f"{prometheus} refuses {target['expr']!r}: {json.load(error).get('error')}"
        ) from None
    except OSError as error:
        raise SystemExit(f"no Prometheus answers at {prometheus} (--prometheus): {error}") from None
    return [
        Series(
            _legend(target["legendFormat"], found["metric"]),
            found["metric"],
            [float(at) for at, _ in found["values"]],
            [float(value) for _, value in found["values"]],
        )
        for found in result
    ]


def _legend(template: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), template)


def draw(prometheus: str, window: Window, out: Path, title: str) -> list[str]:
    """Write the picture; returns the titles of panels that have nothing to show."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 7.5,
        "axes.titlesize": 8.5,
        "axes.titleweight": "bold",
        "lines.linewidth": 1.1,
    }
    panels = load_panels()
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 2
    figure = plt.figure(figsize=(13, rows * _ROW_INCHES), facecolor="#f4f5f7")
    figure.text(0.012, 1 - 1.1 / rows, title, size=11, weight="bold", va="center")
    empty = []
    for panel in panels:
        at = panel["gridPos"]
        left, top = at["x"] / 24, 1 - (at["y"] + 2) / rows
        if panel["type"] == "row":
            figure.text(0.012, top - 0.6 / rows, panel["title"], size=10, va="center", color="#33415c")
            continue
        series = [found for target in panel["targets"] for found in ask(prometheus, target, window)]
        if not series:
            empty.append(panel["title"])
        card = figure.add_axes(
            (left + 0.004, top - (at["h"] - 0.15) / rows, at["w"] / 24 - 0.008, (at["h"] - 0.3) / rows)
        )
        card.set(xticks=[], yticks=[], facecolor="white")
        card.spines[:].set_color("#d8dbe2")
        if panel["type"] == "stat":
            _stat(card, panel, series)
            continue
        inner = (left + 0.052, top - (at["h"] - 1.35) / rows, at["w"] / 24 - 0.074, (at["h"] - 2.75) / rows)
        _lines(figure.add_axes(inner), panel, series, window)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return empty


def _stat(card: Any, panel: Mapping[str, Any], series: Sequence[Series]) -> None:
    at = {"ha": "center", "va": "center", "transform": card.transAxes}
    card.text(0.5, 0.86, panel["title"], weight="bold", size=8.5, **at)
    unit, decimals = (
        panel["fieldConfig"]["defaults"]["unit"],
        panel["fieldConfig"]["defaults"].get("decimals"),
    )
    words = "\n".join(in_unit(each.values[-1], unit, decimals) for each in series[:3]) or "no data"
    size = {0: 14, 1: 22, 2: 14}.get(len(series), 10)
    card.text(0.5, 0.42, words, size=size, color="#2a6f4e", **at)


def _lines(axes: Any, panel: Mapping[str, Any], series: Sequence[Series], window: Window) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_title(panel["title"], loc="left")
    runs = {each.labels.get("run") for each in series}
    for each in series:
        name = (
            each.legend if len(runs) > 1 else each.legend.replace(each.labels.get("run", ""), "", 1).strip()
        )
        minutes = [(at - window.start) / 60 for at in each.times]
        axes.plot(
            minutes, each.values, label=name or panel["title"], marker="." if len(minutes) < 3 else None
        )
    if not series:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color="#8a92a3", transform=axes.transAxes)
    if defaults["custom"].get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    elif "min" in defaults:
        top = max((value for each in series for value in each.values if math.isfinite(value)), default=1.0)
        axes.set_ylim(defaults["min"], defaults.get("max", 1.1 * top or 1.0))
    axes.set_xlim(0, (window.end - window.start) / 60)
    if defaults["unit"] != "none":
        axes.yaxis.set_major_formatter(lambda value, _: in_unit(value, defaults["unit"], None))
    axes.grid(color="#e6e8ee", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9bfcc")
    axes.tick_params(length=2, color="#b9bfcc")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} min")
    if any(name != panel["title"] for name in axes.get_legend_handles_labels()[1]):
        axes.legend(loc="best", fontsize=6.5, frameon=True, framealpha=0.75, edgecolor="none", borderpad=0.2)


def in_unit(value: float, unit: str, decimals: int | None) -> str:
    """A value in one of the dashboard's units."""
    if not math.isfinite(value):
        return str(value)
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s" and value >= 120:
        return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
    if unit in ("bytes", "Bps"):
        power = min(int(math.log(value, 1024)), 4) if value >= 1 else 0
        scaled = value / 1024**power
        number = f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"
        return f"{number} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" + ("/s" if unit == "Bps" else "")
    number = f"{value:.{decimals}f}" if decimals is not None else f"{value:.3g}"
    return number + {"s": " s", "gbytes": " GiB"}.get(unit, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its URL")
    parser.add_argument("--run", default=".+", help="regular expression of the runs' names")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far to look back")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"))
    given = parser.parse_args()
    end = time.time()
    window = Window(end - 60 * given.minutes, end, given.run)
    name = "all runs" if given.run == ".+" else given.run
    empty = draw(
        given.prometheus, window, given.out, f"raydistill: {name}, the last {given.minutes:g} minutes"
    )
    print(f"{given.out}; nothing to show: {', '.join(empty) or 'none'}")


if __name__ == "__main__":
    main()
