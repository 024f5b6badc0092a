"""DMD2 on captioned images: distil a text-to-image teacher into a one-step generator.

python jobs/dmd2_coco.py                                  the embedded teacher and data, a few minutes on two cores
python jobs/dmd2_coco.py --dry-run                        settings, bytes per role, forwards per update
python jobs/dmd2_coco.py method.critic_updates_per_generator=10 name=ratio10
python jobs/dmd2_coco.py --preset long                    up to the teacher's quality, within an hour
python jobs/dmd2_coco.py --preset four_step               four steps with backward simulation
ray job submit -- python jobs/dmd2_coco.py                the same under Ray
"""

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
        teacher=TeacherConfig(path="builtin:scenes", guidance_scale=3.0),
        method=DMD2Config(critic_updates_per_generator=5, gan_weight_generator=3e-3, gan_weight_critic=1e-2),
        generator=GeneratorConfig(lr=3e-4, warmup_steps=20, ema_halflife_images=2000.0),
        critic=CriticConfig(lr=3e-4, warmup_steps=20),
        train=TrainConfig(generator_updates=300, batch_size=64),
        data=DataConfig(shards="builtin:scenes"),
        evaluator=EvaluatorConfig(every=100, num_samples=1000, weights="ema"),
        checkpoint=CheckpointConfig(every=50),
    )


PRESETS = {}


if __name__ == "__main__":
    job_main(recipe, PRESETS)
