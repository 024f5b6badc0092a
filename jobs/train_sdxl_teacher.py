"""Make the embedded SDXL-shaped teacher out of the embedded one (about 15 minutes on one core).

    python jobs/train_sdxl_teacher.py --work runs/sdxl_teacher --out raydistill/assets/scenes_xl_teacher

SDXL's conditioning in small: two text encoders of different widths whose last but one layers are joined, the second
one's pooled embedding and six time ids added to the time embedding, zeros for the unconditional half. Autoencoder,
tokenizer and all weights of UNet and first text encoder that have a place in it come from `builtin:scenes`
(jobs/train_teacher.py); UNet and both text encoders are then trained together on the drawn scenes. Time ids are those
of whole 32x32 images throughout, so they are read but carry nothing to learn. The figures, beside the weights in
`figures.json`, are made by diffusers' own StableDiffusionXLPipeline.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from teacher_figures import Judge, count, encode, file_figures, sampling_figures, tokenise
from torch import Tensor, nn
from tqdm import tqdm
from train_teacher import load_split, make_scheduler, write_vocabulary

from raydistill.data.scenes import SCENES_VERSION, write_scenes
from raydistill.models.diffusers_hub import TextToImage, import_diffusers, import_transformers, load_pipeline
from raydistill.runtime.settings import BUILTIN_TEACHERS

SECOND_WIDTH = 32
PROJECTION = 24
TIME_ID_WIDTH = 8
TIME_IDS = (32.0, 32.0, 0.0, 0.0, 32.0, 32.0)


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    started = time.time()
    args.work.mkdir(parents=True, exist_ok=True)
    scenes = write_scenes(args.work / "scenes", num_train=args.num_train, num_val=2000)
    train_images, train_captions = load_split(scenes, "train")
    val_images, val_captions = load_split(scenes, "val")

    base = load_pipeline(str(BUILTIN_TEACHERS["builtin:scenes"]))
    tokenizer = base.tokenizers[0]
    latents = encode(base.vae, train_images)
    flat = [caption for five in train_captions for caption in five]
    ids = tokenise(tokenizer, flat).view(len(train_captions), -1, tokenizer.model_max_length)
    nets = make_networks(base)
    parameters = {name: count(net) for name, net in nets.items()} | {"vae": count(base.vae)}
    print("parameters:", parameters, flush=True)

    averaged = train(args, nets, latents, ids)
    pipeline = assemble(base, averaged)
    pipeline.save_pretrained(args.out, safe_serialization=True)
    for part in ("tokenizer", "tokenizer_2"):
        write_vocabulary(tokenizer, args.out / part)
    for part in ("unet", "vae"):
        file = args.out / part / "config.json"  # diffusers notes there where a network was loaded from
        config = json.loads(file.read_text())
        file.write_text(
            json.dumps({k: v for k, v in config.items() if k != "_name_or_path"}, indent=2) + "\n"
        )
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)  # transformers and diffusers write for the owner only
    figures: dict[str, Any] = {"parameters": parameters}
    figures["training"] = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    figures["training"] |= {"scenes_version": SCENES_VERSION, "wall_s": round(time.time() - started)}
    judge = PipelineJudge(val_images, val_captions, args.seed)
    figures |= sampling_figures(judge, pipeline, args.eval_samples, args.ddim_steps, args.guidance, args.work)
    figures |= file_figures(args.out)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/sdxl_teacher"), help="scenes and pictures")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("raydistill/assets/scenes_xl_teacher"),
        help="where the pipeline goes",
    )
    parser.add_argument("--num-train", type=int, default=16000, help="train scenes")
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--ema-decay", type=float, default=0.998, help="per step; ramped up at the start")
    parser.add_argument(
        "--caption-dropout", type=float, default=0.1, help="share of captions replaced by zeros"
    )
    parser.add_argument("--eval-samples", type=int, default=2000, help="samples per guidance scale")
    parser.add_argument("--ddim-steps", type=int, default=25, help="sampling steps for the figures")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 1.5, 3.0], help="scales to measure"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the new weights, the batches and the noise"
    )
    return parser.parse_args()


def make_networks(base: TextToImage) -> nn.ModuleDict:
    """UNet and text encoders of SDXL's kind, begun from the embedded teacher's weights."""
    transformers = import_transformers()
    old_text: Any = base.text_encoders[0]
    old_unet: Any = base.denoiser.unet
    # the layer behind the one that is read is there because SDXL's encoders have it
    first = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            **(old_text.config.to_dict() | {"num_hidden_layers": old_text.config.num_hidden_layers + 1})
        )
    )
    second = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            **(
                old_text.config.to_dict()
                | {
                    "hidden_size": SECOND_WIDTH,
                    "intermediate_size": 2 * SECOND_WIDTH,
                    "projection_dim": PROJECTION,
                    "hidden_act": "gelu",
                }
            )
        )
    )
    width = first.config.hidden_size + SECOND_WIDTH
    unet = import_diffusers().UNet2DConditionModel.from_config(
        dict(old_unet.config)
        | {
            "cross_attention_dim": width,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_ID_WIDTH,
            "projection_class_embeddings_input_dim": PROJECTION + len(TIME_IDS) * TIME_ID_WIDTH,
        }
    )
    adopt(first, old_text)
    adopt(unet, old_unet)
    nn.init.zeros_(unet.add_embedding.linear_2.weight)  # at first the UNet is the one that it was
    nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return nn.ModuleDict({"unet": unet, "text_encoder": first, "text_encoder_2": second})


@torch.no_grad()
def adopt(new: nn.Module, old: nn.Module) -> None:
    """Old weights where a new one has their name: 1x1 convolutions as matrices, columns that are new begin at zero."""
    weights = old.state_dict()
    for name, target in new.state_dict().items():
        if name not in weights:
            continue
        source = weights[name].reshape(*weights[name].shape[: target.ndim])
        if source.shape == target.shape:
            target.copy_(source)
        elif source.shape[0] == target.shape[0] and source.shape[1] < target.shape[1]:
            target.zero_()
            target[:, : source.shape[1]] = source


def conditions(nets: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Text embeddings [B, L, D] and the pooled one [B, P] of token ids [B, L], as SDXL reads its encoders."""
    first = nets["text_encoder"](ids, output_hidden_states=True)
    second = nets["text_encoder_2"](ids, output_hidden_states=True)
    text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return text, second.text_embeds


