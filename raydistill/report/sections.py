"""What a report says of runs beside their pictures: curves, final figures, the front, the map, losses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from raydistill.eval.protocol import higher_is_better
from raydistill.report.chart import Chart, Series, chart
from raydistill.report.runs import COUNTERS, LOSSES, Points, Run
from raydistill.tracking import METRICS

RATIO, GUIDANCE = "method.critic_updates_per_generator", "teacher.guidance_scale"
_BUCKETS = 120
"""Points of a loss curve, each a mean."""
_NO_SETTING = (
    "name", "output_dir", "resume", "tracking.", "data.", "prepare.", "placement.", "evaluator.", "checkpoint.",
)  # fmt: skip
"""Settings that don't change what is learnt."""
_PALE, _DEEP = (226, 238, 249), (8, 64, 129)


def quality_word(run: Run) -> str:
    """toyfid, without N."""
    return run.protocol.metric


def accuracy_word(run: Run) -> str:
    """prompt accuracy, without N; nothing where the protocol has no such figure."""
    return (run.accuracy or "").removeprefix("eval/").rpartition("_")[0].replace("_", " ")


def best_word(runs: Sequence[Run]) -> str:
    """What makes a snapshot the best of its run."""
    if len({run.judged_by for run in runs}) > 1:
        return "the best figure of the kind that its run goes by (evaluator.best_by)"
    name = runs[0].judged_by.removeprefix("eval/").rpartition("_")[0].replace("_", " ")
    return f"the {'highest' if higher_is_better(runs[0].judged_by) else 'lowest'} {name}"


def teachers(runs: Sequence[Run], metric: str) -> dict[str, float]:
    """What each teacher is called, and its own figure."""
    name = metric.replace("eval/", "eval/teacher_")
    return {teacher_name(run, runs): run.teacher[name] for run in runs if name in run.teacher}


def which_teacher(run: Run, runs: Sequence[Run]) -> str:
    """ "teacher", with what tells it from the others' where they have several."""
    several = [
        n for n in ("teacher.path", "teacher.dtype") if len({each.settings.get(n) for each in runs}) > 1
    ]
    return " ".join(["teacher", *(run.settings.get(name, "unknown") for name in several)])


