"""The pictures of a report: what each generator makes of the same noise, with the teacher's own."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from raydistill.eval.grids import Grid, strip_png
from raydistill.report.runs import Run
from raydistill.report.sections import which_teacher

STAGES = 6
"""Pictures of a run over training, at most."""
_CELL = 64
"""Pixels on the page of a small image, which is enlarged by a whole factor; large ones get half as many again."""


@dataclass(frozen=True)
class Strip:
    """A row of images as one picture, `width` pixels wide on the page. number: the run's, None for a teacher."""

    label: str
    says: str
    uri: str
    width: int
    number: int | None


@dataclass(frozen=True)
class Samples:
    """Strips under one row of captions: each run's best, and a run's over training; teachers' last.

    `missing` names runs whose pictures were made before they could be taken apart.
    """

    captions: list[str]
    cell: int
    across: list[Strip]
    over: list[tuple[Run, list[Strip]]]
    missing: list[str]


def samples(runs: Sequence[Run]) -> Samples | None:
    """The pictures of all runs, None if there are none."""
    grids = {number: {step: run.grid(step) for step in _stages(run)} for number, run in enumerate(runs)}
    whole = {
        number: {step: grid for step, grid in by_step.items() if grid is not None}
        for number, by_step in grids.items()
    }
    found = {number: by_step for number, by_step in whole.items() if by_step}
    if not found:
        return None
    every = [grid for by_step in found.values() for grid in by_step.values()]
    count = min(len(grid.rows[0][1]) for grid in every)
    edge = every[0].rows[0][1].shape[-1]
    cell = edge * max(1, _CELL // edge) if edge <= _CELL else _CELL * 3 // 2
    captions = every[0].captions[:count]

    def strip(label: str, images: Tensor, number: int | None) -> Strip:
        uri = "data:image/png;base64," + base64.b64encode(strip_png(images[:count])).decode()
        return Strip(label, f"{label}: {count} samples: {'; '.join(captions)}", uri, cell * count, number)

    def generator(run: Run, number: int, step: int, grid: Grid, *, name: str) -> Strip:
        value = run.figures[step][run.metric]
        return strip(f"{name}update {step}, {run.protocol.metric} {value:.3g}", grid.rows[0][1], number)

    teachers: dict[str, Strip] = {}
    across, over = [], []
    for number, by_step in found.items():
        run = runs[number]
        best = min(by_step, key=lambda step: (step != run.best, run.figures[step][run.metric]))
        across.append(generator(run, number, best, by_step[best], name=f"{run.name}, "))
        label, images = by_step[best].rows[-1]
        guidance = run.number("teacher.guidance_scale")
        label = label.replace("teacher", which_teacher(run, runs), 1)
        label += f", guidance {guidance:g}" if guidance is not None else ""
        teacher = teachers.setdefault(label, strip(label, images, None))
        stages = [generator(run, number, step, by_step[step], name="") for step in sorted(by_step)]
        over.append((run, [*stages, teacher]))
    missing = [run.name for number, run in enumerate(runs) if number not in found]
    return Samples(captions, cell, [*across, *teachers.values()], over, missing)


def _stages(run: Run) -> list[int]:
    """Evenly spread steps with a picture, the first, the best and the last among them."""
    steps = list(run.grid_steps)
    if len(steps) > STAGES:
        spread = {steps[round(number * (len(steps) - 1) / (STAGES - 2))] for number in range(STAGES - 1)}
        steps = sorted(spread | ({run.best} & set(steps)))
    return steps
