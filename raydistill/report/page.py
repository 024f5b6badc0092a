"""The page: its contents handed to the template, which escapes every string, and written in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import jinja2

from raydistill.errors import TrackingError
from raydistill.eval.protocol import METHOD_PROTOCOL, cost
from raydistill.report import chart, sections
from raydistill.report.runs import Run, Runs
from raydistill.report.samples import samples


def _best(runs: Sequence[Run]) -> Run:
    """By the figure that the first one's best snapshot is chosen by."""
    metric = runs[0].judged_by
    return min(runs, key=lambda run: cost(metric, run.figures[run.best][metric]))


def write_page(found: Runs, out: Path, title: str) -> Path:
    """Write the report on these runs. Raises TrackingError if it can't be written."""
    runs = found.runs
    protocol = runs[0].protocol
    page = _template().render(
        title=title,
        runs=runs,
        left_out=found.left_out,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=version("raydistill"),
        judged=sections.best_word(runs),
        quality=sections.quality_word(runs[0]),
        accuracy=sections.accuracy_word(runs[0]),
        count=protocol.num_samples,
        protocol={name: value for name, value in protocol.to_dict().items() if name not in METHOD_PROTOCOL},
        curves=sections.curves(runs),
        without_seconds=[run.name for run in runs if not run.points["time/train_s"]],
        teachers={
            name: (value, sections.teachers(runs, runs[0].accuracy)[name] if runs[0].accuracy else None)
            for name, value in sections.teachers(runs, runs[0].metric).items()
        },
        rows=[sections.row(number, run) for number, run in enumerate(runs)],
        differing=sections.differing(runs),
        best=_best(runs),
        front=sections.front_chart(runs),
        on_front=sections.front(runs),
        maps=sections.heat_maps(runs),
        samples=samples(runs),
        losses=sections.losses(runs),
        frame=chart,
        ratio_setting=sections.RATIO,
        guidance_setting=sections.GUIDANCE,
    )
    partial = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise TrackingError(f"can't write {out} (--out): {error.strerror or error}") from error
    return out


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("raydistill.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
