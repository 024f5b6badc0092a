"""DMD2 on captioned images: distil a text-to-image teacher into a one-step generator.

python jobs/dmd2_coco.py                            the embedded teacher and data, minutes on two cores
python jobs/dmd2_coco.py --dry-run                  settings, bytes per role, forwards per update
python jobs/dmd2_coco.py method.critic_updates_per_generator=10 name=ratio10
python jobs/dmd2_coco.py --preset long              towards the teacher's own quality, for most of an hour
python jobs/dmd2_coco.py --preset lora              generator and critic as adapters in the teacher
python jobs/dmd2_coco.py --preset four_step         four steps with backward simulation
python jobs/dmd2_coco.py --preset sd15 --dry-run    the paper's SD1.5 recipe, stage 1: nothing is downloaded
python jobs/dmd2_coco.py --preset sd15_gan          stage 1 and then stage 2, with the GAN
ray job submit -- python jobs/dmd2_coco.py          the same as a Ray job
"""

from dataclasses import replace
from typing import Any

from raydistill.cli import job_main
from raydistill.data.reader import DataConfig
from raydistill.methods.dmd2 import DMD2Config
from raydistill.roles.critic import CriticConfig
from raydistill.roles.evaluator import EvaluatorConfig
from raydistill.roles.generator import GeneratorConfig
from raydistill.runtime.settings import CheckpointConfig, PrepareConfig, RunConfig, TeacherConfig, TrainConfig

_METHOD = DMD2Config(
    critic_updates_per_generator=2,
    timesteps=(625.0,),
    gan_weight_generator=0.0,
    gan_weight_critic=0.0,
)


def recipe() -> RunConfig:
    """DMD2 of the embedded captioned-scenes teacher into one step: the first minutes.

    Chosen by runs of 300 to 1000 updates against each other, one core each. Rates: the critic's x0 at high noise is its
    eps error times sigma, so at 8e-4 Adam's noise alone moved its mean by 0.1 to 0.2 from step to step, and the share
    of each background in the samples with it; hence 4e-4, both rates falling to 0, and an EMA. No GAN, as in stage 1 of
    the SD1.5 recipe: an update with it takes 1.6 times as long (2.6 times with the R = 5 it needs) and comes no further
    in the same time. R = 2 learns as much per update as 5; R = 1 falls apart, as the paper says.
    The teacher is shown in 8 steps, where it is as good as in 25 (toyfid 0.314 and 0.351) in a third of the time.
    Evaluated at its start and end only: on two cores a figure asked for in between arrives when training is over.
    """
    return RunConfig(
        name="dmd2_coco",
        teacher=TeacherConfig(path="builtin:scenes", guidance_scale=1.5),
        method=_METHOD,
        generator=GeneratorConfig(
            lr=2.5e-4, warmup_steps=10, lr_schedule="linear", ema_halflife_images=3000.0
        ),
        critic=CriticConfig(lr=4e-4, warmup_steps=10, lr_schedule="linear"),
        train=TrainConfig(generator_updates=900, batch_size=32),
        data=DataConfig(shards="builtin:scenes"),
        evaluator=EvaluatorConfig(every=900, num_samples=2000, weights="ema", teacher_steps=8),
        checkpoint=CheckpointConfig(every=150),
    )


def long() -> RunConfig:
    """The same teacher and method in two stages, as SD1.5's recipe: without GAN, then with it.

    5000 updates came to a toyfid of 0.477 (0.62 at the end of the first stage), 6200 to 0.533. README has the curve.
    """
    base = recipe()
    return replace(
        base,
        name="dmd2_coco_long",
        method=replace(
            _METHOD,
            critic_updates_per_generator=3,
            gan_weight_generator=0.1,
            gan_weight_critic=0.1,
            gan_start_update=2500,
        ),
        generator=replace(base.generator, lr=1.5e-4, ema_halflife_images=6400.0),
        critic=replace(base.critic, lr=2e-4, lr_schedule="constant"),
        train=replace(base.train, generator_updates=5000),
        evaluator=replace(base.evaluator, every=500, teacher_steps=25),
        checkpoint=replace(base.checkpoint, every=250),
    )


