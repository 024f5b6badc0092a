"""One open shard: which samples it holds and where in the tar their parts lie, so that any one is read alone.

The tar's headers are scanned once and grouped into samples by webdataset's own rule. After that a latent or
one caption's embedding is one read of just its bytes, straight into the batch: no shuffle buffer, no second
copy, and for local files the page cache is the only cache.
"""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np
from webdataset.tariterators import group_by_keys

from raydistill.data.images import first_line
from raydistill.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png")
ARRAY_DTYPES = ("float16", "float32")


class RejectedSample(Exception):  # noqa: N818 (an outcome that is counted, not an error of the run)
    """A sample can't be used; `reason` is the name that it is counted under."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class _Header(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int


class ShardFile:
    """Random access to the samples of one tar. Threads may share it."""

    def __init__(self, url: str, source: str | bytes):
        """source: a local file's path, or the tar's bytes. Raises DataError for what is no whole tar."""
        self.url = url
        self._bytes: memoryview | None = None
        try:
            if isinstance(source, bytes):
                self._bytes = memoryview(source)
                self._samples = _scan(io.BytesIO(source), url)
            else:
                with open(source, "rb") as file:
                    self._samples = _scan(file, url)
                    self._fd = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._fd)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise DataError(
                f"shard {url} is no whole tar file: {first_line(error)}; make or copy it again"
            ) from error
        except OSError as error:
            raise DataError(f"shard {url} can't be read: {error.strerror or first_line(error)}") from error
        self._captions: dict[int, list[str]] = {}
        self._headers: dict[bytes, _Header] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, sample: int) -> str:
        return str(self._samples[sample]["__key__"])

    def suffixes(self) -> set[str]:
        """Every kind of part that some sample has: jpg, json, latent.npy, ..."""
        return {suffix for sample in self._samples for suffix in sample if not suffix.startswith("__")}

    def captions(self, sample: int) -> list[str]:
        """The captions in the sample's JSON. Raises RejectedSample."""
        known = self._captions.get(sample)
        if known is not None:
            return known
        try:
            content = json.loads(self._part(sample, "json"))
        except ValueError as error:
            raise RejectedSample("json_invalid", first_line(error)) from None
        captions = content.get("captions") if isinstance(content, dict) else None
        if not isinstance(captions, list) or not captions:
            raise RejectedSample("caption_missing")
        if not all(isinstance(caption, str) and caption for caption in captions):
            raise RejectedSample("caption_invalid")
        self._captions[sample] = captions
        return captions

    def image(self, sample: int) -> bytes:
        """The encoded image. Raises RejectedSample."""
        for suffix in IMAGE_SUFFIXES:
            if suffix in self._samples[sample]:
                return self._part(sample, suffix)
        raise RejectedSample("image_missing")

    def read_array(
        self, sample: int, name: str, out: np.ndarray, row: int | None = None, rows: int = 0
    ) -> None:
        """Fill `out` with NAME.npy, or with one row of it where the array has `rows` of them.

        out: C-contiguous, of the shape wanted and a dtype that the stored one is cast to. Raises
        RejectedSample for a missing, malformed or non-finite array and for one of another shape.
        """
        start, size = self._where(sample, f"{name}.npy")
        header = self._header(name, start, size)
        wanted = out.shape if row is None else (rows, *out.shape)
        if header.shape != wanted:
            raise RejectedSample(f"{name}_shape", f"{list(header.shape)}, not {list(wanted)}")
        at = start + header.size
        if row is not None:
            at += row * out.size * header.dtype.itemsize
        target = out if header.dtype == out.dtype else np.empty(out.shape, header.dtype)
        self._read_into(target.data.cast("B"), at)
        if not np.isfinite(target).all():
            raise RejectedSample(f"{name}_not_finite")
        if target is not out:
            out[...] = target

    def _part(self, sample: int, suffix: str) -> bytes:
        start, size = self._where(sample, suffix)
        data = bytearray(size)
        self._read_into(memoryview(data), start)
        return bytes(data)

    def _where(self, sample: int, suffix: str) -> tuple[int, int]:
        where = self._samples[sample].get(suffix)
        if where is None:
            raise RejectedSample(f"{suffix.removesuffix('.npy').replace('.', '_')}_missing")
        return where

    def _header(self, name: str, start: int, size: int) -> _Header:
        # numpy pads its header to 64 bytes, so the first 128 nearly always hold it whole
        raw = bytearray(min(128, size))
        self._read_into(memoryview(raw), start)
        known = self._headers.get(bytes(raw))
        if known is None:
            raw = bytearray(min(4096, size))
            self._read_into(memoryview(raw), start)
            known = _parse_header(name, bytes(raw))
            if known.size <= 128:
                self._headers[bytes(raw[:128])] = known
        if size != known.size + math.prod(known.shape) * known.dtype.itemsize:
            raise RejectedSample(f"{name}_invalid", "its length is not what its header says")
        return known

    def _read_into(self, target: memoryview, start: int) -> None:
        if self._bytes is not None:
            target[:] = self._bytes[start : start + len(target)]
            return
        done = 0
        while done < len(target):
            # one call answers at most 2 GiB, and nothing past the end of a file that was cut meanwhile
            count = os.preadv(self._fd, [target[done:]], start + done)
            if count == 0:
                raise DataError(f"shard {self.url} became shorter while it was read")
            done += count


def _scan(file: Any, url: str) -> list[dict[str, Any]]:
    """Samples as {"__key__": key, suffix: (offset, size)} in the tar's order."""
    file.seek(0, io.SEEK_END)
    end = file.tell()
    file.seek(0)

    def members() -> Iterator[dict[str, Any]]:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} goes beyond the end of the file")
                if member.isreg():
                    yield {"fname": member.name, "data": (member.offset_data, member.size), "__url__": url}

    return list(group_by_keys(members()))


def _parse_header(name: str, raw: bytes) -> _Header:
    file = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except ValueError as error:
        raise RejectedSample(f"{name}_invalid", f"no numpy array: {first_line(error)}") from None
    if dtype.name not in ARRAY_DTYPES or not dtype.isnative:
        raise RejectedSample(f"{name}_dtype", f"{dtype}, not {' or '.join(ARRAY_DTYPES)}")
    if fortran_order and len(shape) > 1:
        raise RejectedSample(f"{name}_invalid", "stored in Fortran order")
    return _Header(dtype, tuple(shape), file.tell())


_shared: weakref.WeakValueDictionary[Hashable, ShardFile] = weakref.WeakValueDictionary()
_opening: defaultdict[Hashable, threading.Lock] = defaultdict(threading.Lock)


def shared_shard(url: str, identity: Hashable, source: Callable[[], str | bytes]) -> ShardFile:
    """A ShardFile that the readers of this process share while one of them holds it.

    identity: changes whenever the content does. source: gives the local path or the bytes, if they are
    needed. Raises DataError.
    """
    with _opening[identity]:
        shard = _shared.get(identity)
        if shard is None:
            shard = ShardFile(url, source())
            _shared[identity] = shard
        return shard
