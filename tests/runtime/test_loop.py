"""The window of updates: ratio, accumulation, ranks, resume, and stopping before damage."""

import multiprocessing
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.checkpoint import Snapshots
from raydistill.config import flatten
from raydistill.errors import CheckpointError, ConfigError, TrainingError
from raydistill.methods.method import PhaseDraws
from raydistill.methods.moment_matching import MomentMatchingConfig
from raydistill.methods.sid import SiDConfig
from raydistill.roles.world import World
from raydistill.runtime.keeper import manifest_of, require_same_settings
from raydistill.runtime.loop import resume
from raydistill.runtime.settings import RunConfig, validate
from raydistill.runtime.trainer import Trainer
from raydistill.tracking.names import check_metric_names
from tests.tiny import DIGITS, tiny_config, tiny_trainer

# Adam's step depends on a gradient's sign where the gradient is tiny, hence on the order of a sum; with a large
# epsilon it is continuous, and what is compared is the arithmetic
SMOOTH = {"generator": {"eps": 0.01}, "critic": {"eps": 0.01}}
CRITIC_FIRST: dict[str, dict[str, Any]] = {
    "sid": {"method": SiDConfig(generator_loss_scale=1.0, critic_updates_per_generator=2)},
    "lsg": {
        "method": SiDConfig(
            alpha=1.0,
            generator_loss_scale=1.0,
            guidance_scale_critic_training=2.0,
            guidance_scale_critic=2.0,
        )
    },
    "sid_edm": {"method": SiDConfig(generator_loss_scale=1.0), "teacher": DIGITS},
    "moment_matching": {"method": MomentMatchingConfig(num_steps=4, critic_updates_per_generator=2)},
    "moment_matching_edm": {"method": MomentMatchingConfig(num_steps=4), "teacher": DIGITS},
    "instant": {
        "method": MomentMatchingConfig(num_steps=4, variant="instant"),
        "teacher": {"guidance_scale": 1.0},
    },
}
SIDA = SiDConfig(
    alpha=1.0,
    generator_loss_scale=1.0,
    gan_weight_critic=1.0,
    gan_weight_generator=0.01,
    generator_rest_updates=3,
    gan_start_update=3,
)
# not among those above: its cross-entropy couples a micro-batch's samples
RESUMED: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "sid": CRITIC_FIRST["sid"],
    "sida": {"method": SIDA, "teacher": DIGITS},
    "moment_matching": CRITIC_FIRST["moment_matching"],
    "instant": CRITIC_FIRST["instant"],
}
NOISY = {"time/train_s", "time/update_s", "time/data_s", "throughput/images_per_s", "memory/peak_gib"}


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


@pytest.mark.parametrize("sections", CRITIC_FIRST.values(), ids=CRITIC_FIRST)
def test_accumulation_equals_the_big_batch_where_the_critic_learns_first(sections: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    runs = []
    for size in (8, 2):
        trainer = tiny_trainer(tiny_config(train={"micro_batch_size": size}, **sections, **SMOOTH))
        for _ in range(2):
            values = trainer.window()
        r = trainer.method.critic_updates_per_generator
        assert (trainer.generator.optimizer.steps, trainer.critic.optimizer.steps) == (2, 2 * r)
        assert values["images"] == 2 * (r + 1) * 8
        runs.append((weights(trainer), figures(values)))
    (big, big_values), (small, small_values) = runs
    for name, value in big_values.items():
        assert small_values[name] == pytest.approx(value, rel=1e-3), name
    start = weights(tiny_trainer(tiny_config(**sections)))
    for name, tensor in big.items():
        assert (small[name] - tensor).abs().max() < 1e-6, name
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in big.items()) > 1e-5


