"""How the bytes of a shard folder are reached: a local disk, or an object store through fsspec (s3://: s3fs).

Remote reads are retried with growing pauses. Credentials come from the environment or the machine's role,
never from a URL or a setting, and are in no message.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from raydistill.data.images import first_line
from raydistill.errors import ConfigError, DataError

log = logging.getLogger(__name__)

T = TypeVar("T")
_RETRIES = 4
_FIRST_PAUSE_S = 0.5


def is_remote(url: str) -> bool:
    return "://" in url


class LocalFolder:
    """Shards in a folder of this machine."""

    def __init__(self, root: str):
        self.root = os.path.abspath(root)

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def sizes(self) -> dict[str, int]:
        """Files and their bytes. Raises DataError if the folder is not there."""
        try:
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.root) if entry.is_file()}
        except OSError as error:
            raise DataError(f"data.shards: folder {self.root} can't be read: {error.strerror}") from error

    def read(self, name: str) -> bytes:
        try:
            return Path(self.root, name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.path(name)} can't be read: {error.strerror}") from error

    def identity(self, name: str, sha256: str) -> Hashable:
        """Equal for equal content, as far as can be told without reading it. Raises DataError."""
        try:
            stat = os.stat(self.path(name))
        except OSError as error:
            raise DataError(f"shard {self.path(name)} can't be read: {error.strerror}") from error
        return self.path(name), stat.st_ino, stat.st_size, stat.st_mtime_ns

    def shard(self, name: str, sha256: str) -> str | bytes:
        return self.path(name)


class RemoteFolder:
    """Shards under a URL; downloaded to `cache_dir` once per machine, or held in memory without one."""

    def __init__(
        self,
        root: str,
        *,
        cache_dir: str | None = None,
        endpoint_url: str | None = None,
        timeout_s: float = 300.0,
    ):
        """endpoint_url: of an S3 service other than AWS. timeout_s: after so long, no further attempt is made.

        Raises ConfigError for a URL with credentials.
        """
        if "@" in urlsplit(root).netloc:
            raise ConfigError(
                "data.shards has credentials in its URL; put them in the environment (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY) and give the URL without them"
            )
        import fsspec

        self.root = root.rstrip("/")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        options: dict[str, Any] = {}
        self._timeout_s = timeout_s
        self._transient: tuple[type[BaseException], ...] = (OSError, asyncio.TimeoutError)
        if urlsplit(root).scheme in ("s3", "s3a"):
            from botocore.exceptions import BotoCoreError, ClientError

            self._transient += (BotoCoreError, ClientError)
            # Our own retries see every failure, so botocore's would only multiply the waiting.
            config = {
                "connect_timeout": min(10, timeout_s),
                "read_timeout": min(60, timeout_s),
                "retries": {"max_attempts": 0},
            }
            options = {"endpoint_url": endpoint_url, "config_kwargs": config, "use_listings_cache": False}
        try:
            self._fs, self._prefix = fsspec.core.url_to_fs(self.root, **options)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"data.shards={self.root!r}: {first_line(error)}") from error

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def sizes(self) -> dict[str, int]:
        """Files and their bytes. Raises DataError if the folder is not there or can't be reached."""
        entries = self._retry(self.root, lambda: self._fs.ls(self._prefix, detail=True))
        return {
            entry["name"].rsplit("/", 1)[-1]: int(entry["size"])
            for entry in entries
            if entry["type"] == "file"
        }

    def read(self, name: str) -> bytes:
        return self._retry(self.path(name), lambda: bytes(self._fs.cat_file(f"{self._prefix}/{name}")))

    def identity(self, name: str, sha256: str) -> Hashable:
        return self.path(name), sha256, self.cache_dir

    def shard(self, name: str, sha256: str) -> str | bytes:
        """A local file with the shard's bytes, or the bytes. Raises DataError on another hash."""
        if self.cache_dir is None:
            return self._retry(self.path(name), lambda: self._checked(name, sha256))
        file = self.cache_dir / f"{sha256}.tar"
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            # Ranks on one machine ask for the same shard at the same time: one downloads, the others wait.
            with open(self.cache_dir / f".{sha256}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not file.exists():
                    data = self._retry(self.path(name), lambda: self._checked(name, sha256))
                    partial = self.cache_dir / f".{sha256}.partial"
                    partial.write_bytes(data)
                    os.replace(partial, file)
        except OSError as error:
            raise DataError(f"data.cache_dir={self.cache_dir} can't hold {name}: {error.strerror}") from error
        return str(file)

    def _checked(self, name: str, sha256: str) -> bytes:
        data = bytes(self._fs.cat_file(f"{self._prefix}/{name}"))
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise OSError(f"its sha256 is {found[:12]}, index.json says {sha256[:12]}")
        return data

    def _retry(self, path: str, read: Callable[[], T]) -> T:
        pause = _FIRST_PAUSE_S
        started = time.monotonic()
        for attempt in range(_RETRIES + 1):
            try:
                return read()
            except (FileNotFoundError, PermissionError) as error:
                raise DataError(f"data.shards: {path} {_why(error)}") from error
            except self._transient as error:
                if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                    raise DataError(
                        f"data.shards: no credentials for {path}; set AWS_ACCESS_KEY_ID and "
                        "AWS_SECRET_ACCESS_KEY"
                    ) from error
                if attempt == _RETRIES or time.monotonic() - started > self._timeout_s:
                    raise DataError(
                        f"data.shards: {path} can't be read after {attempt + 1} attempts: {_why(error)}"
                    ) from error
                log.warning("%s: %s; next attempt in %.1f s", path, _why(error), pause)
                time.sleep(pause)
                pause *= 2
        raise AssertionError("unreachable")


def _why(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "is not there"
    if isinstance(error, PermissionError):
        return "may not be read with these credentials"
    return f"{type(error).__name__}: {first_line(error)}"
