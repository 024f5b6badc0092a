"""Preparing shards: what goes in comes out, a killed run goes on, and nothing is left out unsaid."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from raydistill.data.coco import read_coco
from raydistill.data.images import load_image
from raydistill.data.prepare import prepare_coco
from raydistill.data.shards import ShardIndex
from raydistill.errors import DataError
from tests.data.samples_on_disk import PoolEncoder, write_coco

REPOSITORY = Path(__file__).parents[2]
# What a child process prepares; {} is code that runs before it.
CHILD = """
import sys
from raydistill.data.prepare import prepare_coco
from tests.data.samples_on_disk import PoolEncoder
encoder = PoolEncoder()
{}
prepare_coco(sys.argv[1], "train", sys.argv[2], 8, encoder, progress=False, batch_size=4)
"""


def child(code: str, scenes: Path, out: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD.format(code), str(scenes), str(out)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Finished files by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".lock"}


def test_webdataset_itself_reads_back_images_captions_latents_and_embeddings(
    scenes: Path, shards: Path
) -> None:
    images = {f"{image.id:012d}": image for image in read_coco(scenes, "train")}
    encoder = PoolEncoder()
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == sorted(images)
    for sample in samples:
        image = images[sample["__key__"]]
        about = json.loads(sample["json"])
        assert (tuple(about["captions"]), about["image_id"]) == (image.captions, image.id)
        assert about["file_name"] == image.path.name
        assert sample["jpg"] == image.path.read_bytes()
        latent = np.load(io.BytesIO(sample["latent.npy"]))
        wanted = encoder.encode_images(load_image(image.path, 32)[None])[0]
        assert latent.dtype == np.float16
        torch.testing.assert_close(torch.from_numpy(latent).float(), wanted, atol=1e-3, rtol=0)
        text = encoder.encode_text(list(image.captions))
        for name in ("text", "pooled"):
            stored = torch.from_numpy(np.load(io.BytesIO(sample[f"{name}.npy"]))).float()
            torch.testing.assert_close(stored, text[name].detach(), atol=2e-3, rtol=0)


def test_the_index_says_what_the_shards_hold(shards: Path) -> None:
    index = ShardIndex.from_json((shards / "index.json").read_bytes(), "index.json")
    assert [shard.samples for shard in index.shards] == [8, 8, 8, 8, 8, 8, 2]
    assert index.num_samples == 50
    assert index.image_shape == (3, 32, 32)
    assert index.latent_shape == (3, 8, 8)
    assert index.text_shapes == {"text": (5, 4), "pooled": (4,)}
    assert index.encoder == PoolEncoder.fingerprint
    assert all((shards / shard.name).stat().st_size == shard.bytes for shard in index.shards)


def test_resized_images_are_stored_without_loss(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", "train", {"a.jpg": (40, 20), "b.png": (8, 8)}, {1: ["x"], 2: ["y"]})
    index = prepare_coco(root, "train", tmp_path / "out", image_size=8, progress=False)
    assert index.image_shape == (3, 8, 8)
    first, second = webdataset.WebDataset(
        str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False, empty_check=False
    )
    with Image.open(io.BytesIO(first["png"])) as image:
        stored = torch.from_numpy(np.array(image)).movedim(-1, 0)
    wanted = (load_image(root / "train" / "a.jpg", 8) + 1) * 127.5
    assert torch.equal(stored, wanted.round().to(torch.uint8))
    assert second["png"] == (root / "train" / "b.png").read_bytes()


def test_images_of_several_sizes_are_stored_as_they_are_but_not_encoded(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", "train", {"a.jpg": (40, 20), "b.jpg": (8, 8)}, {1: ["x"], 2: ["y"]})
    assert prepare_coco(root, "train", tmp_path / "plain", progress=False).image_shape is None
    with pytest.raises(DataError, match="give --image-size"):
        prepare_coco(root, "train", tmp_path / "encoded", encoder=PoolEncoder(), progress=False)


def test_a_second_call_keeps_every_shard(scenes: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = prepare_coco(scenes, "train", out, 8, PoolEncoder(), progress=False, batch_size=4)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    assert contents(out) == contents(shards)
    assert prepare_coco(scenes, "train", out, 8, PoolEncoder(), progress=False, batch_size=4) == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == times


def test_a_run_killed_in_mid_shard_goes_on_and_ends_with_the_same_bytes(
    scenes: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # the eighth batch of four is the second half of the fourth shard
    stop = """
import time
calls, encode = [], encoder.encode_images
def stopping(images):
    calls.append(1)
    if len(calls) == 8:
        print("here", flush=True)
        time.sleep(600)
    return encode(images)
