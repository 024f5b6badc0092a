"""The reader: the stream is one and the same for every split of the work, and bad samples are never silent."""

import fcntl
import gc
import io
import json
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from raydistill.data.coco import read_coco
from raydistill.data.images import load_image
from raydistill.data.prepare import prepare_coco
from raydistill.data.reader import Batch, DataConfig, ShardReader
from raydistill.data.shards import ShardIndex, ShardSet
from raydistill.errors import ConfigError, DataError
from tests.data.samples_on_disk import PoolEncoder

ALL = ("image", "latent", "text")


def reader(shards: Path | str, fields: tuple[str, ...] = ALL, **changes: Any) -> ShardReader:
    """12 samples a batch unless told otherwise; `changes` are settings or arguments."""
    settings = {key: changes.pop(key) for key in list(changes) if key in DataConfig.__dataclass_fields__}
    arguments = {"purpose": "real", "seed": 5, "batch_size": 12, "micro_batch_size": 12} | changes
    config = DataConfig(shards=str(shards), **({"num_workers": 0, "shuffle_shards": 2} | settings))
    return ShardReader(config, fields=fields, **arguments)


def joined(batches: list[Batch]) -> dict[str, Any]:
    """Micro-batches as one batch of plain values that compare with ==."""
    out: dict[str, Any] = {
        "positions": np.concatenate([batch.positions for batch in batches]).tolist(),
        "keys": [key for batch in batches for key in batch.keys],
        "captions": [caption for batch in batches for caption in batch.captions],
    }
    if batches[0].images is not None:
        out["images"] = torch.cat([b.images for b in batches if b.images is not None]).tolist()
    if batches[0].latents is not None:
        out["latents"] = torch.cat([b.latents for b in batches if b.latents is not None]).tolist()
    for name in batches[0].text or {}:
        out[name] = torch.cat([batch.text[name] for batch in batches if batch.text is not None]).tolist()
    return out


