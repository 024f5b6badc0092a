"""What the command line does with a finished or interrupted run: sample, evaluate, export."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from raydistill.checkpoint import Snapshot, Snapshots
from raydistill.config import apply_overrides
from raydistill.diffusion.random import Draws
from raydistill.errors import ConfigError
from raydistill.eval.grids import grid_png
from raydistill.eval.protocol import to_uint8
from raydistill.eval.published import TOY
from raydistill.models.denoiser import Denoiser
from raydistill.models.diffusers_export import LORA_FILE, push_folder, require_pushable, write_single_file
from raydistill.models.diffusers_hub import import_diffusers, local_folder
from raydistill.models.edm_pipeline import is_edm, load_edm_pipeline
from raydistill.models.pipeline import Pipeline
from raydistill.roles.generator import Weights, generator_adapter, generator_weights
from raydistill.runtime.build import build_method, build_pipeline
from raydistill.runtime.run import resolve
from raydistill.runtime.services import build_evaluator, require_evaluation
from raydistill.runtime.settings import RunConfig, config_from_dict, teacher_folder
from raydistill.runtime.summary import EXPORT_FILE, export_snapshot, open_export
from raydistill.tracking import download_model


def open_run(run: str, step: int | None, weights: Weights | None) -> tuple[RunConfig, Snapshot]:
    """Settings and snapshot of the run in a folder; the newest snapshot if no step is given.

    Raises ConfigError if the folder holds none.
    """
    folder = Path(run).resolve()
    snapshots = Snapshots(str(folder / "snapshots"), keep=1)
    snapshot = snapshots.latest() if step is None else snapshots.read(step)
    if snapshot is None:
        raise ConfigError(f"{run} holds no snapshot; give the folder of a run, e.g. runs/dmd2_coco")
    config = config_from_dict(snapshot.manifest["config"])
    config = replace(config, name=folder.name, output_dir=str(folder.parent))
    if weights is not None:
        config = replace(config, evaluator=replace(config.evaluator, weights=weights))
    if config.evaluator.weights == "ema" and config.generator.ema_halflife_images <= 0:
        raise ConfigError(f"{run} kept no EMA (generator.ema_halflife_images=0); use --weights raw")
    return config, snapshot


def sample(
    run: str,
    *,
    prompts: Sequence[str],
    out: str,
    num_images: int = 4,
    seed: int = 0,
    step: int | None = None,
    weights: Weights | None = None,
) -> Path:
    """Draw `num_images` images for each prompt with a run's generator and write them as one PNG grid."""
    config, snapshot = open_run(run, step, weights)
    pipeline = build_pipeline(config)
    pipeline.denoiser.load_state_dict(generator_weights(snapshot, config.evaluator.weights, lambda: pipeline))
    rows = []
    for number, prompt in enumerate(prompts):
        positions = range(number * num_images, (number + 1) * num_images)
        rows.append(
            (prompt, to_uint8(sample_images(config, pipeline, [prompt] * num_images, seed, positions)))
        )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(grid_png(rows, None))
    return path


@torch.no_grad()
def sample_images(
    config: RunConfig, pipeline: Pipeline, prompts: Sequence[str], seed: int, positions: Sequence[int]
) -> torch.Tensor:
    """Images [n, 3, H, W] in about [-1, 1]; sample n's noise depends on seed and positions[n] only."""
    method = build_method(config, pipeline)
    cond = pipeline.encode_text(prompts)
    draws = Draws(seed)
    latents = method.sample(
        pipeline.denoiser,
        cond,
        draws.normal("sample/noise", 0, positions, pipeline.latent_shape),
        lambda number: draws.normal(f"sample/renoise_{number}", 0, positions, pipeline.latent_shape),
    )
    return pipeline.decode(latents)


def evaluate(
    run: str,
    *,
    num_samples: int | None = None,
    step: int | None = None,
    weights: Weights | None = None,
    tracking_uri: str | None = None,
    settings: Sequence[str] = (),
) -> dict[str, object]:
    """Figures of a generator and (evaluator.teacher_figure) of its teacher, with the protocol's hash.

    run: folder of a run, of an export, or a registered model (models:/NAME@best) of the MLflow at `tracking_uri`.
    settings: evaluator.NAME=VALUE, other ones than the run's.
    """
    if others := [text for text in settings if not text.startswith("evaluator.")]:
        raise ConfigError(
            f"{others[0]!r}: only settings of the evaluator (evaluator.NAME=VALUE) can be changed here"
        )
    if run.startswith("models:/"):
        with TemporaryDirectory(prefix="raydistill-") as folder:
            config, update, generator = open_export(download_model(run, tracking_uri, folder))
    elif (Path(run) / EXPORT_FILE).is_file():
        config, update, generator = open_export(Path(run))
    else:
        config, snapshot = open_run(run, step, weights)
        teacher = partial(build_pipeline, config)
        update = snapshot.step
        generator = generator_weights(snapshot, config.evaluator.weights, teacher)
        step = weights = None
    if step is not None or weights is not None:
        raise ConfigError(f"{run} is one export of update {update}: leave --step and --weights out")
    config = _evaluated_by(config, settings, num_samples)
    require_evaluation(config)
    evaluator = build_evaluator(config)
    figures: dict[str, object] = dict(evaluator.figures(generator))
    if config.evaluator.teacher_figure:
        figures |= evaluator.evaluate_teacher().metrics
    protocol = {"protocol": evaluator.protocol.name, "protocol_hash": evaluator.protocol.hash()}
    return figures | {"step": update} | protocol


