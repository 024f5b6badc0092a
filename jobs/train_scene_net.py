"""Train SceneNet, the detector behind toyfid and prompt accuracy, (about four minutes on two cores).

    python jobs/train_scene_net.py --out raydistill/assets/scene_net

Besides noise and blur, so that decoded latents do not confuse it, the net sees wrecked scenes (shuffled
patches, two scenes blended, noise) labelled "nothing here": a generator must not score by painting something
in the right colour.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from raydistill.data.scenes import BACKGROUNDS, SCENES_VERSION, SIZES, Scene, draw, scene
from raydistill.eval.features import (
    COLOURS,
    IMAGE_SIZE,
    NUM_FEATURES,
    SHAPES,
    SceneNet,
    load_scene_net,
    scene_net_sha256,
)

NUM_PAIRS = len(COLOURS) * len(SHAPES)
NUM_HINTS = len(SIZES) + len(BACKGROUNDS) + 9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("raydistill/assets/scene_net"), help="folder to write the net to"
    )
    parser.add_argument("--num-train", type=int, default=24000, help="scenes of the train split to draw")
    parser.add_argument("--steps", type=int, default=2200, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=128, help="scenes per step")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="peak learning rate of AdamW, decayed along a cosine"
    )
    parser.add_argument("--width", type=int, default=24, help="channels of the first layer")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the weights and the augmentation (scenes have seed 0)"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    started = time.time()
    images, pairs, hints = load_split("train", args.num_train)
    net = SceneNet(args.width)
    train(net, images, pairs, hints, args.steps, args.batch_size, args.lr)

    net.eval().requires_grad_(False)
    val_images, val_pairs, _ = load_split("val", 2000)
    with torch.no_grad():
        features = torch.cat([net.features(part) for part in val_images.split(250)])
    net.feature_scale.copy_((NUM_FEATURES / features.var(dim=0).sum()).sqrt())

    # The shipped file is half precision to save space; it must be judged as it will be used.
    args.out.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in net.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, str(args.out / "scene_net.safetensors"))
    about = {"width": args.width, "colours": COLOURS, "shapes": SHAPES, "scenes_version": SCENES_VERSION}
    about |= {
        "sha256": scene_net_sha256(args.out),
        "steps": args.steps,
        "num_train": args.num_train,
        "seed": args.seed,
    }
    (args.out / "scene_net.json").write_text(json.dumps(about, indent=1) + "\n")
    figures = evaluate(load_scene_net(args.out), val_images, val_pairs)
    figures |= {
        "parameters": sum(p.numel() for p in net.parameters()),
        "wall_s": round(time.time() - started, 1),
    }
    (args.out / "scene_net.json").write_text(json.dumps(about | {"figures": figures}, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def load_split(split: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(images uint8 [N, 3, 32, 32], presence [N, pairs], hints [N, NUM_HINTS]) of a split's first scenes."""
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    pairs, hints = torch.zeros(count, NUM_PAIRS), torch.zeros(count, NUM_HINTS)
    for index in tqdm(range(count), desc=f"drawing {split}", unit="img"):
        content = scene(0, split, index)
        images[index] = np.asarray(draw(content))
        for thing in content.objects:
            pairs[index, COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)] = 1
        hints[index] = layout_hints(content)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), pairs, hints


def layout_hints(content: Scene) -> Tensor:
    """What the pooled features shall know besides objects: sizes, background, which ninth is covered."""
    hints = torch.zeros(NUM_HINTS)
    for thing in content.objects:
        hints[list(SIZES).index(thing.size)] = 1
        cell = min(2, int(thing.y * 3 / IMAGE_SIZE)) * 3 + min(2, int(thing.x * 3 / IMAGE_SIZE))
        hints[len(SIZES) + len(BACKGROUNDS) + cell] = 1
    hints[len(SIZES) + list(BACKGROUNDS).index(content.background)] = 1
    return hints


