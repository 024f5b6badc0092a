"""What a sweep varies, and what it refuses before anything is started."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from raydistill import cli
from raydistill.errors import ConfigError, RayDistillError
from raydistill.runtime import digits
from raydistill.sweep.config import (
    Range,
    SweepConfig,
    checked,
    draw,
    parse_space,
    trial_config,
    trials_of,
)

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SPACE = {"method.alpha": [1.0, 1.2], "generator.lr": [1e-4, 2e-4, 4e-4]}
CONFIG = SweepConfig(run=digits.sid(), space=SPACE)


def test_a_space_is_read_from_text() -> None:
    assert parse_space(["a=1, 2,5", "b=[[625],[999,499]]", "c=uniform(1,4)", "d=loguniform(1e-5, 1e-3)"]) == {
        "a": ["1", "2", "5"],
        "b": [[625], [999, 499]],
        "c": Range("uniform", 1.0, 4.0),
        "d": Range("loguniform", 1e-5, 1e-3),
    }


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a=",
        "=1,2",
        "a=[1,2",
        "a=uniform(4,1)",
        "a=uniform(1,1)",
        "a=loguniform(0,1)",
        "a=uniform(x,1)",
        "a=uniform(1,inf)",
        "a=randint(0.5,2)",
    ],
)
def test_what_is_no_space_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be NAME=VALUE,VALUE or"):
        parse_space([text])


def test_a_grid_has_all_combinations_with_values_of_the_settings_own_types() -> None:
    config = checked(replace(CONFIG, space={"method.alpha": ["1", "1.2"], "generator.lr": ["1e-4"]}))
    assert trials_of(config) == [
        {"method.alpha": 1.0, "generator.lr": 1e-4},
        {"method.alpha": 1.2, "generator.lr": 1e-4},
    ]
    assert len(trials_of(checked(CONFIG))) == 6
    lists = checked(SweepConfig(run=digits.dmd2(), space={"method.timesteps": [[80.0], [80.0, 2.5]]}))
    runs = [trial_config(lists.run, settings, "x") for settings in trials_of(lists)]
    assert [run.method.timesteps for run in runs] == [(80.0,), (80.0, 2.5)]  # type: ignore[attr-defined]


def test_random_trials_lie_in_the_space_and_follow_from_the_seed() -> None:
    space = {
        "generator.lr": Range("loguniform", 1e-5, 1e-3), "method.u_max": Range("uniform", 0.2, 0.9),
        "train.batch_size": Range("randint", 8, 12), "method.alpha": [1.0, 1.2],
    }  # fmt: skip
    config = checked(replace(CONFIG, search="random", num_trials=40, space=space))
    trials = trials_of(config)
    assert len(trials) == 40
    assert trials == trials_of(config)
    other = replace(config, run=replace(config.run, seed=1))
    assert trials != trials_of(other)
    assert {trial["train.batch_size"] for trial in trials} == {8, 9, 10, 11}
    assert {trial["method.alpha"] for trial in trials} == {1.0, 1.2}
    assert all(0.2 <= trial["method.u_max"] < 0.9 for trial in trials)
    rates = [trial["generator.lr"] for trial in trials]
    assert 1e-5 <= min(rates) < 3e-5
    assert 3e-4 < max(rates) < 1e-3


def test_a_range_of_logarithms_is_even_in_them() -> None:
    generator = random.Random(0)
    drawn = [draw(generator, Range("loguniform", 1e-4, 1.0)) for _ in range(2000)]
    # half of them lie below the geometric middle; the standard deviation of the share is 0.011
    assert sum(value < 1e-2 for value in drawn) / 2000 == pytest.approx(0.5, abs=0.045)


def test_trials_share_a_teacher_service_unless_told_otherwise() -> None:
    placement = checked(CONFIG).run.placement
    assert (placement.mode, placement.teacher_service) == ("teachers", checked(CONFIG).own_service)
    placement = checked(replace(CONFIG, share_teacher=False)).run.placement
    assert (placement.mode, placement.teacher_service) == ("colocated", None)


def test_the_metric_is_toyfid_and_accuracy_is_to_rise() -> None:
    toyfid, _, accuracy = CONFIG.run.evaluator.figures.values()
    assert (CONFIG.figure, CONFIG.mode) == (toyfid, "min") == ("eval/toyfid_1797", "min")
    assert replace(CONFIG, metric=accuracy).mode == "max"


def test_trials_keep_the_snapshot_that_is_best_by_the_sweeps_metric_and_evaluate_every_one_that_is_due() -> (
    None
):
    config = checked(replace(CONFIG, metric="eval/label_accuracy_1797"))
    assert config.run.evaluator.best_metric == "eval/label_accuracy_1797"
    assert not config.run.evaluator.may_skip
    by_accuracy = replace(CONFIG.run, evaluator=replace(CONFIG.run.evaluator, best_by="accuracy"))
    assert replace(CONFIG, run=by_accuracy).figure == "eval/label_accuracy_1797"


def test_no_trial_is_registered_as_a_model_but_the_sweeps_best_one() -> None:
    named = replace(CONFIG.run, tracking=replace(CONFIG.run.tracking, register_as="digits"))
    config = checked(replace(CONFIG, run=named))
    assert config.run.tracking.register_as == "digits"
    assert trial_config(config.run, {"method.alpha": 1.0}, "t").tracking.register_as is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, space={}), "needs something to vary"),
        (
            lambda c: replace(c, space={"generator.lrr": [1]}),
            r"unknown setting in 'generator.lrr=1'; did you mean gen",
        ),
        (lambda c: replace(c, space={"generator.lr": [1e-4, "fast"]}), "generator.lr=fast is refused"),
        (lambda c: replace(c, space={"generator": [1]}), "names a section"),
        (lambda c: replace(c, space={"prepare.num_train": [100, 200]}), "prepare.num_train can't be varied"),
        (
            lambda c: replace(c, space={"train.compile": [True, False]}),
            "can't share one teacher: --own-teachers",
        ),
        (
            lambda c: replace(c, search="random", space={"method.alpha": Range("uniform", 1, 2.1)}),
            "method.alpha=2.09.* must lie in -1 to 2",
        ),
        (lambda c: replace(c, space={"tracking.uri": ["a", "b"]}), "tracking.uri can't be varied"),
        (lambda c: replace(c, space={"method.alpha": [1.2, 7]}), "method.alpha=7.0 must lie in -1 to 2"),
        (lambda c: replace(c, space={"train.batch_size": [0]}), "train.batch_size=0 must be at least 1"),
        (
            lambda c: replace(c, space={"method.alpha": Range("uniform", 1, 1.5)}),
            r"method.alpha=uniform\(1,1.5\): a grid has no points in a range",
        ),
        (
            lambda c: replace(c, search="random", space={"train.batch_size": Range("uniform", 8, 16)}),
            "train.batch_size=.* is refused",
        ),
        (
            lambda c: replace(c, space={"teacher.path": ["builtin:digits"]}),
            "can't share one teacher: --own-teachers",
        ),
        (
            lambda c: replace(c, metric="eval/fid_5k"),
            "reported by no trial; their evaluator reports eval/toyfid_1797,",
        ),
        (lambda c: replace(c, num_trials=0), "--num-trials 0 must be at least 1"),
        (lambda c: replace(c, reduction_factor=1.0), "--reduction-factor 1 must be above 1"),
        (
            lambda c: replace(c, run=replace(c.run, evaluator=replace(c.run.evaluator, enabled=False))),
            "evaluator.enabled=false: a sweep judges",
        ),
        (
            lambda c: replace(c, run=replace(c.run, placement=replace(c.run.placement, session="inline"))),
            "placement.session=inline: a sweep's trials run under Ray",
        ),
    ],
)
def test_what_can_not_work_is_refused_at_once(
    change: Callable[[SweepConfig], SweepConfig], message: str
) -> None:
    with pytest.raises(RayDistillError, match=message):
        checked(change(CONFIG))


def test_a_dry_run_lists_the_default_sweeps_trials(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["sweep", str(JOBS / "sweep_dmd2_coco.py"), "--dry-run", f"output_dir={tmp_path}"])
    assert end.value.code == 0
    trials = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trial ")]
    assert len(trials) == 8
    assert trials[0] == "trial 0: {'method.critic_updates_per_generator': 1, 'teacher.guidance_scale': 1.5}"
    assert list(tmp_path.iterdir()) == []


def test_a_tracking_server_that_is_not_there_is_told_of_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([
            "sweep", str(JOBS / "sid_cifar10.py"), "--over", "method.alpha=1,1.2", "--dry-run",
            f"output_dir={tmp_path}", "tracking.uri=http://anna:geheim@127.0.0.1:9",
        ])  # fmt: skip
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "http://***@127.0.0.1:9 does not answer" in line
    assert "tracking.uri" in line