def repack(folder: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Rewrite every shard with each file changed (None drops it) and the index made to fit."""
    index = json.loads((folder / "index.json").read_text())
    for info in index["shards"]:
        path = folder / info["name"]
        with tarfile.open(path) as tar:
            files = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        with tarfile.open(path, "w") as tar:
            for name, data in files:
                changed = change(name, data)
                if changed is not None:
                    member = tarfile.TarInfo(name)
                    member.size = len(changed)
                    tar.addfile(member, io.BytesIO(changed))
        info["bytes"] = path.stat().st_size
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def spoil(*ids: int, suffix: str, data: bytes | None) -> Callable[[str, bytes], bytes | None]:
    """Replaces one file of some samples."""
    names = {f"{number:012d}.{suffix}" for number in ids}
    return lambda name, content: data if name in names else content


def read(stream: ShardReader, steps: range) -> list[Batch]:
    return [batch for step in steps for batch in stream.batch(step)]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("world_size", "micro", "workers", "ahead"),
    [(1, 4, 0, 4), (2, 6, 1, 4), (2, 3, 3, 0), (4, 1, 2, 7), (3, 4, 1, 1)],
)
def test_global_batches_are_the_same_for_any_ranks_workers_and_micro_batches(
    shards: Path, world_size: int, micro: int, workers: int, ahead: int
) -> None:
    steps = [0, 1, 3, 4, 9]
    whole = reader(shards)
    ranks = [
        reader(
            shards,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro,
            num_workers=workers,
            prefetch_micro_batches=ahead,
        )
        for rank in range(world_size)
    ]
    for step in steps:
        parts = [batch for rank in ranks for batch in rank.batch(step)]
        assert {len(part.keys) for part in parts} == {micro}
        assert joined(parts) == joined(list(whole.batch(step)))


def test_a_new_reader_goes_on_at_any_batch(shards: Path) -> None:
    first = reader(shards, num_workers=1)
    stream = [joined(list(first.batch(step))) for step in range(10)]
    resumed = reader(shards, num_workers=1)
    assert [joined(list(resumed.batch(step))) for step in range(6, 10)] == stream[6:]
    # backwards, twice, and a batch that is left half read
    assert joined(list(resumed.batch(2))) == stream[2]
    assert joined(list(resumed.batch(2))) == stream[2]
    half = reader(shards, num_workers=2, micro_batch_size=3)
    next(iter(half.batch(0)))
    assert joined(list(half.batch(1))) == stream[1]


def test_two_batches_may_be_read_side_by_side(shards: Path) -> None:
    plain, both = reader(shards), reader(shards, micro_batch_size=4, num_workers=1)
    pairs = list(zip(both.batch(0), both.batch(7), strict=True))
    assert joined([a for a, _ in pairs]) == joined(list(plain.batch(0)))
    assert joined([b for _, b in pairs]) == joined(list(plain.batch(7)))


def test_positions_are_the_global_ones_and_every_epoch_has_every_sample_once(shards: Path) -> None:
    stream = reader(shards, ("text",))
    batches = [batch for step in range(25) for batch in stream.batch(step)]
    assert np.concatenate([batch.positions for batch in batches]).tolist() == list(range(300))
    keys = [key for batch in batches for key in batch.keys]
    epochs = [keys[start : start + 50] for start in range(0, 300, 50)]
    assert all(len(set(epoch)) == 50 for epoch in epochs)
    assert all(a != b for a, b in pairwise(epochs))


def test_samples_are_what_was_prepared(scenes: Path, shards: Path) -> None:
    sources = {f"{image.id:012d}": image for image in read_coco(scenes, "train")}
    encoder = PoolEncoder()
    chosen = set()
    for batch in (batch for step in range(5) for batch in reader(shards).batch(step)):
        assert batch.images is not None
        assert batch.latents is not None
        assert batch.text is not None
        text = encoder.encode_text(batch.captions)
        for name in ("text", "pooled"):
            assert batch.text[name].dtype == torch.float32
            torch.testing.assert_close(batch.text[name], text[name].detach(), atol=2e-3, rtol=0)
        for row, key in enumerate(batch.keys):
            image = load_image(sources[key].path, 32)
            assert torch.equal(batch.images[row], image)
            latent = encoder.encode_images(image[None])[0]
            torch.testing.assert_close(batch.latents[row], latent, atol=1e-3, rtol=0)
            chosen.add(sources[key].captions.index(batch.captions[row]))
    assert chosen == {0, 1, 2, 3, 4}


def test_streams_of_other_purposes_and_seeds_differ(shards: Path) -> None:
    first = [joined(list(reader(shards, ("text",), **changes).batch(0)))["keys"] for changes in (
        {}, {"purpose": "prompt"}, {"seed": 6}
    )]  # fmt: skip
    assert first[0] != first[1] != first[2] != first[0]


def test_only_the_fields_asked_for_are_read(shards: Path) -> None:
    latents = reader(shards, ("latent",))
    (batch,) = latents.batch(0)
    assert batch.latents is not None
    assert batch.images is None
    assert batch.text is None
    assert len(batch.captions) == 12
    assert latents.images_decoded == 0


def test_an_image_is_decoded_once_while_the_cache_has_room_for_it(shards: Path) -> None:
    roomy, none = reader(shards, ("image",)), reader(shards, ("image",), cache_mb=0)
    for one, two in zip(read(roomy, range(25)), read(none, range(25)), strict=True):
        assert one.images is not None
        assert two.images is not None
        assert torch.equal(one.images, two.images)
    assert roomy.images_decoded == 50
    # 300 samples, and the one by which the first shard was checked
    assert none.images_decoded == 301


def test_bad_samples_are_counted_by_reason_and_their_places_filled_alike_on_any_split(copy: Path) -> None:
    def change(name: str, data: bytes) -> bytes | None:
        for ids, suffix, replaced in (
            ((3, 20), "jpg", b"no image"),
            ((7,), "json", b"{"),
            ((11,), "json", b'{"captions": []}'),
            ((12,), "json", None),
            ((15,), "latent.npy", npy(np.zeros((3, 4, 4), np.float16))),
            ((16,), "latent.npy", npy(np.full((3, 8, 8), np.nan, np.float16))),
            ((17,), "text.npy", npy(np.zeros((4, 5, 4), np.float16))),
            ((18,), "text.npy", npy(np.zeros((5, 5, 4), np.int8))),
            ((19,), "pooled.npy", b"\x93NUMPY junk"),
        ):
            data_or_none = spoil(*ids, suffix=suffix, data=replaced)(name, data)
            if data_or_none is not data:
                return data_or_none
        return data

    repack(copy, change)
    # all shards in one block, so that every bad sample of an epoch draws from the same forty
    whole = reader(copy, max_rejected_share=0.5, shuffle_shards=7)
    ranks = [
        reader(
            copy,
            max_rejected_share=0.5,
            shuffle_shards=7,
            rank=rank,
            world_size=2,
            micro_batch_size=3,
            num_workers=2,
        )
        for rank in (0, 1)
    ]
    keys = []
    for step in range(25):
        expected = joined(list(whole.batch(step)))
        assert joined([batch for rank in ranks for batch in rank.batch(step)]) == expected
        keys += expected["keys"]
    assert len(keys) == 300
    bad = {3, 20, 7, 11, 12, 15, 16, 17, 18, 19}
    assert {int(key) for key in keys} == set(range(1, 51)) - bad
    for start in range(0, 300, 50):
        stand_ins = Counter(keys[start : start + 50]) - Counter(set(keys))
        assert sum(stand_ins.values()) == 10
        assert len(stand_ins) >= 5
    counters = whole.counters
    reasons = {name.removeprefix("rejected/") for name in counters} - {"accepted", "rejected"}
    assert reasons == {
        "image_undecodable", "json_invalid", "caption_missing", "json_missing", "latent_shape",
        "latent_not_finite", "text_shape", "text_dtype", "pooled_invalid",
    }  # fmt: skip
    assert counters["accepted"] == 300
    assert counters["rejected"] == sum(counters[f"rejected/{reason}"] for reason in reasons)
    # ten bad samples in each of six epochs
    assert counters["rejected"] == 60
    assert counters["rejected/image_undecodable"] == 12
    merged = [rank.counters for rank in ranks]
    assert sum(c["rejected"] for c in merged) == counters["rejected"]


def test_too_many_bad_samples_stop_the_run_at_the_same_batch(copy: Path) -> None:
    repack(copy, spoil(*range(10, 16), suffix="jpg", data=b"no image"))
    lenient = reader(copy, ("image",), max_rejected_share=0.99, micro_batch_size=1)
    bad_at = []
    for number, _ in enumerate(batch for step in range(5) for batch in lenient.batch(step)):
        bad_at += [number] * (lenient.counters["rejected"] - len(bad_at))
    sixth = bad_at[5] + 1
    for workers in (0, 2):
        stream = reader(copy, ("image",), num_workers=workers, max_rejected_share=0.1, micro_batch_size=1)
        with pytest.raises(
            DataError, match=r"6 samples .* \(image_undecodable: 6\), more than .*share=0\.1 of 50"
        ):
            read(stream, range(5))
        assert stream.counters["accepted"] == sixth


def test_a_block_that_yields_nothing_stops_the_run(copy: Path) -> None:
    repack(copy, lambda name, data: b"gone" if name.endswith("jpg") and int(name[:12]) > 8 else data)
    stream = reader(copy, ("image",), max_rejected_share=0.99, shuffle_shards=1)
    with pytest.raises(
        DataError, match=r"64 samples in a row were rejected \(image_undecodable: 64\).*data\.shards"
    ):
        read(stream, range(5))


def test_a_first_shard_without_a_usable_sample_is_refused_at_once(copy: Path) -> None:
    repack(copy, lambda name, data: b'{"text": "a"}' if name.endswith("json") else data)
    with pytest.raises(
        DataError, match=r"no usable sample among its first 8 \(caption_missing: 8\); the first is 0+1"
    ):
        reader(copy)


def test_a_first_shard_with_latents_of_another_shape_is_refused_at_once(copy: Path) -> None:
    wrong = npy(np.zeros((3, 4, 4), np.float16))
    repack(copy, lambda name, data: wrong if name.endswith("latent.npy") else data)
    with pytest.raises(DataError, match=r"latent_shape: 8\).*\(\[3, 4, 4\], not \[3, 8, 8\]\)"):
        reader(copy)


def test_shards_with_wrong_keys_are_refused_with_the_keys_found_and_needed(copy: Path) -> None:
    repack(copy, lambda name, data: None if name.endswith("latent.npy") else data)
    with pytest.raises(DataError, match=(
        r"shard-000000\.tar has no latent\.npy: they hold jpg, json, pooled\.npy, text\.npy, "
        r"needed are jpg, json, latent\.npy, pooled\.npy, text\.npy \(data\.shards\)"
    )):  # fmt: skip
        reader(copy)
    reader(copy, ("image", "text"))


def test_fields_that_were_not_prepared_are_refused(scenes: Path, tmp_path: Path) -> None:
    prepare_coco(scenes, "train", tmp_path, progress=False, limit=4)
    with pytest.raises(
        DataError, match=r"prepared without latent: it holds image, needed are latent; .*--encode"
    ):
        reader(tmp_path, ("latent",))
    with pytest.raises(ConfigError, match="unknown data field 'depth'; there are image, latent, text"):
        reader(tmp_path, ("depth",))


def test_shards_of_another_encoder_are_refused_unless_only_images_are_read(shards: Path) -> None:
    ours, theirs = PoolEncoder.fingerprint, "0" * 64
    reader(shards, expect_encoder=ours)
    with pytest.raises(DataError, match=rf"encoded by {ours[:12]}, this run's teacher\.path is 0{{12}}"):
        reader(shards, expect_encoder=theirs)
    reader(shards, ("image",), expect_encoder=theirs)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 10}, {"world_size": 8, "micro_batch_size": 1}, {"micro_batch_size": 5}]
)
def test_a_batch_that_does_not_divide_is_refused(shards: Path, changes: dict[str, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.batch_size=\d+ is not divisible by \d ranks x train\.micro"
    ):
        reader(shards, **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_workers", -1),
        ("max_rejected_share", 1.0),
        ("timeout_s", 0.0),
        ("cache_mb", -1),
        ("shuffle_shards", -1),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{name}={value}"):
        DataConfig(shards="x", **{name: value})  # type: ignore[arg-type]


def test_a_shard_that_shrinks_under_the_reader_stops_it(copy: Path) -> None:
    stream = reader(copy, ("latent",), shuffle_shards=0)
    list(stream.batch(0))
    with open(copy / "shard-000001.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match=r"shard-000001\.tar became shorter"):
        read(stream, range(1, 4))


def test_a_batch_that_never_arrives_stops_the_run(shards: Path, tmp_path: Path) -> None:
    """A remote set whose second shard another process is downloading, for ever."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{shards}/", "/hang/", recursive=True)
    index = ShardIndex.from_json((shards / "index.json").read_bytes(), "index.json")
    with open(tmp_path / f".{index.shards[1].sha256}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stream = reader(
            "memory://hang",
            ("text",),
            shuffle_shards=0,
            cache_dir=str(tmp_path),
            num_workers=1,
            timeout_s=2.0,
        )
        with pytest.raises(DataError, match=r"no batch arrived in data\.timeout_s=2 s: .*shard-000001\.tar"):
            list(stream.batch(0))
    # the other process is gone: the same reader goes on
    assert joined(list(stream.batch(0))) == joined(list(reader(shards, ("text",), shuffle_shards=0).batch(0)))


