"""Shared by the tests of the data layer: 50 drawn scenes, and shards of them with latents and embeddings."""

from pathlib import Path

import pytest

from raydistill.data.prepare import prepare_coco
from raydistill.data.scenes import write_scenes
from tests.data.samples_on_disk import PoolEncoder

NUM_SCENES = 50


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coco") / "scenes"
    return write_scenes(root, num_train=NUM_SCENES, num_val=4, progress=False)


@pytest.fixture(scope="session")
def shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven shards of at most eight samples. Read only."""
    out = tmp_path_factory.mktemp("prepared") / "shards"
    prepare_coco(scenes, "train", out, 8, PoolEncoder(), progress=False, batch_size=4)
    return out
