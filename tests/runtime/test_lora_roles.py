"""Runs whose roles are adapters in one base: the same numbers wherever the teacher is, resumed, planned, exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raydistill.checkpoint import Snapshots
from raydistill.errors import CheckpointError, ConfigError
from raydistill.methods.moment_matching import MomentMatchingConfig
from raydistill.methods.sid import SiDConfig
from raydistill.models.diffusers_hub import random_pixel_pipeline
from raydistill.models.lora import AdaptedDenoiser
from raydistill.roles.critic import critic_weights
from raydistill.roles.generator import generator_adapter, generator_weights
from raydistill.runtime.build import build_method, build_teacher
from raydistill.runtime.commands import export, export_difference
from raydistill.runtime.keeper import manifest_of
from raydistill.runtime.plan import plan_for
from raydistill.runtime.run import run
from raydistill.runtime.settings import RunConfig, validate
from raydistill.runtime.trainer import Trainer
from tests.runtime.test_run import recipe
from tests.tiny import DIGITS, PlainSession, tiny_config, tiny_pipeline, tiny_trainer

LORA: dict[str, Any] = {
    "generator": {"lora_rank": 4, "lora_targets": "all", "lora_alpha": 8.0, "eps": 1e-2},
    "critic": {"lora_rank": 2, "eps": 1e-2},
}
METHODS: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "dmd2, GAN on the teacher": {"method": {"gan_features": "teacher"}},
    "sid": {"method": SiDConfig(generator_loss_scale=1.0), "teacher": DIGITS},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    parts = {"generator": trainer.generator.denoiser, "critic": trainer.critic.critic}
    return {
        f"{role}/{name}": t.clone() for role, net in parts.items() for name, t in net.state_dict().items()
    }


def base_of(trainer: Trainer) -> dict[str, Tensor]:
    """The shared network without its adapters, by their plain names."""
    state = trainer.pipeline.denoiser.state_dict()
    return {name.replace(".base_layer.", "."): t.clone() for name, t in state.items() if ".lora_" not in name}


@pytest.mark.parametrize("sections", METHODS.values(), ids=METHODS)
def test_teacher_elsewhere_recomputed_activations_and_small_micro_batches_change_nothing(
    sections: dict[str, Any],
) -> None:
    def after(train: dict[str, Any], *, elsewhere: bool = False) -> dict[str, Tensor]:
        config = tiny_config(**sections, **LORA, train=train)
        scorer = None
        if elsewhere:
            trainer = tiny_trainer(tiny_config(**sections))
            scorer = build_teacher(config, trainer.pipeline, torch.device("cpu"))
        trainer = tiny_trainer(config, scorer=scorer)
        for _ in range(2):
            trainer.window()
        return weights(trainer)

    together = after({})
    recomputed, pooled = after({"activation_checkpointing": True}), after({}, elsewhere=True)
    for name, tensor in together.items():
        assert torch.equal(recomputed[name], tensor), name
        assert torch.equal(pooled[name], tensor), name
    for name, tensor in after({"micro_batch_size": 2}).items():
        assert (together[name] - tensor).abs().max() < 1e-6, name


def test_roles_move_only_in_their_own_updates_and_the_base_never() -> None:
    trainer = tiny_trainer(tiny_config(**LORA))
    plain = tiny_pipeline().denoiser.state_dict()
    states = [weights(trainer)]
    trainer.generator_update(0, gan_stage=True)
    states.append(weights(trainer))
    trainer._critic_updates(0, gan_stage=True)
    states.append(weights(trainer))
    for before, after, moving in ((states[0], states[1], "generator"), (states[1], states[2], "critic")):
        moved = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {moving}
    heads = [name for name in states[0] if "/head." in name]
    assert heads
    assert any(not torch.equal(states[0][name], states[2][name]) for name in heads)
    found = base_of(trainer)
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(found[name], tensor), name
    assert all(p.grad is None for p in trainer.pipeline.denoiser.parameters())
    assert set(trainer.generator.ema.weights()) == set(trainer.generator.denoiser.state_dict())  # type: ignore[union-attr]


@pytest.mark.parametrize("adapted", ["generator", "critic"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_role_may_be_an_adapter_and_the_other_a_whole_network_that_begins_as_the_teacher(
    adapted: str, dtype: str
) -> None:
    config = tiny_config(**{adapted: LORA[adapted]}, teacher={"dtype": dtype}, train={"dtype": dtype})
    trainer = tiny_trainer(config)
    networks = {"generator": trainer.generator.denoiser, "critic": trainer.critic.critic.denoiser}
    whole = networks.pop("critic" if adapted == "generator" else "generator")
    assert isinstance(networks[adapted], AdaptedDenoiser)
    for name, tensor in tiny_pipeline().denoiser.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor)  # not rounded where the base is in bf16
    before = weights(trainer)
    values = trainer.window()
    assert values["loss/generator_total"] > 0
    assert {name.split("/")[0] for name, t in weights(trainer).items() if not torch.equal(t, before[name])} == {
        "generator", "critic",
    }  # fmt: skip


def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit_from_adapters_alone(tmp_path: Path) -> None:
    config = tiny_config(**LORA)
    snapshots = Snapshots(str(tmp_path), keep=1)
    trainer = tiny_trainer(config)
    for _ in range(2):
        trainer.window()
    session: Any = PlainSession()
    session.run_id = "none"
    for role, owner in trainer.parts.items():
        snapshots.write_part(2, role, *owner.save())
    snapshots.commit(2, manifest_of(trainer, session))
    snapshot = snapshots.latest()
    assert snapshot is not None
    adapter = sum(p.numel() for p in trainer.generator.denoiser.parameters())
    tensors, _ = snapshot.part("generator")
    counters = sum(t.numel() for name, t in tensors.items() if name.endswith(".step"))
    assert sum(t.numel() for t in tensors.values()) - counters == 4 * adapter  # weights, EMA and two moments
    again = tiny_trainer(config)
    again.load(snapshot)
    for _ in range(2):
        trainer.window()
        again.window()
    expected = weights(trainer)
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, expected[name]), name
    ours, theirs = trainer.generator.ema, again.generator.ema
    assert ours is not None
    assert theirs is not None
    for name, tensor in theirs.weights().items():
        assert torch.equal(tensor, ours.weights()[name]), name


def test_a_snapshot_s_roles_are_whole_networks_again_with_the_teacher_it_was_made_with(
    tmp_path: Path,
) -> None:
    config = tiny_config(**LORA)
    trainer = tiny_trainer(config)
    trainer.window()
    snapshots = Snapshots(str(tmp_path), keep=1)
    session: Any = PlainSession()
    session.run_id = "none"
    for role, owner in trainer.parts.items():
        snapshots.write_part(1, role, *owner.save())
    snapshots.commit(1, manifest_of(trainer, session))
    snapshot = snapshots.read(1)
    cond = trainer.pipeline.encode_text(["", ""])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([900.0, 100.0])
    pairs = (
        (generator_weights(snapshot, "raw", tiny_pipeline), trainer.generator.denoiser),
        (critic_weights(snapshot, tiny_pipeline), trainer.critic.critic.denoiser),
    )
    for state, role in pairs:
        whole = tiny_pipeline().denoiser
        whole.load_state_dict(state)
        torch.testing.assert_close(whole(x, t, cond), role(x, t, cond), rtol=1e-4, atol=1e-5)
    adapter = generator_adapter(snapshot, "ema")
    assert adapter is not None
    assert adapter[1] == 2.0  # alpha 8 over rank 4

    def another() -> Any:
        pipeline = tiny_pipeline()
        pipeline.fingerprint = "another"
        return pipeline

    with pytest.raises(CheckpointError, match=r"teacher\.path"):
        generator_weights(snapshot, "raw", another)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"generator": {"lora_rank": -1}}, r"generator\.lora_rank=-1 must not be negative"),
        ({"critic": {"lora_alpha": 4.0}}, r"critic\.lora_alpha=4\.0 has no meaning without critic\.lora_rank"),
        ({"generator": {"lora_targets": "all"}}, r"generator\.lora_targets=all has no meaning without"),
        ({"generator": {"lora_rank": 4, "lora_alpha": 0.0}}, r"generator\.lora_alpha=0 must be positive"),
        ({"critic": {"lora_rank": 4}, "train": {"compile": True}}, r"train\.compile=true with critic\.lora_rank=4"),
        ({"critic": {"lora_rank": 4}, "teacher": {"dtype": "bf16"}}, r"train\.dtype=fp32 with critic\.lora_rank=4"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_can_not_be_or_do_nothing_are_refused_in_one_line(
    sections: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        validate(tiny_config(**sections))
    assert "\n" not in str(caught.value)


def test_an_instant_critic_has_no_adapter_and_its_generator_may_have_one() -> None:
    method = MomentMatchingConfig(num_steps=2, variant="instant")
    with pytest.raises(ConfigError, match=r"critic\.lora_rank=2: the critic of method\.variant=instant"):
        build_method(tiny_config(method=method, teacher=DIGITS, critic={"lora_rank": 2}), tiny_pipeline())
    trainer = tiny_trainer(tiny_config(method=method, teacher=DIGITS, generator=LORA["generator"]))
    before = weights(trainer)
    trainer.window()
    assert any(
        not torch.equal(t, before[name]) for name, t in weights(trainer).items() if "generator/" in name
    )


def planned(config: RunConfig) -> Any:
    _, meta, shapes = random_pixel_pipeline(8, (8, 16), 1)
    return plan_for(config, meta, shapes)


def test_planned_bytes_are_those_of_the_real_adapters_and_of_one_base() -> None:
    config = tiny_config(**LORA, method={"gan_weight_generator": 0.0, "gan_weight_critic": 0.0})
    trainer = tiny_trainer(config)
    trainer.window()
    roles = planned(config).bytes_by_role

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    for role, owner in trainer.parts.items():
        adapter = trainer.generator.denoiser if role == "generator" else trainer.critic.critic
        assert size(adapter.parameters()) == roles[role].weights == roles[role].gradients
        moments = [t for state in owner.optimizer.optimizer.state.values() for t in state.values() if t.ndim]
        assert size(moments) == roles[role].optimizer
    assert size(trainer.generator.ema.weights().values()) == roles["generator"].ema  # type: ignore[union-attr]
    assert size(base_of(trainer).values()) == roles["teacher"].weights

    seen: dict[int, Tensor] = {}
    own = {p.untyped_storage().data_ptr() for p in trainer.pipeline.denoiser.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    cond = trainer.pipeline.encode_text([""] * 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = trainer.generator.denoiser(torch.randn(8, 3, 8, 8), torch.full((8,), 900.0), cond)
    assert sum(t.untyped_storage().nbytes() for t in seen.values()) == pytest.approx(
        roles["generator"].activations, rel=0.15
    )
    assert x.requires_grad
    whole = planned(tiny_config(method={"gan_weight_generator": 0.0, "gan_weight_critic": 0.0}))
    assert whole.forwards["generator"] == planned(config).forwards["generator"] + 1


def test_lora_and_merged_folder_in_plain_diffusers_give_the_run_s_images(tmp_path: Path) -> None:
    overrides = [
        f"output_dir={tmp_path}", "name=lora", "placement.session=inline", "evaluator.enabled=false",
        "prepare.num_train=64", "prepare.num_val=2", "prepare.samples_per_shard=32", "train.batch_size=4",
        "train.generator_updates=2", "checkpoint.every=2", "tracking.uri=off", "generator.lr=0.02",
        "generator.lora_rank=4", "generator.lora_alpha=8", "generator.lora_targets=all", "critic.lora_rank=4",
        "generator.warmup_steps=0", "generator.lr_schedule=constant",
    ]  # fmt: skip
    summary = run(recipe(*overrides))
    folder = Path(summary["export"])
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    out = export(str(tmp_path / "lora"), str(tmp_path / "raw"), weights="raw")
    difference = export_difference(
        str(tmp_path / "lora"), str(out), prompts=["a red circle", "a square"], weights="raw"
    )
    assert difference < 2e-4
    # with another step's weights it is not: the comparison sees the adapter
    (out / "pytorch_lora_weights.safetensors").write_bytes(
        (folder / "pytorch_lora_weights.safetensors").read_bytes()
    )
    assert export_difference(str(tmp_path / "lora"), str(out), prompts=["a red circle"], weights="raw") > 1e-3
