"""Small real runs of the default job, in this process."""

import sys
from dataclasses import replace
from pathlib import Path

from raydistill.config import apply_overrides
from raydistill.runtime.run import run

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "prepare.num_train=32", "prepare.num_val=16", "prepare.samples_per_shard=16", "train.batch_size=4",
    "train.generator_updates=4", "checkpoint.every=2", "evaluator.every=2", "evaluator.num_samples=16",
    "evaluator.batch_size=16", "evaluator.teacher_steps=2", "evaluator.grid_images=3", "placement.session=inline",
    "teacher.preflight=false",
]  # fmt: skip
RUNS = {f"ratio{ratio}_guidance{guidance}": (ratio, guidance) for ratio in (1, 2) for guidance in (1.5, 3.0)}


def run_small(output_dir: Path, name: str, *more: str, parent: str | None = None) -> None:
    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        import dmd2_coco
    finally:
        sys.path.pop(0)
    config = apply_overrides(dmd2_coco.recipe(), [f"output_dir={output_dir}", f"name={name}", *SMALL, *more])
    run(replace(config, tracking=replace(config.tracking, parent_run_id=parent)))
