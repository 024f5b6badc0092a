"""Train the digits' teacher, a tiny class-conditional EDM network (eight minutes).

    python jobs/train_digits_teacher.py --work runs/digits_teacher --out raydistill/assets/digits_teacher

The loss is EDM's (arXiv:2206.00364, table 1), without augmentation. A call with the same `--work` goes on where the
last one stopped. `figures.json` beside the weights holds what this command printed: toyfid and label accuracy of 1797
samples for several samplers, with the training images' labels and the evaluator's own noise; what real images give;
and how far samples are from the nearest training image, since a network could learn 1797 of them by heart.
"""

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from raydistill.data.digits import DIGITS_VERSION, read_digits
from raydistill.data.images import to_signed
from raydistill.diffusion.random import Draws
from raydistill.diffusion.samplers import ancestral, heun, karras_times
from raydistill.diffusion.schedules import expand
from raydistill.eval.detectors import detector_for
from raydistill.eval.frechet import FeatureStatistics, frechet_distance
from raydistill.eval.grids import grid_png
from raydistill.eval.protocol import to_uint8
from raydistill.models.denoiser import Cond, parameter_count
from raydistill.models.edm_net import EDMDenoiser, EDMNetConfig
from raydistill.models.edm_pipeline import load_edm_pipeline, save_edm
from raydistill.models.pipeline import Pipeline

EVALUATION_SEED = 10  # the evaluator's default
BATCH = 300


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    pixels, labels = read_digits()
    judge = Judge(to_signed(pixels), labels.tolist())
    denoiser = EDMDenoiser.random(EDMNetConfig.digits(), args.seed)
    print(
        "parameters:",
        parameter_count(denoiser),
        "std of the pixels:",
        round(to_signed(pixels).std().item(), 3),
    )

    def publish(weights: EDMDenoiser) -> Pipeline:
        save_edm(args.out, weights.config, weights.state_dict())
        return load_edm_pipeline(str(args.out))

    final, wall_s = train(args, denoiser, judge, publish)
    pipeline = publish(final)
    figures: dict[str, Any] = {
        "parameters": parameter_count(pipeline.denoiser),
        "network": asdict(denoiser.config),
        "training": {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        | {"digits_version": DIGITS_VERSION, "wall_s": round(wall_s)},
    }
    figures |= judge.all_figures(pipeline, args.work)
    figures |= file_figures(args.out, judge)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/digits_teacher"), help="folder for intermediate results"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("raydistill/assets/digits_teacher"), help="where the teacher goes"
    )
    parser.add_argument("--steps", type=int, default=8000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="peak learning rate of Adam, decayed along a cosine"
    )
    parser.add_argument("--ema-decay", type=float, default=0.999, help="per step; ramped up at the start")
    parser.add_argument("--check-every", type=int, default=2000, help="steps between judged snapshots")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the batches and the noise")
    return parser.parse_args()


def train(
    args: argparse.Namespace,
    denoiser: EDMDenoiser,
    judge: "Judge",
    publish: Callable[[EDMDenoiser], Pipeline],
) -> tuple[EDMDenoiser, float]:
    """The averaged weights after training with ln sigma ~ N(-1.2, 1.2^2), and the seconds of all calls."""
    averaged = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    sigma_data = denoiser.config.sigma_data
    state_file, first, wall_s, started = args.work / "teacher.pt", 0, 0.0, time.time()
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        denoiser.load_state_dict(state["denoiser"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first, wall_s = state["step"], state["wall_s"]
    pipeline = publish(averaged)
    images, labels = (
        pipeline.encode_images(judge.images),
        pipeline.encode_text(judge.captions).tensors["label"],
    )
    denoiser.train()
    steps = range(first, args.steps)
    bar = tqdm(steps, initial=first, total=args.steps, desc="teacher", unit="step", mininterval=5)
    smooth_loss = None
    for step in bar:
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(images), (args.batch_size,), generator=draw)
        x0, cond = images[chosen], Cond({"label": labels[chosen]})
        # Stratified over the batch: the loss varies far more with sigma than with the image.
        quantile = (
            torch.arange(args.batch_size) + torch.rand(args.batch_size, generator=draw)
        ) / args.batch_size
        sigma = (-1.2 + 1.2 * torch.special.ndtri(quantile.clamp(1e-6, 1 - 1e-6))).exp()
        x_t = x0 + expand(sigma, x0) * torch.randn(x0.shape, generator=draw)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        loss = ((denoiser(x_t, sigma, cond) - x0).square().mean(dim=(1, 2, 3)) * weight).mean()
        progress = step / args.steps
        lr = args.lr * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(args.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), list(denoiser.parameters()), 1 - decay)
        if step % 20 == 0 or smooth_loss is None:
            smooth_loss = loss.item() if smooth_loss is None else 0.95 * smooth_loss + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth_loss:.4f}", lr=f"{lr:.1e}")
        if (step + 1) % args.check_every == 0 or step + 1 == args.steps:
            state = {"denoiser": denoiser.state_dict(), "averaged": averaged.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state | {"wall_s": wall_s + time.time() - started}, state_file)
            shown = judge.figures(judge.samples(publish(averaged), "heun", 8))
            print(f"\nstep {step + 1} loss {smooth_loss:.4f} heun_8 {shown}", flush=True)
    return averaged, wall_s + time.time() - started