def teacher_name(run: Run, runs: Sequence[Run]) -> str:
    """How the teacher's own images were made."""
    made = run.teacher_protocol
    if made is None:
        return which_teacher(run, runs)
    return f"{which_teacher(run, runs)}, {made.sampler}, {made.num_steps} evaluations, guidance {made.guidance_scale:g}"


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Quality, then accuracy, each against every counter that was logged."""
    drawn = [
        _curve(runs, metric, word, counter)
        for metric, word in (
            (runs[0].metric, quality_word(runs[0])),
            (runs[0].accuracy, accuracy_word(runs[0])),
        )
        for counter in COUNTERS
        if metric is not None
    ]
    return [each for each in drawn if each is not None]


def _curve(runs: Sequence[Run], metric: str, word: str, counter: str) -> Chart | None:
    series, says = [], []
    for number, run in enumerate(runs):
        points = [
            (x, run.figures[step][metric], f"{run.name}, update {step}: {run.figures[step][metric]:.4g}")
            for step in run.figures
            if (x := run.at(counter, step)) is not None
        ]
        # a run that never logged a counter has its step 0 all the same
        if counter == "generator_updates" or run.points[counter]:
            series.append(Series(number, points))
            says.append(f"{run.name}: {points[0][1]:.3g} at first, {points[-1][1]:.3g} at last.")
    title = f"{word} against {COUNTERS[counter]}"
    levels = [(value, f"{name}: {value:.4g}") for name, value in teachers(runs, metric).items()]
    return chart(title, f"{title}. {' '.join(says)}", COUNTERS[counter], series, levels=levels)


@dataclass(frozen=True)
class Row:
    """A run's line of the final table; figures at the best snapshot where they don't say which."""

    number: int
    run: Run
    method: str
    ratio: str
    guidance: str
    start: float
    best: float
    end: float
    over_teacher: float | None
    accuracy: float | None
    images: float | None
    seconds: float | None
    wanted: str


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings in which the runs differ, with each run's value; a method's own are empty for others."""
    names = sorted({name for run in runs for name in run.settings if not name.startswith(_NO_SETTING)})
    values = {name: [run.settings.get(name, "") for run in runs] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def row(number: int, run: Run) -> Row:
    """A run's line of the final table."""
    metric, best = run.metric, run.figures[run.best]
    teacher = run.teacher.get(metric.replace("eval/", "eval/teacher_"))
    return Row(
        number=number,
        run=run,
        method=run.settings.get("method.kind", "unknown"),
        ratio=run.settings.get(RATIO, "unknown"),
        guidance=run.settings.get(GUIDANCE, "unknown"),
        start=run.figures[min(run.figures)][metric],
        best=best[metric],
        end=run.figures[max(run.figures)][metric],
        over_teacher=best[metric] / teacher if teacher else None,
        accuracy=None if run.accuracy is None else best[run.accuracy],
        images=run.at("images", run.updates),
        seconds=run.at("time/train_s", run.updates),
        wanted=run.settings.get("train.generator_updates", "unknown"),
    )


def front(runs: Sequence[Run]) -> list[Run]:
    """The runs that no other beats in both quality and accuracy, best quality first; none without an accuracy."""
    best_accuracy, found, name = -math.inf, list[Run](), runs[0].accuracy
    if name is None:
        return found
    for run in sorted(
        runs, key=lambda run: (run.figures[run.best][run.metric], -run.figures[run.best][name])
    ):
        accuracy = run.figures[run.best][name]
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            found.append(run)
    return found


def front_chart(runs: Sequence[Run]) -> Chart | None:
    """Quality against accuracy of each run's best snapshot, the front joined; None for a single run, or without an
    accuracy."""
    metric, accuracy, on_it = runs[0].metric, runs[0].accuracy, front(runs)
    if len(runs) < 2 or accuracy is None:
        return None

    def point(run: Run) -> tuple[float, float, str]:
        x, y = run.figures[run.best][metric], run.figures[run.best][accuracy]
        return x, y, f"{run.name}, guidance {run.settings.get(GUIDANCE)}: {x:.4g}, {y:.4g}"

    several = len({run.settings.get(GUIDANCE) for run in runs}) > 1
    joined = Series(None, [point(run) for run in on_it], dots=False)
    dots = [
        Series(number, [point(run)], line=False, labels=[run.settings.get(GUIDANCE, "")] * several)
        for number, run in enumerate(runs)
    ]
    own = teachers(runs, accuracy)
    teacher = [
        (x, own[name], f"{name}: {x:.4g}, {own[name]:.4g}") for name, x in teachers(runs, metric).items()
    ]
    says = f"{accuracy_word(runs[0])} against {quality_word(runs[0])}; on the front: " + ", ".join(
        point(run)[2] for run in on_it
    )
    series = [joined, *dots, Series(None, teacher, line=False)]
    title = f"{accuracy_word(runs[0])} against {quality_word(runs[0])}"
    return chart(title, says, f"{quality_word(runs[0])} (lower is better)", series, from_zero=False)


@dataclass(frozen=True)
class Cell:
    """A cell of the map: the best figure of `count` runs, and its colours."""

    value: float
    count: int
    says: str
    background: str
    ink: str


@dataclass(frozen=True)
class HeatMap:
    """A figure over ratio (rows) and guidance (columns)."""

    word: str
    ratios: list[float]
    guidances: list[float]
    cells: list[list[Cell | None]]


def heat_maps(runs: Sequence[Run]) -> list[HeatMap]:
    """Quality and accuracy over ratio and guidance; none if all runs share both."""
    found: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        ratio, guidance = run.number(RATIO), run.number(GUIDANCE)
        if ratio is not None and guidance is not None:
            found.setdefault((ratio, guidance), []).append(run)
    if len(found) < 2:
        return []
    maps = [_heat_map(found, runs[0].metric, quality_word(runs[0]), sign=1.0)]
    if runs[0].accuracy is not None:
        maps.append(_heat_map(found, runs[0].accuracy, accuracy_word(runs[0]), sign=-1.0))
    return maps


def _heat_map(found: dict[tuple[float, float], list[Run]], metric: str, word: str, sign: float) -> HeatMap:
    values = {
        at: sign * min(sign * run.figures[run.best][metric] for run in there) for at, there in found.items()
    }
    good, bad = sorted((min(values.values()), max(values.values())), reverse=sign < 0)

    def cell(at: tuple[float, float]) -> Cell | None:
        if at not in values:
            return None
        share = (bad - values[at]) / (bad - good) if bad != good else 1.0
        colour = [round(pale + share * (deep - pale)) for pale, deep in zip(_PALE, _DEEP, strict=True)]
        names = ", ".join(run.name for run in found[at])
        return Cell(values[at], len(found[at]), names, f"rgb({colour[0]} {colour[1]} {colour[2]})",
                    "#fff" if share > 0.5 else "#111")  # fmt: skip

    ratios, guidances = (sorted({at[axis] for at in values}) for axis in (0, 1))
    return HeatMap(
        word, ratios, guidances, [[cell((ratio, guidance)) for guidance in guidances] for ratio in ratios]
    )


def losses(runs: Sequence[Run]) -> list[tuple[Chart, str]]:
    """A small chart of each loss that a run logged, with what it means."""
    found = []
    for name in LOSSES:
        series = [
            Series(number, [(step, value, run.name) for step, value in _means(run.points[name])], dots=False)
            for number, run in enumerate(runs)
        ]
        drawn = chart(name, f"{name} against generator updates: {METRICS[name]}", "generator updates", series)
        if drawn is not None:
            found.append((drawn, METRICS[name]))
    return found


def _means(points: Points) -> list[tuple[float, float]]:
    """At most so many points as a small chart has room for."""
    size = -(-len(points) // _BUCKETS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (statistics.fmean(step for step, _ in part), statistics.fmean(value for _, value in part))
        for part in parts
    ]
