"""Train the embedded teacher, a small Stable-Diffusion-shaped pipeline (half an hour on two cores).

    python jobs/train_teacher.py --work runs/teacher --out raydistill/assets/scenes_teacher

Phases: scenes, autoencoder, latents, text encoder and UNet together, figures. Each phase leaves its result in
`--work`, and a call with the same folder goes on where the last one stopped. The teacher is a folder as
diffusers writes it, so that the code that loads Stable Diffusion loads it too; `figures.json` beside it holds
what this command printed.
"""

import argparse
import copy
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from raydistill.torchvision_ops import ensure_torchvision_importable

ensure_torchvision_importable()

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from teacher_figures import (  # noqa: E402
    Judge,
    count,
    encode,
    file_figures,
    reconstruction_figures,
    sampling_figures,
    to_floats,
    tokenise,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer  # noqa: E402

from raydistill.data.scenes import SCENES_VERSION, write_scenes  # noqa: E402

NUM_TOKENS = 20
TEXT_WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.time()
    args.work.mkdir(parents=True, exist_ok=True)
    scenes = write_scenes(args.work / "scenes", num_train=args.num_train, num_val=2000)
    train_images, train_captions = load_split(scenes, "train")
    val_images, val_captions = load_split(scenes, "val")

    vae = train_autoencoder(args, train_images, val_images)
    latents = encode(vae, train_images)
    tokenizer = make_tokenizer(train_captions, args.work / "tokenizer")
    text_encoder, unet = make_networks(len(tokenizer), args.seed)
    parameters = {"unet": count(unet), "vae": count(vae), "text_encoder": count(text_encoder)}
    print("parameters:", parameters, flush=True)
    nets = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    judge = Judge(val_images, val_captions, args.seed)

    def publish(weights: nn.ModuleDict) -> StableDiffusionPipeline:
        pipeline = assemble(vae, tokenizer, weights["text_encoder"], weights["unet"])
        pipeline.save_pretrained(args.out, safe_serialization=True)
        write_vocabulary(tokenizer, args.out / "tokenizer")
        for file in args.out.rglob("*.safetensors"):
            file.chmod(0o644)  # transformers and diffusers write for the owner only
        return pipeline

    flat = [caption for five in train_captions for caption in five]
    ids = tokenise(tokenizer, flat).view(len(train_captions), -1, NUM_TOKENS)
    final = train_denoiser(args, nets, latents, ids, tokenise(tokenizer, [""])[0], publish, judge)
    pipeline = publish(final)
    figures: dict[str, Any] = {"parameters": parameters}
    figures["training"] = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    figures["training"] |= {
        "scenes_version": SCENES_VERSION,
        "last_call_wall_s": round(time.time() - started),
    }
    figures["autoencoder"] = reconstruction_figures(vae, val_images)
    figures |= sampling_figures(judge, pipeline, args.eval_samples, args.ddim_steps, args.guidance, args.work)
    figures |= file_figures(args.out)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/teacher"), help="folder for intermediate results"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("raydistill/assets/scenes_teacher"), help="where the pipeline goes"
    )
    parser.add_argument(
        "--num-train", type=int, default=32000, help="train scenes; the data set's 8000 are the first of them"
    )
    parser.add_argument("--vae-steps", type=int, default=2200, help="optimiser steps of the autoencoder")
    parser.add_argument("--vae-lr", type=float, default=2e-3, help="peak learning rate of the autoencoder")
    parser.add_argument(
        "--kl-weight", type=float, default=1e-4, help="weight of the mean KL of a latent element"
    )
    parser.add_argument("--steps", type=int, default=6500, help="optimiser steps of UNet and text encoder")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument(
        "--lr", type=float, default=1.2e-3, help="peak learning rate of UNet and text encoder"
    )
    parser.add_argument("--ema-decay", type=float, default=0.999, help="per step; ramped up at the start")
    parser.add_argument(
        "--caption-dropout", type=float, default=0.1, help="share of captions replaced by the empty string"
    )
    parser.add_argument(
        "--check-every", type=int, default=1000, help="steps between snapshots, each judged on 256 captions"
    )
    parser.add_argument(
        "--eval-samples", type=int, default=2000, help="samples per guidance scale for the figures"
    )
    parser.add_argument("--ddim-steps", type=int, default=25, help="sampling steps for the figures")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 5.0], help="scales to measure"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the batches and the noise")
    return parser.parse_args()


def load_split(root: Path, split: str) -> tuple[Tensor, list[list[str]]]:
    """(images uint8 [N, 3, 32, 32], the five captions of each) of a split of the scenes folder."""
    table = json.loads((root / "annotations" / f"captions_{split}.json").read_text())
    pixels = [np.asarray(Image.open(root / split / entry["file_name"])) for entry in table["images"]]
    captions: dict[int, list[str]] = {entry["id"]: [] for entry in table["images"]}
    for note in table["annotations"]:
        captions[note["image_id"]].append(note["caption"])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), list(captions.values())


# Autoencoder


