"""Several runs under one parent in MLflow, a table, and a plot: what a comparison of methods or settings is made of."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from raydistill.config import to_dict
from raydistill.errors import ConfigError, TrainingError
from raydistill.eval.protocol import METHOD_PROTOCOL, Protocol, require_same
from raydistill.runtime.prepare import prepare_builtin, prepare_shards
from raydistill.runtime.run import resolve, run
from raydistill.runtime.services import require_evaluation
from raydistill.runtime.session import LEDGER, TEACHER_STEP
from raydistill.runtime.settings import RunConfig, config_from_dict, validate
from raydistill.runtime.signals import on_sigterm
from raydistill.tracking import Tracker, previous_run_id, require_store

Summary = dict[str, Any]


def compare(
    name: str, configs: Sequence[RunConfig], *, at_once: int, threads: int = 1
) -> tuple[list[Summary], Tracker]:
    """Run all, `at_once` at a time in processes of `threads` threads each, under a parent run of this name.

    Each goes on from its newest snapshot; one that is complete is read. Returns their summaries, in order, and the
    parent's tracker, which the caller finishes. Raises ConfigError if two share a name or if their figures can't be
    compared, TrainingError if a run's process is killed, and whatever a run raises.
    """
    names = [config.name for config in configs]
    if doubled := {each for each in names if names.count(each) > 1}:
        raise ConfigError(f"runs of a comparison need names of their own: {', '.join(sorted(doubled))}")
    configs = [resolve(config) for config in configs]
    for config in configs:
        validate(config)
        require_evaluation(config)
    if len(protocols := {config.evaluator.protocol: config.name for config in configs}) > 1:
        differing = ", ".join(f"{protocol} ({run})" for protocol, run in protocols.items())
        raise ConfigError(
            f"figures of different protocols can't be compared, evaluator.protocol is {differing}"
        )
    first = configs[0]
    require_store(first.tracking, first.run_dir)
    for config in configs:
        prepare_builtin(config)
        prepare_shards(config)
    folder = f"{first.output_dir}/{name}"
    Path(folder).mkdir(parents=True, exist_ok=True)
    parent = Tracker(first.tracking, folder, name, run_id=previous_run_id(folder))
    parent.params({"runs": json.dumps(names)})
    children = [
        replace(
            config,
            tracking=replace(config.tracking, parent_run_id=parent.run_id if parent.uri else None),
            placement=replace(config.placement, session="inline", workers=1),
            evaluator=replace(config.evaluator, threads=threads),
        )
        for config in configs
    ]
    done: dict[str, Summary] = {}
    bar = tqdm(total=len(children), desc=name, unit="run")
    try:
        with (
            on_sigterm(_stop_children),
            ProcessPoolExecutor(at_once, get_context("spawn"), _few_threads, (threads,)) as pool,
        ):
            # handed out one by one: what the pool holds in advance it would begin after an error, or after SIGTERM
            rest, running = iter(children), dict[Future[Summary], str]()
            while len(done) < len(children):
                for child in islice(rest, at_once - len(running)):
                    running[pool.submit(_run, to_dict(child))] = child.name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done[running.pop(future)] = future.result()
                    bar.update()
        require_same([_protocol(config) for config in children], METHOD_PROTOCOL)
        for summary in done.values():
            quality = summary["quality"]
            if summary[f"{quality}_start"] is None or summary[f"{quality}_end"] is None:
                failed = "; ".join(f"update {s}: {e}" for s, e in summary["evaluations_failed"].items())
                raise ConfigError(f"{summary['name']} has no figure to compare: {failed}")
    except BrokenProcessPool as error:
        parent.finish("FAILED")
        raise TrainingError(
            f"a run's process was killed from outside (for want of memory?); {len(done)} of {len(children)} "
            "runs are complete. Start the same command again: each goes on from its newest snapshot"
        ) from error
    except BaseException:
        parent.finish("FAILED")
        raise
    finally:
        bar.close()
    return [done[each] for each in names], parent


def _stop_children() -> None:
    """Each with a snapshot; SIGTERM to this process by itself would leave them running."""
    for child in active_children():
        child.terminate()


def _few_threads(threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _run(settings: Mapping[str, Any]) -> Summary:
    return run(config_from_dict(dict(settings)))


def _protocol(config: RunConfig) -> Protocol:
    """Of the generator's figures. Raises ConfigError where it or its teacher has none."""
    ledger = json.loads((Path(config.run_dir) / LEDGER).read_text())
    teacher = ledger.pop(str(TEACHER_STEP), {})
    if config.evaluator.teacher_figure and teacher.get("state") != "done":
        raise ConfigError(f"the teacher's figure of {config.name} is missing: {teacher.get('error')}")
    entry = next((entry for entry in ledger.values() if entry["state"] == "done"), None)
    if entry is None:
        failed = "; ".join(f"update {step}: {each.get('error')}" for step, each in ledger.items())
        raise ConfigError(f"{config.name} has no figure to compare: {failed}")
    return Protocol.from_dict({key: value for key, value in entry["protocol"].items() if key != "hash"})


