"""What a finished run leaves: summary.json, the exported generator, and the table on the screen."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydistill.checkpoint import Snapshot, Snapshots
from raydistill.config import to_dict
from raydistill.diffusion.schedules import EDMSchedule
from raydistill.errors import CheckpointError, ConfigError
from raydistill.eval.protocol import cost, count_label, second_figure
from raydistill.methods.method import Method
from raydistill.models.diffusers_export import (
    export_pipeline,
    exported_weights,
    few_step_scheduler,
    require_exportable,
)
from raydistill.models.diffusers_hub import scheduler_config
from raydistill.models.edm_pipeline import edm_on_meta, is_edm, load_edm_pipeline, save_edm
from raydistill.models.lora import for_diffusers
from raydistill.models.random_sd import is_random_sd
from raydistill.roles.generator import generator_adapter, generator_weights
from raydistill.runtime.build import build_pipeline, denoiser_on_meta, method_for
from raydistill.runtime.model_card import write_card
from raydistill.runtime.session import LEDGER, TEACHER_STEP
from raydistill.runtime.settings import RunConfig, config_from_dict, teacher_folder, without_secret_settings
from raydistill.tracking import OFF, register_model, without_secrets

log = logging.getLogger(__name__)

EXPORT_FILE = "raydistill.json"
"""In an exported folder: what it was exported from, so that it can be evaluated as its run did."""


def summarise(config: RunConfig, run_id: str) -> Path:
    """Write runs/<name>/summary.json and export the best snapshot; returns the summary's path."""
    folder = Path(config.run_dir)
    snapshots = Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep)
    last = snapshots.read(snapshots.steps()[-1])
    progress = last.manifest["progress"]
    method = _method(config)
    summary: dict[str, Any] = {
        "name": config.name,
        "run_dir": config.run_dir,
        "method": config.method.label,
        "generator_updates": progress["generator_updates"],
        "critic_updates": progress["critic_updates"],
        "images": progress["images"],
        "wall_s": round(progress["train_s"], 2),
        "generator_steps": len(method.sampling_times),
        "guidance_scale": config.teacher.guidance_scale,
        "teacher": config.teacher.path,
        "teacher_steps": config.evaluator.teacher_steps,
        "teacher_figure": config.evaluator.teacher_figure,
        "teacher_sampler": "Heun" if isinstance(method.schedule, EDMSchedule) else "DDIM",
        "seed": config.seed,
        "mlflow_uri": without_secrets(config.tracking.uri or f"sqlite:///{config.output_dir}/mlflow.db"),
        "mlflow_run_id": run_id,
    }
    best = last
    if config.evaluator.enabled:
        figures, best_step = _figures(config, last.step)
        summary |= figures
        if best_step is not None:
            best = snapshots.read(best_step)
    try:
        exported = export_snapshot(config, best, folder / "export")
        summary |= {"exported_step": best.step, "export": str(exported)}
    except (ConfigError, CheckpointError) as error:  # told of at the start (timesteps), or a full disk
        summary |= {"exported_step": None, "export": None, "export_error": str(error)}
    if config.tracking.register_as and summary["export"]:
        summary["registered"] = register_export(
            config, config.tracking.register_as, best.step, exported, run_id
        )
    path = folder / "summary.json"
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(f"can't write {path} (output_dir): {error.strerror or error}") from error
    return path


def register_export(config: RunConfig, name: str, step: int, folder: Path, run_id: str) -> str | None:
    """Make the exported snapshot of `step` a version of the registered model `name`, its alias "best".

    Returns models:/NAME/VERSION, or None, after a warning, where MLflow can't take it.
    """
    snapshot = Snapshots(f"{config.run_dir}/snapshots", config.checkpoint.keep).read(step)
    tags = {
        "method": config.method.label,
        "teacher": config.teacher.path,
        "teacher_fingerprint": snapshot.manifest["teacher_fingerprint"],
        "guidance_scale": config.teacher.guidance_scale,
        "generator_update": step,
    }
    if config.evaluator.enabled:
        entry = json.loads((Path(config.run_dir) / LEDGER).read_text()).get(str(step), {})
        metric = config.evaluator.best_metric
        if metric in entry.get("metrics", {}):
            tags |= {
                "metric": metric,
                "metric_value": entry["metrics"][metric],
                "protocol_hash": entry["protocol"]["hash"],
            }
    version = register_model(config.tracking, name, folder, run_id, tags)
    return None if version is None else f"models:/{name}/{version}"


