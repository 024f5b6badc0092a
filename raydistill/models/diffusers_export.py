"""A generator as a diffusers folder that plain `DiffusionPipeline.from_pretrained` samples in its own few steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raydistill.errors import CheckpointError, ConfigError
from raydistill.models.diffusers_hub import import_diffusers, local_folder, read_json, scheduler_config

LORA_FILE = "pytorch_lora_weights.safetensors"
"""As diffusers calls it."""


def export_pipeline(
    teacher_path: str,
    weights: dict[str, Tensor],
    out: Path,
    *,
    timesteps: Sequence[float],
    prediction: str = "auto",
    revision: str | None = None,
    lora: dict[str, Tensor] | None = None,
) -> Path:
    """Write a diffusers folder that samples the generator in `len(timesteps)` steps.

    The teacher's folder with the UNet's weights replaced and, as scheduler, an LCMScheduler, whose step is the
    generator's own: x0, then re-noise to the next time.

    weights: of `UNetDenoiser` (names begin with "unet."). timesteps: descending, as trained. prediction: as the
    teacher was loaded with. lora: of a generator that was trained as one, by diffusers' names, written beside it for
    the teacher's own pipeline: `load_lora_weights(out)`.

    Raises ConfigError if the scheduler can't reproduce `timesteps`, CheckpointError if `out` can't be written.
    """
    folder = local_folder(teacher_path, revision)
    config = scheduler_config(teacher_path, prediction=prediction, revision=revision)
    scheduler = few_step_scheduler(config, timesteps)
    try:
        if out.exists():
            shutil.rmtree(out)
        ignored = shutil.ignore_patterns("unet", "scheduler", "figures.json")
        shutil.copytree(folder, out, ignore=ignored)
        model = import_diffusers().UNet2DConditionModel
        unet = model.from_config(model.load_config(folder / "unet"))
        unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()})
        unet.save_pretrained(out / "unet", safe_serialization=True)
        mode = (out / "unet" / "config.json").stat().st_mode
        for file in (out / "unet").glob("*.safetensors"):
            file.chmod(mode)  # safetensors leaves them to their owner alone
        scheduler.save_pretrained(out / "scheduler")
        index = read_json(out / "model_index.json", teacher_path)
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        if lora is not None:
            save_file(lora, out / LORA_FILE)
            (out / LORA_FILE).chmod(mode)
        (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't write the exported folder {out} (output_dir): {error}") from error
    return out


def exported_weights(folder: Path) -> dict[str, Tensor]:
    """The generator's weights in a folder that `export_pipeline` wrote, by the names of `UNetDenoiser`.

    Raises ConfigError if they can't be read.
    """
    try:
        unet = import_diffusers().UNet2DConditionModel.from_pretrained(folder / "unet")
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder / 'unet'} can't be read: {error}") from error
    return {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}


def few_step_scheduler(teacher_config: dict[str, Any], timesteps: Sequence[float]) -> Any:
    """An LCMScheduler that visits exactly `timesteps` when asked for `len(timesteps)` steps.

    Its grid begins at its last training timestep, so a generator that starts below the teacher's gets the teacher's
    betas up to there. Raises ConfigError for a grid that is not evenly spaced from its first timestep down.
    """
    kept = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    config = {name: teacher_config[name] for name in kept if name in teacher_config}
    wanted = [int(t) for t in timesteps]
    if any(t != float(whole) for t, whole in zip(timesteps, wanted, strict=True)):
        raise ConfigError(
            f"diffusers' schedulers step over whole timesteps, method.timesteps={tuple(timesteps)} has others"
        )
    num = wanted[0] + 1
    if num != config.get("num_train_timesteps", 1000):
        betas = (
            import_diffusers().DDPMScheduler(**config).betas[:num]
        )  # rescaled already where they are to be
        config |= {"num_train_timesteps": num, "trained_betas": [float(beta) for beta in betas]}
        config.pop("rescale_betas_zero_snr", None)
    # LCM's c_skip = sd^2/(s^2+sd^2) and c_out = s/sqrt(s^2+sd^2), s = scaling * t, tend to 0 and 1: x0 itself
    config |= {"set_alpha_to_one": True, "clip_sample": False, "timestep_scaling": 1e9}
    for steps in {num, len(wanted)}:
        scheduler = import_diffusers().LCMScheduler(**config, original_inference_steps=steps)
        scheduler.set_timesteps(len(wanted))
        if scheduler.timesteps.tolist() == wanted:
            return scheduler
    raise ConfigError(
        f"no diffusers scheduler visits the timesteps {wanted} in {len(wanted)} steps (method.timesteps); "
        "evenly spaced ones can be exported, e.g. 999,749,499,249"
    )
