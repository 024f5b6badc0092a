"""DMD2 on captioned images: distil a text-to-image teacher into a one-step generator.

python jobs/dmd2_coco.py                            the embedded teacher and data, minutes on two cores
python jobs/dmd2_coco.py --dry-run                  settings, bytes per role, forwards per update
python jobs/dmd2_coco.py method.critic_updates_per_generator=10 name=ratio10
python jobs/dmd2_coco.py --preset long              towards the teacher's own quality, for most of an hour
python jobs/dmd2_coco.py --preset four_step         four steps with backward simulation
ray job submit -- python jobs/dmd2_coco.py          the same as a Ray job
"""

from dataclasses import replace

from raydistill.cli import job_main
from raydistill.data.reader import DataConfig
from raydistill.methods.dmd2 import DMD2Config
from raydistill.roles.critic import CriticConfig
from raydistill.roles.evaluator import EvaluatorConfig
from raydistill.roles.generator import GeneratorConfig
from raydistill.runtime.settings import CheckpointConfig, RunConfig, TeacherConfig, TrainConfig

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
    """The same run with generator and critic as adapters in the teacher itself."""
    base = recipe()
    return replace(
        base,
        name="dmd2_coco_lora",
        generator=replace(base.generator, lr=1e-3, lora_rank=32, lora_targets="all"),
        critic=replace(base.critic, lr=1.5e-3, lora_rank=32, lora_targets="all"),
    )


PRESETS = {"long": long, "lora": lora, "four_step": four_step}


if __name__ == "__main__":
    job_main(recipe, PRESETS)
