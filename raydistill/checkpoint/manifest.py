"""`manifest.json`: what makes a folder of parts a snapshot, and the check of its files against it."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from raydistill.errors import CheckpointError

SCHEMA = 1
MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step_(\d{8,})")
ROLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def to_json(value: dict[str, Any], what: str) -> bytes:
    try:
        return json.dumps(value, indent=1, sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error


def parse_manifest(data: bytes, name: str, step: int) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(data)
        said = (document["schema"], document["step"])
        sizes = {
            file: (int(entry["bytes"]), str(entry["sha256"])) for file, entry in document["files"].items()
        }
        if not isinstance(document["manifest"], dict):
            raise TypeError("its field 'manifest' is not an object")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name} is not a manifest: {type(error).__name__}: {error}") from error
    if said != (SCHEMA, step):
        raise CheckpointError(f"{name} says schema {said[0]}, step {said[1]}; expected {SCHEMA} and {step}")
    for file in sizes:
        role, dot, suffix = file.partition(".")
        if not ROLE.fullmatch(role) or dot + suffix not in (".safetensors", ".json") or file == MANIFEST:
            raise CheckpointError(
                f"{name} names {file!r}; only ROLE.safetensors and ROLE.json inside the folder are read, "
                "nothing is "
                "unpickled"
            )
        if not {f"{role}.safetensors", f"{role}.json"} <= sizes.keys():
            raise CheckpointError(f"{name} has only half of the part {role!r}")
    return document


def verify(path: Path, name: str, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{name} is missing")
    size = path.stat().st_size
    if size != int(entry["bytes"]):
        raise CheckpointError(f"{name} has {size} bytes; its manifest says {entry['bytes']}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        raise CheckpointError(
            f"{name} does not match its hash (sha256 {digest[:12]}..., manifest {entry['sha256'][:12]}...): "
            "the file "
            "was altered or the disk fails"
        )