def four_step() -> RunConfig:
    """Four steps, trained by backward simulation on the grid of the paper's SDXL recipe, with its R and GAN weights."""
    base = recipe()
    method = replace(
        _METHOD,
        timesteps=(999.0, 749.0, 499.0, 249.0),
        critic_updates_per_generator=5,
        gan_weight_generator=5e-3,
        gan_weight_critic=1e-2,
    )
    return replace(
        base,
        name="dmd2_coco_four_step",
        method=method,
        generator=replace(base.generator, lr=1e-4),
        critic=replace(base.critic, lr=2e-4),
    )


def lora() -> RunConfig:
    """The same run with generator and critic as adapters in the teacher itself.

    28 % of the teacher's weights each: the UNet is narrow, 48 and 80 channels. Rates are about 4 times the full run's,
    the first ones tried.
    """
    base = recipe()
    return replace(
        base,
        name="dmd2_coco_lora",
        generator=replace(base.generator, lr=1e-3, lora_rank=16, lora_targets="all"),
        critic=replace(base.critic, lr=1.5e-3, lora_rank=16, lora_targets="all"),
    )


_SD15 = DMD2Config(
    critic_updates_per_generator=10,  # config
    timesteps=(999.0,),  # config: unit noise
    gan_weight_generator=0.0,  # stage 1 has no GAN
    gan_weight_critic=0.0,
    dm_min_level=0.02,  # config
    dm_max_level=0.98,  # config
)


def sd15() -> RunConfig:
    """DMD2 of Stable Diffusion 1.5 into one step, stage 1: no GAN (arXiv:2405.14867, appendix F; methods.md 1.6).

    Teacher and shards are yours to bring: data.shards as jobs/prepare_coco.py writes them, of captions like the paper's
    3 million LAION-Aesthetics prompts. The published run took 25 hours on 64 A100. Comments name each value's source:
    config = experiments/sdv1.5 of the official code, as methods.md 1.6 quotes it; ours = not given there.
    """
    adam_w: dict[str, Any] = {
        "betas": (0.9, 0.999),  # config
        "weight_decay": 0.01,  # config
        "clip_norm": 10.0,  # config
    }
    return RunConfig(
        name="dmd2_sd15",
        teacher=TeacherConfig(
            path="stable-diffusion-v1-5/stable-diffusion-v1-5",
            guidance_scale=1.75,  # config
            dtype="bf16",  # config: the teacher in bf16
        ),
        method=_SD15,
        # config: no EMA; both rates rise over 500 iterations, which accelerate makes 500 / 64 GPUs, so within the first
        # of the generator's updates, one in ten iterations (methods.md 1.2)
        generator=GeneratorConfig(lr=1e-5, warmup_steps=1, **adam_w),
        critic=CriticConfig(lr=1e-5, warmup_steps=8, **adam_w),
        train=TrainConfig(
            generator_updates=4000,  # config: 40k iterations, every tenth with a generator update
            batch_size=2048,  # config: 32 on each of 64 GPUs
            micro_batch_size=32,  # config
            dtype="bf16",  # config: autocast
            activation_checkpointing=True,  # ours: memory, not numbers
            log_every=10,  # ours
        ),
        data=DataConfig(shards="sd15_shards"),
        prepare=PrepareConfig(coco=None),
        evaluator=EvaluatorConfig(
            protocol="gigagan-coco30k",
            coco="coco",
            split="val2014",
            captions="coco_captions_30k.txt",  # the paper's, one a line
            teacher_figure=False,  # ours
            every=500,  # ours
        ),
        checkpoint=CheckpointConfig(every=100),  # ours
    )


def sd15_gan() -> RunConfig:
    """The same with stage 2 after it in one run: the GAN and a smaller rate (2 hours on 64 A100 in the paper).

    The published second stage resumes generator and critic from the first; here it begins at gan_start_update.
    """
    base = sd15()
    return replace(
        base,
        name="dmd2_sd15_gan",
        method=replace(
            _SD15,
            gan_weight_generator=1e-3,  # config
            gan_weight_critic=1e-2,  # config
            gan_start_update=4000,  # stage 1's length
        ),
        generator=replace(base.generator, lr_gan_stage=5e-7),  # config
        critic=replace(base.critic, lr_gan_stage=5e-7),  # config
        train=replace(base.train, generator_updates=4500),  # config: about 5k iterations more
    )


PRESETS = {"long": long, "lora": lora, "four_step": four_step, "sd15": sd15, "sd15_gan": sd15_gan}


if __name__ == "__main__":
    job_main(recipe, PRESETS)
