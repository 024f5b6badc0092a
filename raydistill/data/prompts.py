"""A list of prompts as a source of shards: .txt with one prompt a line, or .jsonl with a caption in each object.

Millions of prompts are never held: one pass notes where each shard's lines begin in the file, and hashes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raydistill.data.images import first_line
from raydistill.data.sources import Refused, Sample
from raydistill.errors import DataError

FIELDS = ("caption", "prompt", "text")
"""Of a JSON object, the first that is there; a list of them is several captions of one sample."""


class PromptSource:
    """The lines of a file; empty ones are none."""

    def __init__(self, file: str | Path, samples_per_shard: int, limit: int | None = None):
        """Raises DataError for a file that can't be read, has another suffix, or holds no prompt."""
        self._file = Path(file).absolute()
        if self._file.suffix not in (".txt", ".jsonl"):
            raise DataError(
                f"--prompts {file} must be a .txt file with a prompt a line, or a .jsonl file with one of the fields "
                f"{', '.join(FIELDS)} in each object"
            )
        self._places: list[tuple[int, int, int]] = []
        """Of each shard: offset in the file, number of its first prompt, prompts."""
        digest, count, offset = hashlib.sha256(), 0, 0
        try:
            with open(self._file, "rb") as lines:
                for line in lines:
                    digest.update(line)
                    if line.strip() and (limit is None or count < limit):
                        if count % samples_per_shard == 0:
                            self._places.append((offset, count, 0))
                        start, first, size = self._places[-1]
                        self._places[-1] = (start, first, size + 1)
                        count += 1
                    offset += len(line)
        except OSError as error:
            raise DataError(f"--prompts {file} can't be read: {error.strerror}") from error
        if not count:
            raise DataError(f"--prompts {file} holds no prompt")
        self.plan: dict[str, Any] = {
            "source": "prompts",
            "prompts_sha256": digest.hexdigest(),
            "images": count,
            "samples_per_shard": samples_per_shard,
        }

    @property
    def sizes(self) -> Sequence[int]:
        return [size for _, _, size in self._places]

    def read(self, shard: int) -> Iterator[Sample | Refused]:
        offset, number, left = self._places[shard]
        with open(self._file, "rb") as lines:
            lines.seek(offset)
            for line in lines:
                if not line.strip():
                    continue
                if not left:
                    return
                where = f"prompt {number} of {self._file}"
                captions = self._captions(line, where)
                yield (
                    Sample(f"{number:012d}", captions, {"prompt": number}, where)
                    if captions
                    else Refused("caption_missing", where)
                )
                number, left = number + 1, left - 1

    def refused(self) -> Iterator[Refused]:
        return iter(())

    def _captions(self, line: bytes, where: str) -> tuple[str, ...]:
        try:
            text = line.decode()
            if self._file.suffix == ".txt":
                return (text.strip(),)
            content = json.loads(text)
        except ValueError as error:
            raise DataError(
                f"{where} is not {self._file.suffix[1:]} in UTF-8: {first_line(error)}"
            ) from error
        return captions_of(content)


def captions_of(content: Any) -> tuple[str, ...]:
    """The captions in a JSON object, under the first of FIELDS that it has; none where it has none."""
    found = (
        next((content[name] for name in FIELDS if content.get(name)), ()) if isinstance(content, dict) else ()
    )
    texts = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
