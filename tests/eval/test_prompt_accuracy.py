import numpy as np
import pytest
import torch

from raydistill.data.scenes import Scene, draw, scene
from raydistill.errors import DataError
from raydistill.eval.features import COLOURS, SHAPES, load_scene_net
from raydistill.eval.prompt_accuracy import named_objects, prompt_accuracy, prompt_matches

CONTENTS = [scene(0, "val", index) for index in range(200)]


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("a red circle", [("red", "circle")]),
        ("a picture of a large cyan ring at the top left", [("cyan", "ring")]),
        ("a small red circle left of a blue ring", [("red", "circle"), ("blue", "ring")]),
        ("An Orange Square and a red square.", [("orange", "square"), ("red", "square")]),
        ("two white crosses", [("white", "cross")]),
        ("two white triangles", [("white", "triangle")]),
        ("a red circle and a red circle", [("red", "circle")]),
        ("a circle on a red background", []),
        ("a blueish ring", []),
        ("a dog", []),
    ],
)
def test_captions_name_colour_and_shape_pairs(caption: str, objects: list[tuple[str, str]]) -> None:
    assert named_objects(caption) == objects


def test_every_caption_that_the_project_writes_names_exactly_the_objects_of_its_scene() -> None:
    for split in ("train", "val"):
        for index in range(300):
            content = scene(1, split, index)
            drawn = {(thing.colour, thing.shape) for thing in content.objects}
            for caption in content.captions:
                assert set(named_objects(caption)) == drawn, caption


def logits(*present: tuple[str, str]) -> torch.Tensor:
    result = torch.full((1, len(COLOURS), len(SHAPES)), -3.0)
    for colour, shape in present:
        result[0, COLOURS.index(colour), SHAPES.index(shape)] = 3.0
    return result


def test_an_image_counts_only_if_everything_named_is_there() -> None:
    caption = "a red circle and a blue ring"
    red, blue, other = ("red", "circle"), ("blue", "ring"), ("red", "ring")
    objects = torch.cat(
        [logits(red, blue), logits(red), logits(other, blue), logits(), logits(red, blue, other)]
    )
    assert prompt_matches(objects, [caption] * 5).tolist() == [True, False, False, False, True]
    assert prompt_accuracy(objects, [caption] * 5) == 0.4


def test_the_threshold_is_a_probability() -> None:
    objects = torch.full((1, len(COLOURS), len(SHAPES)), float(np.log(0.7 / 0.3)))
    assert prompt_accuracy(objects, ["a red ring"], threshold=0.69) == 1.0
    assert prompt_accuracy(objects, ["a red ring"], threshold=0.71) == 0.0


def pixels(contents: list[Scene]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(draw(content))).permute(2, 0, 1) for content in contents])


def test_real_scenes_score_near_one_under_their_captions_and_near_zero_under_others() -> None:
    objects = load_scene_net().objects(pixels(CONTENTS))
    captions = [content.captions[0] for content in CONTENTS]
    assert prompt_accuracy(objects, captions) > 0.97
    assert prompt_accuracy(objects, captions[1:] + captions[:1]) < 0.1
    noise = torch.randint(
        0, 256, (50, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    assert prompt_accuracy(load_scene_net().objects(noise), captions[:50]) < 0.1


def test_what_can_not_be_judged_is_refused() -> None:
    with pytest.raises(DataError, match="names no object"):
        prompt_accuracy(logits(), ["a dog"])
    with pytest.raises(DataError, match=rf"\(2 captions, {len(COLOURS)} colours, {len(SHAPES)} shapes\)"):
        prompt_accuracy(logits(), ["a red ring"] * 2)
    with pytest.raises(DataError, match="no images"):
        prompt_accuracy(torch.zeros(0, len(COLOURS), len(SHAPES)), [])
