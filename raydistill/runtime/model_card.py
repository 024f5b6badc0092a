"""The README.md of an exported folder: how to sample it, what made it, its figures with their protocol, its picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydistill.checkpoint import Snapshot
from raydistill.config import flatten
from raydistill.errors import CheckpointError
from raydistill.methods.method import Method
from raydistill.models.diffusers_export import LORA_FILE, SINGLE_FILE
from raydistill.models.edm_pipeline import is_edm
from raydistill.runtime.session import LEDGER
from raydistill.runtime.settings import RunConfig, teacher_folder, without_secret_settings

CARD = "README.md"
_PICTURE = "grid.png"
_RECIPE = ("teacher.", "method.", "generator.", "critic.", "train.", "seed")
"""Settings that make the weights what they are."""


def write_card(config: RunConfig, method: Method, snapshot: Snapshot, out: Path) -> None:
    """Write the card of an exported folder and, where the run made one, its picture.

    Raises CheckpointError if they can't be written.
    """
    folder, step = Path(config.run_dir), snapshot.step
    ledger = folder / LEDGER
    figures: dict[str, Any] = json.loads(ledger.read_text()).get(str(step), {}) if ledger.is_file() else {}
    picture = folder / "artifacts" / "grids" / f"grid_{step:08d}.png"
    evaluated = figures.get("protocol", {}).get("weights") == config.evaluator.weights
    has_picture = evaluated and picture.is_file()
    try:
        if has_picture:
            shutil.copyfile(picture, out / _PICTURE)
        (out / CARD).write_text(card(config, method, snapshot, figures if evaluated else {}, has_picture))
    except OSError as error:
        raise CheckpointError(f"can't write the exported folder {out} (output_dir): {error}") from error


def card(
    config: RunConfig, method: Method, snapshot: Snapshot, figures: Mapping[str, Any], has_picture: bool
) -> str:
    """The card's text; figures: the evaluation ledger's entry of the snapshot."""
    steps = len(method.sampling_times)
    times = ", ".join(f"{t:g}" for t in method.sampling_times)
    edm = is_edm(teacher_folder(config.teacher))
    progress = snapshot.manifest["progress"]
    lines = [
        "---",
        *([] if edm else ["library_name: diffusers", "pipeline_tag: text-to-image"]),
        *([f"base_model: {config.teacher.path}"] if _is_hub_id(config.teacher.path) else []),
        "tags: [raydistill, distillation, few-step]",
        "---",
        "",
        f"# {config.name}",
        "",
        f"A generator of {steps} step{'s' * (steps > 1)}, distilled from `{config.teacher.path}` by "
        f"{config.method.label} with raydistill.",
        "",
        *(
            _edm_usage(times)
            if edm
            else _diffusers_usage(steps, times, lora=bool(config.generator.lora_rank))
        ),
        "",
        "## Figures",
        "",
        *_figures(figures),
        "",
        "## Recipe",
        "",
        f"Generator update {progress['generator_updates']}, {progress['critic_updates']} critic updates, "
        f"{progress['images']} generated images; weights: {config.evaluator.weights}; teacher's weights sha256 "
        f"`{snapshot.manifest['teacher_fingerprint']}`. All settings are in `raydistill.json`.",
        "",
        "| setting | value |",
        "|---|---|",
        *(
            f"| {name} | `{_cell(value)}` |"
            for name, value in flatten(without_secret_settings(config)).items()
            if name.startswith(_RECIPE)
        ),
        "",
    ]
    if has_picture:
        lines += ["## Samples", "", f"![Samples of the same noise]({_PICTURE})", ""]
    return "\n".join(lines)


def _diffusers_usage(steps: int, times: str, *, lora: bool) -> list[str]:
    adapter = [
        "",
        f"`{LORA_FILE}` is the same as an adapter for the teacher's own pipeline, with the scheduler of this folder: "
        '`pipeline.load_lora_weights("THIS FOLDER")`.',
    ]
    return [
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        'pipeline = DiffusionPipeline.from_pretrained("THIS FOLDER")',
        f'image = pipeline("a prompt", num_inference_steps={steps}, guidance_scale=1.0).images[0]',
        "```",
        "",
        f"The scheduler in the folder visits timesteps {times}. No guidance: it is distilled in. The generator alone "
        f"is `{SINGLE_FILE}`, one file by the names of diffusers' UNet2DConditionModel.",
        *(adapter if lora else []),
    ]


def _edm_usage(times: str) -> list[str]:
    return [
        f"`edm.json` and `model.safetensors` are what raydistill's `teacher.path` takes; noise levels: {times}.",
    ]


def _figures(entry: Mapping[str, Any]) -> list[str]:
    if entry.get("state") != "done":
        return ["These weights were not evaluated."]
    protocol = entry["protocol"]
    return [
        "| figure | value |",
        "|---|---|",
        *(
            f"| {name.removeprefix('eval/')} | {value:.4g} |"
            for name, value in entry["metrics"].items()
            if name != "eval/seconds"
        ),
        "",
        "They may be compared with figures of the same protocol only:",
        "",
        "| protocol | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in protocol.items()),
    ]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/")) and not Path(path).exists()
