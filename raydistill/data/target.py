"""Where shards are written: a local folder, or a folder of an object store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from raydistill.errors import DataError
from raydistill.object_store import StoreError, open_store, with_retries

T = TypeVar("T")
_TIMEOUT_S = 300.0


class Target(Protocol):
    """A folder being filled; a file is there under its name as a whole or not at all."""

    root: str

    def sizes(self) -> dict[str, int]:
        """Files and their bytes."""

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, fill: Callable[[BinaryIO], object]) -> None: ...

    def remove(self, name: str) -> None: ...

    def digest(self, name: str, compute: Callable[[Path], str]) -> str | None:
        """What `compute` says of the file, where reading it again costs nothing but time; None elsewhere."""


class LocalTarget:
    """Temporary names, then renamed."""

    def __init__(self, root: str | Path):
        self.root = os.path.abspath(root)

    def sizes(self) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.root) if entry.is_file()}

    def read(self, name: str) -> bytes:
        return Path(self.root, name).read_bytes()

    def write(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        partial = Path(self.root, f".{name}.partial")
        try:
            with open(partial, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        os.replace(partial, Path(self.root, name))

    def remove(self, name: str) -> None:
        Path(self.root, name).unlink(missing_ok=True)

    def digest(self, name: str, compute: Callable[[Path], str]) -> str | None:
        return compute(Path(self.root, name))


class RemoteTarget:
    """Files are made in a temporary local one and uploaded, again after an outage of up to five minutes."""

    def __init__(self, url: str, endpoint_url: str | None = None):
        """Raises ConfigError for a URL that can't be opened."""
        self.root = url.rstrip("/")
        self._fs, self._prefix = open_store(self.root, setting="--out", endpoint_url=endpoint_url)

    def sizes(self) -> dict[str, int]:
        with self._told("read"):
            try:
                listed = self._retry(lambda: self._fs.ls(self._prefix, detail=True))
            except StoreError as error:
                if isinstance(error.__cause__, FileNotFoundError) and "bucket" not in error.fault.reason:
                    return {}
                raise
        return {
            each["name"].rsplit("/", 1)[-1]: int(each["size"]) for each in listed if each["type"] == "file"
        }

    def read(self, name: str) -> bytes:
        with self._told("read"):
            return self._retry(lambda: bytes(self._fs.cat_file(f"{self._prefix}/{name}")))

    def write(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        with tempfile.NamedTemporaryFile(prefix="raydistill-shard-") as file:
            fill(file)  # type: ignore[arg-type]
            file.flush()
            with self._told("written"):
                self._retry(lambda: self._fs.put_file(file.name, f"{self._prefix}/{name}"))

    def remove(self, name: str) -> None:
        if name in self.sizes():
            with self._told("written"):
                self._retry(lambda: self._fs.rm_file(f"{self._prefix}/{name}"))

    def digest(self, name: str, compute: Callable[[Path], str]) -> str | None:
        return None

    def _retry(self, call: Callable[[], T]) -> T:
        return with_retries(call, what=self.root, timeout_s=_TIMEOUT_S)

    @contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            raise DataError(f"{self.root} can't be {doing}: {error} (--out)") from error
