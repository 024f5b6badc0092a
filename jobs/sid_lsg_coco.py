"""SiD-LSG on captioned images: distil a guided text-to-image teacher into a one-step generator, without real images.

python jobs/sid_lsg_coco.py                         the embedded teacher and captions, minutes on two cores
python jobs/sid_lsg_coco.py --preset paper --dry-run    Stable Diffusion 1.5, as published
ray job submit -- python jobs/sid_lsg_coco.py       the same as a Ray job
"""

from typing import Any

from raydistill.cli import job_main
from raydistill.data.reader import DataConfig
from raydistill.methods.sid import SiDConfig
from raydistill.roles.critic import CriticConfig
from raydistill.roles.evaluator import EvaluatorConfig
from raydistill.roles.generator import GeneratorConfig
from raydistill.runtime.settings import CheckpointConfig, PrepareConfig, RunConfig, TeacherConfig, TrainConfig

_ADAM: dict[str, Any] = {"betas": (0.0, 0.999), "weight_decay": 0.0, "clip_norm": None}


def lsg(kappa: float) -> SiDConfig:
    """All four guidance scales but the teacher's at kappa, alpha 1 (arXiv:2406.01561)."""
    return SiDConfig(
        alpha=1.0,
        generator_loss_scale=1.0,
        init_timestep=625.0,
        guidance_scale_critic_training=kappa,
        guidance_scale_critic=kappa,
        prompt_dropout=0.1,
    )


def recipe() -> RunConfig:
    """SiD-LSG of the embedded captioned-scenes teacher into one step."""
    return RunConfig(
        name="sid_lsg_coco",
        teacher=TeacherConfig(path="builtin:scenes", guidance_scale=1.5),
        method=lsg(1.5),
        generator=GeneratorConfig(
            lr=1e-4, warmup_steps=10, lr_schedule="linear", ema_halflife_images=3000.0, ema_ramp=0.05, **_ADAM
        ),
        critic=CriticConfig(lr=2e-4, warmup_steps=10, lr_schedule="linear", **_ADAM),
        train=TrainConfig(generator_updates=600, batch_size=32),
        data=DataConfig(shards="builtin:scenes"),
        evaluator=EvaluatorConfig(every=600, num_samples=2000, weights="ema", teacher_steps=8),
        checkpoint=CheckpointConfig(every=150),
    )


def paper() -> RunConfig:
    """SiD-LSG of Stable Diffusion 1.5 with kappa 2 (arXiv:2406.01561; run_sid.sh of its code, methods.md 2.4).

    Prompts alone are used: any shards whose captions are the prompts (theirs: Aesthetics 6+).
    """
    adam = _ADAM | {"eps": 1e-8, "warmup_steps": 0}
    return RunConfig(
        name="sid_lsg_sd15",
        teacher=TeacherConfig(
            path="stable-diffusion-v1-5/stable-diffusion-v1-5", guidance_scale=2.0
        ),  # kappa_4
        method=lsg(2.0),  # published: 1.5, 2, 3 and 4.5
        generator=GeneratorConfig(lr=1e-6, ema_halflife_images=50_000.0, ema_ramp=0.05, **adam),
        critic=CriticConfig(lr=1e-6, **adam),
        train=TrainConfig(
            generator_updates=19_532,  # 10 Mimg in batches of 512; their FID of 8.15 is at 18.8 Mimg
            batch_size=512,
            micro_batch_size=1,
            log_every=10,
        ),
        data=DataConfig(shards="prompt_shards"),
        prepare=PrepareConfig(coco=None),
        evaluator=EvaluatorConfig(
            protocol="gigagan-coco30k",
            coco="coco",
            split="val2014",
            captions="coco_captions_30k.txt",  # of GigaGAN and DMD2; one a line
            weights="ema",
            teacher_figure=False,
            every=1000,  # 0.5 Mimg
        ),
        checkpoint=CheckpointConfig(every=200),
    )


PRESETS = {"paper": paper}


if __name__ == "__main__":
    job_main(recipe, PRESETS)
