"""SiD (score identity distillation) of a class-conditional EDM teacher into a one-step generator.

python jobs/sid_cifar10.py                          the embedded digits teacher, minutes on two cores
python jobs/sid_cifar10.py --preset sida            with SiDA's discriminator, which has no weights of its own
python jobs/sid_cifar10.py --preset paper --dry-run teacher.path=random:edm-cifar10
python jobs/sid_cifar10.py --preset paper data.shards=...   the paper's CIFAR-10 recipe
ray job submit -- python jobs/sid_cifar10.py        the same as a Ray job
"""

from typing import Any

from raydistill.cli import job_main
from raydistill.data.reader import DataConfig
from raydistill.methods.sid import SiDConfig
from raydistill.roles.critic import CriticConfig
from raydistill.roles.evaluator import EvaluatorConfig
from raydistill.roles.generator import GeneratorConfig
from raydistill.runtime import digits
from raydistill.runtime.settings import CheckpointConfig, PrepareConfig, RunConfig, TeacherConfig, TrainConfig


def recipe() -> RunConfig:
    """SiD of the embedded digits teacher into one step."""
    return digits.sid()


def sida() -> RunConfig:
    """SiDA of the embedded digits teacher into one step."""
    return digits.sida()


def paper() -> RunConfig:
    """SiD's class-conditional CIFAR-10 run (arXiv:2404.04057; run_sid.sh and sid_train.py of its code, methods.md 2.3).

    Left out: dropout 0.13 in the generator and augmentation 0.12 of the critic's samples. The teacher is NVIDIA's
    edm-cifar10-32x32-cond-vp.pkl (CC BY-NC-SA). Only the shards' labels are used. Evaluated with EDM's
    reference and detector; their own figures take labels and noise from another random stream.
    """
    adam: dict[str, Any] = {
        "betas": (0.0, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": None,
        "warmup_steps": 0,
    }
    return RunConfig(
        name="sid_cifar10",
        teacher=TeacherConfig(path="edm-cifar10-32x32-cond-vp.pkl", guidance_scale=1.0),
        method=SiDConfig(
            alpha=1.2,  # sid_train.py; 1.710 FID against 1.932 with 1.0
            sigma_init=2.5,  # --init_sigma
            u_max=0.8,  # tmax 800 of 1000
            generator_loss_scale=100.0,  # lsg
            critic_loss_scale=1.0,  # ls
        ),
        generator=GeneratorConfig(
            lr=1e-5,  # --glr
            ema_halflife_images=500_000.0,  # --ema 0.5 Mimg
            ema_ramp=0.05,  # training loop
            **adam,
        ),
        critic=CriticConfig(lr=1e-5, **adam),  # --lr
        train=TrainConfig(
            # 800 Mimg in batches of 256; 713 Mimg is the published checkpoint
            generator_updates=3_125_000,
            batch_size=256,
            log_every=50,
        ),
        data=DataConfig(shards="cifar10_shards"),
        prepare=PrepareConfig(coco=None),
        evaluator=EvaluatorConfig(
            protocol="edm-cifar10-50k",
            reference="cifar10-32x32.npz",
            weights="ema",
            teacher_figure=False,
            every=20_000,  # 5 Mimg
        ),
        checkpoint=CheckpointConfig(every=2000),
    )


PRESETS = {"sida": sida, "paper": paper}


if __name__ == "__main__":
    job_main(recipe, PRESETS)
