"""Train DigitNet, the detector behind toyfid and label accuracy of the digits (a quarter of a minute on one core).

    python jobs/train_digit_net.py --out raydistill/assets/digit_net

Beside the class, a head that is not kept reads the pixels back from the features: a classifier alone would forget how
the digits of one class differ, and with it whether a generator makes all of them. A random fifth of the images is held
out.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from raydistill.data.digits import DIGITS_VERSION, read_digits
from raydistill.eval.digit_net import (
    IMAGE_SIZE,
    NUM_FEATURES,
    DigitNet,
    digit_net_sha256,
    label_accuracy,
    load_digit_net,
)
from raydistill.eval.frechet import FeatureStatistics, frechet_distance

NUM_PIXELS = 3 * IMAGE_SIZE**2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("raydistill/assets/digit_net"), help="folder to write the net to"
    )
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=128, help="images per step")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="peak learning rate of AdamW, decayed along a cosine"
    )
    parser.add_argument("--pixel-weight", type=float, default=3.0, help="weight of reading the pixels back")
    parser.add_argument("--width", type=int, default=24, help="channels of the first layer")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the augmentation")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    started = time.time()
    pixels, numbers = read_digits()
    images, labels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(numbers)
    # not every fifth: the digits come in runs of 0 to 9
    held_out = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)) % 5 == 4
    net = DigitNet(args.width)
    train(net, images[~held_out], labels[~held_out], args)

    net.eval().requires_grad_(False)
    net.feature_scale.copy_((NUM_FEATURES / net.features(images).var(dim=0).sum()).sqrt())

    # The shipped file is half precision to save space; it must be judged as it will be used.
    args.out.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in net.state_dict().items()}
    weights = args.out / "digit_net.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, str(weights))
    weights.chmod(0o644)  # safetensors writes for the owner only
    about = {
        "width": args.width,
        "digits_version": DIGITS_VERSION,
        "sha256": digit_net_sha256(args.out),
        "steps": args.steps,
        "seed": args.seed,
    }
    (args.out / "digit_net.json").write_text(json.dumps(about, indent=1) + "\n")
    figures = evaluate(load_digit_net(args.out), images, labels, held_out)
    figures |= {
        "parameters": sum(p.numel() for p in net.parameters()),
        "wall_s": round(time.time() - started, 1),
    }
    (args.out / "digit_net.json").write_text(json.dumps(about | {"figures": figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def train(net: DigitNet, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    """Class and pixels from the features, the latter through a head not kept."""
    reader = nn.Linear(NUM_FEATURES, NUM_PIXELS)
    optimizer = torch.optim.AdamW([*net.parameters(), *reader.parameters()], lr=args.lr, weight_decay=1e-2)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)
    net.train()
    bar = tqdm(range(args.steps), desc="DigitNet", unit="step", mininterval=5)
    for step in bar:
        chosen = torch.randint(len(images), (args.batch_size,))
        shown, inputs = augment(images[chosen].float() / 127.5 - 1)
        embedded = net.embed(inputs)
        class_loss = F.cross_entropy(net.classes(embedded), labels[chosen], label_smoothing=0.1)
        pixel_loss = F.mse_loss(reader(embedded), shown.flatten(1))
        loss = class_loss + args.pixel_weight * pixel_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        if step % 20 == 0:
            bar.set_postfix(classes=f"{class_loss.item():.4f}", pixels=f"{pixel_loss.item():.4f}")


def augment(images: Tensor) -> tuple[Tensor, Tensor]:
    """(moved and tinted images, the same with noise): parts of a pixel, slight turns, and unequal channels.

    The tint is for the features, which shall tell grey from coloured strokes, as a generator may make either.
    """
    count = len(images)
    angle, scale = 0.12 * torch.randn(count), 1 + 0.06 * torch.randn(count)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(count, 2, 2)
    shift = 0.5 * (2 * torch.rand(count, 2, 1) - 1) * 2 / IMAGE_SIZE
    grid = F.affine_grid(
        torch.cat([turn * scale.view(-1, 1, 1), shift], dim=2), list(images.shape), align_corners=False
    )
    # outside is paper, which is -1: shifted by one, so that padding with zeros is that
    moved = F.grid_sample(images + 1, grid, padding_mode="zeros", align_corners=False)
    moved = torch.where(torch.rand(count, 1, 1, 1) < 0.5, moved, images + 1)
    tint = 1 + 0.15 * torch.randn(count, 3, 1, 1) * torch.rand(count, 1, 1, 1) ** 2
    shown = (moved * tint - 1).clamp(-1, 1)
    noise = torch.randn_like(shown) * torch.rand(count, 1, 1, 1) ** 2 * 0.3
    return shown, (shown + noise).clamp(-1, 1)


@torch.no_grad()
def evaluate(net: DigitNet, images: Tensor, labels: Tensor, held_out: Tensor) -> dict[str, float]:
    """Accuracies on held-out digits, and how far apart equal numbers of real digits are in the features."""
    noisy = ((augment(images.float() / 127.5 - 1)[1] + 1) * 127.5).round().to(torch.uint8)
    figures = {}
    for name, inputs in (("clean", images), ("augmented", noisy)):
        captions = [str(label) for label in labels[held_out].tolist()]
        figures[f"held_out_accuracy_{name}"] = round(label_accuracy(net(inputs[held_out])[1], captions), 4)
    features = net.features(images)
    seen = features[~held_out][::4]
    figures["toyfid_held_out_to_seen"] = toyfid(features[held_out], seen)
    figures["toyfid_seen_to_seen"] = toyfid(features[~held_out][2::4], seen)
    return figures


def toyfid(a: Tensor, b: Tensor) -> float:
    statistics = FeatureStatistics(), FeatureStatistics()
    statistics[0].update(a)
    statistics[1].update(b)
    return round(frechet_distance(*statistics), 4)


if __name__ == "__main__":
    main()
