"""DMD2 of a class-conditional EDM teacher into a one-step generator.

python jobs/dmd2_imagenet64.py                      the embedded digits teacher, minutes on two cores
python jobs/dmd2_imagenet64.py method.critic_updates_per_generator=1 name=ratio1
python jobs/dmd2_imagenet64.py --preset paper --dry-run teacher.path=random:edm-imagenet64
ray job submit -- python jobs/dmd2_imagenet64.py    the same as a Ray job
"""

from typing import Any

from raydistill.cli import job_main
from raydistill.data.reader import DataConfig
from raydistill.methods.dmd2 import DMD2Config
from raydistill.roles.critic import CriticConfig
from raydistill.roles.evaluator import EvaluatorConfig
from raydistill.roles.generator import GeneratorConfig
from raydistill.runtime import digits
from raydistill.runtime.settings import CheckpointConfig, PrepareConfig, RunConfig, TeacherConfig, TrainConfig


def recipe() -> RunConfig:
    """DMD2 of the embedded digits teacher into one step."""
    return digits.dmd2()


def paper() -> RunConfig:
    """DMD2's ImageNet-64 run from scratch, FID 1.51 (arXiv:2405.14867, experiments/imagenet, methods.md 1.6).

    The teacher is NVIDIA's edm-imagenet-64x64-cond-adm.pkl (CC BY-NC-SA).
    """
    adam_w: dict[str, Any] = {
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "clip_norm": 10.0,
    }
    return RunConfig(
        name="dmd2_imagenet64",
        teacher=TeacherConfig(path="edm-imagenet-64x64-cond-adm.pkl", guidance_scale=1.0),
        method=DMD2Config(
            critic_updates_per_generator=5,
            timesteps=(80.0,),  # conditioning_sigma
            gan_weight_generator=3e-3,
            gan_weight_critic=1e-2,
        ),
        # 500 iterations, which accelerate makes 500 / 7 GPUs; the generator moves in every fifth (methods.md 1.2)
        generator=GeneratorConfig(lr=2e-6, warmup_steps=14, **adam_w),
        critic=CriticConfig(lr=2e-6, warmup_steps=71, **adam_w),
        train=TrainConfig(
            generator_updates=40_000,  # 200k iterations of their code, one critic update each, every fifth with both
            batch_size=280,  # 40 on each of 7 GPUs
            dtype="bf16",
            log_every=10,
        ),
        data=DataConfig(shards="imagenet64_shards"),
        prepare=PrepareConfig(coco=None),
        evaluator=EvaluatorConfig(
            protocol="dmd2-in64-50k", reference="imagenet-64x64.npz", teacher_figure=False, every=2000
        ),
        checkpoint=CheckpointConfig(every=500),
    )


PRESETS = {"paper": paper}


if __name__ == "__main__":
    job_main(recipe, PRESETS)
