r"""Time one generator update with its R critic updates; no Ray, on CPU or GPU.

    python jobs/bench_step.py --out step.json               the embedded size and an EDM-like pixel size
    python jobs/bench_step.py --size edm32 --batch 64 --gpu   CIFAR-10's 32x32 pixels, a UNet of 56 M parameters
    python jobs/bench_step.py --job jobs/dmd2_coco.py --out step.json   a job's own networks and settings
    python jobs/bench_step.py --job jobs/sid_cifar10.py --preset paper --batch 1 --updates 1 \
        teacher.path=random:edm-cifar10                                 published shapes, random weights
    raydistill plan jobs/dmd2_coco.py --role-times step.json            what they promise on many devices

Each size runs the trainer's own code on random-weight or shipped networks, standard-normal samples standing in for the
data, and prints median seconds of a warm update, forward equivalents by role as counted by hooks beside the plan's,
samples per second, peak memory beside the plan's, and the median seconds of each phase as the placements simulate them
(`raydistill plan --role-times`). Each size runs in a process of its own, so peaks don't mix.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

SIZES = {
    "scenes": "the embedded teacher: latents 4x8x8",
    "edm16": "pixels 3x16x16, UNet of about 1.5 M parameters",
    "edm32": "pixels 3x32x32, UNet of about 56 M parameters (EDM's CIFAR-10 size)",
}


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure(arguments, arguments.size[0])))
        return
    results = []
    for size in arguments.size:
        command = [sys.executable, __file__, "--child", "--updates", str(arguments.updates)]
        command += ["--job", arguments.job, *arguments.overrides] if arguments.job else ["--size", size]
        command += ["--preset", arguments.preset] if arguments.preset else []
        command += ["--ratio", str(arguments.ratio)] if arguments.ratio else []
        command += ["--dtype", arguments.dtype] if arguments.dtype else []
        command += ["--threads", str(arguments.threads)] if arguments.threads else []
        command += ["--batch", str(arguments.batch)] if arguments.batch else []
        command += [flag for flag, on in (("--gpu", arguments.gpu), ("--compile", arguments.compile)) if on]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(done.returncode)  # it has said why
        results.append(json.loads(done.stdout.splitlines()[-1]))
        show(results[-1])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")
        print(f"written: {arguments.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = "; ".join(f"{name}: {text}" for name, text in SIZES.items())
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["scenes", "edm16"], help=sizes)
    parser.add_argument("--job", metavar="JOB", help="a job file or a method's name, instead of a size")
    parser.add_argument("--preset", metavar="NAME", help="one of the job's other recipes")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="settings of the job")
    parser.add_argument(
        "--batch", type=int, help="samples of an update (scenes 64, edm16 16, edm32 16, the job's own)"
    )
    parser.add_argument(
        "--updates",
        type=int,
        default=5,
        help="measured updates after one to warm up (%(default)s); 0: the cold one alone, for its memory",
    )
    parser.add_argument(
        "--ratio", type=int, help="R, critic updates per generator update (5, or the job's own)"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        help="arithmetic of generator and critic (fp32, or the job's own)",
    )
    parser.add_argument("--threads", type=int, help="of the process (as torch chooses: one for each core)")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNets")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args()
    if any(text.startswith("-") for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides += rest
    if (arguments.overrides or arguments.preset) and not arguments.job:
        parser.error("--preset and settings are a job's: name it with --job")
    if arguments.job:
        arguments.size = ["/".join(filter(None, (Path(arguments.job).stem, arguments.preset)))]
    return arguments


def measure(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    import torch

    from raydistill.data.normal import NormalSource
    from raydistill.models.denoiser import parameter_count
    from raydistill.roles.world import World
    from raydistill.runtime import role_times
    from raydistill.runtime.plan import GIB, plan_for
    from raydistill.runtime.trainer import Trainer, peak_memory_gib

    device = torch.device("cuda" if arguments.gpu else "cpu")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = job_config(arguments) if arguments.job else size_config(arguments, size)
    if arguments.job:
        # what the libraries and their imports take is there before the networks are
        meta, shapes = job_meta(config)
        planned = plan_for(config, meta, shapes)
        baseline = reset_peak_gib(device)
        pipeline = job_pipeline(config)
    else:
        pipeline, meta, shapes = networks(size)
        planned = plan_for(config, meta, shapes)
        baseline = reset_peak_gib(device)
    batch, ratio = config.train.batch_size, config.method.critic_updates_per_generator

    def source(
        purpose: str, fields: tuple[str, ...], batch_size: int, micro_batch_size: int, world: World
    ) -> NormalSource:
        shapes_of_one = {"latent_shape": pipeline.latent_shape, "cond_shapes": shapes}
        return NormalSource(purpose, fields, batch_size, micro_batch_size, **shapes_of_one)

    class BenchSession:
        world = World()

        def __init__(self) -> None:
            self.device = device

        def scorer(self, pipeline: object) -> None:
            return None

    trainer = Trainer(config, BenchSession(), pipeline, source)  # type: ignore[arg-type]
    reset_peak_gib(device)  # a teacher is loaded in fp32, whatever teacher.dtype
    networks_by_role = {
        "generator": trainer.generator.denoiser, "critic": trainer.critic.critic.denoiser, "teacher": pipeline.denoiser,
    }  # fmt: skip
    # passes through a network that several roles share can't be told apart by its layers
    owners = [role for role in ("generator", "critic") if not getattr(config, role).lora]
    owners += ["teacher"] * (len(owners) == 2)
    counts = {role: Count(networks_by_role[role].network) for role in owners}
    if arguments.updates:
        trainer.window()
        for count in counts.values():
            count.reset()
    seconds = []
    for _ in range(arguments.updates or 1):
        synchronise(device)
        started = time.perf_counter()
        trainer.window()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    equivalents = {
        role: count.equivalents(planned.encoder_share) / batch / len(seconds)
        for role, count in counts.items()
    }
    peak = peak_memory_gib(device)
    phases = role_times.measure(trainer, arguments.updates) if arguments.updates else None
    result = {
        "size": size,
        "batch_size": batch,
        "critic_updates_per_generator": ratio,
        "parameters": parameter_count(meta),
        "dtype": config.train.dtype,
        "device": torch.cuda.get_device_name()
        if arguments.gpu
        else f"cpu, {torch.get_num_threads()} threads",
        "seconds_median": median,
        "seconds": seconds,
        "samples_per_s": batch * (ratio + trainer.method.critic_first) / median,
        "forward_equivalents": equivalents,
        "forward_equivalents_planned": planned.forwards,
        "planned_but_not_counted": [
            what
            for what, there in (
                ("what train.activation_checkpointing computes again", config.train.activation_checkpointing),
                ("the forward-mode part of a tangent", bool(trainer.method.needs.instant_critic)),
            )
            if there
        ],
        "peak_gib": peak - (0.0 if arguments.gpu else baseline),
        "peak_gib_planned": planned.total_bytes / GIB,
        "process_gib_before": baseline,
    }
    return result if phases is None else result | role_times.entry(phases, config, planned)


def size_config(arguments: argparse.Namespace, size: str) -> Any:
    """The settings of one of the built-in sizes."""
    from raydistill.data.reader import DataConfig
    from raydistill.methods.dmd2 import DMD2Config
    from raydistill.runtime.settings import RunConfig, TeacherConfig, TrainConfig

    return RunConfig(
        name="bench",
        teacher=TeacherConfig(guidance_scale=3.0 if size == "scenes" else 1.0),
        method=DMD2Config(critic_updates_per_generator=arguments.ratio or 5),
        train=TrainConfig(
            batch_size=arguments.batch or (64 if size == "scenes" else 16),
            dtype=arguments.dtype or "fp32",
            compile=arguments.compile,
        ),
        data=DataConfig(shards="standard-normal"),
    )


def job_config(arguments: argparse.Namespace) -> Any:
    """A job's settings on one device, its GAN on from the first update. Ends the process if the job is wrong."""
    from raydistill.cli import load_job
    from raydistill.config import apply_overrides
    from raydistill.errors import ConfigError, RayDistillError
    from raydistill.runtime.settings import PlacementConfig, validate

    try:
        recipe, presets = load_job(arguments.job)
        if arguments.preset and arguments.preset not in presets:
            raise ConfigError(
                f"--preset {arguments.preset!r} is unknown; valid: {', '.join(presets) or 'none'}"
            )
        recipe = presets[arguments.preset] if arguments.preset else recipe
        config = apply_overrides(recipe(), arguments.overrides)
        train = replace(
            config.train,
            batch_size=arguments.batch or config.train.batch_size,
            dtype=arguments.dtype or config.train.dtype,
            compile=arguments.compile or config.train.compile,
            generator_updates=10**6,
        )
        ratio = arguments.ratio or config.method.critic_updates_per_generator
        gates = ("gan_start_update", "generator_rest_updates", "regression_updates")
        from_the_first: dict[str, Any] = {name: 0 for name in gates if hasattr(config.method, name)}
        config = replace(
            config,
            train=train,
            method=replace(config.method, critic_updates_per_generator=ratio, **from_the_first),
            placement=PlacementConfig(session="inline"),
        )
        validate(config)
    except RayDistillError as error:
        sys.exit(f"bench_step: error: {error}")
    return config


