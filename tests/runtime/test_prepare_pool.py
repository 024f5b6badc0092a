"""Shards written by actors under Ray, to a store, killed and gone on with."""

import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from raydistill.data.scenes import write_scenes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cluster"))
from s3_service import S3Service

sys.path.pop(0)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.ray
def test_shards_of_several_processes_on_s3_are_those_of_one_and_outlive_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = write_scenes(tmp_path / "scenes", num_train=60, num_val=4, progress=False)
    teacher = ROOT / "raydistill" / "assets" / "scenes_teacher"
    job = [
        sys.executable, "jobs/prepare_coco.py", "--coco", str(scenes), "--samples-per-shard", "6", "--encode",
        str(teacher),
    ]  # fmt: skip
    with S3Service(tmp_path / "moto.log") as service:
        environment = os.environ | service.environment | {"OMP_NUM_THREADS": "1"}
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        files = fsspec.filesystem(
            "s3", endpoint_url=service.endpoint, skip_instance_cache=True, use_listings_cache=False
        )
        files.mkdir("data")
        on_s3 = [*job, "--out", "s3://data/set", "--endpoint-url", service.endpoint]
        first = subprocess.Popen([*on_s3, "--workers", "2"], cwd=ROOT, env=environment)
        try:
            deadline = time.monotonic() + 240
            while not files.exists("data/set/shard-000001.tar"):
                assert first.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            first.kill()
            first.wait()
        assert not files.exists("data/set/index.json")
        # without Ray this time: a shard is the same whoever writes it
        done = subprocess.run(on_s3, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "data.shards=s3://data/set"
        alone = subprocess.run([*job, "--out", str(tmp_path / "alone")], cwd=ROOT, env=environment)
        assert alone.returncode == 0
        local = sorted((tmp_path / "alone").glob("[!.]*"))
        assert len(local) == 10 + 2
        for file in local:
            assert files.cat_file(f"data/set/{file.name}") == file.read_bytes(), file.name
