"""Placements compared before a run: their bytes, transfers and times by hand."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydistill import cli
from raydistill.errors import ConfigError, PlacementError
from raydistill.models.diffusers_hub import random_pixel_pipeline
from raydistill.runtime.placements import compare, network, suggested, table
from raydistill.runtime.plan import GIB, Plan, plan, plan_for
from raydistill.runtime.role_times import RoleTimes, entry
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.simulate import Layout, Network, RoleSeconds, simulate
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
    quarter -= roles["generator"].gradients  # never there with the critic's
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
    assert apart.settings == (
        "placement.mode=disaggregated placement.workers=2 placement.critic_ranks=1 placement.teacher_replicas=2"
    )


def test_bytes_are_the_same_whatever_placement_the_run_itself_has() -> None:
    """A plan counts activations for its own ranks; the comparison, for those of each placement."""
    own: list[dict[str, Any]] = [
        {"workers": 1},
        {"workers": 4},
        {"workers": 2, "mode": "teachers"},
        {"workers": 5, "mode": "disaggregated", "critic_ranks": 4},
    ]
    found = []
    for placement in own:
        config = tiny_config(train={"batch_size": 16}, placement=placement)
        found.append([each.device_bytes for each in compare(config, planned(config), 8, 4)])
    for each in found[1:]:
        for mine, first in zip(each, found[0], strict=True):
            assert mine == pytest.approx(first, rel=0.05)
    plan = planned(tiny_config(train={"batch_size": 16}, placement=own[3]))
    colocated = planned(tiny_config(train={"batch_size": 16}))
    for role, ranks in (("generator", 1), ("critic", 4)):
        whole = colocated.bytes_by_role[role].activations
        assert plan.bytes_by_role[role].activations == pytest.approx(whole / ranks, rel=0.1)


def test_samples_made_again_for_the_backward_pass_are_counted() -> None:
    """Of several micro-batches no graph is kept while the teacher elsewhere scores."""
    whole = tiny_config(train={"batch_size": 8})
    parts = tiny_config(train={"batch_size": 8, "micro_batch_size": 2})
    times = [{e.layout.mode: e.window for e in compare(c, planned(c), 4, 2)} for c in (whole, parts)]
    assert times[1]["colocated"] == times[0]["colocated"]
    plan = planned(whole)
    assert times[1]["teachers"] - times[0]["teachers"] == pytest.approx(plan.seconds.sample / 2)


TIMES = RoleTimes(RoleSeconds(0.2, 0.1, 0.1, 0.3, 0.4, generator_step=0.05, critic_step=0.02), "measured")


def test_measured_seconds_and_a_network_take_the_place_of_forward_equivalents() -> None:
    config = tiny_config()
    plan = planned(config)
    net = Network(1e-3, 1e9)
    free, slow = (compare(config, plan, 4, 1, TIMES, each) for each in (None, net))
    colocated = free[0]
    # R = 2; the optimisers' steps on every one of four ranks
    assert colocated.window == pytest.approx((0.15 + 2 * 0.1 + 0.1 + 2 * 0.28 + 0.4) / 4 + 0.05 + 2 * 0.02)
    assert slow[0].window - colocated.window == pytest.approx(
        net.all_reduce_seconds(plan.bytes_by_role["generator"].gradients, 4)
        + 2 * net.all_reduce_seconds(plan.bytes_by_role["critic"].gradients, 4)
    )
    text = table(config, [(4, slow)], None, TIMES, net)
    row = next(line for line in text.splitlines() if line.startswith("colocated")).split()
    window = slow[0].window
    assert [float(cell) for cell in row[5:8]] == pytest.approx([window, 1 / window, 16 / window], rel=1e-3)
    assert "times: measured; 1000 us and 8 Gbit/s a link, gradients averaged by a ring" in text
    assert "s/update" not in table(config, [(4, compare(config, plan, 4, 1))], None)


def test_the_division_of_the_ranks_knows_the_teachers_and_the_network() -> None:
    config = tiny_config(train={"batch_size": 840}, method={"critic_updates_per_generator": 5})
    plan = planned(config)

    def chosen(times: RoleTimes, net: Network | None, teachers: int = 2) -> Layout:
        return compare(config, plan, 8 + teachers, teachers, times, net)[-1].layout

    free = chosen(TIMES, None)
    windows = {
        c: simulate(TIMES.seconds, 5, Layout("disaggregated", 8 - c, c, 2)).window_s for c in range(1, 8)
    }
    assert windows[free.critics] == pytest.approx(min(windows.values()))
    # averaging over more critic ranks costs more than they save
    assert chosen(TIMES, Network(5e-2)).critics < free.critics
    # one teacher that serves all: nothing else matters, the fewest critic ranks will do
    slow = RoleTimes(RoleSeconds(0.2, 0.1, 0.1, 0.3, 1000.0), "measured")
    assert chosen(slow, None, teachers=1).critics == 1


@pytest.mark.parametrize(
    ("latency_us", "gbit_per_s", "times", "named"),
    [
        (10.0, None, None, "give --role-times too"),
        (None, 100.0, None, "give --role-times too"),
        (-1.0, None, TIMES, "--latency-us -1 must be at least 0"),
        (None, 0.0, TIMES, "--gbit-per-s 0 must be positive"),
    ],
)
def test_a_network_without_seconds_or_of_no_sense_is_refused(
    latency_us: float | None, gbit_per_s: float | None, times: RoleTimes | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        network(latency_us, gbit_per_s, times)


def test_a_network_is_in_microseconds_and_gigabits() -> None:
    assert network(None, None, None) is None
    assert network(10.0, 200.0, TIMES) == Network(1e-5, 25e9)
    assert network(10.0, None, TIMES) == Network(1e-5)


def test_one_table_for_several_numbers_of_devices() -> None:
    config = tiny_config(train={"batch_size": 16})
    plan = planned(config)
    found = [(devices, compare(config, plan, devices, 1)) for devices in (2, 12, 16)]
    text = table(config, found, None)
    assert "suggestion for 2 devices: placement.mode=" in text
    assert (
        "not possible for 12 devices: colocated, teachers, disaggregated (their ranks do not divide" in text
    )
    assert "suggestion for 12 devices" not in text
    assert "16 workers" in text
    sizes = {devices: min(max(e.device_bytes.values()) for e in row) for devices, row in found if row}
    between = (sizes[2] + sizes[16]) / 2 / GIB
    partly = table(config, found, between)
    assert "suggestion for 2 devices: none, no placement fits into" in partly
    assert "suggestion for 16 devices: placement.mode=" in partly
    with pytest.raises(PlacementError, match="no placement fits into 1e-06 GiB"):
        table(config, found, 1e-6)


def test_four_thousand_devices_are_compared_in_seconds() -> None:
    config = tiny_config(train={"batch_size": 61440})
    config = replace(config, train=replace(config.train, micro_batch_size=1))
    plan = planned(config)
    started = time.process_time()
    found = compare(config, plan, 4096, 256, TIMES, Network(1e-5, 25e9))
    assert time.process_time() - started < 3.0
    assert [each.layout.mode for each in found] == ["colocated", "teachers", "disaggregated"]
    assert found[2].layout.generators + found[2].layout.critics == 3840


def test_the_plan_command_predicts_from_a_file_of_role_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = "jobs/dmd2_coco.py"
    config = cli.load_job(job)[0]()
    path = tmp_path / "step.json"
    result = {"size": "dmd2_coco", "batch_size": 32, "device": "cpu"} | entry(
        TIMES.seconds, config, plan(config)
    )
    path.write_text(json.dumps({"results": [result]}))

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["plan", job, *arguments])
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    code, out, _ = run("--devices", "64,4096", "--teachers", "4,256", "train.batch_size=61440",
                       "--role-times", str(path), "--latency-us", "10", "--gbit-per-s", "200")  # fmt: skip
    assert code == 0
    assert "s/update" in out
    assert "taken 1920 times for batch 61440" in out
    assert "10 us and 200 Gbit/s a link" in out
    assert "4096 workers" in out
    assert "left out: a rank's lower efficiency" in out
    code, out, err = run("--latency-us", "10")
    assert code == 2
    assert "give --role-times too" in err
    assert out == ""
    code, _, err = run("--role-times", str(path), "teacher.guidance_scale=1")
    assert code == 2
    assert "teacher.guidance_scale was other than 1, the job's is 1" in err
    code, _, err = run("--devices", "3,8", "--teachers", "1,1,1")
    assert code == 2
    assert "--teachers has 3 numbers and --devices 2" in err


def test_suggestion_is_the_fastest_that_fits_and_says_what_does_not() -> None:
    config = tiny_config()
    found = compare(config, planned(config), devices=4, teachers=1)
    fastest = min(found, key=lambda each: each.window)
    assert suggested(found, None) is fastest
    sizes = {each.layout.mode: max(each.device_bytes.values()) / GIB for each in found}
    smallest = min(sizes, key=lambda mode: sizes[mode])
    assert suggested(found, sizes[smallest]).layout.mode == smallest
    with pytest.raises(PlacementError, match=r"fits into 1e-06 GiB a device .*colocated 0\.00, "):
        suggested(found, 1e-6)
    assert f"suggestion: {fastest.settings}" in table(config, [(4, found)], None)


def test_batches_that_do_not_divide_leave_a_placement_out() -> None:
    config = tiny_config(train={"batch_size": 8, "micro_batch_size": 8})
    modes = [each.layout.mode for each in compare(config, planned(config), devices=2, teachers=1)]
    assert modes == ["teachers"]
    assert compare(replace(config), planned(config), devices=3, teachers=1)[-1].layout.mode == "disaggregated"
