"""Shard sets: the order is a pure function, and a set that is not whole is refused before training."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from raydistill.data.prepare import prepare_coco
from raydistill.data.shard_file import ShardFile
from raydistill.data.shards import ShardIndex, ShardSet, plan
from raydistill.errors import DataError
from tests.data.samples_on_disk import PoolEncoder

COUNTS = (8, 8, 3, 8, 0, 8, 5)


def epoch_order(seed: int, purpose: str, epoch: int, shuffle_shards: int) -> list[tuple[int, int]]:
    epoch_plan = plan(seed, purpose, epoch, COUNTS, shuffle_shards)
    order = []
    for block in epoch_plan.blocks:
        shards, samples = epoch_plan.order(block)
        order += list(zip(shards.tolist(), samples.tolist(), strict=True))
    return order


STORED = [(shard, sample) for shard, count in enumerate(COUNTS) for sample in range(count)]


@pytest.mark.parametrize("shuffle_shards", [1, 2, 3, 7, 100])
def test_an_epoch_holds_every_sample_once(shuffle_shards: int) -> None:
    order = epoch_order(0, "real", 0, shuffle_shards)
    assert sorted(order) == STORED
    assert order != STORED


def test_orders_differ_by_seed_purpose_and_epoch_and_by_nothing_else() -> None:
    orders = [
        epoch_order(*key, 2) for key in [(0, "real", 0), (1, "real", 0), (0, "prompt", 0), (0, "real", 1)]
    ]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])
    assert orders[0] == epoch_order(0, "real", 0, 2)


def test_the_samples_of_a_block_come_from_its_shards_only_and_are_mixed() -> None:
    epoch_plan = plan(3, "real", 5, (50,) * 6, 2)
    assert [len(block.shards) for block in epoch_plan.blocks] == [2, 2, 2]
    for block in epoch_plan.blocks:
        shards, _ = epoch_plan.order(block)
        assert set(shards.tolist()) == set(block.shards)
        # 99 neighbours of a random order of 50 + 50 change shard about 50 times, at a standard deviation of 5
        assert 25 < int(np.count_nonzero(np.diff(shards))) < 75


def test_without_shuffling_the_stored_order_is_kept() -> None:
    assert epoch_order(0, "real", 4, 0) == STORED


def test_an_offset_is_found_in_its_block_even_past_empty_shards() -> None:
    epoch_plan = plan(0, "real", 0, COUNTS, 1)
    assert len(epoch_plan.blocks) == 6
    for offset in range(sum(COUNTS)):
        block = epoch_plan.block_at(offset)
        assert block.start <= offset < block.start + block.num_samples


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("", 50), ("/", 50), ("/shard-00000[01].tar", 16), ("/*.tar", 50), ("/shard-000006.tar", 2)],
)
def test_folders_globs_and_single_tars_are_listed(shards: Path, pattern: str, count: int) -> None:
    assert ShardSet(str(shards) + pattern).num_samples == count


def test_a_glob_over_folders_joins_them_if_they_are_of_one_kind(scenes: Path, tmp_path: Path) -> None:
    encoder = PoolEncoder()
    prepare_coco(scenes, "train", tmp_path / "a", encoder=encoder, progress=False, limit=3)
    prepare_coco(scenes, "val", tmp_path / "b", encoder=encoder, progress=False)
    assert ShardSet(f"{tmp_path}/*/*.tar").num_samples == 7
    prepare_coco(scenes, "val", tmp_path / "c", progress=False)
    with pytest.raises(
        DataError, match=r"joins folders of different latent_shape: \(3, 8, 8\) in .*a, None in"
    ):
        ShardSet(f"{tmp_path}/*/*.tar")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", r"folder .*out can't be read: No such file"),
        ("empty glob", r"none-\*\.tar' matches no file"),
        ("no index", r"has no index\.json, so its shards are not complete; make them with jobs/prepare_coco"),
        ("bad index", r"index\.json is no shard index: .*; prepare the shards again"),
        ("other schema", r"index\.json has schema version 99, known is 1"),
        ("missing", r"shard .*shard-000001\.tar is missing \(index\.json lists it\)"),
        (
            "truncated",
            r"shard .*shard-000001\.tar has \d+ bytes, not the \d+ of index\.json: it is truncated",
        ),
        ("foreign", r"foreign\.tar is not in its index\.json"),
        ("nothing", "data.shards is empty"),
    ],
)
def test_a_set_that_is_not_whole_is_refused_in_one_line(
    shards: Path, tmp_path: Path, damage: str, message: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(shards, out)
    value, index, second = str(out), out / "index.json", out / "shard-000001.tar"
    match damage:
        case "no folder":
            shutil.rmtree(out)
        case "empty glob":
            value = f"{out}/none-*.tar"
        case "no index":
            index.unlink()
        case "bad index":
            index.write_text('{"schema": 1, "shards": [{"name": "x"}]}')
        case "other schema":
            index.write_text(json.dumps(json.loads(index.read_text()) | {"schema": 99}))
        case "missing":
            second.unlink()
        case "truncated":
            second.write_bytes(second.read_bytes()[:-4096])
        case "foreign":
            shutil.copy(second, out / "foreign.tar")
            value = f"{out}/*.tar"
        case "nothing":
            value = ""
    with pytest.raises(DataError, match=message) as raised:
        ShardSet(value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("keep", [700, 3000, 9000])
def test_a_tar_that_is_cut_is_refused_where_its_index_was_cut_with_it(
    shards: Path, tmp_path: Path, keep: int
) -> None:
    """A copy that stopped early, beside an index that somebody wrote for it."""
    data = (shards / "shard-000000.tar").read_bytes()[:keep]
    (tmp_path / "shard-000000.tar").write_bytes(data)
    index = json.loads((shards / "index.json").read_text())
    index["shards"] = [index["shards"][0] | {"bytes": keep}]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        DataError, match=r"shard-000000\.tar (is no whole tar file|holds \d samples, index.json says 8)"
    ):
        ShardSet(str(tmp_path)).open(0)


def test_a_file_that_is_no_tar_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.tar"
    file.write_bytes(b"not a tar" * 200)
    with pytest.raises(DataError, match=r"x\.tar is no whole tar file"):
        ShardFile("x.tar", str(file))


def test_a_name_that_is_twice_in_a_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("key.json"))
    with pytest.raises(DataError, match="duplicate file name"):
        ShardFile("x.tar", str(tmp_path / "x.tar"))


def test_the_index_survives_json(shards: Path) -> None:
    index = ShardIndex.from_json((shards / "index.json").read_bytes(), "index.json")
    assert ShardIndex.from_json(index.to_json(), "index.json") == index


def test_readers_of_one_process_share_an_open_shard(shards: Path) -> None:
    one, two = ShardSet(str(shards)), ShardSet(f"{shards}/*.tar")
    assert one.open(3) is two.open(3)


def test_no_more_shards_are_held_open_than_allowed(shards: Path) -> None:
    shard_set = ShardSet(str(shards), max_open=2)
    first = shard_set.open(0)
    shard_set.open(1)
    shard_set.open(2)
    assert shard_set.open(2) is shard_set.open(2)
    reopened = shard_set.open(0)
    # still the same file, since this test holds it
    assert reopened is first
    assert len(shard_set._open) == 2