def _evaluated_by(config: RunConfig, settings: Sequence[str], num_samples: int | None) -> RunConfig:
    """The run with other settings of its evaluator, which shows no picture and chooses no snapshot here."""
    config = replace(config, evaluator=replace(config.evaluator, grid_images=1, best_by="toyfid"))
    config = resolve(apply_overrides(config, settings))
    if num_samples is None:
        return config
    protocol = config.evaluator.protocol
    if protocol == TOY:
        return replace(config, evaluator=replace(config.evaluator, num_samples=num_samples))
    shorter = f"{protocol.partition('@')[0]}@{num_samples}"
    return replace(config, evaluator=replace(config.evaluator, protocol=shorter))


def export(
    run: str,
    out: str,
    *,
    step: int | None = None,
    weights: Weights | None = None,
    single_file: str | None = None,
    push_to: str | None = None,
) -> Path:
    """Write a run's generator as a diffusers folder, and where asked for as one file and to a hub id.

    Raises ConfigError if `out` exists, the teacher is none of diffusers' where that is needed, or the Hub refuses.
    """
    if push_to is not None:
        require_pushable(push_to)
    if Path(out).exists():
        raise ConfigError(f"{out} exists already; give a new folder")
    config, snapshot = open_run(run, step, weights)
    if single_file is not None and is_edm(teacher_folder(config.teacher)):
        raise ConfigError(
            f"--single-file {single_file} is for diffusers teachers; model.safetensors in {out} is one"
        )
    written = export_snapshot(config, snapshot, Path(out))
    if single_file is not None:
        method = build_method(config, build_pipeline(config))
        about = {
            "base_model": config.teacher.path,
            "timesteps": ",".join(f"{t:g}" for t in method.sampling_times),
            "generator_update": str(snapshot.step),
        }
        write_single_file(
            generator_weights(snapshot, config.evaluator.weights, partial(build_pipeline, config)),
            Path(single_file),
            about,
        )
    if push_to is not None:
        push_folder(written, push_to)
    return written


@torch.no_grad()
def export_difference(
    run: str,
    out: str,
    *,
    prompts: Sequence[str],
    step: int | None = None,
    weights: Weights | None = None,
    seed: int = 0,
) -> float:
    """Largest difference between the images of an exported folder, in plain diffusers where it is one of its, and the
    run's own; where it holds a LoRA too, also those of the teacher with that.

    One image a prompt, values from 0 to 1, the same noise for both.
    """
    config, snapshot = open_run(run, step, weights)
    pipeline = build_pipeline(config)
    pipeline.denoiser.load_state_dict(generator_weights(snapshot, config.evaluator.weights, lambda: pipeline))
    method, cond = build_method(config, pipeline), pipeline.encode_text(prompts)
    noise = Draws(seed).normal("sample/noise", 0, range(len(prompts)), pipeline.latent_shape)

    def images(denoiser: Denoiser) -> torch.Tensor:
        fresh = torch.Generator().manual_seed(seed)
        latents = method.sample(
            denoiser, cond, noise, lambda number: torch.randn(noise.shape, generator=fresh)
        )
        return (pipeline.decode(latents) / 2 + 0.5).clamp(0, 1)

    expected = images(pipeline.denoiser)
    if is_edm(out):
        return float((images(load_edm_pipeline(out).denoiser) - expected).abs().max())
    found = [out] if generator_adapter(snapshot, config.evaluator.weights) is None else [out, LORA_FILE]
    difference = 0.0
    for source in found:
        base = str(local_folder(teacher_folder(config.teacher), config.teacher.revision))
        loaded = _plain_diffusers(base if source == LORA_FILE else out)
        if source == LORA_FILE:
            loaded.load_lora_weights(out, weight_name=LORA_FILE)
            loaded.scheduler = _plain_diffusers(out).scheduler
        theirs = loaded(
            list(prompts), num_inference_steps=len(method.sampling_times), guidance_scale=1.0,
            latents=noise, generator=torch.Generator().manual_seed(seed), output_type="pt",
        ).images  # fmt: skip
        difference = max(difference, float((theirs - expected).abs().max()))
    return difference


def _plain_diffusers(folder: str) -> Any:
    with warnings.catch_warnings():
        # of steps_offset, which is what the teacher was trained with
        warnings.simplefilter("ignore", FutureWarning)
        loaded = import_diffusers().DiffusionPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded
