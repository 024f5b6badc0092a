"""The window of updates: ratio, accumulation, ranks, resume, and stopping before damage."""

import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.checkpoint import Snapshots
from raydistill.config import flatten
from raydistill.errors import CheckpointError, ConfigError, TrainingError
from raydistill.methods.method import PhaseDraws
from raydistill.roles.world import World
from raydistill.runtime.keeper import manifest_of, require_same_settings
from raydistill.runtime.loop import resume
from raydistill.runtime.settings import validate
from raydistill.runtime.trainer import Trainer
from tests.tiny import tiny_config, tiny_trainer

# Adam's step depends on a gradient's sign where the gradient is tiny, hence on the order of a sum; with a large
# epsilon it is continuous, and what is compared is the arithmetic
SMOOTH = {"generator": {"eps": 0.01}, "critic": {"eps": 0.01}}
NOISY = {"time/update_s", "time/data_s", "throughput/images_per_s", "memory/peak_gib"}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    parts = {"generator": trainer.generator.denoiser, "critic": trainer.critic.critic}
    return {
        f"{role}/{name}": t.clone() for role, net in parts.items() for name, t in net.state_dict().items()
    }


def figures(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name not in NOISY}


@settings(max_examples=8, deadline=None)
@given(micro=st.sampled_from([1, 2, 4, 8]), ratio=st.integers(1, 4))
def test_accumulation_never_moves_the_ratio_and_equals_the_big_batch(micro: int, ratio: int) -> None:
    torch.set_num_threads(1)
    runs = []
    for size in (8, micro):
        trainer = tiny_trainer(
            tiny_config(
                method={"critic_updates_per_generator": ratio}, train={"micro_batch_size": size}, **SMOOTH
            )
        )
        for _ in range(2):
            values = trainer.window()
        assert (trainer.generator.optimizer.steps, trainer.critic.optimizer.steps) == (2, 2 * ratio)
        assert (values["generator_updates"], values["critic_updates"]) == (2, 2 * ratio)
        assert values["images"] == 2 * ratio * 8
        runs.append((weights(trainer), values))
    (big, big_values), (small, small_values) = runs
    # the sums run in another order
    assert small_values["loss/dm"] == pytest.approx(big_values["loss/dm"], rel=1e-4)
    for name in (
        "loss/critic_total",
        "grad_norm/dm",
        "grad_norm/gan_generator",
        "sample/absmax",
        "sample/std",
    ):
        assert small_values[name] == pytest.approx(big_values[name], rel=1e-4)
    for name, tensor in big.items():
        assert (small[name] - tensor).abs().max() < 1e-6, name


def test_first_critic_update_of_a_window_sees_the_generators_images_from_before_its_step() -> None:
    trainer = tiny_trainer(tiny_config(method={"critic_updates_per_generator": 1}))
    seen = []
    original = trainer.method.critic_losses

    def spy(critic, x, cond, real, draws):  # type: ignore[no-untyped-def]
        seen.append(x.clone())
        return original(critic, x, cond, real, draws)

    trainer.method.critic_losses = spy  # type: ignore[method-assign]
    untouched = tiny_trainer(tiny_config())
    prompts = next(untouched.batches.prompts("prompt/generator", 0))
    draws = PhaseDraws(untouched.draws, "generator", 0, prompts.positions, torch.device("cpu"))
    expected = untouched.generator.sample(
        untouched.method, prompts.cond, untouched.pipeline.latent_shape, None, draws, grad=False
    )
    trainer.window()
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=0)


def test_only_the_critic_updates_that_make_samples_read_prompts() -> None:
    trainer = tiny_trainer(tiny_config(method={"critic_updates_per_generator": 3}))
    source = trainer.batches.readers["prompt/critic"]
    asked = []
    original = source.batch
    source.batch = lambda number: (asked.append(number), original(number))[1]  # type: ignore[method-assign, func-returns-value]
    trainer.window()
    trainer.window()
    assert asked == [0, 1, 2, 3]


def test_generator_phase_leaves_no_gradient_on_critic_or_teacher() -> None:
    trainer = tiny_trainer(tiny_config())
    trainer.generator_update(0, gan_stage=True)
    assert all(p.grad is None for p in trainer.critic.critic.parameters())
    assert all(p.requires_grad for p in trainer.critic.critic.parameters())
    assert all(p.grad is None for p in trainer.pipeline.denoiser.parameters())