encoder.encode_images = stopping
"""
    process = child(stop, scenes, out)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "index.json").exists()
    assert (out / ".shard-000003.tar.partial").exists()
    finished = {f"shard-{n:06d}.tar": (out / f"shard-{n:06d}.tar").stat() for n in range(3)}

    prepare_coco(scenes, "train", out, 8, PoolEncoder(), progress=False, batch_size=4)
    assert contents(out) == contents(shards)
    for name, stat in finished.items():
        assert (out / name).stat().st_mtime_ns == stat.st_mtime_ns
        assert (out / name).stat().st_ino == stat.st_ino


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_shard_alone_is_written_again(
    scenes: Path, shards: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    prepare_coco(scenes, "train", out, 8, PoolEncoder(), progress=False, batch_size=4)
    victim, untouched = out / "shard-000002.tar", out / "shard-000003.tar"
    before = untouched.stat().st_mtime_ns
    data = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(
            data[:-600] if damage == "cut" else data[:700] + bytes([data[700] ^ 1]) + data[701:]
        )
    prepare_coco(scenes, "train", out, 8, PoolEncoder(), progress=False, batch_size=4)
    assert contents(out) == contents(shards)
    assert untouched.stat().st_mtime_ns == before


def test_two_calls_at_once_write_one_data_set(scenes: Path, shards: Path, tmp_path: Path) -> None:
    def prepare() -> None:
        prepare_coco(scenes, "train", tmp_path / "out", 8, PoolEncoder(), progress=False, batch_size=4)

    threads = [threading.Thread(target=prepare) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path / "out") == contents(shards)


def test_a_folder_with_other_shards_is_left_alone(scenes: Path, shards: Path, tmp_path: Path) -> None:
    before = contents(shards)
    with pytest.raises(
        DataError, match=r"holds shards of samples_per_shard 8, not 9; .*encoder .*, not None.*--out"
    ):
        prepare_coco(scenes, "train", shards, 9, progress=False)
    assert contents(shards) == before
    (tmp_path / "theirs.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds theirs\.tar, which this command did not write"):
        prepare_coco(scenes, "train", tmp_path, progress=False)


def test_an_image_without_caption_stops_the_job_or_is_counted(tmp_path: Path) -> None:
    images = {f"{n}.jpg": (8, 8) for n in range(10)}
    captions = {n: ["x"] for n in range(1, 11) if n != 4}
    root = write_coco(tmp_path / "coco", "train", images, captions)
    with pytest.raises(DataError, match=r"image id 4 .*caption missing; 1 of 10 .*allows 0"):
        prepare_coco(root, "train", tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob("*.tar"))
    index = prepare_coco(root, "train", tmp_path / "out", progress=False, max_rejected_share=0.1)
    assert index.num_samples == 9
    assert index.rejected == {"caption_missing": 1}


def test_unreadable_and_missing_files_stop_the_job_or_are_counted(tmp_path: Path) -> None:
    images = {f"{n}.jpg": (8, 8) for n in range(10)}
    root = write_coco(tmp_path / "coco", "train", images, {n: ["x"] for n in range(1, 11)})
    (root / "train" / "2.jpg").write_bytes(b"no jpeg")
    with pytest.raises(DataError, match=r"image id 3 .*image undecodable"):
        prepare_coco(root, "train", tmp_path / "out", progress=False)
    (root / "train" / "5.jpg").unlink()
    with pytest.raises(DataError, match=r"image id 6 .*image missing"):
        prepare_coco(root, "train", tmp_path / "out", progress=False)
    index = prepare_coco(root, "train", tmp_path / "out", 4, progress=False, max_rejected_share=0.2)
    assert [shard.samples for shard in index.shards] == [3, 3, 2]
    assert index.rejected == {"image_undecodable": 1, "image_missing": 1}
    # counted from what the finished shards noted, not from reading the images again
    again = prepare_coco(root, "train", tmp_path / "out", 4, progress=False, max_rejected_share=0.2)
    assert again == index


def test_latents_beyond_float16_are_refused_and_fit_float32(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"encoder's latent of image id 1 .*is not finite as float16"):
        prepare_coco(
            scenes, "train", tmp_path / "half", encoder=PoolEncoder(scale=1e6), progress=False, limit=4
        )
    index = prepare_coco(
        scenes,
        "train",
        tmp_path / "full",
        encoder=PoolEncoder(1e6),
        progress=False,
        limit=4,
        array_dtype="float32",
    )
    assert index.array_dtype == "float32"


def test_a_write_that_fails_names_the_folder_and_leaves_no_half_shard(scenes: Path, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    process = child(limit, scenes, tmp_path / "out")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert (
        f"DataError: can't write shards to {tmp_path / 'out'}: File too large (--out, or data.shards)"
        in errors
    )
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "progress.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_shard": 0}, "--samples-per-shard 0 must be at least 1"),
        ({"image_size": 0}, "--image-size 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    scenes: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    settings = {"out": tmp_path / "out", "progress": False} | changes
    with pytest.raises(DataError, match=message):
        prepare_coco(scenes, "train", **settings)  # type: ignore[arg-type]


def test_the_job_prepares_with_the_shipped_teacher_and_says_where(scenes: Path, tmp_path: Path) -> None:
    teacher = REPOSITORY / "raydistill" / "assets" / "scenes_teacher"
    job = [sys.executable, "jobs/prepare_coco.py", "--coco", str(scenes), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*job, "--limit", "6", "--encode", str(teacher)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "6 samples in 1 shards" in run.stdout
    assert run.stdout.splitlines()[-1] == f"data.shards={tmp_path / 'out'}"
    index = ShardIndex.from_json((tmp_path / "out" / "index.json").read_bytes(), "index.json")
    assert index.latent_shape is not None
    assert set(index.text_shapes) == {"text"}

    refused = subprocess.run(
        [*job, "--split", "test"], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("raydistill: error: COCO folder")
    assert len(refused.stderr.splitlines()) == 1
