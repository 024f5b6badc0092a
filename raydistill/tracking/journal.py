"""The file between training and MLflow: appended at once, sent later, compacted when it grows.

First line: {"run_id": ..., "base": logical offset of the line after it}. Every other line is one entry, for
instance {"step": 120, "timestamp_ms": ..., "values": {"loss/dm": 0.1}}. Beside it `metrics.sent` holds the
logical offset up to which MLflow has everything. Offsets are logical so that a crash between the two writes
of a compaction is harmless.

A line reaches the kernel before `append` returns, so SIGKILL loses nothing; `sync` makes it survive a power
cut too.
"""

import errno
import fcntl
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from raydistill.errors import TrackingError

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"
_SENT = "metrics.sent"
JOURNAL_FILES = (_SENT, NAME)
"""In the order in which they can be copied while they are written."""
_LOCK = "metrics.lock"
_LOCK_WAIT_S = 5.0


def previous_run_id(run_dir: str) -> str | None:
    """The MLflow run of this folder's journal, or None; for a restart before the first snapshot."""
    try:
        with open(Path(run_dir, NAME), encoding="utf-8") as file:
            run_id = json.loads(file.readline())["run_id"]
            return None if run_id is None else str(run_id)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def hand_over(run_dir: str, run_id: str | None) -> None:
    """Make a folder's journal, brought from another machine, that of another MLflow run, which is sent all of it.

    run_id: None for the next that is opened on the folder. Raises TrackingError.
    """
    path = Path(run_dir, NAME)
    try:
        header, _, content = path.read_bytes().partition(b"\n")
        document = json.loads(header) | {"run_id": run_id}
        partial = path.with_name(f".{NAME}.partial")
        partial.write_bytes(json.dumps(document).encode() + b"\n" + content)
        path.with_name(_SENT).unlink(missing_ok=True)
        os.replace(partial, path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise TrackingError(f"can't take over the journal {path} (output_dir): {error}") from error


def has_unsent(run_dir: str) -> bool:
    """Whether this folder's journal holds what MLflow does not have yet; of a run that is not going on."""
    path = Path(run_dir, NAME)
    try:
        with open(path, "rb") as file:
            header = file.readline()
        end = json.loads(header)["base"] + path.stat().st_size - len(header)
        return bool(json.loads(path.with_name(_SENT).read_text())["offset"] < end)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return path.is_file()


def read_metrics(run_dir: str, names: Collection[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) points of some metrics in a folder's journal, by step; also while its run goes on.

    A journal that grew too long has lost its oldest points; one that is not there has none.
    """
    points: dict[str, dict[int, float]] = {name: {} for name in names}
    try:
        with open(Path(run_dir, NAME), "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                entry = json.loads(line)
                for name in points.keys() & entry.get("values", {}).keys():
                    points[name][entry["step"]] = entry["values"][name]
    except FileNotFoundError:
        log.warning("%s has no %s: its curves are missing", run_dir, NAME)
    except ValueError as error:
        raise TrackingError(f"{Path(run_dir, NAME)} is no journal: {error}") from error
    return {name: sorted(found.items()) for name, found in points.items()}


class StepSet:
    """A set of (name, step) pairs in one bit each, for runs of millions of steps."""

    def __init__(self) -> None:
        self._bits: dict[tuple[str, int], int] = {}

    def add(self, name: str, step: int) -> bool:
        """Add the pair; False if it was there."""
        key, bit = (name, step >> 10), 1 << (step & 1023)
        before = self._bits.get(key, 0)
        self._bits[key] = before | bit
        return not before & bit


class Journal:
    """The journal of one run in `run_dir`. Safe to use from several threads of one process, and from one
    process only.

    Raises TrackingError if another process holds it, or if it can't be opened.
    """

    def __init__(self, run_dir: str, run_id: str, max_bytes: int) -> None:
        self.path = Path(run_dir, NAME)
        self.dropped_points = 0
        self._max_bytes = max_bytes
        self._run_id = run_id
        self._sent_path = self.path.with_name(_SENT)
        self._lock = threading.RLock()
        self._seen = StepSet()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._guard = _lock_file(self.path.with_name(_LOCK))
            self._open()
        except OSError as error:
            raise TrackingError(f"can't open the journal {self.path} (output_dir): {error}") from error

    def _open(self) -> None:
        old = previous_run_id(str(self.path.parent))
        if self.path.exists() and old is None and self._is_ownerless():
            hand_over(str(self.path.parent), self._run_id)
        elif self.path.exists() and old != self._run_id:
            # a new run in an old folder: its steps start again, so the old journal must not answer for them
            aside = self.path.with_name(f"metrics.{old or 'unknown'}.jsonl")
            log.warning("%s belongs to run %s; moved to %s", self.path, old, aside.name)
            os.replace(self.path, aside)
            self._sent_path.unlink(missing_ok=True)
        if not self.path.exists():
            self.path.write_bytes(self._header(0))
        self._base, self._header_bytes, content = self._load()
        self._end = self._base + content
        # unbuffered, so that a line is with the kernel when append returns
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self._file.truncate(self._header_bytes + content)
        try:
            sent = json.loads(self._sent_path.read_text())
            self._sent = min(max(int(sent["offset"]), self._base), self._end)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self._sent = self._base

    def _is_ownerless(self) -> bool:
        with open(self.path, "rb") as file:
            return file.readline().startswith(b'{"run_id": null')

    def _header(self, base: int) -> bytes:
        return json.dumps({"run_id": self._run_id, "base": base}).encode() + b"\n"

    def _load(self) -> tuple[int, int, int]:
        """Base offset, bytes of the header, bytes of whole entries; fills the set of known points."""
        with open(self.path, "rb") as file:
            first = file.readline()
            base, content = int(json.loads(first)["base"]), 0
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    entry = None
                if entry is None or not line.endswith(b"\n"):
                    # only the last line can be torn; anything else means the file is not ours any more
                    rest = file.read()
                    log.warning("%s: dropped a torn end of %d bytes", self.path, len(line) + len(rest))
                    break
                for name in entry.get("values", ()):
                    self._seen.add(name, entry["step"])
                content += len(line)
        return base, len(first), content

    def append_metrics(self, values: dict[str, float], step: int, timestamp_ms: int) -> int:
        """Append the points that are not there yet and return how many that were."""
        with self._lock:
            new = {name: value for name, value in values.items() if self._seen.add(name, step)}
            if new and not self.append({"step": step, "timestamp_ms": timestamp_ms, "values": new}):
                self.dropped_points += len(new)
                log.log(
                    logging.WARNING if self.dropped_points == len(new) else logging.DEBUG,
                    "the journal %s is full of unsent points (tracking.journal_max_mb); dropping new ones",
                    self.path,
                )
            return len(new)

    def append(self, entry: dict[str, Any]) -> bool:
        """Append one entry; False if the journal is full of entries that MLflow does not have yet.

        Raises TrackingError if the disk takes no more.
        """
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            if self._end - self._base + len(line) > self._max_bytes:
                self._compact()
                if self._end - self._base + len(line) > self._max_bytes:
                    return False
            at = self._header_bytes + self._end - self._base
            try:
                self._file.seek(at)
                if self._file.write(line) != len(line):
                    self._file.truncate(at)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                raise TrackingError(
                    f"can't write figures to {self.path} (output_dir): {error.strerror or error}"
                ) from error
            self._end += len(line)
            return True

    def _compact(self) -> None:
        """Forget the older half, as far as MLflow has it.

        The newer half keeps a resumed run from repeating points.
        """
        cut = min(self._sent, self._end - self._max_bytes // 2)
        if cut <= self._base:
            return
        self._file.seek(self._header_bytes + cut - self._base)
        rest = self._file.read()
        # the cut must be between two lines
        start = 0 if cut == self._sent else rest.index(b"\n") + 1
        base = cut + start
        header = self._header(base)
        partial = self.path.with_name(f".{NAME}.partial")
        partial.write_bytes(header + rest[start:])
        os.replace(partial, self.path)
        self._file.close()
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self._base, self._header_bytes = base, len(header)

    def pending(self, max_bytes: int) -> list[tuple[dict[str, Any], int]]:
        """Entries not yet sent, oldest first, each with the offset after it; at least one if there is one."""
        with self._lock:
            self._file.seek(self._header_bytes + self._sent - self._base)
            data = self._file.read(min(self._end - self._sent, max_bytes))
            if data and b"\n" not in data:
                data += self._file.read(self._end - self._sent - len(data))
                data = data[: data.index(b"\n") + 1]
            data = data[: data.rfind(b"\n") + 1]
            lines = data.splitlines(keepends=True)
            offsets = itertools.accumulate(map(len, lines), initial=self._sent)
            next(offsets)
            return [(json.loads(line), offset) for line, offset in zip(lines, offsets, strict=True)]

    def mark_sent(self, offset: int) -> None:
        """MLflow has everything before `offset`."""
        with self._lock:
            self._sent = offset
            partial = self._sent_path.with_name(f".{_SENT}.partial")
            partial.write_text(json.dumps({"offset": offset}))
            os.replace(partial, self._sent_path)

    @property
    def unsent_bytes(self) -> int:
        with self._lock:
            return self._end - self._sent

    def sync(self) -> None:
        """Have everything on the disk."""
        with self._lock:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._lock:
            self._file.close()
            os.close(self._guard)


def journal_is_held(run_dir: str) -> bool:
    """Whether another process is writing the journal of this folder, i.e. its run is going on."""
    path = Path(run_dir, _LOCK)
    if not path.exists():
        return False
    try:
        os.close(_lock_file(path))
    except TrackingError:
        return True
    return False


def _lock_file(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    deadline = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            # a killed tracker's lock goes with its process, which may take a moment
            if time.monotonic() > deadline:
                os.close(handle)
                raise TrackingError(
                    f"another tracker is writing the metrics of {path.parent}: another run with the same "
                    "output_dir, "
                    "or one of this process that was not finished"
                ) from None
            time.sleep(0.1)