def test_gan_features_of_the_teacher_train_the_head_and_reach_the_generator() -> None:
    trainer = tiny_trainer(tiny_config(method={"gan_features": "teacher"}))
    assert trainer.method.needs.teacher == "vjp"
    teacher = {n: t.clone() for n, t in trainer.pipeline.denoiser.state_dict().items()}
    head = {n: t.clone() for n, t in trainer.critic.critic.head.state_dict().items()}  # type: ignore[union-attr]
    values = trainer.window()
    assert values["grad_norm/gan_generator"] > 0
    assert any(not torch.equal(t, head[n]) for n, t in trainer.critic.critic.head.state_dict().items())  # type: ignore[union-attr]
    assert all(torch.equal(t, teacher[n]) for n, t in trainer.pipeline.denoiser.state_dict().items())


def test_ema_moves_once_for_each_generator_update() -> None:
    trainer = tiny_trainer(tiny_config(method={"critic_updates_per_generator": 3}))
    calls = []
    update = trainer.generator.ema.update  # type: ignore[union-attr]
    trainer.generator.ema.update = lambda images: (calls.append(images), update(images))  # type: ignore[union-attr, method-assign, func-returns-value]
    trainer.window()
    assert calls == [8]


def test_four_step_rollout_runs_and_needs_no_real_data_without_a_gan() -> None:
    method = {
        "timesteps": (999.0, 749.0, 499.0, 249.0),
        "gan_weight_generator": 0.0,
        "gan_weight_critic": 0.0,
    }
    trainer = tiny_trainer(tiny_config(method=method))
    assert "real" not in trainer.batches.readers
    values = [trainer.window() for _ in range(3)]
    assert all(v["loss/dm"] > 0 for v in values)


def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = tiny_config()
    whole = tiny_trainer(config)
    expected = [figures(whole.window()) for _ in range(4)]

    class Named:
        run_id = "run"
        world = World()

    first = tiny_trainer(config)
    for _ in range(2):
        first.window()
    snapshots = Snapshots(str(tmp_path), keep=1)
    for role, owner in (("generator", first.generator), ("critic", first.critic)):
        snapshots.write_part(2, role, *owner.save())
    snapshots.commit(2, manifest_of(first, Named()))  # type: ignore[arg-type]
    second = tiny_trainer(config)
    resume(second, snapshots)
    assert [figures(second.window()) for _ in range(2)] == expected[2:]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(second)[name]), name
    for name, tensor in whole.generator.ema.weights().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, second.generator.ema.weights()[name])  # type: ignore[union-attr]

    with pytest.raises(ConfigError, match=r"generator.lr: 0.001 then, 0.002 now"):
        resume(tiny_trainer(tiny_config(generator={"lr": 2e-3})), snapshots)
    resume(tiny_trainer(tiny_config(train={"generator_updates": 9})), snapshots)
    other = tiny_trainer(config)
    other.pipeline.fingerprint = "another"
    with pytest.raises(CheckpointError, match="another teacher"):
        resume(other, snapshots)
    other = tiny_trainer(config)
    other.batches.fingerprint = "another"
    with pytest.raises(CheckpointError, match=r"other shards than data\.shards"):
        resume(other, snapshots)


def test_a_linear_rate_ends_with_the_run_so_its_length_cannot_change_on_the_way() -> None:
    config = tiny_config(generator={"lr_schedule": "linear"})
    longer = replace(config, train=replace(config.train, generator_updates=9))
    require_same_settings(config, 2, {"settings": flatten(config)})
    with pytest.raises(ConfigError, match=r"train\.generator_updates: 4 then, 9 now"):
        require_same_settings(longer, 2, {"settings": flatten(config)})


def test_non_finite_loss_stops_before_the_weights_move_and_names_the_term() -> None:
    trainer = tiny_trainer(tiny_config())
    trainer.window()
    before = weights(trainer)
    real = trainer.teacher.answer
    trainer.teacher.answer = lambda query: real(query) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"generator step 1 .*non-finite .*loss/dm=nan"):
        trainer.window()
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]), name