def job_meta(config: Any) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A job's denoiser on the meta device, and the condition shapes of one sample."""
    from raydistill.errors import RayDistillError
    from raydistill.runtime.build import denoiser_on_meta

    try:
        return denoiser_on_meta(config)
    except RayDistillError as error:
        sys.exit(f"bench_step: error: {error}")


def job_pipeline(config: Any) -> Any:
    from raydistill.errors import RayDistillError
    from raydistill.runtime.build import build_pipeline

    try:
        return build_pipeline(config)
    except RayDistillError as error:
        sys.exit(f"bench_step: error: {error}")


def reset_peak_gib(device: Any) -> float:
    """Let the peak begin anew, where the system can (Linux), and return what this process holds now."""
    import torch

    from raydistill.runtime.trainer import peak_memory_gib

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_gib(device)


class Count:
    """Samples that pass through a U-Net, by hooks: forward and backward, whole or encoder half only."""

    def __init__(self, network: Any):
        import torch

        self.reset()
        convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
        convolutions[0].register_forward_hook(self._entered)
        convolutions[-1].register_forward_hook(self._left)

    def reset(self) -> None:
        self.forward = self.whole = 0
        self.backward_weights = self.backward_inputs = 0
        self.whole_backward_weights = self.whole_backward_inputs = 0

    def _entered(self, module: Any, inputs: Any, output: Any) -> None:
        self.forward += len(output)
        if output.requires_grad:
            weights, count = module.weight.requires_grad, len(output)
            output.register_hook(lambda gradient: self._back(count, weights, whole=False))

    def _left(self, module: Any, inputs: Any, output: Any) -> None:
        self.whole += len(output)
        if output.requires_grad:
            weights, count = module.weight.requires_grad, len(output)
            output.register_hook(lambda gradient: self._back(count, weights, whole=True))

    def _back(self, count: int, weights: bool, whole: bool) -> None:
        name = ("whole_" if whole else "") + ("backward_weights" if weights else "backward_inputs")
        setattr(self, name, getattr(self, name) + count)

    def equivalents(self, encoder_share: float) -> float:
        """Forward passes of one sample: 1 forward, 2 backward with weights, 1 with inputs only; encoder half: e."""

        def weigh(entered: int, whole: int) -> float:
            return whole + (entered - whole) * encoder_share

        return (
            weigh(self.forward, self.whole)
            + 2 * weigh(self.backward_weights, self.whole_backward_weights)
            + weigh(self.backward_inputs, self.whole_backward_inputs)
        )


