"""Shards behind a URL: an S3 service over HTTP on this machine, its failures, the cache folder, the memory bound."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from raydistill import object_store
from raydistill.data import storage
from raydistill.data.reader import DataConfig, ShardReader
from raydistill.data.shards import ShardIndex
from raydistill.errors import ConfigError, DataError

SECRET = "wJalrXUtnFEMI-not-to-be-printed"
URL = "s3://data/set"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    """The shards under s3://data/set."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTING")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.01)
    files = s3fs.S3FileSystem(endpoint_url=server, use_listings_cache=False)
    if not files.exists("data"):
        files.mkdir("data")
    for file in shards.iterdir():
        if file.name != ".lock":
            files.pipe_file(f"data/set/{file.name}", file.read_bytes())
    return files


def reader(url: str | Path, endpoint: str | None = None, **settings: Any) -> ShardReader:
    config = DataConfig(shards=str(url), endpoint_url=endpoint, **({"shuffle_shards": 2} | settings))
    return ShardReader(
        config, purpose="real", seed=5, fields=("latent", "text"), batch_size=10, micro_batch_size=5
    )


def stream(source: ShardReader, steps: int = 8) -> list[tuple[list[str], list[str], list[float]]]:
    batches = [batch for step in range(steps) for batch in source.batch(step)]
    return [(b.keys, b.captions, b.latents.flatten().tolist()) for b in batches if b.latents is not None]


@pytest.mark.parametrize("pattern", ["", "/", "/*.tar"])
def test_s3_gives_the_same_stream_as_the_folder(
    bucket: s3fs.S3FileSystem, server: str, shards: Path, tmp_path: Path, pattern: str
) -> None:
    local = stream(reader(shards))
    assert stream(reader(URL + pattern, server)) == local
    assert stream(reader(URL + pattern, server, cache_dir=str(tmp_path), num_workers=3)) == local


def test_cached_shards_are_named_by_hash_and_not_fetched_again(
    bucket: s3fs.S3FileSystem, server: str, shards: Path, tmp_path: Path
) -> None:
    local = stream(reader(shards))
    assert stream(reader(URL, server, cache_dir=str(tmp_path))) == local
    index = ShardIndex.from_json((shards / "index.json").read_bytes(), "index.json")
    assert {path.name for path in tmp_path.glob("*.tar")} == {f"{info.sha256}.tar" for info in index.shards}
    for info in index.shards:
        bucket.pipe_file(f"data/set/{info.name}", bytes(info.bytes))
    assert stream(reader(URL, server, cache_dir=str(tmp_path))) == local


def test_a_shard_with_another_hash_is_refused(bucket: s3fs.S3FileSystem, server: str, shards: Path) -> None:
    size = (shards / "shard-000000.tar").stat().st_size
    bucket.pipe_file("data/set/shard-000000.tar", bytes(size))
    with pytest.raises(
        DataError, match=r"shard-000000\.tar has the sha256 \w{12}, index\.json says \w{12}: it is damaged"
    ):
        reader(URL, server)


def test_missing_shards_folders_and_buckets_are_named(bucket: s3fs.S3FileSystem, server: str) -> None:
    with pytest.raises(DataError, match=r"s3://data/other can't be read: it is not there"):
        reader("s3://data/other", server)
    with pytest.raises(DataError, match=r"s3://nobucket/set can't be read: there is no such bucket"):
        reader("s3://nobucket/set", server)
    with pytest.raises(DataError, match=r"'s3://data/set/x-\*\.tar' matches no file in s3://data/set"):
        reader(f"{URL}/x-*.tar", server)
    bucket.rm_file("data/set/shard-000001.tar")
    with pytest.raises(
        DataError, match=r"s3://data/set/shard-000001\.tar is missing \(index\.json lists it\)"
    ):
        reader(URL, server)
    bucket.rm_file("data/set/index.json")
    with pytest.raises(DataError, match=r"s3://data/set has no index\.json"):
        reader(URL, server)


def test_a_service_that_is_back_after_a_while_is_asked_again(bucket: s3fs.S3FileSystem, shards: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # all servers of this process answer from one store, so the shards are there once this one starts
    late = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    warnings: list[str] = []

    class StartAtFirstWarning(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())
            if len(warnings) == 1:
                late.start()

    handler = StartAtFirstWarning()
    object_store.log.addHandler(handler)
    try:
        assert stream(reader(URL, f"http://127.0.0.1:{port}")) == stream(reader(shards))
    finally:
        object_store.log.removeHandler(handler)
        late.stop()
    assert len(warnings) == 1
    assert "EndpointConnectionError" in warnings[0]
    assert "next attempt in" in warnings[0]
    assert SECRET not in warnings[0]


def test_a_service_that_stays_away_is_reported_without_secrets(bucket: s3fs.S3FileSystem) -> None:
    with pytest.raises(
        DataError, match=r"s3://data/set can't be read after 7 attempts: EndpointConnectionError"
    ) as e:
        reader(URL, "http://127.0.0.1:9")
    assert SECRET not in str(e.value)
    assert "\n" not in str(e.value)


def test_a_service_that_accepts_and_never_answers_is_given_up(bucket: s3fs.S3FileSystem) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DataError, match=r"s3://data/set can't be read after 1 attempts: .*[Tt]imeout"):
            reader(URL, endpoint, timeout_s=0.2)


def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"credentials in its URL, .*; put them in the environment"
    ) as raised:
        reader(f"s3://AKIATESTING:{SECRET}@data/set")
    assert SECRET not in str(raised.value)


def test_shards_that_do_not_fit_in_memory_need_a_cache_folder(
    bucket: s3fs.S3FileSystem, server: str, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"MiB of memory for two blocks of data\.shuffle_shards=2, data\.cache_mb is 0"
    ):
        reader(URL, server, cache_mb=0)
    reader(URL, server, cache_mb=0, cache_dir=str(tmp_path))


def test_a_cache_folder_that_cannot_be_written_is_named(
    bucket: s3fs.S3FileSystem, server: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"data\.cache_dir=.*file/cache can't hold shard-000000\.tar: Not a directory"
    ):
        reader(URL, server, cache_dir=str(tmp_path / "file" / "cache"))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.shards='carrier-pigeon://coop': Protocol not known"):
        reader("carrier-pigeon://coop")
