"""Image-text shards as a source of shards: tars of KEY.jpg with KEY.txt or KEY.json, as img2dataset writes LAION's.

    tar: 000000012.jpg 000000012.txt 000000012.json ...  ->  one shard of ours, local or s3://

The caption is the text file, or else the field `caption`, `prompt` or `text` of the JSON. A tar that is cut off is an
error, not a short shard.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from tarfile import EOFHeaderError, HeaderError, ReadError, TarFile  # type: ignore[attr-defined]
from typing import IO, Any, Self

from webdataset.tariterators import group_by_keys

from raydistill.data.images import first_line
from raydistill.data.prompts import captions_of
from raydistill.data.sources import Refused, Sample
from raydistill.errors import DataError
from raydistill.object_store import StoreError, is_remote, open_store, with_retries

_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_ATTEMPTS = 7


class _Whole(tarfile.TarInfo):
    """tarfile takes a header that is cut off, damaged or missing for the end; only the end's zeros are."""

    @classmethod
    def fromtarfile(cls, tarfile: TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            raise
        except HeaderError as error:
            raise ReadError(f"{error} at byte {tarfile.offset}") from error


class PairSource:
    """The tars of a folder, or those that a glob names; local or behind a URL."""

    def __init__(self, shards: str, endpoint_url: str | None = None):
        """Raises DataError if there are none."""
        root, _, last = shards.rstrip("/").rpartition("/")
        picks = last.endswith(".tar") or any(mark in last for mark in "*?[")
        self._root, pattern = (root or ".", last) if picks else (shards.rstrip("/"), "*.tar")
        self._endpoint_url = endpoint_url
        self._given = shards
        found = {name: size for name, size in self._list().items() if fnmatch.fnmatchcase(name, pattern)}
        self._names = sorted(found)
        if not self._names:
            raise DataError(f"--pairs {shards} names no .tar file")
        listing = "\n".join(f"{name} {found[name]}" for name in self._names)
        self.plan: dict[str, Any] = {
            "source": "pairs",
            "tars_sha256": hashlib.sha256(listing.encode()).hexdigest(),
            "images": 0,
            "samples_per_shard": 0,
        }

    @property
    def sizes(self) -> Sequence[int]:
        return [0] * len(self._names)

    def read(self, shard: int) -> Iterator[Sample | Refused]:
        where = f"{self._root}/{self._names[shard]}"
        with self._open(self._names[shard]) as file:
            try:
                yield from self._samples(file, where)
            except (tarfile.TarError, EOFError) as error:
                raise DataError(
                    f"{where} is no whole tar file: {first_line(error)}; make or copy it again (--pairs)"
                ) from error
            except OSError as error:
                raise DataError(f"{where} can't be read: {first_line(error)} (--pairs)") from error

    def refused(self) -> Iterator[Refused]:
        return iter(())

    def _samples(self, file: IO[bytes], where: str) -> Iterator[Sample | Refused]:
        def members() -> Iterator[dict[str, Any]]:
            with tarfile.open(fileobj=file, mode="r|", tarinfo=_Whole) as tar:
                for member in tar:
                    if member.isreg():
                        content = tar.extractfile(member)
                        assert content is not None
                        yield {"fname": member.name, "data": content.read(), "__url__": where}

        for found in group_by_keys(members()):
            key = str(found["__key__"]).replace("/", "_")
            name = f"{key} of {where}"
            image = next((found[suffix] for suffix in _SUFFIXES if suffix in found), None)
            captions = _captions(found)
            if image is None:
                yield Refused("image_missing", name)
            elif not captions:
                yield Refused("caption_missing", name)
            else:
                yield Sample(key, captions, {"file_name": str(found["__key__"])}, name, image)

    def _list(self) -> dict[str, int]:
        if not is_remote(self._root):
            folder = Path(self._root)
            if not folder.is_dir():
                raise DataError(f"--pairs {self._given}: folder {folder} is not there")
            return {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        fs, path = open_store(self._root, setting="--pairs", endpoint_url=self._endpoint_url)
        try:
            listed = with_retries(lambda: fs.ls(path, detail=True), what=self._root, attempts=_ATTEMPTS)
        except StoreError as error:
            raise DataError(f"--pairs: {self._root} can't be read: {error}") from error
        return {
            each["name"].rsplit("/", 1)[-1]: int(each["size"]) for each in listed if each["type"] == "file"
        }

    def _open(self, name: str) -> IO[bytes]:
        if not is_remote(self._root):
            return open(Path(self._root, name), "rb")
        fs, path = open_store(self._root, setting="--pairs", endpoint_url=self._endpoint_url)
        try:
            file: IO[bytes] = with_retries(
                lambda: fs.open(f"{path}/{name}", "rb", block_size=16 * 2**20), what=name, attempts=_ATTEMPTS
            )
        except StoreError as error:
            raise DataError(f"--pairs: {self._root}/{name} can't be read: {error}") from error
        return file


def _captions(found: dict[str, Any]) -> tuple[str, ...]:
    text = found.get("txt", b"").decode(errors="replace").strip()
    if text:
        return (text,)
    try:
        return captions_of(json.loads(found.get("json", b"{}")))
    except ValueError:
        return ()
