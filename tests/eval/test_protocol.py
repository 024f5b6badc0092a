import json
from dataclasses import fields, replace

import pytest
import torch

from raydistill.errors import ConfigError
from raydistill.eval.protocol import Protocol, require_same, to_uint8
from raydistill.tracking import check_metric_names

PROTOCOL = Protocol(
    name="scenes-val",
    metric="toyfid",
    num_samples=2000,
    seed=10,
    detector="SceneNet",
    detector_sha256="aa",
    reference="scenes/val",
    reference_sha256="bb",
    num_reference=2000,
    captions_sha256="cc",
    resize="none",
    uint8_rule="round",
    caption_rule="first",
    sampler="few_step",
    num_steps=1,
    guidance_scale=1.0,
    weights="ema",
)


@pytest.mark.parametrize(
    ("count", "suffix"), [(2, "2"), (500, "500"), (1000, "1k"), (2000, "2k"), (2500, "2500"), (50_000, "50k")]
)
def test_the_number_of_samples_is_in_the_metric_name(count: int, suffix: str) -> None:
    protocol = replace(PROTOCOL, num_samples=count)
    assert protocol.key() == f"eval/toyfid_{suffix}"
    assert protocol.key("teacher_prompt_accuracy") == f"eval/teacher_prompt_accuracy_{suffix}"
    check_metric_names([protocol.key(), protocol.key("prompt_accuracy"), protocol.key("teacher_toyfid")])


def test_every_field_changes_the_hash() -> None:
    hashes = {PROTOCOL.hash()}
    for field in fields(Protocol):
        value = getattr(PROTOCOL, field.name)
        other = {"uint8_rule": "floor", "weights": "raw"}.get(field.name)
        changed = replace(
            PROTOCOL, **{field.name: other or (value + 1 if isinstance(value, int | float) else value + "x")}
        )
        assert changed.hash() != PROTOCOL.hash(), field.name
        hashes.add(changed.hash())
    assert len(hashes) == len(fields(Protocol)) + 1


def test_a_protocol_survives_json_with_its_hash() -> None:
    back = Protocol.from_dict(json.loads(json.dumps(PROTOCOL.to_dict())))
    assert back == PROTOCOL
    assert back.hash() == PROTOCOL.hash()
    assert replace(PROTOCOL, guidance_scale=1).hash() == PROTOCOL.hash()
    with pytest.raises(ConfigError, match="lacks seed"):
        Protocol.from_dict({k: v for k, v in PROTOCOL.to_dict().items() if k != "seed"})
    with pytest.raises(ConfigError, match="has no colour"):
        Protocol.from_dict(PROTOCOL.to_dict() | {"colour": 1})


def test_the_hash_is_pinned_so_that_logged_figures_stay_comparable() -> None:
    assert PROTOCOL.hash()[:12] == "e97eb2984c09"


def test_figures_of_different_protocols_are_refused_with_the_fields_that_differ() -> None:
    require_same([PROTOCOL, PROTOCOL, replace(PROTOCOL)])
    teacher = replace(PROTOCOL, num_steps=25, guidance_scale=2.0, sampler="ddim")
    with pytest.raises(
        ConfigError,
        match=r"sampler \('few_step', 'ddim'\); num_steps \(1, 25\); guidance_scale \(1\.0, 2\.0\)",
    ):
        require_same([PROTOCOL, teacher])
    require_same([PROTOCOL, teacher], but=["sampler", "num_steps", "guidance_scale"])
    with pytest.raises(ConfigError, match="num_samples"):
        require_same(
            [PROTOCOL, replace(teacher, num_samples=500)], but=["sampler", "num_steps", "guidance_scale"]
        )
    with pytest.raises(ConfigError, match="has no colour"):
        require_same([PROTOCOL], but=["colour"])


@pytest.mark.parametrize(
    "change", [{"num_samples": 1}, {"num_reference": 0}, {"uint8_rule": "ceil"}, {"weights": "best"}]
)
def test_a_protocol_that_means_nothing_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(PROTOCOL, **change)


def test_every_byte_survives_the_way_to_floats_and_back() -> None:
    levels = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1.0), levels)
    assert torch.equal(to_uint8((levels.float() / 127.5 - 1.0).half()), levels)


def test_round_and_floor_are_the_rules_of_edm_and_dmd2() -> None:
    values = torch.tensor([-2.0, -1.0, -0.001, 0.0, 0.5, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 127, 128, 191, 255, 255]
    assert to_uint8(values, "floor").tolist() == [0, 0, 127, 127, 191, 255, 255]
    uniform = torch.linspace(-0.99, 0.99, 100_001)
    darker = to_uint8(uniform).double().mean() - to_uint8(uniform, "floor").double().mean()
    assert darker.item() == pytest.approx(0.5, abs=0.01)


def test_pictures_that_are_not_floats_or_not_finite_are_refused() -> None:
    with pytest.raises(ConfigError, match="round, floor"):
        to_uint8(torch.zeros(1), "nearest")
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="1 pixel values"):
        to_uint8(torch.tensor([0.0, float("nan")]))
