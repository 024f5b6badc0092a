"""A generator as a diffusers folder that plain `DiffusionPipeline.from_pretrained` samples in its own few steps."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from raydistill.errors import CheckpointError, ConfigError
from raydistill.models.diffusers_hub import import_diffusers, local_folder, read_json, scheduler_config
from raydistill.models.random_sd import is_random_sd

SINGLE_FILE = "unet/diffusion_pytorch_model.safetensors"
"""The generator in an exported folder, however large."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

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

    Raises ConfigError if the scheduler can't reproduce `timesteps` or the teacher has no folder, CheckpointError if
    `out` can't be written.
    """
    require_exportable(teacher_path)
    folder = local_folder(teacher_path, revision)
    config = scheduler_config(teacher_path, prediction=prediction, revision=revision)
    scheduler = few_step_scheduler(config, timesteps)
    try:
        if out.exists():
            shutil.rmtree(out)
        # of a hub's folder also its half-precision copies and its own card
        ignored = shutil.ignore_patterns(
            "unet", "scheduler", "figures.json", "README.md", "*.fp16.*", "*.non_ema.*"
        )
        shutil.copytree(folder, out, ignore=ignored)
        model = import_diffusers().UNet2DConditionModel
        unet = model.from_config(model.load_config(folder / "unet"))
        unet.load_state_dict({name.removeprefix("unet."): tensor for name, tensor in weights.items()})
        unet.save_pretrained(out / "unet", safe_serialization=True, max_shard_size="1000GB")  # one file
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


def require_exportable(teacher_path: str) -> None:
    """Raise ConfigError for a teacher without a folder to copy tokenizers and autoencoder from."""
    if is_random_sd(teacher_path):
        raise ConfigError(
            f"teacher.path={teacher_path!r} has random weights, for measuring: its generators are not exported"
        )


def write_single_file(weights: dict[str, Tensor], file: Path, about: dict[str, str]) -> Path:
    """The generator alone as one safetensors file, by the names of diffusers' UNet2DConditionModel.

    weights: of `UNetDenoiser`. about: the file's metadata. Raises CheckpointError if it can't be written.
    """
    plain = {name.removeprefix("unet."): tensor.contiguous() for name, tensor in weights.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        mode = file.stat().st_mode
        save_file(plain, file, metadata=about)
        file.chmod(mode)  # safetensors leaves it to its owner alone
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"can't write --single-file {file}: {error}") from error
    return file


def require_pushable(hub_id: str) -> None:
    """Raise ConfigError unless `hub_id` is one and a token is at hand: before anything is written."""
    from huggingface_hub import get_token

    if not _HUB_ID.fullmatch(hub_id):
        raise ConfigError(f"--push-to {hub_id!r} must be of the form owner/name")
    if not get_token():
        raise ConfigError(
            f"--push-to {hub_id} needs a token of the Hub: set HF_TOKEN, or run `hf auth login`"
        )


def push_folder(folder: Path, hub_id: str) -> str:
    """Upload an exported folder as a private model of the Hub, which is made if it is not there; its address.

    Raises ConfigError, naming the Hub's answer, if it can't be done.
    """
    from huggingface_hub import HfApi

    require_pushable(hub_id)
    api = HfApi()
    try:
        where = api.create_repo(hub_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Exported by raydistill")
    except Exception as error:
        # huggingface_hub passes on errors of whatever HTTP library it uses; messages may quote what was sent
        raise ConfigError(
            f"--push-to {hub_id}: the Hub could not take it ({type(error).__name__}); {folder} is written"
        ) from None
    return str(where)


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
