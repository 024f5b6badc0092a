"""The regression warm-up of a one-step generator that starts below the teacher's last timestep."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from raydistill.diffusion.random import Draws
from raydistill.diffusion.samplers import ddim, trailing_times
from raydistill.errors import ConfigError
from raydistill.methods.dmd2 import DMD2, DMD2Config
from raydistill.methods.method import PhaseDraws, Query
from raydistill.models.denoiser import denoise_guided
from raydistill.runtime import wire
from tests.tiny import DIGITS, tiny_config, tiny_trainer

WARM_UP: dict[str, Any] = {
    "timesteps": (399.0,), "regression_updates": 2, "regression_teacher_steps": 3, "gan_start_update": 2,
    "critic_updates_per_generator": 1,
}  # fmt: skip


def test_it_regresses_onto_the_teachers_guided_samples_from_the_generators_own_noise() -> None:
    config = tiny_config(method=WARM_UP)
    trainer = tiny_trainer(config)
    cond = next(trainer.batches.prompts("prompt/generator", 0)).cond
    draws = PhaseDraws(Draws(config.seed), "generator", 0, range(8), "cpu")
    shape = trainer.pipeline.latent_shape
    noise, t = trainer.method.generator_input(trainer.generator.denoiser, cond, shape, None, draws)
    assert t.tolist() == [399.0] * 8
    x = torch.randn(8, *shape, requires_grad=True)
    queries = trainer.method.queries(x, cond, None, draws)
    assert set(queries) == {"sample"}
    answer = trainer.teacher.submit(queries["sample"]).answer()

    null, teacher = trainer.pipeline.null_cond(8), trainer.pipeline.denoiser
    with torch.no_grad():
        expected = ddim(
            lambda x_t, t: denoise_guided(teacher, x_t, t, cond, null, 2.0),
            teacher.schedule,
            [*trailing_times(3), teacher.schedule.t_clean],
            noise,
        )
    assert torch.equal(answer, expected)
    losses = trainer.method.generator_losses(x, queries, {"sample": answer})
    (gradient,) = torch.autograd.grad(losses.total(), x)
    torch.testing.assert_close(gradient, 2 * (x - expected).detach() / x.numel())


def test_it_ends_after_its_updates_and_the_gan_begins_then() -> None:
    trainer = tiny_trainer(tiny_config(method=WARM_UP, train={"generator_updates": 3}))
    figures = [trainer.window() for _ in range(3)]
    for values in figures[:2]:
        assert "loss/regression" in values
        assert "loss/dm" not in values
        assert "loss/gan_critic" not in values
        assert values["loss/dsm"] > 0  # the critic learns all the while
    assert "loss/dm" in figures[2]
    assert "loss/gan_generator" in figures[2]
    assert "loss/regression" not in figures[2]


def test_a_sample_query_keeps_its_steps_on_the_wire() -> None:
    trainer = tiny_trainer(tiny_config(method=WARM_UP))
    cond = next(trainer.batches.prompts("prompt/generator", 0)).cond
    query = Query(
        network="teacher", want="sample", x_t=torch.randn(8, 3, 8, 8), t=torch.full((8,), 999.0), cond=cond,
        guidance_scale=2.0, steps=3,
    )  # fmt: skip
    arrived = wire.unpack_query(wire.pack_query(query, "fp32"), "cpu", differentiable=False)
    scorer = trainer.teacher
    assert torch.equal(scorer.submit(arrived).answer(), scorer.submit(query).answer())
    fewer = scorer.submit(replace(query, steps=2)).answer()
    assert not torch.equal(fewer, scorer.submit(query).answer())


def test_what_it_can_not_do_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"method\.regression_updates=5 is for one step: method\.timesteps=\(999"
    ):
        DMD2Config(timesteps=(999.0, 499.0), regression_updates=5)
    with pytest.raises(ConfigError, match=r"method\.regression_teacher_steps=0 at least 1"):
        DMD2Config(regression_updates=5, regression_teacher_steps=0)
    edm = tiny_trainer(
        tiny_config(
            teacher=DIGITS,
            method={"timesteps": (80.0,), "gan_weight_generator": 0.0, "gan_weight_critic": 0.0},
        )
    )
    with pytest.raises(ConfigError, match=r"discrete timesteps \(teacher\.path\)"):
        DMD2(DMD2Config(timesteps=(80.0,), regression_updates=5), edm.method.schedule, 1.0)