def train(
    net: SceneNet, images: Tensor, pairs: Tensor, hints: Tensor, steps: int, batch_size: int, peak_lr: float
) -> None:
    """Presence from the maps, presence and layout from the pooled features through a head not kept."""
    head = nn.Linear(NUM_FEATURES, NUM_PAIRS + NUM_HINTS)
    optimizer = torch.optim.AdamW([*net.parameters(), *head.parameters()], lr=peak_lr, weight_decay=1e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps, pct_start=0.1)
    net.train()
    bar = tqdm(range(steps), desc="SceneNet", unit="step")
    for step in bar:
        chosen = torch.randint(len(images), (batch_size,))
        inputs, wanted = images[chosen].float() / 127.5 - 1, pairs[chosen]
        inputs, intact = wreck(augment(inputs))
        wanted = wanted * intact[:, None]
        maps = net.maps_of_floats(inputs)
        logits = head(maps.mean(dim=(2, 3)))
        hint_loss = F.binary_cross_entropy_with_logits(logits[:, NUM_PAIRS:], hints[chosen], reduction="none")
        loss = (
            F.binary_cross_entropy_with_logits(net.presence_of_maps(maps).flatten(1), wanted) * NUM_PAIRS
            + F.binary_cross_entropy_with_logits(logits[:, :NUM_PAIRS], wanted) * NUM_PAIRS * 0.3
            + (hint_loss.mean(dim=1) * intact).sum() / intact.sum()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def augment(images: Tensor) -> Tensor:
    """Blur, noise and a small change of brightness, of a strength that differs from image to image."""
    strength = torch.rand(len(images), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, strength * 0.7)
    noise = torch.randn_like(images) * torch.rand(len(images), 1, 1, 1) ** 2 * 0.12
    smooth = F.interpolate(torch.randn(len(images), 3, 8, 8), IMAGE_SIZE, mode="bilinear") * 0.04
    return (images + noise + smooth).clamp(-1, 1)


def wreck(images: Tensor) -> tuple[Tensor, Tensor]:
    """(images, intact [B] 0/1): one in ten becomes something that shows no shape at all."""
    images, kind = images.clone(), torch.rand(len(images))
    for index in (kind < 0.1).nonzero().flatten().tolist():
        if kind[index] < 0.05:
            patches = F.unfold(images[index][None], 4, stride=4)
            patches = patches[:, :, torch.randperm(patches.shape[2])]
            images[index] = F.fold(patches, IMAGE_SIZE, 4, stride=4)[0]
        elif kind[index] < 0.08:
            cells = int(torch.randint(3, 17, ()))
            colours = F.interpolate(torch.randn(1, 3, cells, cells) * 0.6, IMAGE_SIZE, mode="bilinear")
            images[index] = colours[0].clamp(-1, 1)
        else:
            images[index] = images[index].mean(dim=(1, 2), keepdim=True) + 0.3 * torch.randn(
                3, IMAGE_SIZE, IMAGE_SIZE
            )
    return images, (kind >= 0.1).float()


@torch.no_grad()
def evaluate(net: SceneNet, images: Tensor, pairs: Tensor) -> dict[str, float]:
    """Accuracies on clean scenes and on scenes with the artefacts that training showed."""
    figures = {}
    noisy = ((augment(images.float() / 127.5 - 1) + 1) * 127.5).round().to(torch.uint8)
    for name, inputs in (("clean", images), ("augmented", noisy)):
        found = torch.cat([net.objects(part) for part in inputs.split(250)]).flatten(1) > 0
        truth = pairs > 0
        figures[f"pair_recall_{name}"] = round((found & truth).sum().item() / truth.sum().item(), 5)
        figures[f"pair_precision_{name}"] = round((found & truth).sum().item() / found.sum().item(), 5)
        figures[f"scene_accuracy_{name}"] = round((found == truth).all(dim=1).float().mean().item(), 5)
    return figures


if __name__ == "__main__":
    main()
