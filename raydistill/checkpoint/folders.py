"""Where snapshots lie: a local folder with atomic, durable writes, or an object store through fsspec."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from raydistill.errors import CheckpointError
from raydistill.object_store import fault_of, open_store

log = logging.getLogger(__name__)

_SETTING = "checkpoint.uri"
_PARTS = {"chunksize": 32 * 2**20, "max_concurrency": 4}
"""Of an upload to S3: 128 MiB of memory at most."""


class LocalFolder:
    """Files under one local folder. A write goes to a temporary name, to the disk, then to its own name."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def _at(self, name: str) -> Path:
        return Path(self.root, name)

    def folders(self) -> list[str]:
        root = Path(self.root)
        return sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []

    def files(self, folder: str) -> list[str]:
        path = self._at(folder)
        return sorted(entry.name for entry in path.iterdir() if entry.is_file()) if path.is_dir() else []

    def exists(self, name: str) -> bool:
        return self._at(name).exists()

    def size(self, name: str) -> int:
        return self._at(name).stat().st_size if self.exists(name) else 0

    def read(self, name: str) -> bytes:
        return self._at(name).read_bytes()

    def write(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        """Create `name`; FileExistsError if another process is writing it right now."""
        path = self._at(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, f"{error.filename} is a file, not a folder") from error
        partial = path.with_name(f".{path.name}.partial")
        # "x": two ranks that write the same name at the same time meet here, not in a torn file
        with open(partial, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)

    def remove(self, name: str) -> None:
        path = self._at(name)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
            if path.exists():
                log.warning("could not delete all of %s", path)
        else:
            path.unlink(missing_ok=True)

    def rename(self, name: str, new: str) -> None:
        os.replace(self._at(name), self._at(new))

    def free_bytes(self) -> int | None:
        path = Path(self.root)
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def fetch(self, folder: str, names: Iterable[str]) -> tuple[Path, object]:
        """A local folder that holds `names`, and what keeps it there."""
        return self._at(folder), None


class RemoteFolder:
    """The same over fsspec.

    An object store shows a file only once it is closed, so no temporary names are needed.
    """

    def __init__(self, root: str, endpoint_url: str | None = None) -> None:
        """Raises ConfigError for an unknown scheme, and for credentials in a URL."""
        self.root = root.rstrip("/")
        self._fs, self._base = open_store(self.root, setting=_SETTING, endpoint_url=endpoint_url)
        # s3fs would make a bucket that is missing; other stores need their folders
        self._has_folders = urlsplit(root).scheme not in ("s3", "s3a")

    def _at(self, name: str) -> str:
        return f"{self._base}/{name}"

    @contextmanager
    def _reached(self, doing: str = "read") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            fault = fault_of(error)
            if fault is None or (isinstance(error, FileNotFoundError) and "bucket" not in fault.reason):
                raise
            raise CheckpointError(f"{self.root} can't be {doing} ({_SETTING}): {fault.reason}") from error

    def _list(self, path: str, kind: str) -> list[str]:
        # other processes write there too, so a listing that fsspec remembers is no answer
        self._fs.invalidate_cache()
        try:
            with self._reached():
                entries = self._fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == kind)

    def folders(self, under: str = "") -> list[str]:
        return self._list(f"{self._base}/{under}".rstrip("/"), "directory")

    def files(self, folder: str) -> list[str]:
        return self._list(self._at(folder), "file")

    def files_below(self, folder: str) -> list[str]:
        """Names of all files in a folder and its folders."""
        self._fs.invalidate_cache()
        with self._reached():
            found = self._fs.find(self._at(folder))
        return sorted(name.removeprefix(self._base).lstrip("/") for name in found)

    def exists(self, name: str) -> bool:
        self._fs.invalidate_cache()
        with self._reached():
            return bool(self._fs.exists(self._at(name)))

    def size(self, name: str) -> int:
        return int(self._fs.size(self._at(name))) if self.exists(name) else 0

    def read(self, name: str) -> bytes:
        with self._reached():
            return bytes(self._fs.cat_file(self._at(name)))

    def write(self, name: str, fill: Callable[[BinaryIO], object]) -> None:
        path = self._at(name)
        with self._reached("written"):
            self._make_room(path)
            with self._fs.open(path, "wb") as file:
                fill(file)

    def upload(self, source: Path, name: str, told: Callable[[int], None] = lambda _: None) -> None:
        """Send a local file; told: is given the bytes of each part that has arrived."""
        from fsspec.callbacks import Callback

        class Told(Callback):
            def relative_update(self, inc: int = 1) -> None:
                told(int(inc))

        path = self._at(name)
        with self._reached("written"):
            self._make_room(path)
            options = {} if self._has_folders else _PARTS
            self._fs.put_file(str(source), path, callback=Told(), **options)

    def download(self, name: str, target: Path) -> None:
        """Fetch a file to a local path, to which nothing else points until it is whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        with self._reached():
            self._fs.get_file(self._at(name), str(partial))
        os.replace(partial, target)

    def remove(self, name: str) -> None:
        if self.exists(name):
            with self._reached("written"):
                self._fs.rm(self._at(name), recursive=True)

    def rename(self, name: str, new: str) -> None:
        # object stores have no folders to rename, and s3fs fails on the empty name it takes for one
        names = self.files(name)
        with self._reached("written"):
            for file in names:
                self._fs.cp_file(self._at(f"{name}/{file}"), self._at(f"{new}/{file}"))
        self.remove(name)

    def free_bytes(self) -> int | None:
        return None

    def fetch(self, folder: str, names: Iterable[str]) -> tuple[Path, object]:
        copy = tempfile.TemporaryDirectory(prefix="raydistill-snapshot-")
        for name in names:
            with self._reached():
                self._fs.get_file(f"{self._at(folder)}/{name}", f"{copy.name}/{name}")
        return Path(copy.name), copy

    def _make_room(self, path: str) -> None:
        if self._has_folders:
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)


def _sync_folder(path: Path) -> None:
    # a rename survives a power cut only once its folder is on the disk
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
