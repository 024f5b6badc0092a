"""A run's copy in an object store: its snapshots, and the small files beside them that a new machine needs.

    URL/snapshots/step_00000120/...     as in the local folder; the manifest is sent last
    URL/metrics.jsonl ...               files of the run's folder, sent before the manifest: they know at least as
                                        much as the snapshot

What is in the local folder comes first: the mirror is made from it, and read where the local folder has less.
"""

import fnmatch
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from raydistill.checkpoint.folders import RemoteFolder
from raydistill.checkpoint.manifest import MANIFEST, STEP_FOLDER, folder_name, parse_manifest, verify
from raydistill.checkpoint.snapshots import Snapshots
from raydistill.errors import CheckpointError
from raydistill.object_store import fault_of

log = logging.getLogger(__name__)

_ABOUT = "about.json"


class Mirror:
    """The copy of one run. For one thread; one process at a time may send."""

    def __init__(
        self, url: str, local: Snapshots, *, files: Sequence[str] = (), endpoint_url: str | None = None
    ) -> None:
        """url: of the run's copy. files: glob patterns in the folder above local's, in the order they are sent.

        Raises ConfigError for a URL that can't be opened; nothing is asked yet.
        """
        self.url = url.rstrip("/")
        self.local = local
        self._run_dir = Path(local.root).parent
        self._files = tuple(files)
        self._store = RemoteFolder(self.url, endpoint_url)
        self._copies = Snapshots(f"{self.url}/snapshots", local.keep, endpoint_url)
        self._sent: dict[str, tuple[int, int]] = {}

    def steps(self) -> list[int]:
        """Steps of the snapshots that are in the store to their end, ascending. Raises CheckpointError."""
        return self._copies.steps()

    def introduce(self) -> None:
        """Write who sends to this copy; the first to know whether it may. Raises CheckpointError."""
        text = json.dumps({"host": socket.gethostname(), "run_dir": str(self._run_dir), "since": time.time()})
        self._store.write(_ABOUT, lambda file: file.write(text.encode()))

    def push(self, step: int, told: Callable[[int], None] = lambda _: None) -> int | None:
        """Send the local snapshot of `step` and the run's files, delete what is too old there; the bytes sent.

        None: the local one is gone. Files that an attempt before this one has sent are not sent again. Raises
        CheckpointError.
        """
        with self.local.hold(step) as there:
            if not there:
                return None
            folder = Path(self.local.path(step))
            data = (folder / MANIFEST).read_bytes()
            entries = parse_manifest(data, f"{folder}/{MANIFEST}", step)["files"]
            size = 0
            for name in entries:
                size += self._push(folder / name, f"snapshots/{folder_name(step)}/{name}", told)
            self.push_files()
            size += self._push(folder / MANIFEST, f"snapshots/{folder_name(step)}/{MANIFEST}", told)
        self._retire()
        return size

    def push_files(self) -> None:
        """Send those of the run's files that have changed."""
        for pattern in self._files:
            for file in sorted(path for path in self._run_dir.glob(pattern) if path.is_file()):
                self._push(file, file.relative_to(self._run_dir).as_posix(), lambda _: None)

    def fetch(self, told: Callable[[str], None] = lambda _: None) -> list[int]:
        """Copy what the local folder lacks, if the newest snapshot in the store is newer; the steps fetched.

        The newest comes last, so that a fetch that is broken off is seen to be one; a damaged one is passed over with
        a warning. The run's files come before all of them and replace local ones. Raises CheckpointError.
        """
        there, here = self.steps(), self.local.steps()
        if not there or (here and here[-1] >= there[-1]):
            return []
        for name in self._store.files_below(""):
            if any(fnmatch.fnmatchcase(name, each) for each in self._files) and ".." not in name.split("/"):
                self._store.download(name, self._run_dir / name)
        fetched = []
        for step in there:
            if step in here:
                continue
            try:
                self._fetch(step, told)
                fetched.append(step)
            except CheckpointError as error:
                fault = fault_of(error.__cause__) if error.__cause__ else None
                if fault is not None and fault.passing:
                    raise
                log.warning("passing over a snapshot: %s", error)
        return fetched

    def _fetch(self, step: int, told: Callable[[str], None]) -> None:
        name, folder = folder_name(step), Path(self.local.path(step))
        at = f"snapshots/{name}/{MANIFEST}"
        data = self._store.read(at)
        for file, entry in parse_manifest(data, f"{self.url}/{at}", step)["files"].items():
            told(f"update {step}: {file}, {int(entry['bytes']) / 2**20:.1f} MiB")
            try:
                self._store.download(f"snapshots/{name}/{file}", folder / file)
            except FileNotFoundError as error:
                raise CheckpointError(f"{self.url}/snapshots/{name}/{file} is missing") from error
            verify(folder / file, f"{self.url}/snapshots/{name}/{file}", entry)
        partial = folder / f".{MANIFEST}.partial"
        partial.write_bytes(data)
        os.replace(partial, folder / MANIFEST)

    def _push(self, source: Path, name: str, told: Callable[[int], None]) -> int:
        try:
            stat = source.stat()
            if self._sent.get(name) == (stat.st_size, stat.st_mtime_ns):
                return 0
            self._store.upload(source, name, told)
        except FileNotFoundError as error:
            raise CheckpointError(f"{source} vanished while it was sent to {self.url}") from error
        self._sent[name] = (stat.st_size, stat.st_mtime_ns)
        return stat.st_size

    def _retire(self) -> None:
        here = set(self.local.steps())
        self._copies.protect(here)
        self._copies.retire()
        # what a killed sender left of a snapshot that nobody sends any more
        whole = {folder_name(step) for step in {*self.steps(), *here}}
        for name in self._store.folders("snapshots"):
            if STEP_FOLDER.fullmatch(name) and name not in whole:
                self._store.remove(f"snapshots/{name}")
