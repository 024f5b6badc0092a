"""A sweep of DMD2 over critic update ratio and guidance scale, on one shared teacher.

python jobs/sweep_dmd2_coco.py                          the embedded teacher and data
python jobs/sweep_dmd2_coco.py --resume                 go on after an interruption
python jobs/sweep_dmd2_coco.py --over method.critic_updates_per_generator=2,5 --over teacher.guidance_scale=1.5,3
python jobs/sweep_dmd2_coco.py --search optuna --num-trials 12 --over "generator.lr=loguniform(1e-5,1e-3)"
ray job submit -- python jobs/sweep_dmd2_coco.py        the same as a Ray job
"""

from dataclasses import replace

from dmd2_coco import recipe as dmd2

from raydistill.cli import sweep_main
from raydistill.sweep.config import SweepConfig


def recipe() -> SweepConfig:
    """DMD2 on the captioned scenes: R of 1, 2, 5 and 10 by guidance scales of 1.5 and 3, 80 updates each."""
    base = dmd2()
    run = replace(
        base,
        name="sweep_dmd2_coco",
        train=replace(base.train, generator_updates=80),
        # few updates: an average over less of them, and shown in fewer pictures
        generator=replace(base.generator, ema_halflife_images=640.0),
        evaluator=replace(base.evaluator, every=40, num_samples=1000),
        checkpoint=replace(base.checkpoint, every=20),
    )
    return SweepConfig(
        run=run,
        space={
            "method.critic_updates_per_generator": [1, 2, 5, 10],
            "teacher.guidance_scale": [1.5, 3.0],
        },
    )


if __name__ == "__main__":
    sweep_main(recipe)