def _rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    config = tiny_config(train={"micro_batch_size": 4}, **SMOOTH)
    assert World(rank, 2).range(10 + rank) == (11, 10)
    trainer = tiny_trainer(config, World(rank, 2))
    values = [trainer.window() for _ in range(3)]
    torch.save({"weights": weights(trainer), "values": [figures(v) for v in values]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_draw_the_same_noise_and_learn_the_same_as_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    # one rank that accumulates the same two halves differs from two ranks by the order of one addition
    alone = tiny_trainer(tiny_config(train={"micro_batch_size": 4}, **SMOOTH))
    expected = [figures(alone.window()) for _ in range(3)]
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in saved[0]["weights"].items():
        assert torch.equal(tensor, saved[1]["weights"][name]), name
        assert (tensor - weights(alone)[name]).abs().max() < 1e-6, name
    for one, both in zip(expected, saved[0]["values"], strict=True):
        assert both["loss/dm"] == pytest.approx(one["loss/dm"], rel=1e-4)
        for name in (
            "loss/dsm",
            "grad_norm/dm",
            "grad_norm/gan_generator",
            "grad_norm/critic",
            "sample/absmax",
        ):
            assert both[name] == pytest.approx(one[name], rel=1e-4)


def test_batch_that_does_not_divide_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"train.batch_size=8 is not divisible .*train.micro_batch_size=3 = 3"
    ):
        validate(tiny_config(train={"micro_batch_size": 3}))


@pytest.mark.parametrize("r", [1, 2])
def test_rollout_from_real_data_runs_at_any_ratio_on_the_real_samples_own_captions(r: int) -> None:
    method = {"timesteps": (999.0, 499.0), "rollout": "real_data", "critic_updates_per_generator": r}
    trainer = tiny_trainer(tiny_config(method=method))
    seen = []
    original = trainer.generator.sample

    def spy(method, cond, shape, real, draws, grad):  # type: ignore[no-untyped-def]
        seen.append((cond.tensors["text"], real.cond.tensors["text"]))
        return original(method, cond, shape, real, draws, grad)

    trainer.generator.sample = spy  # type: ignore[method-assign]
    assert trainer.window()["loss/dm"] > 0
    assert len(seen) == r  # one for the generator, the rest for critic updates 2..R
    assert all(torch.equal(used, its_own) for used, its_own in seen)


def test_stage_two_begins_on_time_with_its_own_rate_and_only_then_are_real_samples_read() -> None:
    trainer = tiny_trainer(
        tiny_config(
            method={"gan_start_update": 2},
            generator={"lr_gan_stage": 5e-4, "warmup_steps": 0},
            critic={"warmup_steps": 4, "lr_schedule": "linear"},
        )
    )
    asked = []
    source = trainer.batches.readers["real"]
    original = source.batch
    source.batch = lambda number: (asked.append(number), original(number))[1]  # type: ignore[method-assign, func-returns-value]
    values = [trainer.window() for _ in range(3)]
    assert ["loss/gan_generator" in v and "loss/gan_critic" in v for v in values] == [False, False, True]
    assert asked == [4, 5]
    assert [v["lr/generator"] for v in values] == [1e-3, 1e-3, 5e-4]
    # the last of each window's two critic steps: warmed up over 4, decaying over 4 windows' 8
    expected = [1e-3 * min(1, (step + 1) / 4) * (1 - step / 8) for step in (1, 3, 5)]
    assert [v["lr/critic"] for v in values] == pytest.approx(expected)


def test_gradients_beyond_clip_norm_are_scaled_down_and_counted() -> None:
    trainer = tiny_trainer(tiny_config(generator={"clip_norm": 1e-6}))
    values = [trainer.window() for _ in range(2)]
    assert [v["clipped_steps/generator"] for v in values] == [1, 2]
    assert values[-1]["clipped_steps/critic"] == 0
    assert values[-1]["grad_norm/generator"] > 1e-6  # as it was before


def test_an_update_reads_the_device_once_for_each_optimiser_step(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tiny_config(method={"critic_updates_per_generator": 3}))
    trainer.window()
    read = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, name=name):  # type: ignore[no-untyped-def]
            if self.requires_grad or self.numel() > 1 or self.is_floating_point():
                read.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    trainer.window()
    assert read.count("tolist") == 4
    assert [name for name in read if name != "tolist"] == []


def test_compiled_networks_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    plain = figures(tiny_trainer(tiny_config()).window())
    compiled = []
    original = torch.nn.Module.compile

    def without_code_generation(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        compiled.append(self)
        return original(self, *args, **kwargs, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", without_code_generation)
    values = figures(tiny_trainer(tiny_config(train={"compile": True})).window())
    assert len(compiled) == 3
    assert values == pytest.approx(plain, rel=1e-4)


def test_activation_checkpointing_changes_no_gradient() -> None:
    torch.set_num_threads(1)
    values, passes = [], []
    for on in (False, True):
        trainer = tiny_trainer(tiny_config(train={"activation_checkpointing": on}))
        entered: list[int] = []
        block = trainer.generator.denoiser.unet.down_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda module, inputs, entered=entered: entered.append(1))
        values.append(figures(trainer.window()))
        passes.append(len(entered))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert passes[1] == passes[0] + 1  # the generator's one backward pass computed it again


def test_bf16_arithmetic_stays_near_fp32() -> None:
    plain = figures(tiny_trainer(tiny_config()).window())
    half = figures(tiny_trainer(tiny_config(train={"dtype": "bf16"})).window())
    assert half["loss/dm"] == pytest.approx(plain["loss/dm"], rel=0.05)
    assert half["loss/dm"] != plain["loss/dm"]