def networks(size: str) -> tuple[Any, Any, dict[str, tuple[int, ...]]]:
    """(pipeline, its denoiser on the meta device, condition shapes of one sample)."""
    from raydistill.models.diffusers_hub import denoiser_on_meta, load_pipeline, random_pixel_pipeline
    from raydistill.runtime.settings import BUILTIN_TEACHERS

    if size == "scenes":
        folder = str(BUILTIN_TEACHERS["builtin:scenes"])
        return load_pipeline(folder), *denoiser_on_meta(folder)
    channels = {"edm16": (32, 64), "edm32": (128, 256, 256)}[size]
    layers = {"edm16": 2, "edm32": 4}[size]
    return random_pixel_pipeline(int(size.removeprefix("edm")), channels, layers)


def synchronise(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['size']}: batch {result['batch_size']}, R {result['critic_updates_per_generator']}, "
        f"{result['parameters'] / 1e6:.2f} M parameters, {result['dtype']}, {result['device']}\n"
        f"  {result['seconds_median']:.3f} s per generator update (median of {len(result['seconds'])}), "
        f"{result['samples_per_s']:.1f} samples/s\n"
        f"  peak {result['peak_gib']:.3f} GiB, planned {result['peak_gib_planned']:.3f} GiB "
        f"(beside {result['process_gib_before']:.2f} GiB of Python and libraries)"
    )
    for role, counted in result["forward_equivalents"].items():
        planned = result["forward_equivalents_planned"][role]
        print(f"  {role:<10} {counted:7.2f} forward equivalents, planned {planned:7.2f}")
    for what in result["planned_but_not_counted"]:
        print(f"  (planned, but not seen by the hooks that count: {what})")
    if "role_seconds" not in result:
        return
    print("  seconds of the phases, for the whole batch:")
    for phase, seconds in result["role_seconds"].items():
        print(f"  {phase:<18} {seconds:8.4f}")


def machine() -> dict[str, Any]:
    import os

    import torch

    return {
        "platform": platform.platform(), "processor": platform.processor(), "cores": os.cpu_count(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