def warn_if_not_exportable(config: RunConfig) -> None:
    """Say before training what the export at its end would find out. Raises ConfigError if a diffusers teacher is not
    there."""
    if is_edm(teacher_folder(config.teacher)):
        return
    path = teacher_folder(config.teacher)
    scheduler = {} if is_random_sd(path) else scheduler_config(path, revision=config.teacher.revision)
    try:
        require_exportable(path)
        few_step_scheduler(scheduler, _timesteps(_method(config)))
    except ConfigError as error:
        log.warning("the generator can be trained and sampled, but not exported: %s", error)


def export_snapshot(config: RunConfig, snapshot: Snapshot, out: Path) -> Path:
    """Write a snapshot's generator (the weights that are evaluated) as a diffusers folder, or as the folder of an EDM
    network beside which its noise levels stand."""
    weights = generator_weights(snapshot, config.evaluator.weights, partial(build_pipeline, config))
    adapter = generator_adapter(snapshot, config.evaluator.weights)
    method = _method(config)
    path = teacher_folder(config.teacher)
    if not is_edm(path):
        export_pipeline(
            path,
            weights,
            out,
            timesteps=_timesteps(method),
            prediction=config.teacher.prediction,
            revision=config.teacher.revision,
            lora=for_diffusers(*adapter) if adapter else None,
        )
    else:
        made = {
            "method": config.method.kind,
            "sampler": method.sampler,
            "sigmas": list(method.sampling_times),
        }
        save_edm(out, edm_on_meta(path)[0].config, weights, {"generator": made})
    described = {
        "generator_update": snapshot.step,
        "config": to_dict(without_secret_settings(config)),
    }
    try:
        (out / EXPORT_FILE).write_text(json.dumps(described, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(f"can't write the exported folder {out} (output_dir): {error}") from error
    write_card(config, method, snapshot, out)
    return out


def open_export(folder: Path) -> tuple[RunConfig, int, dict[str, Tensor]]:
    """Settings, generator update and weights of a folder that `export_snapshot` wrote. Raises ConfigError."""
    try:
        described = json.loads((folder / EXPORT_FILE).read_text())
        config, step = config_from_dict(described["config"]), int(described["generator_update"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{folder / EXPORT_FILE} does not describe an exported generator: {error}"
        ) from error
    if is_edm(str(folder)):
        return config, step, dict(load_edm_pipeline(str(folder)).denoiser.state_dict())
    return config, step, exported_weights(folder)


def _timesteps(method: Method) -> tuple[float, ...]:
    """Where diffusers is to run the generator. Raises ConfigError for a method that no scheduler of its samples."""
    first = float(method.pure_noise(torch.ones(1, 1, 1, 1)))
    if method.sampler != "few_step" or first != 1.0:
        raise ConfigError(
            f"diffusers' schedulers begin with noise of standard deviation 1 and put fresh noise on x0 between steps; "
            f"this method begins with {first:.4g} and samples by {method.sampler} (method.kind)"
        )
    return method.sampling_times


def _method(config: RunConfig) -> Method:
    return method_for(config, denoiser_on_meta(config)[0].schedule)


def _figures(config: RunConfig, last_step: int) -> tuple[dict[str, Any], int | None]:
    """Figures, None where an evaluation failed, and the best evaluated step."""
    ledger = json.loads((Path(config.run_dir) / LEDGER).read_text())
    quality, judged = config.evaluator.quality, config.evaluator.best_metric
    metric, label = config.evaluator.figures[quality], count_label(config.evaluator.samples)
    done = {int(s): e["metrics"] for s, e in ledger.items() if e["state"] == "done"}
    teacher = done.pop(TEACHER_STEP, {})
    best = min(done, key=lambda step: cost(judged, done[step][judged]), default=None)
    start, end = done.get(0, {}), done.get(last_step, {})
    figures = {
        "protocol": config.evaluator.protocol,
        "quality": quality,
        f"{quality}_start": start.get(metric),
        f"{quality}_end": end.get(metric),
        f"{quality}_best": done[best][metric] if best is not None else None,
        f"{quality}_teacher": teacher.get(f"eval/teacher_{quality}_{label}"),
        f"{quality}_samples": config.evaluator.samples,
        "accuracy": None,
        "best_step": best,
        "curve": [[step, done[step][metric]] for step in sorted(done)],
        "evaluations_failed": {s: e["error"] for s, e in ledger.items() if e["state"] == "failed"},
    }
    accuracy = second_figure(config.evaluator.figures.values())
    if accuracy is not None:
        measured = accuracy.removeprefix("eval/").removesuffix(f"_{label}")
        figures |= {
            f"{measured}_start": start.get(accuracy),
            measured: end.get(accuracy),
            f"{measured}_teacher": teacher.get(f"eval/teacher_{measured}_{label}"),
            f"{measured}_samples": config.evaluator.samples,
            "accuracy": measured,
            "curve": [[step, done[step][metric], done[step][accuracy]] for step in sorted(done)],
        }
    return figures, best


def _cell(value: float | None) -> str:
    return "failed" if value is None else f"{value:.3f}"


def _where_to_compare(uri: str, run_dir: str) -> str:
    if uri == OFF:
        return f"{run_dir}/metrics.jsonl (tracking.uri={OFF})"
    if uri.startswith("http"):
        return uri
    return f"{Path(sys.executable).with_name('mlflow')} ui --host 127.0.0.1 --backend-store-uri {uri}"


def _figure_lines(summary: dict[str, Any], steps: int) -> list[str]:
    """A column for each of the main figures."""
    quality, measured = summary["quality"], summary["accuracy"]
    n = summary[f"{quality}_samples"]
    sampled = f"{summary['teacher_steps']} {summary['teacher_sampler']} steps"
    generator = f"generator, {steps} step{'s' * (steps > 1)}"
    rows = [(f"{generator}, start", f"{quality}_start", f"{measured}_start"),
            (f"{generator}, end", f"{quality}_end", f"{measured}")]  # fmt: skip
    if summary["teacher_figure"]:
        teacher = f"teacher, {sampled}, guidance {summary['guidance_scale']:g}"
        rows.append((teacher, f"{quality}_teacher", f"{measured}_teacher"))
    second = f"{f'{measured} ({n})'.replace('_', ' '):>24}" if measured else ""
    lines = [f"{'':<42}{f'{quality} ({n})':>14}{second}"]
    for label, first, other in rows:
        cell = f"{_cell(summary[other]):>24}" if measured else ""
        lines.append(f"{label:<42}{_cell(summary[first]):>14}{cell}")
    return lines


def table(summary: dict[str, Any]) -> str:
    """The result as a person wants to read it."""
    steps = summary["generator_steps"]
    lines = [
        f"{summary['name']}: {summary['method']}, {summary['generator_updates']} generator updates, "
        f"{summary['critic_updates']} critic updates, {summary['images']} images, {summary['wall_s']:.0f} s of training"
    ]
    if "quality" in summary:
        lines += _figure_lines(summary, steps)
        lines += [
            f"the evaluation of {'the teacher' if int(step) == TEACHER_STEP else f'update {step}'} failed: {error}"
            for step, error in summary["evaluations_failed"].items()
        ]
    if summary["export"] is None:
        lines.append(f"not exported: {summary['export_error']}")
    else:
        lines.append(f"exported: {summary['export']} (update {summary['exported_step']})")
    if "registered" in summary:
        lines.append(f"registered: {summary['registered'] or 'not, see the warning'}")
    lines.append(f"compare runs: {_where_to_compare(summary['mlflow_uri'], summary['run_dir'])}")
    return "\n".join(lines)