def test_generator_that_rests_stands_still_while_the_critic_learns_and_begins_to_warm_up_after_it() -> None:
    sections = {"teacher": DIGITS, "generator": {"ema_ramp": 0.05, "warmup_steps": 4}}
    trainer = tiny_trainer(tiny_config(method=SIDA, train={"generator_updates": 6}, **sections))
    assert trainer.generator.ema is not None
    average = {name: tensor.clone() for name, tensor in trainer.generator.ema.weights().items()}
    previous = weights(trainer)
    for update in range(5):
        values = trainer.window()
        check_metric_names(values)
        now = weights(trainer)
        moved = {
            name.split("/")[0] for name, tensor in now.items() if not torch.equal(tensor, previous[name])
        }
        assert moved == ({"critic"} if update < 3 else {"generator", "critic"})
        assert ("loss/gan_generator" in values) == (update >= 3)
        assert "loss/gan_critic" in values
        assert values["loss/sid"] != 0  # the loss is told of, though nothing learns from it
        assert (values["generator_updates"], values["critic_updates"]) == (update + 1, update + 1)
        assert trainer.generator.optimizer.steps == max(0, update - 2)
        assert all(p.grad is None for p in trainer.generator.denoiser.parameters())
        if update < 3:
            assert "lr/generator" not in values
            assert trainer.generator.ema.images_seen == 0
            for name, tensor in trainer.generator.ema.weights().items():
                assert torch.equal(tensor, average[name])
        else:
            assert values["lr/generator"] == pytest.approx(1e-3 * (update - 2) / 4)
        previous = now
    assert trainer.generator.ema.images_seen == 16


def test_first_critic_update_of_a_window_sees_the_generators_images_from_before_its_step() -> None:
    trainer = tiny_trainer(tiny_config(method={"critic_updates_per_generator": 1}))
    seen = []
    original = trainer.method.critic_losses

    def spy(critic, x, cond, real, draws, answers):  # type: ignore[no-untyped-def]
        seen.append(x.clone())
        return original(critic, x, cond, real, draws, answers)

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


@pytest.mark.parametrize(
    "sections", [{}, {"method": SiDConfig(critic_updates_per_generator=2)}], ids=["dmd2", "sid"]
)
def test_critic_phase_leaves_no_gradient_on_generator_or_teacher(sections: dict[str, Any]) -> None:
    trainer = tiny_trainer(tiny_config(**sections))
    trainer.generator_update(0, gan_stage=trainer.gan_stage(0))
    trainer._critic_updates(0, gan_stage=trainer.gan_stage(0))
    assert all(p.grad is None for p in trainer.generator.denoiser.parameters())
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


class Named:
    run_id = "run"
    world = World()


def stopped_at(step: int, config: RunConfig, folder: Path) -> Snapshots:
    """The snapshots of a run that ended early."""
    trainer = tiny_trainer(config)
    for _ in range(step):
        trainer.window()
    snapshots = Snapshots(str(folder), keep=1)
    save(trainer, step, snapshots)
    return snapshots


@pytest.mark.parametrize("sections", RESUMED.values(), ids=RESUMED)
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    # a ramp that still bounds the half-life after the resume
    config = tiny_config(**sections, generator={"ema_ramp": 1.0})
    whole = tiny_trainer(config)
    expected = [figures(whole.window()) for _ in range(4)]
    assert whole.generator.ema is not None
    second = tiny_trainer(config)
    resume(second, stopped_at(2, config, tmp_path))
    assert second.generator.ema is not None
    assert [figures(second.window()) for _ in range(2)] == expected[2:]
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(second)[name]), name
    assert second.generator.ema.images_seen == whole.generator.ema.images_seen > 0
    for name, tensor in whole.generator.ema.weights().items():
        assert torch.equal(tensor, second.generator.ema.weights()[name])


def test_an_average_with_a_ramp_follows_a_young_run_and_is_bounded_by_the_half_life() -> None:
    trainer = tiny_trainer(tiny_config(generator={"ema_ramp": 1.0}))
    assert trainer.generator.ema is not None
    expected = None
    # images so far are 0, 8, 16 and 24, the half-life at most 20
    for halflife in (0, 8, 16, 20):
        trainer.window()
        now = trainer.generator.denoiser.state_dict()
        if expected is None:
            expected = now
        decay = 0.5 ** (8 / halflife) if halflife else 0.0
        expected = {name: decay * tensor + (1 - decay) * now[name] for name, tensor in expected.items()}
        for name, tensor in trainer.generator.ema.weights().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


def test_snapshot_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    config = tiny_config()
    snapshots = stopped_at(2, config, tmp_path)
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
    assert World(rank, 2).range(10 + rank) == (11, 10)
    trainer = tiny_trainer(HALVES, World(rank, 2))
    values = [trainer.window() for _ in range(3)]
    torch.save({"weights": weights(trainer), "values": [figures(v) for v in values]}, f"{folder}/{rank}.pt")
    resumed = tiny_trainer(HALVES, World(rank, 2))
    snapshots = Snapshots(f"{folder}/snapshots", keep=9)
    resume(resumed, snapshots)
    values = [resumed.window() for _ in range(2)]
    torch.save([figures(v) for v in values], f"{folder}/resumed_{rank}.pt")
    if rank == 0:
        save(resumed, 4, snapshots)
    dist.destroy_process_group()