class Judge:
    """Figures of 1797 samples, one for each training image and of its label, with the evaluator's noise."""

    def __init__(self, images: Tensor, labels: list[int]):
        """images: float [N, 3, 8, 8] in [-1, 1]."""
        self.images = images
        self.captions = [str(label) for label in labels]
        self.detector = detector_for("digits")
        self.reference = self.detector(to_uint8(images))[0]

    @torch.no_grad()
    def samples(self, pipeline: Pipeline, sampler: str, steps: int) -> Tensor:
        """Images [N, 3, 8, 8]: heun makes 2 steps - 1 evaluations, ancestral `steps`."""
        schedule, draws = pipeline.denoiser.schedule, Draws(EVALUATION_SEED)
        times = [*karras_times(steps, schedule), schedule.t_clean]
        parts = []
        for start in range(0, len(self.captions), BATCH):
            rows = range(start, min(start + BATCH, len(self.captions)))
            cond = pipeline.encode_text([self.captions[row] for row in rows])

            def denoise(x_t: Tensor, t: Tensor, cond: Cond = cond) -> Tensor:
                return pipeline.denoiser(x_t, t, cond)

            def noise(step: int, rows: range = rows) -> Tensor:
                return draws.normal(f"eval/renoise_{step}", 0, rows, pipeline.latent_shape)

            x_T = schedule.t_max * draws.normal("eval/noise", 0, rows, pipeline.latent_shape)
            if sampler == "heun":
                x = heun(denoise, schedule, times, x_T)
            else:
                x = ancestral(denoise, schedule, times, x_T, noise)
            parts.append(pipeline.decode(x))
        return torch.cat(parts)

    def figures(self, images: Tensor) -> dict[str, float]:
        """toyfid to the real images, and label accuracy."""
        features, logits = self.detector(to_uint8(images))
        return {
            "toyfid": toyfid(features, self.reference),
            "label_accuracy": round(self.detector.accuracy(logits, self.captions), 4),
        }

    def all_figures(self, pipeline: Pipeline, grids: Path) -> dict[str, Any]:
        """Per sampler and number of steps, and what real images give."""
        figures: dict[str, Any] = {"samples": len(self.captions), "reference_images": len(self.images)}
        for sampler, counts in (("heun", (2, 4, 8, 16, 32)), ("ancestral", (1, 2, 4, 8, 16, 32))):
            for steps in counts:
                images = self.samples(pipeline, sampler, steps)
                figures[f"{sampler}_{steps}"] = self.figures(images)
                print(f"{sampler}_{steps}", figures[f"{sampler}_{steps}"], flush=True)
                if sampler == "heun" and steps == 8:
                    figures["rms_to_nearest_real"] = {
                        "samples": nearest(images, self.images),
                        "real": nearest(self.images, self.images),
                    }
                    grid = [("real", to_uint8(self.images)), ("samples", to_uint8(images))]
                    rows = [(name, part[row : row + 10]) for row in (0, 10, 20) for name, part in grid]
                    (grids / "samples.png").write_bytes(grid_png(rows, self.captions[:10], scale=6))
        figures["toyfid_real_halves"], figures["toyfid_real_resampled"] = self._floors()
        return figures

    def _floors(self, repeats: int = 10) -> tuple[float, float]:
        """Mean toyfid of random halves of the real images, and of real images drawn anew for each label."""
        halves, resampled = [], []
        for seed in range(repeats):
            draw = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(self.reference), generator=draw)
            halves.append(toyfid(*self.reference[order].tensor_split(2)))
            drawn = torch.empty_like(self.reference)
            for label in sorted(set(self.captions)):
                rows = torch.tensor([row for row, caption in enumerate(self.captions) if caption == label])
                drawn[rows] = self.reference[rows[torch.randint(len(rows), rows.shape, generator=draw)]]
            resampled.append(toyfid(drawn, self.reference))
        return round(sum(halves) / repeats, 4), round(sum(resampled) / repeats, 4)


def nearest(images: Tensor, real: Tensor) -> float:
    """Median over the images of the RMS difference to the nearest real image that is not the very same."""
    distance = torch.cdist(images.flatten(1).double(), real.flatten(1).double())
    if images is real:
        distance.fill_diagonal_(math.inf)
    return round(distance.amin(dim=1).median().item() / real[0].numel() ** 0.5, 4)


def toyfid(a: Tensor, b: Tensor) -> float:
    statistics = FeatureStatistics(), FeatureStatistics()
    statistics[0].update(a)
    statistics[1].update(b)
    return round(frechet_distance(*statistics), 4)


def file_figures(folder: Path, judge: Judge) -> dict[str, Any]:
    """Which files the figures belong to."""
    weights = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*.safetensors"))}
    return {
        "digit_net_sha256": judge.detector.sha256,
        "sha256": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in weights.items()},
        "bytes": sum(file.stat().st_size for file in weights.values()),
    }


if __name__ == "__main__":
    main()
