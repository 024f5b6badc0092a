"""Built-in data sets become folders of the run, and shards hold what the teacher's pipeline needs of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from raydistill.data.reader import DataConfig
from raydistill.roles.evaluator import EvaluatorConfig
from raydistill.runtime.prepare import builtin_paths, prepare_builtin, prepare_shards
from raydistill.runtime.settings import PrepareConfig, RunConfig, TeacherConfig


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        name="digits",
        output_dir=str(tmp_path),
        teacher=TeacherConfig(path="builtin:digits", guidance_scale=1.0),
        prepare=PrepareConfig(coco="builtin:digits"),
        evaluator=EvaluatorConfig(coco="builtin:digits", detector="digits"),
        data=DataConfig(shards="builtin:digits"),
    )


def test_the_digits_are_written_and_sharded_without_an_encoder(config: RunConfig, tmp_path: Path) -> None:
    config = builtin_paths(config)
    assert config.prepare.coco == config.evaluator.coco == str(tmp_path / "data" / "digits" / "coco")
    assert config.data.shards == str(tmp_path / "data" / "digits" / "shards")
    prepare_builtin(config)
    prepare_shards(config)
    index = json.loads((Path(config.data.shards) / "index.json").read_text())
    assert sum(shard["samples"] for shard in index["shards"]) == 1797
    assert index["image_shape"] == [3, 8, 8]
    assert index["latent_shape"] is None
    assert index["text_shapes"] == {}
    assert index["encoder"] is None
    assert not (tmp_path / "data" / "scenes-8000-2000").exists()


def test_names_are_replaced_one_by_one_and_only_what_is_used_is_written(
    config: RunConfig, tmp_path: Path
) -> None:
    mixed = builtin_paths(
        replace(
            config,
            prepare=replace(config.prepare, coco="builtin:scenes", num_train=3, num_val=2),
            evaluator=replace(config.evaluator, enabled=False),
            data=DataConfig(shards="mine"),
        )
    )
    assert mixed.prepare.coco == str(tmp_path / "data" / "scenes-3-2" / "coco")
    assert mixed.evaluator.coco == str(tmp_path / "data" / "digits" / "coco")
    assert mixed.data.shards == "mine"
    prepare_builtin(mixed)
    assert Path(mixed.prepare.coco, "scenes.json").is_file()
    assert not Path(mixed.evaluator.coco).exists()
