"""The folder of a run's snapshots: parts, manifest, retention, and the newest one that is whole."""

import errno
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from raydistill.checkpoint.folders import LocalFolder, RemoteFolder
from raydistill.checkpoint.manifest import (
    MANIFEST,
    ROLE,
    SCHEMA,
    STEP_FOLDER,
    folder_name,
    parse_manifest,
    to_json,
    verify,
)
from raydistill.checkpoint.sharded import join, role_of
from raydistill.checkpoint.tensor_file import TensorFile
from raydistill.diffusion.shards import Rows
from raydistill.errors import CheckpointError, ConfigError
from raydistill.object_store import is_remote

log = logging.getLogger(__name__)

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Snapshot:
    """One complete snapshot, its hashes already checked.

    `step` and `path` say which one it is; `manifest` is the dict that was given to `Snapshots.commit`;
    `roles` are those it holds, each in one part or in parts of several ranks, and `num_bytes` their size.
    """

    def __init__(
        self, step: int, path: str, document: dict[str, Any], folder: Path, keep_alive: object
    ) -> None:
        files = document["files"]
        self.step = step
        self.path = path
        self.manifest: dict[str, Any] = document["manifest"]
        self._parts: dict[str, list[str]] = {}
        for name in sorted(name.removesuffix(".json") for name in files if name.endswith(".json")):
            self._parts.setdefault(role_of(name), []).append(name)
        self.roles = sorted(self._parts)
        self.num_bytes = sum(int(entry["bytes"]) for entry in files.values())
        self._folder = folder
        self._keep_alive = keep_alive  # the local copy of a remote snapshot lives as long as this object

    def part(
        self, role: str, rows: Mapping[str, Rows] | None = None, prefix: str = ""
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights (on the CPU, in memory of their own) and the JSON state that `role` wrote.

        rows: tensors of which only these rows are read, by however many ranks they were written; prefix: how the names
        of the tensors begin that are read.

        Raises CheckpointError if the snapshot has no such part, if its file is not safetensors, if the part of a rank
        is missing, or if a tensor has not the number of rows that is asked for.
        """
        if role not in self.roles:
            raise CheckpointError(
                f"snapshot {self.path} has no part {role!r}; it holds {', '.join(self.roles)}"
            )
        return join(self._folder, self._parts[role], self.path, rows or {}, prefix)


class Snapshots:
    """The snapshots of one run, in one folder.

    Several processes may write into the same folder, each its own parts; exactly one calls `commit`, after
    all parts are there, and exactly one calls `discard_unfinished`, before the first part of a run is
    written.

    Args:
        root: local path or fsspec URL; created when first written to. Settings: `output_dir`, `checkpoint.uri`.
        keep: how many of the newest snapshots to keep, at least 1, beside protected ones. While one is being
            written there is one more. Setting: `checkpoint.keep`.
        endpoint_url: of an S3 service other than AWS. Setting: `checkpoint.endpoint_url`.
    """

    def __init__(self, root: str, keep: int, endpoint_url: str | None = None) -> None:
        if keep < 1:
            raise ConfigError(
                f"checkpoint.keep is {keep}; it must be at least 1, or no snapshot is left to resume from"
            )
        self.keep = keep
        self._store: LocalFolder | RemoteFolder = (
            RemoteFolder(root, endpoint_url) if is_remote(root) else LocalFolder(root)
        )
        self.root = self._store.root
        self._protected: set[int] = set()
        self._held: set[int] = set()
        self._retiring = threading.Lock()

    def path(self, step: int) -> str:
        """Where the snapshot of `step` is or would be."""
        return f"{self.root}/{folder_name(step)}"

    def steps(self) -> list[int]:
        """Steps that have a manifest, ascending; their hashes are not checked."""
        found = (STEP_FOLDER.fullmatch(name) for name in self._store.folders())
        steps = sorted(int(match[1]) for match in found if match)
        return [step for step in steps if self._store.exists(f"{folder_name(step)}/{MANIFEST}")]

    def protect(self, steps: set[int]) -> None:
        """Replace the set of steps that retention leaves alone, for instance the best one or one being
        evaluated.

        The set is not stored: after a resume, protect them again before the first commit.
        """
        self._protected = set(steps)

    def write_part(self, step: int, role: str, weights: dict[str, Tensor], state: dict[str, Any]) -> int:
        """Write one role's part of the snapshot of `step` and return its size in bytes.

        The tensors are copied to the host one by one and streamed; they must not change meanwhile. `state` is
        JSON.

        Raises CheckpointError if another writer has this role already, if `state` is not JSON, or if the file
        can't be written; in that last case the whole unfinished snapshot is removed and older ones are
        untouched.
        """
        if not ROLE.fullmatch(role) or f"{role}.json" == MANIFEST:
            raise CheckpointError(
                f"role {role!r} can't name a file; use letters, digits, '-' and '_', not 'manifest'"
            )
        folder, names = folder_name(step), (f"{role}.safetensors", f"{role}.json")
        tensors = TensorFile(weights, f"{self.path(step)}/{names[0]}")
        part: dict[str, Any] = {"schema": SCHEMA, "role": role, "state": state}
        needed = tensors.num_bytes + len(to_json(part, f"the state of {role!r} at step {step}"))
        for name in names:
            if self._store.exists(f"{folder}/{name}"):
                raise self._collision(step, name)
        free = self._store.free_bytes()

        def write_weights(file: BinaryIO) -> None:
            part["weights"] = {"sha256": tensors.write(file), "bytes": tensors.num_bytes}

        try:
            self._store.write(f"{folder}/{names[0]}", write_weights)
            text = to_json(part, role)
            self._store.write(f"{folder}/{names[1]}", lambda file: file.write(text))
        except FileExistsError as error:
            raise self._collision(step, names[0]) from error
        except OSError as error:
            self._abandon(folder)
            raise self._cannot_write(step, f"part {role!r}", needed, free, error) from error
        except BaseException:
            self._abandon(folder)
            raise
        return tensors.num_bytes + len(text)

    def has_part(self, step: int, role: str) -> bool:
        """Whether a role's part of the snapshot of `step` is written to its end."""
        return self._store.exists(f"{folder_name(step)}/{role}.json")

    def commit(self, step: int, manifest: dict[str, Any], roles: Sequence[str] | None = None) -> int:
        """Make the parts written for `step` a snapshot, delete what is too old, and return the snapshot's
        bytes.

        Args:
            step: the step whose parts are all written (the caller has waited for the other ranks).
            manifest: JSON that describes the run: counters, configuration, tracking run id.
            roles: the parts that must be there; None accepts whatever was written.

        Raises CheckpointError if a part is missing, if `manifest` is not JSON, or if the file can't be
        written.
        """
        folder = folder_name(step)
        if self._store.exists(f"{folder}/{MANIFEST}"):
            raise CheckpointError(f"{self.path(step)} is committed already; a snapshot is never overwritten")
        files: dict[str, dict[str, Any]] = {}
        for name in self._store.files(folder):
            if not name.endswith(".json"):
                continue
            data = self._store.read(f"{folder}/{name}")
            files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
            weights, entry = f"{name.removesuffix('.json')}.safetensors", json.loads(data)["weights"]
            size = self._store.size(f"{folder}/{weights}")
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"{self.path(step)}/{weights} has {size} bytes; {entry['bytes']} were written"
                )
            files[weights] = entry
        missing = sorted(role for role in roles or () if f"{role}.json" not in files)
        if missing or not files:
            raise CheckpointError(
                f"snapshot {self.path(step)} lacks the parts {', '.join(missing) or '(all of them)'}; every "
                "role "
                "writes its part before the commit"
            )
        document = {"schema": SCHEMA, "step": step, "files": files, "manifest": manifest}
        text = to_json(document, f"the manifest of step {step}")
        free = self._store.free_bytes()
        try:
            self._store.write(f"{folder}/{MANIFEST}", lambda file: file.write(text))
        except OSError as error:
            self._abandon(folder)
            raise self._cannot_write(step, MANIFEST, len(text), free, error) from error
        self.retire()
        return sum(int(entry["bytes"]) for entry in files.values()) + len(text)

    def latest(self) -> Snapshot | None:
        """The newest snapshot that is complete and whose hashes match, or None if there is none.

        A broken one is named in a warning and passed over.
        """
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CheckpointError as error:
                log.warning("skipping a broken snapshot: %s", error)
        return None

    def manifest(self, step: int) -> dict[str, Any]:
        """What was given to `commit` at `step`; the weights are neither read nor checked.

        Raises CheckpointError if it is not a manifest.
        """
        name = f"{folder_name(step)}/{MANIFEST}"
        document = parse_manifest(self._store.read(name), f"{self.root}/{name}", step)
        manifest: dict[str, Any] = document["manifest"]
        return manifest

    def read(self, step: int) -> Snapshot:
        """The snapshot of `step`.

        Raises CheckpointError if it is missing, incomplete, altered or unsafe to read.
        """
        path, folder = self.path(step), folder_name(step)
        if not self._store.exists(f"{folder}/{MANIFEST}"):
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"no complete snapshot at {path}; complete steps under {self.root}: {there}"
            )
        document = parse_manifest(self._store.read(f"{folder}/{MANIFEST}"), f"{path}/{MANIFEST}", step)
        try:
            local, keep_alive = self._store.fetch(folder, document["files"])
            for name, entry in document["files"].items():
                verify(local / name, f"{path}/{name}", entry)
        except OSError as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        return Snapshot(step, path, document, local, keep_alive)

    def discard_unfinished(self) -> list[str]:
        """Clear what killed runs left behind, and return what was done, one line each.

        Folders without a manifest are deleted. Snapshots newer than `latest()`, all broken, are renamed to
        `broken_step_...`, so that the resumed run can write those steps again. Call it from one process at
        the start of a run, while nobody writes.
        """
        done = []
        complete = set(self.steps())
        good = self.latest()
        for name in self._store.folders():
            match = STEP_FOLDER.fullmatch(name)
            if not match:
                continue
            step = int(match[1])
            if step not in complete:
                self._store.remove(name)
                done.append(
                    f"deleted {self.root}/{name}: it has no manifest, its run was stopped while writing it"
                )
            elif good is None or step > good.step:
                self._store.remove(f"broken_{name}")
                self._store.rename(name, f"broken_{name}")
                done.append(f"renamed {self.root}/{name} to broken_{name}: it failed its checks")
        for line in done:
            log.warning("%s", line)
        return done

    @contextmanager
    def hold(self, step: int) -> Iterator[bool]:
        """While it is held, retention leaves the snapshot of `step` alone; False if there is none (any more)."""
        with self._retiring:
            self._held.add(step)
        try:
            yield self._store.exists(f"{folder_name(step)}/{MANIFEST}")
        finally:
            with self._retiring:
                self._held.discard(step)

    def retire(self) -> None:
        """Delete what is too old, as every commit does."""
        for step in self.steps()[: -self.keep]:
            with self._retiring:
                if step in self._protected | self._held:
                    continue
                # the manifest goes first, so that a half-deleted folder does not look like a snapshot
                self._store.remove(f"{folder_name(step)}/{MANIFEST}")
            self._store.remove(folder_name(step))

    def _abandon(self, folder: str) -> None:
        try:
            self._store.remove(folder)
        except (OSError, CheckpointError) as error:
            log.warning("could not remove the unfinished snapshot %s/%s: %s", self.root, folder, error)

    def _collision(self, step: int, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path(step)}/{name} exists already: another rank uses the same role name, or the step was "
            "written "
            "before. Give each rank its own role name, set another output_dir, or, after a killed run, call "
            "Snapshots.discard_unfinished() before the first write"
        )

    def _cannot_write(
        self, step: int, what: str, needed: int, free: int | None, error: OSError
    ) -> CheckpointError:
        room = f"needs {_mib(needed)}" + ("" if free is None else f", {_mib(free)} were free")
        cure = (
            "set output_dir to a larger disk or lower checkpoint.keep"
            if error.errno in _NO_ROOM
            else "see output_dir"
        )
        return CheckpointError(
            f"can't write {what} of {self.path(step)}: {error.strerror or error}; {room}; {cure}. The "
            "unfinished "
            "snapshot was removed, older ones are intact"
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"
