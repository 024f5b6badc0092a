"""How the bytes of a shard folder are reached: a local disk, or an object store.

What a remote folder is asked again and again with growing pauses: an outage in mid-run may last `data.timeout_s`,
at the start, where it is more likely a wrong address, half a minute.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

from raydistill.errors import DataError
from raydistill.object_store import StoreError, is_remote, open_store, with_retries

__all__ = ["LocalFolder", "RemoteFolder", "is_remote"]

T = TypeVar("T")
_ATTEMPTS = 7
_ATTEMPTS_AT_A_HASH = 3
_FIRST_PAUSE_S = 0.5


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
        self.root = root.rstrip("/")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._timeout_s = timeout_s
        self._fs, self._prefix = open_store(
            root, setting="data.shards", endpoint_url=endpoint_url, timeout_s=timeout_s
        )

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
            return self._retry(self.path(name), lambda: self._checked(name, sha256), patient=True)
        file = self.cache_dir / f"{sha256}.tar"
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            # Ranks on one machine ask for the same shard at the same time: one downloads, the others wait.
            with open(self.cache_dir / f".{sha256}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not file.exists():
                    data = self._retry(self.path(name), lambda: self._checked(name, sha256), patient=True)
                    partial = self.cache_dir / f".{sha256}.partial"
                    partial.write_bytes(data)
                    os.replace(partial, file)
        except OSError as error:
            raise DataError(f"data.cache_dir={self.cache_dir} can't hold {name}: {error.strerror}") from error
        return str(file)

    def _checked(self, name: str, sha256: str) -> bytes:
        found = ""
        for _ in range(_ATTEMPTS_AT_A_HASH):
            data = bytes(self._fs.cat_file(f"{self._prefix}/{name}"))
            found = hashlib.sha256(data).hexdigest()
            if found == sha256:
                return data
        raise DataError(
            f"data.shards: {self.path(name)} has the sha256 {found[:12]}, index.json says {sha256[:12]}: it is "
            "damaged or was replaced; copy or prepare it again"
        )

    def _retry(self, path: str, read: Callable[[], T], *, patient: bool = False) -> T:
        try:
            return with_retries(
                read,
                what=path,
                first_pause_s=_FIRST_PAUSE_S,
                attempts=None if patient else _ATTEMPTS,
                timeout_s=self._timeout_s,
            )
        except StoreError as error:
            times = f" after {error.attempts} attempts" if error.fault.passing else ""
            raise DataError(f"data.shards: {path} can't be read{times}: {error}") from error
