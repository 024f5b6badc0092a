"""Four real runs, two ratios by two guidance scales, under one parent in one MLflow file."""

from pathlib import Path

import pytest

from raydistill.tracking import Tracker, TrackingConfig
from tests.report.small_runs import RUNS, run_small


@pytest.fixture(scope="session")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def parent_id(output_dir: Path) -> str:
    """Of the four runs."""
    parent = Tracker(TrackingConfig(), str(output_dir / "four"), "four")
    for name, (ratio, guidance) in RUNS.items():
        run_small(
            output_dir, name, f"method.critic_updates_per_generator={ratio}", f"teacher.guidance_scale={guidance}",
            parent=parent.run_id,
        )  # fmt: skip
    parent.finish()
    return parent.run_id


@pytest.fixture(scope="session")
def folders(output_dir: Path, parent_id: str) -> list[Path]:
    """Of the four runs, in the order of RUNS."""
    return [output_dir / name for name in RUNS]
