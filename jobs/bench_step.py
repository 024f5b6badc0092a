"""Time one DMD2 generator update with its R critic updates; no Ray, on CPU or GPU.

    python jobs/bench_step.py --out step.json               the embedded size and an EDM-like pixel size
    python jobs/bench_step.py --size edm32 --batch 64 --gpu   CIFAR-10's 32x32 pixels, a UNet of 56 M parameters

Each size runs the trainer's own code on random-weight or shipped networks, standard-normal samples standing in for the
data, and prints median seconds of a warm update, forward equivalents by role as counted by hooks beside the plan's,
samples per second, and peak memory beside the plan's. Each size runs in a process of its own, so peaks don't mix.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
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
        command = [sys.executable, __file__, "--child", "--size", size, "--updates", str(arguments.updates)]
        command += ["--ratio", str(arguments.ratio), "--dtype", arguments.dtype]
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
    parser.add_argument("--batch", type=int, help="samples of an update (scenes 64, edm16 16, edm32 16)")
    parser.add_argument(
        "--updates", type=int, default=5, help="measured updates after one to warm up (%(default)s)"
    )
    parser.add_argument(
        "--ratio", type=int, default=5, help="R, critic updates per generator update (%(default)s)"
    )
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="arithmetic (%(default)s)")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNets")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    import torch

    from raydistill.data.normal import NormalSource
    from raydistill.data.reader import DataConfig
    from raydistill.methods.dmd2 import DMD2Config
    from raydistill.models.denoiser import parameter_count
    from raydistill.roles.world import World
    from raydistill.runtime.plan import GIB, plan_for
    from raydistill.runtime.settings import RunConfig, TeacherConfig, TrainConfig
    from raydistill.runtime.trainer import Trainer, peak_memory_gib

    device = torch.device("cuda" if arguments.gpu else "cpu")
    batch = arguments.batch or (64 if size == "scenes" else 16)
    pipeline, meta, shapes = networks(size)
    config = RunConfig(
        name="bench",
        teacher=TeacherConfig(guidance_scale=3.0 if size == "scenes" else 1.0),
        method=DMD2Config(critic_updates_per_generator=arguments.ratio),
        train=TrainConfig(batch_size=batch, dtype=arguments.dtype, compile=arguments.compile),
        data=DataConfig(shards="standard-normal"),
    )

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

    baseline = peak_memory_gib(device)
    trainer = Trainer(config, BenchSession(), pipeline, source)  # type: ignore[arg-type]
    networks_by_role = {
        "generator": trainer.generator.denoiser, "critic": trainer.critic.critic.denoiser, "teacher": pipeline.denoiser,
    }  # fmt: skip
    counts = {role: Count(net.unet) for role, net in networks_by_role.items()}
    trainer.window()
    for count in counts.values():
        count.reset()
    seconds = []
    for _ in range(arguments.updates):
        synchronise(device)
        started = time.perf_counter()
        trainer.window()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    planned = plan_for(config, meta, shapes)
    median = statistics.median(seconds)
    equivalents = {
        role: count.equivalents(planned.encoder_share) / batch / arguments.updates
        for role, count in counts.items()
    }
    return {
        "size": size,
        "batch_size": batch,
        "critic_updates_per_generator": arguments.ratio,
        "parameters": parameter_count(pipeline.denoiser),
        "dtype": arguments.dtype,
        "device": torch.cuda.get_device_name()
        if arguments.gpu
        else f"cpu, {torch.get_num_threads()} threads",
        "seconds_median": median,
        "seconds": seconds,
        "samples_per_s": batch * arguments.ratio / median,
        "forward_equivalents": equivalents,
        "forward_equivalents_planned": planned.forwards,
        "peak_gib": peak_memory_gib(device) - (0.0 if arguments.gpu else baseline),
        "peak_gib_planned": planned.total_bytes / GIB,
        "process_gib_before": baseline,
    }


class Count:
    """Samples that pass through a UNet, by hooks: forward and backward, whole or encoder half only."""

    def __init__(self, unet: Any):
        self.reset()
        unet.conv_in.register_forward_hook(self._entered)
        unet.conv_out.register_forward_hook(self._left)

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


def machine() -> dict[str, Any]:
    import os

    import torch

    return {
        "platform": platform.platform(), "processor": platform.processor(), "cores": os.cpu_count(),
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