def train(args: argparse.Namespace, nets: nn.ModuleDict, latents: Tensor, ids: Tensor) -> nn.ModuleDict:
    """The averaged weights after training on the eps loss, min-SNR-5 weighted (arXiv:2303.09556, eq. 5)."""
    averaged = copy.deepcopy(nets).eval().requires_grad_(False)
    trained = [p for p in nets.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    alpha_bar = make_scheduler().alphas_cumprod
    snr = alpha_bar / (1 - alpha_bar)
    loss_weights = snr.clamp(max=5) / snr
    size = args.batch_size
    time_ids = torch.tensor([TIME_IDS]).expand(size, -1)
    bar = tqdm(range(args.steps), desc="teacher", unit="step", mininterval=5)
    smooth_loss = None
    for step in bar:
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        chosen = torch.randint(len(latents), (size,), generator=draw)
        tokens = ids[chosen, torch.randint(ids.shape[1], (size,), generator=draw)]
        kept = (torch.rand(size, generator=draw) >= args.caption_dropout).float()
        # stratified over the batch: the loss varies far more with t than with the image
        t = ((torch.arange(size) + torch.rand(size, generator=draw)) * 1000 / size).long()
        x0 = latents[chosen]
        eps = torch.randn(x0.shape, generator=draw)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        text, pooled = conditions(nets, tokens)
        added = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
        predicted = nets["unet"](
            a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text * kept[:, None, None], added_cond_kwargs=added
        ).sample
        loss = ((predicted - eps).square().mean(dim=(1, 2, 3)) * loss_weights[t]).mean()
        progress = step / args.steps
        lr = args.lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay = min(args.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), list(nets.parameters()), 1 - decay)
        if step % 20 == 0:
            smooth_loss = loss.item() if smooth_loss is None else 0.95 * smooth_loss + 0.05 * loss.item()
            bar.set_postfix(loss=f"{smooth_loss:.4f}", lr=f"{lr:.1e}")
    return averaged


def assemble(base: TextToImage, nets: nn.ModuleDict) -> Any:
    return import_diffusers().StableDiffusionXLPipeline(
        vae=base.vae,
        tokenizer=base.tokenizers[0],
        tokenizer_2=base.tokenizers[0],
        text_encoder=nets["text_encoder"],
        text_encoder_2=nets["text_encoder_2"],
        unet=nets["unet"],
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


class PipelineJudge(Judge):
    """A judge of what diffusers itself samples."""

    @torch.no_grad()
    def _sample(
        self, pipeline: Any, captions: list[str], steps: int, guidance: float, spacing: str
    ) -> Tensor:
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, timestep_spacing=spacing)
        sampling = type(pipeline)(**(pipeline.components | {"scheduler": scheduler}), add_watermarker=False)
        sampling.set_progress_bar_config(disable=True)
        noise = torch.randn(len(captions), 4, 8, 8, generator=torch.Generator().manual_seed(self.seed + 1))
        return torch.cat(
            [
                sampling(
                    captions[start : start + 64],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    latents=noise[start : start + 64],
                    output_type="latent",
                ).images
                for start in range(0, len(captions), 64)
            ]
        )


if __name__ == "__main__":
    main()