def test_no_more_is_read_ahead_than_allowed(shards: Path) -> None:
    stream = reader(
        shards, ("image",), num_workers=2, prefetch_micro_batches=3, micro_batch_size=2, cache_mb=0
    )
    next(iter(stream.batch(0)))
    for _ in range(500):
        if stream.images_decoded >= 9:
            break
        threading.Event().wait(0.02)
    threading.Event().wait(0.1)
    # one sample checked at the start, one micro-batch handed out and three ahead
    assert stream.images_decoded == 1 + 4 * 2


def test_what_was_read_ahead_is_dropped_when_another_batch_is_asked_for(shards: Path) -> None:
    stream = reader(shards, ("text",), num_workers=1, prefetch_micro_batches=2)
    for step in (0, 30, 5, 60, 1):
        list(stream.batch(step))
        assert len(stream._window._futures) == 2


def test_threads_end_with_their_reader(shards: Path) -> None:
    before = set(threading.enumerate())
    closed, dropped = (reader(shards, ("text",), num_workers=2) for _ in range(2))
    list(closed.batch(0))
    list(dropped.batch(0))
    started = set(threading.enumerate()) - before
    assert len(started) == 4
    closed.close()
    del dropped
    gc.collect()
    for thread in started:
        thread.join(timeout=5)
    assert not any(thread.is_alive() for thread in started)


def test_the_set_is_found_by_counts_alone(shards: Path) -> None:
    assert reader(shards).num_samples == ShardSet(str(shards)).num_samples == 50
