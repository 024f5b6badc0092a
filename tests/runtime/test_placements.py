"""Placements compared before a run: their bytes, transfers and times by hand."""

from dataclasses import replace

import pytest

from raydistill.errors import PlacementError
from raydistill.models.diffusers_hub import random_pixel_pipeline
from raydistill.runtime.placements import compare, suggested, table
from raydistill.runtime.plan import GIB, Plan, plan_for
from raydistill.runtime.settings import RunConfig
from tests.tiny import tiny_config


def planned(config: RunConfig) -> Plan:
    _, meta, shapes = random_pixel_pipeline(8, (8, 16), 1)
    return plan_for(config, meta, shapes)


def test_bytes_transfers_and_times_of_each_placement() -> None:
    config = tiny_config(placement={"workers": 1})
    plan = planned(config)
    colocated, teachers, apart = compare(config, plan, devices=4, teachers=2)
    assert [each.layout.mode for each in (colocated, teachers, apart)] == [
        "colocated",
        "teachers",
        "disaggregated",
    ]
    assert [each.devices for each in (colocated, teachers, apart)] == [
        "4 workers", "2 workers, 2 teachers", "1 generator, 1 critic, 2 teachers",
    ]  # fmt: skip
    roles = plan.bytes_by_role
    quarter = sum(role.total - role.activations + role.activations // 4 for role in roles.values())
    assert colocated.device_bytes["worker"] == pytest.approx(quarter, abs=8)
    assert colocated.window == pytest.approx(sum(plan.forwards.values()) / 4)
    assert apart.device_bytes == {
        "generator": roles["generator"].total, "critic": roles["critic"].total, "teacher": roles["teacher"].total,
    }  # fmt: skip
    # 8 samples of 3x8x8 floats with 64 numbers of text: x_t and text there, x0 back; R = 2 batches of samples to the
    # critic; its x0, and the gradient of its logit, back
    sample, text = 8 * 3 * 64 * 4, 8 * 64 * 4
    assert apart.transfer_bytes == (sample + text) + sample + 2 * sample + 3 * sample
    gradients = roles["generator"].gradients + 2 * roles["critic"].gradients
    assert colocated.transfer_bytes == 2 * 3 * gradients
    assert teachers.transfer_bytes == 2 * 1 * gradients + 2 * sample + text
    assert all(0 <= share <= 1 for each in (colocated, teachers, apart) for share in each.idle.values())


def test_suggestion_is_the_fastest_that_fits_and_says_what_does_not() -> None:
    config = tiny_config()
    found = compare(config, planned(config), devices=4, teachers=1)
    fastest = min(found, key=lambda each: each.window)
    assert suggested(found, None) is fastest
    sizes = {each.layout.mode: max(each.device_bytes.values()) / GIB for each in found}
    smallest = min(sizes, key=lambda mode: sizes[mode])
    assert suggested(found, sizes[smallest]).layout.mode == smallest
    with pytest.raises(
        PlacementError, match=r"fits into 1e-06 GiB a device .*colocated .*train\.micro_batch_size"
    ):
        suggested(found, 1e-6)
    assert f"suggestion: placement.mode={fastest.layout.mode}" in table(found, None)


def test_batches_that_do_not_divide_leave_a_placement_out() -> None:
    config = tiny_config(train={"batch_size": 8, "micro_batch_size": 8})
    modes = [each.layout.mode for each in compare(config, planned(config), devices=2, teachers=1)]
    assert modes == ["teachers"]
    assert compare(replace(config), planned(config), devices=3, teachers=1)[-1].layout.mode == "disaggregated"
