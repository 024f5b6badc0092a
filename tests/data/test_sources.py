"""Prompt lists and image-text tars as sources of shards, and a store as their place."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from raydistill.data.pairs import PairSource
from raydistill.data.prepare import prepare
from raydistill.data.prompts import PromptSource
from raydistill.data.reader import DataConfig, ShardReader
from raydistill.data.shards import ShardIndex, ShardSet
from raydistill.data.sources import CocoSource, Sample
from raydistill.errors import ConfigError, DataError
from tests.data.samples_on_disk import PoolEncoder, write_coco


def captions(shards: Path | str) -> list[list[str]]:
    found = ShardSet(str(shards))
    return [
        found.open(shard).captions(sample)
        for shard, count in enumerate(found.counts)
        for sample in range(count)
    ]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts_become_shards_of_captions_and_embeddings_without_images(tmp_path: Path, suffix: str) -> None:
    prompts = [f"prompt {n} with a ü" for n in range(7)]
    lines = prompts if suffix == ".txt" else [json.dumps({"id": 3, "caption": text}) for text in prompts]
    file = tmp_path / f"prompts{suffix}"
    file.write_text("\n".join([*lines[:3], "", *lines[3:]]))
    index = prepare(
        PromptSource(file, 3), tmp_path / "out", encoder=PoolEncoder(), progress=False, batch_size=2
    )
    assert [shard.samples for shard in index.shards] == [3, 3, 1]
    assert (index.image_shape, index.latent_shape) == (None, None)
    assert index.text_shapes["text"] == (5, 4)
    assert captions(tmp_path / "out") == [[text] for text in prompts]
    # they serve a method that needs no images
    reader = ShardReader(
        DataConfig(shards=str(tmp_path / "out")), purpose="prompt/generator", seed=0, fields=("text",),
        batch_size=4, micro_batch_size=4,
    )  # fmt: skip
    (batch,) = reader.batch(0)
    assert batch.text is not None
    assert batch.text["text"].shape == (4, 5, 4)
    assert set(batch.captions) <= set(prompts)
    with pytest.raises(DataError, match=r"prepared from prompts, without images: .*teacher\.preflight=false"):
        ShardReader(
            DataConfig(shards=str(tmp_path / "out")), purpose="real", seed=0, fields=("latent", "text"),
            batch_size=4, micro_batch_size=4,
        )  # fmt: skip


def test_a_shard_of_prompts_is_read_from_its_place_without_the_ones_before_it(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("not json\n" * 4 + '{"prompt": ["a", "b"]}\n{"text": ""}\n')
    source = PromptSource(file, 4)
    assert list(source.sizes) == [4, 2]
    first, second = source.read(1)
    assert isinstance(first, Sample)
    assert (first.key, first.captions) == ("000000000004", ("a", "b"))
    assert not isinstance(second, Sample)
    assert second.reason == "caption_missing"
    with pytest.raises(DataError, match=r"prompt 0 of .*prompts\.jsonl is not jsonl in UTF-8"):
        list(source.read(0))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("prompts.csv", "a", r"--prompts .*prompts\.csv must be a \.txt file"),
        ("prompts.txt", "\n\n", r"--prompts .* holds no prompt"),
        ("nowhere/prompts.txt", None, r"--prompts .* can't be read: No such file"),
    ],
)
def test_prompts_that_cannot_be_are_refused(
    tmp_path: Path, name: str, content: str | None, told: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        PromptSource(tmp_path / name, 3)


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, parts in samples.items():
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def picture(seed: int, size: tuple[int, int] = (12, 9)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def laion(tmp_path: Path) -> Path:
    """Two tars as img2dataset writes them: captions as text, in JSON, and missing."""
    folder = tmp_path / "laion"
    folder.mkdir()
    write_tar(
        folder / "00000.tar",
        {
            "000000000": {"jpg": picture(0), "txt": b" a dog \n", "json": b'{"caption": "another"}'},
            "000000001": {"json": b'{"caption": "a cat", "url": "http://x"}', "jpg": picture(1)},
            "000000002": {"jpg": b"no jpeg", "txt": b"a cow"},
        },
    )
    write_tar(
        folder / "00001.tar", {"000010000": {"jpg": picture(3)}, "000010001": {"webp": b"", "txt": b"x"}}
    )
    return folder


def test_image_text_tars_become_shards_one_for_one_and_what_they_lack_is_counted(
    laion: Path, tmp_path: Path
) -> None:
    index = prepare(
        PairSource(str(laion)), tmp_path / "out", image_size=8, encoder=PoolEncoder(), progress=False,
        max_rejected_share=0.6,
    )  # fmt: skip
    assert [shard.samples for shard in index.shards] == [2, 0]
    assert index.rejected == {"image_undecodable": 2, "caption_missing": 1}
    assert index.image_shape == (3, 8, 8)
    assert captions(tmp_path / "out") == [["a dog"], ["a cat"]]
    again = prepare(
        PairSource(f"{laion}/*.tar"), tmp_path / "out", image_size=8, encoder=PoolEncoder(), progress=False,
        max_rejected_share=0.6,
    )  # fmt: skip
    assert again == index
    with pytest.raises(DataError, match=r"image undecodable; .* --max-rejected-share .* allows 0\.1"):
        prepare(
            PairSource(str(laion)), tmp_path / "few", image_size=8, progress=False, max_rejected_share=0.1
        )


def test_a_tar_that_is_cut_off_and_a_folder_without_tars_are_named(laion: Path, tmp_path: Path) -> None:
    whole = (laion / "00000.tar").read_bytes()
    (laion / "00000.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"00000\.tar is no whole tar file: .*\(--pairs\)") as caught:
        prepare(
            PairSource(str(laion)), tmp_path / "out", image_size=8, progress=False, max_rejected_share=0.9
        )
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"--pairs .*/x-\*\.tar names no \.tar file"):
        PairSource(f"{laion}/x-*.tar")
    with pytest.raises(DataError, match=r"--pairs .*nowhere: folder .* is not there"):
        PairSource(str(tmp_path / "nowhere"))


def test_a_tar_is_never_taken_for_a_shorter_one(laion: Path, tmp_path: Path) -> None:
    file = laion / "00000.tar"
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        members = tar.getmembers()
        end = tar.offset

    def read(data: bytes) -> int:
        file.write_bytes(data)
        return len(list(PairSource(str(laion)).read(0)))

    count = read(whole)
    for cut in [*range(512, end + 1, 512), *(member.offset + 200 for member in members)]:
        with pytest.raises(DataError, match=r"00000\.tar is no whole tar file: .*\(--pairs\)"):
            read(whole[:cut])
    for member in members:
        damaged = whole[: member.offset + 100] + b"\xff" * 100 + whole[member.offset + 200 :]
        with pytest.raises(DataError, match="is no whole tar file"):
            read(damaged)
    assert read(whole[: end + 512]) == count, "the end's first zeros are enough"


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def test_shards_are_written_to_a_store_kept_there_and_read_from_there(
    scenes: Path, shards: Path, memory: fsspec.AbstractFileSystem
) -> None:
    def once() -> ShardIndex:
        return prepare(
            CocoSource(scenes, "train", 8),
            "memory://set",
            encoder=PoolEncoder(),
            progress=False,
            batch_size=4,
        )

    index = once()
    for file in shards.glob("*.tar"):
        assert memory.cat_file(f"/set/{file.name}") == file.read_bytes()
    assert captions("memory://set") == captions(shards)
    # a killed run: no index, a shard that is there without a line, another that is not there
    memory.rm_file("/set/index.json")
    progress = json.loads(memory.cat_file("/set/progress.json"))
    del progress["shards"]["2"]
    memory.pipe_file("/set/progress.json", json.dumps(progress).encode())
    memory.rm_file("/set/shard-000005.tar")
    kept = memory.modified("/set/shard-000001.tar")
    assert once() == index
    assert memory.modified("/set/shard-000001.tar") == kept
    assert captions("memory://set") == captions(shards)


def test_image_text_tars_are_read_from_a_store(
    laion: Path, tmp_path: Path, memory: fsspec.AbstractFileSystem
) -> None:
    for file in laion.iterdir():
        memory.pipe_file(f"/pairs/{file.name}", file.read_bytes())
    index = prepare(
        PairSource("memory://pairs/*.tar"),
        tmp_path / "out",
        image_size=8,
        progress=False,
        max_rejected_share=0.6,
    )
    assert index.num_samples == 2
    assert captions(tmp_path / "out") == [["a dog"], ["a cat"]]


def test_captions_of_another_coco_year_are_refused(tmp_path: Path) -> None:
    root = write_coco(tmp_path, "val2017", {"000000000139.jpg": (8, 8)}, {1: ["a room"]})
    other = root / "annotations" / "captions_val2017.json"
    other.write_text(other.read_text().replace('"000000000139.jpg"', '"COCO_val2014_000000000139.jpg"'))
    with pytest.raises(
        DataError,
        match=r"holds none of its first 1 images \(there is 000000000139\.jpg\): .*COCO years .*--split",
    ):
        CocoSource(root, "val2017", 10)


def test_credentials_in_an_address_and_shares_that_are_none_are_refused(scenes: Path, tmp_path: Path) -> None:
    for share in (float("nan"), -0.1, 1.0):
        with pytest.raises(DataError, match=r"prepare\.max_rejected_share\) .* must be in \[0, 1\)"):
            prepare(CocoSource(scenes, "train", 8), tmp_path, progress=False, max_rejected_share=share)
    with pytest.raises(ConfigError, match="--out has credentials in its URL") as caught:
        prepare(CocoSource(scenes, "train", 8), "s3://AKIA:hidden@bucket/x", progress=False)
    assert "hidden" not in str(caught.value)
