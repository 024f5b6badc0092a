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


def recipe() -> RunConfig:
    """DMD2 of the embedded captioned-scenes teacher into one step: the first minutes.

    Chosen by runs of 300 to 500 updates against each other, one core each: from t=850 the EMA's toyfid (2000 samples)
    was 1.8 after 250 updates, from the paper's t=999 3.2. What moves toyfid most is how often each background comes:
    its share swings (sample/mean) with GAN weights from 0.1 on and with higher rates; the critic's weighting, a rate
    that falls to 0 and the EMA dampen that.
    """
    return RunConfig(
        name="dmd2_coco",
        teacher=TeacherConfig(path="builtin:scenes", guidance_scale=2.0),
        method=DMD2Config(
            critic_updates_per_generator=5,
            timesteps=(850.0,),
            gan_weight_generator=0.03,
            gan_weight_critic=0.03,
            critic_weighting="snr_plus_one",
        ),
        generator=GeneratorConfig(lr=2e-4, warmup_steps=10, decay_steps=440, ema_halflife_images=2500.0),
        critic=CriticConfig(lr=8e-4, warmup_steps=10),
        train=TrainConfig(generator_updates=440, batch_size=32),
        data=DataConfig(shards="builtin:scenes"),
        evaluator=EvaluatorConfig(every=220, num_samples=2000, weights="ema"),
        checkpoint=CheckpointConfig(every=110),
    )


def long() -> RunConfig:
    """The same teacher and method for most of an hour, from a start that is easier, with a longer average."""
    base = recipe()
    return replace(
        base,
        name="dmd2_coco_long",
        method=replace(base.method, timesteps=(625.0,)),
        generator=replace(base.generator, lr=2e-4, decay_steps=4000, ema_halflife_images=30000.0),
        train=replace(base.train, generator_updates=4000),
        evaluator=replace(base.evaluator, every=400),
        checkpoint=replace(base.checkpoint, every=200),
    )


def four_step() -> RunConfig:
    """Four steps, trained by backward simulation on the grid of the paper's SDXL recipe."""
    base = recipe()
    return replace(
        base, name="dmd2_coco_four_step", method=replace(base.method, timesteps=(999.0, 749.0, 499.0, 249.0))
    )


PRESETS = {"long": long, "four_step": four_step}


if __name__ == "__main__":
    job_main(recipe, PRESETS)