def save(trainer: Trainer, step: int, snapshots: Snapshots) -> None:
    for role, owner in trainer.parts.items():
        snapshots.write_part(step, role, *owner.save())
    snapshots.commit(step, manifest_of(trainer, Named()))  # type: ignore[arg-type]


HALVES = tiny_config(train={"micro_batch_size": 4, "generator_updates": 6}, **SMOOTH)
LIKE_ONE_RANKS = (
    "loss/dm", "loss/dsm", "grad_norm/dm", "grad_norm/gan_generator", "grad_norm/critic", "sample/absmax",
)  # fmt: skip


def test_two_ranks_learn_the_same_as_one_and_each_goes_on_from_the_others_snapshot(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    snapshots = Snapshots(str(tmp_path / "snapshots"), keep=9)
    first = tiny_trainer(HALVES)
    for _ in range(2):
        first.window()
    save(first, 2, snapshots)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    # one rank that accumulates the same two halves differs from two ranks by the order of one addition
    alone = tiny_trainer(HALVES)
    expected = [figures(alone.window()) for _ in range(3)]
    after_three = weights(alone)
    expected += [figures(alone.window()) for _ in range(3)]
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in saved[0]["weights"].items():
        assert torch.equal(tensor, saved[1]["weights"][name]), name
        assert (tensor - after_three[name]).abs().max() < 1e-6, name
    last = tiny_trainer(HALVES)
    resume(last, snapshots)
    assert last.progress.generator_updates == 4
    on_two = torch.load(tmp_path / "resumed_0.pt", weights_only=True)
    moved = [
        *on_two,
        *(figures(last.window()) for _ in range(2)),
    ]  # updates 3 and 4 on two ranks, 5 and 6 on one
    for name, tensor in weights(last).items():
        assert (tensor - weights(alone)[name]).abs().max() < 1e-6, name
    pairs = [*zip(expected[:3], saved[0]["values"], strict=True), *zip(expected[2:], moved, strict=True)]
    for one, both in pairs:
        for name in LIKE_ONE_RANKS:
            assert both[name] == pytest.approx(one[name], rel=1e-4), name


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


@pytest.mark.parametrize("variant", ["alternating", "instant"])
def test_moment_matchings_updates_each_have_a_real_batch_of_their_own(
    variant: Literal["alternating", "instant"],
) -> None:
    r = 1 if variant == "instant" else 2
    method = MomentMatchingConfig(num_steps=4, variant=variant, critic_updates_per_generator=r)
    trainer = tiny_trainer(tiny_config(method=method, teacher={"guidance_scale": 1.0}))
    asked = []
    source = trainer.batches.readers["real"]
    original = source.batch
    source.batch = lambda number: (asked.append(number), original(number))[1]  # type: ignore[method-assign, func-returns-value]
    for _ in range(2):
        trainer.window()
    # the same one for both would bias the instant variant's gradient, and the paper's algorithms have two
    assert asked == list(range(2 * (r + 1)))


def test_gradients_beyond_clip_norm_are_scaled_down_and_counted() -> None:
    trainer = tiny_trainer(tiny_config(generator={"clip_norm": 1e-6}))
    values = [trainer.window() for _ in range(2)]
    assert [v["clipped_steps/generator"] for v in values] == [1, 2]
    assert values[-1]["clipped_steps/critic"] == 0
    assert values[-1]["grad_norm/generator"] > 1e-6  # as it was before


def test_without_a_clip_norm_no_gradient_is_scaled() -> None:
    torch.set_num_threads(1)
    runs = []
    for clip_norm in (None, 1e9):
        trainer = tiny_trainer(
            tiny_config(generator={"clip_norm": clip_norm}, critic={"clip_norm": clip_norm})
        )
        values = [figures(trainer.window()) for _ in range(2)]
        runs.append((values, weights(trainer)))
    (never, ours), (far, theirs) = runs
    assert never == far
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [v["clipped_steps/generator"] + v["clipped_steps/critic"] for v in never] == [0, 0]


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