def row(summary: Summary) -> dict[str, Any]:
    """A line of the table: where it began, where it came to, and what that cost."""
    quality, accuracy = summary["quality"], summary["accuracy"]
    return {
        "name": summary["name"],
        "method": summary["method"],
        "steps": summary["generator_steps"],
        "quality": quality,
        "accuracy": accuracy,
        f"{quality}_start": summary[f"{quality}_start"],
        f"{quality}_end": summary[f"{quality}_end"],
        f"{quality}_teacher": summary[f"{quality}_teacher"],
        **({accuracy: summary[accuracy]} if accuracy else {}),
        "generator_updates": summary["generator_updates"],
        "critic_updates": summary["critic_updates"],
        "images": summary["images"],
        "wall_s": summary["wall_s"],
        "seed": summary["seed"],
        "samples": summary[f"{quality}_samples"],
        "curve": summary["curve"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For the screen and for README, in Markdown."""
    quality, accuracy = rows[0]["quality"], rows[0]["accuracy"]
    n, own = rows[0]["samples"], rows[0][f"{quality}_teacher"]
    heads = [
        "run", "steps", f"{quality} ({n}), start", "end", "lower by", *["over the teacher's"] * (own is not None),
        *[accuracy.replace("_", " ")] * bool(accuracy), "images", "seconds",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for each in rows:
        start, end, teacher = (each[f"{quality}_{of}"] for of in ("start", "end", "teacher"))
        cells = [each["name"], str(each["steps"]), f"{start:.3f}", f"{end:.3f}", f"{start / end:.1f}x"]
        cells += [f"{end / teacher:.2f}x"] if own is not None else []
        cells += [f"{each[accuracy]:.3f}"] if accuracy else []
        lines.append("| " + " | ".join([*cells, str(each["images"]), f"{each['wall_s']:.0f}"]) + " |")
    if own is not None:
        lines.append(f"\nteacher: {own:.3f}")
    return "\n".join(lines)


def plot_png(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """The main distance against generated images, one curve a run, the teacher's figure as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for number, each in enumerate(rows):
        per_update = each["images"] / each["generator_updates"]
        points = [(step * per_update, value) for step, value, *_ in each["curve"]]
        axes.plot(
            *zip(*points, strict=True), marker="os^Dv"[number % 5], markersize=4, label=each["name"],
            linestyle="-" if number < 7 else "--",
        )  # fmt: skip
    quality = rows[0]["quality"]
    teacher = rows[0][f"{quality}_teacher"]
    if teacher is not None:
        axes.axhline(teacher, color="black", linestyle=":", label=f"teacher ({teacher:.3f})")
    axes.set(
        yscale="log",
        xlabel="images generated for training",
        ylabel=f"{quality} ({rows[0]['samples']} samples)",
        title=title,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
