"""Does the image show what its caption names? Colours and shapes, judged by the shipped SceneNet."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from raydistill.errors import DataError
from raydistill.eval.features import COLOURS, SHAPES

_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)})\s+({'|'.join(SHAPES)})(?:s|es)?\b", re.IGNORECASE)


def named_objects(caption: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs that a caption names, in order, each once.

    "a small red circle left of a blue ring" names (red, circle) and (blue, ring).
    """
    return list(dict.fromkeys((colour.lower(), shape.lower()) for colour, shape in _OBJECT.findall(caption)))


def prompt_matches(objects: Tensor, captions: Sequence[str], threshold: float = 0.5) -> Tensor:
    """Which images show everything that their captions name; bool [B].

    Args:
        objects: presence logits [B, colours, shapes] of `SceneNet.objects`.
        captions: one per image.
        threshold: probability from which an object counts as present.

    Raises DataError if the counts or shapes differ or if a caption names no object.
    """
    if objects.shape != (len(captions), len(COLOURS), len(SHAPES)):
        raise DataError(
            f"presence logits have shape {tuple(objects.shape)}; expected "
            f"({len(captions)} captions, {len(COLOURS)} colours, {len(SHAPES)} shapes)"
        )
    present = torch.sigmoid(objects.detach().float()).cpu() >= threshold
    matches = []
    for row, caption in zip(present, captions, strict=True):
        pairs = named_objects(caption)
        if not pairs:
            raise DataError(
                f"caption {caption!r} names no object; prompt accuracy knows the colours "
                f"{', '.join(COLOURS)} and the "
                f"shapes {', '.join(SHAPES)}"
            )
        matches.append(all(bool(row[COLOURS.index(colour), SHAPES.index(shape)]) for colour, shape in pairs))
    return torch.tensor(matches, dtype=torch.bool)


def prompt_accuracy(objects: Tensor, captions: Sequence[str], threshold: float = 0.5) -> float:
    """Share of images that show every (colour, shape) their caption names; arguments as in `prompt_matches`.

    Raises DataError without images.
    """
    if not captions:
        raise DataError("prompt accuracy of no images")
    return prompt_matches(objects, captions, threshold).double().mean().item()