def train_autoencoder(args: argparse.Namespace, images: Tensor, val_images: Tensor) -> AutoencoderKL:
    """The trained VAE; its scaling factor gives the latents a standard deviation of one, as in SD."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )
    file, about = args.work / "vae.safetensors", args.work / "vae.json"
    if not about.exists():
        optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_lr, weight_decay=1e-4, betas=(0.9, 0.99))
        plan = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, args.vae_lr, total_steps=args.vae_steps, pct_start=0.05
        )
        bar = tqdm(range(args.vae_steps), desc="autoencoder", unit="step")
        for step in bar:
            x = to_floats(images[torch.randint(len(images), (64,))])
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(x).latent_dist
                out = vae.decode(posterior.sample()).sample.float()
            # The gradient term keeps the edges, by which a ring differs from a circle.
            edges = sum((out.diff(dim=d) - x.diff(dim=d)).abs().mean() for d in (2, 3))
            kl = posterior.kl().float().mean() / posterior.mean[0].numel()
            loss = (out - x).abs().mean() + F.mse_loss(out, x) + 0.5 * edges + args.kl_weight * kl
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            plan.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", kl=f"{kl.item():.2f}")
        save_file(vae.state_dict(), str(file))
        vae.register_to_config(scaling_factor=1.0)
        spread = encode(vae.eval(), images[:4000])
        about.write_text(json.dumps({"scaling_factor": float(1 / spread.std())}))
        print(
            "latent mean per channel",
            spread.mean(dim=(0, 2, 3)).tolist(),
            "std",
            spread.std(dim=(0, 2, 3)).tolist(),
        )
    vae.load_state_dict(load_file(str(file)))
    vae.register_to_config(scaling_factor=json.loads(about.read_text())["scaling_factor"])
    vae.eval().requires_grad_(False)
    print("autoencoder:", reconstruction_figures(vae, val_images), flush=True)
    return vae


# Text


def make_tokenizer(captions: list[list[str]], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte pairs are merged until each word of the captions is one token."""
    if not folder.exists():
        words = sorted({word for five in captions for caption in five for word in caption.split()})
        # Letters that end no word have tokens too, so that any lower-case prompt can be read.
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        pieces, merges = [*letters, *(f"{letter}</w>" for letter in letters)], byte_pairs(words)
        pieces += [left + right for left, right in merges]
        vocab = {piece: index for index, piece in enumerate([*dict.fromkeys(pieces), START, END])}
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, pad_token=END, model_max_length=NUM_TOKENS)
        split_words = [word for word in words if len(tokenizer(word).input_ids) != 3]
        if split_words:
            raise RuntimeError(f"words that are not one token: {split_words}")
        tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def byte_pairs(words: list[str]) -> list[tuple[str, str]]:
    """The merges, most frequent pair first and ties in alphabetical order, that make each word one piece."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(pieces) > 1 for pieces in split):
        counts = Counter(pair for pieces in split for pair in itertools.pairwise(pieces))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for pieces in split:
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def write_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json and merges.txt, the files that Stable Diffusion's tokenizer folder has."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"], ensure_ascii=False))
    lines = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))


# Denoiser


def make_networks(vocab_size: int, seed: int) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    torch.manual_seed(seed)
    text_config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=NUM_TOKENS,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 80),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # two heads: diffusers' historical name
        norm_num_groups=16,
        time_embedding_dim=96,
    )
    return CLIPTextModel(text_config), unet


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_denoiser(
    args: argparse.Namespace,
    nets: nn.ModuleDict,
    latents: Tensor,
    ids: Tensor,
    empty: Tensor,
    publish: Callable[[nn.ModuleDict], StableDiffusionPipeline],
    judge: Judge,
) -> nn.ModuleDict:
    """The averaged weights after training on the eps loss, min-SNR-5 weighted (arXiv:2303.09556, eq. 5)."""
    averaged = copy.deepcopy(nets).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        nets.parameters(), lr=args.lr, weight_decay=1e-2, betas=(0.9, 0.99), fused=True
    )
    alpha_bar = make_scheduler().alphas_cumprod
    snr = alpha_bar / (1 - alpha_bar)
    loss_weights = snr.clamp(max=5) / snr
    state_file, first = args.work / "denoiser.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        nets.load_state_dict(state["nets"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    nets.train()
    bar = tqdm(
        range(first, args.steps), initial=first, total=args.steps, desc="teacher", unit="step", mininterval=5
    )
    smooth_loss = None
    for step in bar:
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (args.batch_size,), generator=draw)
        x0 = latents[chosen]
        tokens = ids[chosen, torch.randint(ids.shape[1], (args.batch_size,), generator=draw)]
        dropped = torch.rand(args.batch_size, generator=draw) < args.caption_dropout
        tokens = torch.where(dropped[:, None], empty, tokens)
        # Stratified over the batch: the loss varies far more with t than with the image.
        t = (
            (torch.arange(args.batch_size) + torch.rand(args.batch_size, generator=draw))
            * 1000
            / args.batch_size
        ).long()
        eps = torch.randn(x0.shape, generator=draw)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        text = nets["text_encoder"](tokens).last_hidden_state
        predicted = nets["unet"](a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text).sample
        loss = ((predicted - eps).square().mean(dim=(1, 2, 3)) * loss_weights[t]).mean()
        progress = step / args.steps
        lr = args.lr * min(1, (step + 1) / 300) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), list(nets.parameters()), 1 - decay)
        if step % 20 == 0 or smooth_loss is None:
            smooth_loss = loss.item() if smooth_loss is None else 0.95 * smooth_loss + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth_loss:.4f}", lr=f"{lr:.1e}")
        if (step + 1) % args.check_every == 0 or step + 1 == args.steps:
            state = {"nets": nets.state_dict(), "averaged": averaged.state_dict()}
            torch.save(state | {"optimizer": optimizer.state_dict(), "step": step + 1}, state_file)
            pipeline = publish(averaged)
            shown = judge(pipeline, 256, args.ddim_steps, 3.0, grid=args.work / f"grid_{step + 1:06d}.png")
            print(f"\nstep {step + 1} loss {smooth_loss:.4f} {shown}", flush=True)
    return averaged


if __name__ == "__main__":
    main()
