"""DMD2 on captioned images: distil a text-to-image teacher into a one-step generator.

python jobs/dmd2_coco.py                            the embedded teacher and data, minutes on two cores
python jobs/dmd2_coco.py --dry-run                  settings, bytes per role, forwards per update
python jobs/dmd2_coco.py method.critic_updates_per_generator=10 name=ratio10
python jobs/dmd2_coco.py --preset long              on to the teacher's own quality, within an hour
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
    """DMD2 of the embedded captioned-scenes teacher into one step: the first five minutes."""
    return RunConfig(
        name="dmd2_coco",
        teacher=TeacherConfig(path="builtin:scenes", guidance_scale=2.0),
        method=DMD2Config(
            critic_updates_per_generator=5,
            timesteps=(999.0,),
            gan_weight_generator=0.1,
            gan_weight_critic=0.03,
        ),
        generator=GeneratorConfig(lr=1.5e-4, warmup_steps=10, ema_halflife_images=1500.0),
        critic=CriticConfig(lr=8e-4, warmup_steps=10),
        train=TrainConfig(generator_updates=350, batch_size=32),
        data=DataConfig(shards="builtin:scenes"),
        evaluator=EvaluatorConfig(every=100, num_samples=1000, weights="ema"),
        checkpoint=CheckpointConfig(every=50),
    )


def long() -> RunConfig:
    """The same for most of an hour."""
    base = recipe()
    return replace(
        base,
        name="dmd2_coco_long",
        method=replace(base.method, timesteps=(625.0,)),
        generator=replace(base.generator, ema_halflife_images=6000.0),
        train=replace(base.train, generator_updates=1300, batch_size=64),
        evaluator=replace(base.evaluator, every=200, num_samples=2000),
        checkpoint=replace(base.checkpoint, every=100),
    )


PRESETS = {"long": long}


if __name__ == "__main__":
    job_main(recipe, PRESETS)
