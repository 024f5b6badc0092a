"""Measured phases add up to the window, and their file is taken only for what it was measured with."""

import json
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raydistill.errors import ConfigError
from raydistill.models.diffusers_hub import random_pixel_pipeline
from raydistill.runtime.plan import Plan, plan_for
from raydistill.runtime.role_times import entry, read, scaled, timed_phases, window_phases
from raydistill.runtime.settings import RunConfig
from raydistill.runtime.simulate import RoleSeconds
from tests.tiny import tiny_config, tiny_trainer

SECONDS = RoleSeconds(0.2, 0.1, 0.1, 0.3, 0.4, generator_step=0.05, critic_step=0.02)


def planned(config: RunConfig) -> Plan:
    _, meta, shapes = random_pixel_pipeline(8, (8, 16), 1)
    return plan_for(config, meta, shapes)


def written(path: Path, config: RunConfig, plan: Plan, *batches: int) -> Path:
    results = [
        {"size": f"tiny{batch}", "batch_size": batch, "device": "cpu"} | entry(SECONDS, config, plan)
        for batch in batches
    ]
    path.write_text(json.dumps({"results": results}))
    return path


CASES: dict[str, dict[str, Any]] = {
    "GAN on the critic": {},
    "no GAN": {"method": {"gan_weight_generator": 0.0, "gan_weight_critic": 0.0}},
    "GAN on the teacher": {"method": {"gan_features": "teacher"}},
    "accumulation": {"train": {"micro_batch_size": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_each_phase_gets_its_own_time_and_together_they_are_the_window(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """A clock that only the networks move: by the samples of each forward pass."""
    config = tiny_config(**CASES[case])
    trainer = tiny_trainer(config)
    clock = 0.0

    def weigh(network: Any, seconds: float) -> None:
        def passed(module: Any, inputs: Any, output: Any) -> None:
            nonlocal clock
            clock += seconds * len(output)

        network.unet.conv_in.register_forward_hook(passed)

    weigh(trainer.generator.denoiser, 1.0)
    weigh(trainer.critic.critic.denoiser, 100.0)
    weigh(trainer.pipeline.denoiser, 10_000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    with timed_phases(trainer) as phases:
        found = window_phases(trainer, phases)
    size, r = config.train.batch_size, config.method.critic_updates_per_generator
    gan = config.method.gan_weight_generator > 0
    on_critic = gan and config.method.gan_features == "critic"
    assert found.sample == size
    assert found.critic_answer == (2 if on_critic else 1) * 100 * size
    # with a GAN the critic's features of fake and real samples
    assert found.critic_update == (3 if on_critic else 1) * 100 * size
    # guided: two halves; the teacher's features once for the generator and of both batches for each critic update
    features = 1 + 2 * r if gan and not on_critic else 0
    assert found.teacher_answer == (2 + features) * 10_000 * size
    assert found.generator_update == found.generator_step == found.critic_step == 0
    assert found.window(r) == clock
    assert "sample" not in vars(trainer.generator)
    assert "generator_update" not in vars(trainer)


def test_phases_of_a_real_clock_add_up_to_the_window() -> None:
    trainer = tiny_trainer(tiny_config())
    trainer.window()
    with timed_phases(trainer) as phases:
        started = time.perf_counter()
        found = window_phases(trainer, phases)
        took = time.perf_counter() - started
    assert found.window(2) == pytest.approx(took, rel=0.02)
    # in DMD2 the critic asks the teacher nothing
    asked = [field.name for field in fields(RoleSeconds) if field.name != "teacher_for_critic"]
    assert all(getattr(found, name) > 0 for name in asked)
    assert found.generator_step < found.generator_update
    assert found.critic_step < found.critic_update


def test_role_times_of_this_run_are_taken_and_the_nearest_batch_is_scaled(tmp_path: Path) -> None:
    config = tiny_config()
    plan = planned(config)
    path = written(tmp_path / "step.json", config, plan, 8, 2)
    same = read(path, config, plan, "dmd2")
    assert same.seconds == SECONDS
    assert same.source == "measured at batch 8 on cpu (step.json, tiny8)"
    large = read(path, replace(config, train=replace(config.train, batch_size=32)), plan, "dmd2")
    assert large.seconds == scaled(SECONDS, 4)
    assert large.seconds.generator_update == pytest.approx(4 * 0.15 + 0.05)
    assert large.seconds.critic_update == pytest.approx(4 * 0.28 + 0.02)
    assert large.seconds.teacher_answer == pytest.approx(1.6)
    assert large.seconds.critic_step == 0.02
    assert "taken 4 times for batch 32" in large.source
    # R is no part of a phase
    other = tiny_config(method={"critic_updates_per_generator": 7})
    assert read(path, other, planned(other), "dmd2").seconds == SECONDS


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"teacher": {"guidance_scale": 1.0}}, r"teacher\.guidance_scale was other than 1, the job's is 1"),
        ({"method": {"gan_weight_generator": 0.0, "gan_weight_critic": 0.0}},
         r"the method's critic_answer in passes was 1\.\d+, the job's is 1\.0"),
        ({"method": {"timesteps": (999.0, 499.0)}}, r"the method's rollout in passes was 0\.0, the job's is 0\.5"),
        ({"train": {"dtype": "bf16"}}, r"train\.dtype was fp32, the job's is bf16"),
        ({"train": {"activation_checkpointing": True}}, r"train\.activation_checkpointing was False"),
    ],
)  # fmt: skip
def test_role_times_of_other_settings_are_refused_by_their_names(
    tmp_path: Path, sections: dict[str, Any], named: str
) -> None:
    measured = tiny_config()
    path = written(tmp_path / "step.json", measured, planned(measured), 8)
    config = tiny_config(**sections)
    with pytest.raises(ConfigError, match=named) as refused:
        read(path, config, planned(config), "jobs/dmd2_coco.py")
    assert "python jobs/bench_step.py --job jobs/dmd2_coco.py --out" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_role_times_of_another_network_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    path = written(tmp_path / "step.json", config, planned(config), 8)
    _, meta, shapes = random_pixel_pipeline(8, (8, 32), 1)
    with pytest.raises(ConfigError, match=r"GFLOP of a sample's forward pass was .*, the job's is"):
        read(path, config, plan_for(config, meta, shapes), "dmd2")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "can't be read"),
        ("{", "is no file of role times"),
        ("[]", "is no file of role times"),
        ('{"results": [{"size": "scenes", "batch_size": 64}]}', "an older bench_step wrote it"),
    ],
)
def test_a_file_that_holds_no_role_times_says_how_to_write_one(
    tmp_path: Path, text: str | None, named: str
) -> None:
    path = tmp_path / "step.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=named) as refused:
        read(path, tiny_config(), planned(tiny_config()), "dmd2")
    assert f"python jobs/bench_step.py --job dmd2 --out {path}" in str(refused.value)


@pytest.mark.parametrize(("phase", "value"), [("sample", -1.0), ("sample", None), ("sample", "fast")])
def test_role_times_that_are_no_seconds_are_refused(tmp_path: Path, phase: str, value: Any) -> None:
    config = tiny_config()
    path = written(tmp_path / "step.json", config, planned(config), 8)
    data = json.loads(path.read_text())
    data["results"][0]["role_seconds"][phase] = value
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="is no file of role times"):
        read(path, config, planned(config), "dmd2")


def test_hooks_are_gone_and_the_numbers_are_the_same_after_a_measured_window() -> None:
    plain, measured = (tiny_trainer(tiny_config()) for _ in range(2))
    with timed_phases(measured) as phases:
        window_phases(measured, phases)
    plain.window()
    values = [
        {k: v for k, v in trainer.window().items() if not k.startswith(("time/", "throughput/", "memory/"))}
        for trainer in (plain, measured)
    ]
    assert {k: v for k, v in values[0].items() if k != "train_s"} == values[1]
    weights = [torch.cat([p.flatten() for p in t.generator.denoiser.parameters()]) for t in (plain, measured)]
    assert torch.equal(*weights)
