"""The plan against what really happens: forward passes counted by hooks, bytes of real tensors."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from raydistill.errors import ConfigError, PlacementError
from raydistill.methods.method import Query
from raydistill.methods.moment_matching import MomentMatchingConfig
from raydistill.methods.sid import SiDConfig
from raydistill.models.diffusers_hub import random_pixel_pipeline
from raydistill.runtime.plan import GIB, plan, plan_for
from raydistill.runtime.ranks import best_num_critic
from raydistill.runtime.room import check_room, choose_workers, worker_cpus
from raydistill.runtime.settings import RunConfig, validate
from raydistill.runtime.simulate import RoleSeconds
from tests.tiny import DIGITS, tiny_config, tiny_trainer

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "jobs" / "bench_step.py"
ROLES = ("generator", "critic", "teacher")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_step", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned(config: RunConfig) -> Any:
    if config.teacher.path == "builtin:digits":
        return plan(config)
    _, meta, shapes = random_pixel_pipeline(8, (8, 16), 1)
    return plan_for(config, meta, shapes)


CASES: dict[str, dict[str, Any]] = {
    "guided, GAN on the critic": {},
    "unguided": {"teacher": {"guidance_scale": 1.0}},
    "no GAN": {"method": {"gan_weight_generator": 0.0, "gan_weight_critic": 0.0}},
    "GAN on the teacher": {"method": {"gan_features": "teacher"}},
    "ratio 5": {"method": {"critic_updates_per_generator": 5}},
    "accumulation": {"train": {"micro_batch_size": 2}},
    "SiD": {"method": SiDConfig(), "teacher": DIGITS},
    "SiD, ratio 3": {"method": SiDConfig(critic_updates_per_generator=3), "teacher": DIGITS},
    "SiD-LSG": {"method": SiDConfig(guidance_scale_critic_training=1.5, guidance_scale_critic=1.5)},
    "SiD, guided teacher only": {"method": SiDConfig()},
    "SiDA": {"method": SiDConfig(gan_weight_generator=0.01, gan_weight_critic=1.0), "teacher": DIGITS},
    "moment matching": {"method": MomentMatchingConfig(num_steps=4), "teacher": DIGITS},
    "moment matching, guided, ratio 2": {
        "method": MomentMatchingConfig(num_steps=4, critic_updates_per_generator=2)
    },
    "moment matching, plain critic": {
        "method": MomentMatchingConfig(num_steps=4, teacher_regularised=False),
        "teacher": DIGITS,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_forward_passes_of_an_update_are_those_of_the_plan(bench: ModuleType, case: str) -> None:
    config = tiny_config(**CASES[case])
    trainer = tiny_trainer(config)
    networks = {
        "generator": trainer.generator.denoiser,
        "critic": trainer.critic.critic.denoiser,
        "teacher": trainer.pipeline.denoiser,
    }
    counts = {role: bench.Count(net.network) for role, net in networks.items()}
    trainer.window()
    expected = planned(config)
    for role, count in counts.items():
        counted = count.equivalents(expected.encoder_share) / config.train.batch_size
        assert counted == pytest.approx(expected.forwards[role], rel=1e-6), role


@pytest.mark.parametrize("teacher", [DIGITS, {"guidance_scale": 1.0}], ids=["edm", "unet"])
def test_an_instant_critics_tangent_costs_what_the_plan_says_though_hooks_see_one_pass(
    bench: ModuleType, teacher: dict[str, Any]
) -> None:
    config = tiny_config(method=MomentMatchingConfig(num_steps=4, variant="instant"), teacher=teacher)
    trainer = tiny_trainer(config)
    networks = {"generator": trainer.generator.denoiser, "critic": trainer.critic.critic.denoiser}
    counts = {role: bench.Count(net.network) for role, net in networks.items()}
    flops = []
    answer = trainer.critic.answer

    def counted(query: Query) -> torch.Tensor:
        with FlopCounterMode(display=False) as counter:
            tangent = answer(query)
        flops.append(counter.get_total_flops())
        return tangent

    trainer.critic.answer = counted  # type: ignore[method-assign]
    trainer.window()
    expected = planned(config)
    assert expected.forwards["teacher"] == 0
    found = {role: c.equivalents(expected.encoder_share) / 8 for role, c in counts.items()}
    assert found["generator"] == expected.forwards["generator"]
    assert found["critic"] == expected.forwards["critic"] - expected.work.critic_answer + 1
    # each layer's output, its change with the weights and with the input, of which the first layer has none
    passes = flops[0] / 8 / (expected.gflop_per_forward * 1e9)
    assert passes == pytest.approx(expected.work.critic_answer, rel=0.03)


@pytest.mark.parametrize(("moments", "num_bytes"), [("fp32", 8), ("bf16", 4)])
def test_bytes_of_weights_gradients_optimiser_and_ema_are_those_of_the_real_tensors(
    moments: str, num_bytes: int
) -> None:
    config = tiny_config(generator={"moments": moments}, critic={"moments": moments})
    trainer = tiny_trainer(config)
    trainer.window()
    roles = planned(config).bytes_by_role

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    for role, owner, net in (
        ("generator", trainer.generator, trainer.generator.denoiser),
        ("critic", trainer.critic, trainer.critic.critic),
    ):
        assert size(net.parameters()) == roles[role].weights == roles[role].gradients
        of_adam = [
            state[name]
            for state in owner.optimizer.optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ]
        assert size(of_adam) == roles[role].optimizer == num_bytes * sum(p.numel() for p in net.parameters())
    assert size(trainer.generator.ema.weights().values()) == roles["generator"].ema  # type: ignore[union-attr]
    assert size(trainer.pipeline.denoiser.parameters()) == roles["teacher"].weights
    assert roles["critic"].activations > roles["generator"].activations > 0


def test_saved_activations_are_those_of_the_real_graph() -> None:
    config = tiny_config(method={"gan_weight_generator": 0.0, "gan_weight_critic": 0.0})
    trainer = tiny_trainer(config)
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    cond = next(trainer.batches.prompts("prompt/generator", 0)).cond
    x_t = torch.randn(8, *trainer.pipeline.latent_shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = trainer.generator.denoiser(x_t, torch.full((8,), 500.0), cond)
    real = sum(t.untyped_storage().nbytes() for t in seen.values())
    assert graph.requires_grad
    assert planned(config).bytes_by_role["generator"].activations == pytest.approx(real, rel=0.15)


def test_bf16_and_checkpointing_need_less_and_more_ranks_less_each() -> None:
    plain = planned(tiny_config())
    activations = plain.bytes_by_role["generator"].activations
    assert planned(tiny_config(train={"dtype": "bf16"})).bytes_by_role["generator"].activations < activations
    saved = planned(tiny_config(train={"activation_checkpointing": True}))
    assert saved.bytes_by_role["generator"].activations < activations
    assert saved.forwards["generator"] == plain.forwards["generator"] + 1
    both = planned(tiny_config(placement={"workers": 2}))
    assert both.bytes_by_role["generator"].activations == pytest.approx(activations / 2, rel=0.05)


def test_the_table_says_what_each_kind_of_device_holds() -> None:
    colocated = planned(tiny_config())
    roles = colocated.bytes_by_role
    smaller = roles["generator"].gradients  # the critic's has a head; they are never there together
    total = sum(role.total for role in roles.values()) - smaller
    assert colocated.device_bytes == {"worker": total}
    lines = colocated.table().splitlines()
    assert lines[0].startswith("GiB, all on a worker")
    assert lines[4].split()[0] == "together"
    assert lines[4].split()[-1] == f"{total / GIB:.4f}"

    teachers = planned(tiny_config(placement={"mode": "teachers", "workers": 2}))
    roles = teachers.bytes_by_role
    on_worker = roles["generator"].total + roles["critic"].total - roles["generator"].gradients
    assert teachers.device_bytes == {"worker": on_worker, "teacher": roles["teacher"].total}
    text = teachers.table()
    assert "all on a worker" not in text
    assert "together" not in text.split("forward equivalents")[0]
    assert re.search(rf"^on a worker: generator, critic +{on_worker / GIB:.4f}$", text, re.M)
    assert re.search(rf"^on a teacher replica: teacher +{roles['teacher'].total / GIB:.4f}$", text, re.M)

    apart = planned(tiny_config(placement={"mode": "disaggregated", "workers": 5, "critic_ranks": 4}))
    assert apart.ranks == {"generator": 1, "critic": 4}
    assert apart.device_bytes == {role: apart.bytes_by_role[role].total for role in ROLES}
    assert "on a generator rank: generator" in apart.table()
    assert "on a critic rank: critic" in apart.table()


def test_ranks_that_are_not_set_are_those_that_a_run_would_choose() -> None:
    config = tiny_config(placement={"mode": "disaggregated"})
    assert planned(config).ranks == {"generator": 1, "critic": 1}
    config = tiny_config(placement={"mode": "disaggregated", "workers": 6}, train={"batch_size": 40})
    found = planned(config)
    r = config.method.critic_updates_per_generator
    assert found.ranks["critic"] == best_num_critic(6, 40, None, found.seconds, r)
    with pytest.raises(PlacementError, match=r"train\.batch_size=7 can't be shared"):
        planned(tiny_config(placement={"mode": "disaggregated", "workers": 4}, train={"batch_size": 7}))


@pytest.mark.parametrize(
    ("nodes", "placement", "named"),
    [
        ([{"CPU": 2.0}], {"workers": 2}, None),
        ([{"CPU": 2.0}], {"workers": 3}, r"placement\.workers=3 x placement\.cpus_per_worker=1 does not fit"),
        ([{"CPU": 2.0}, {"CPU": 2.0}], {"workers": 1, "cpus": 4}, r"cpus_per_worker=4 .*have 2, 2 CPUs"),
        ([{"CPU": 64.0, "GPU": 8.0}], {"workers": 8, "gpus_per_worker": 1}, None),
        (
            [{"CPU": 64.0, "GPU": 8.0}],
            {"workers": 8, "gpus_per_worker": 1, "evaluator_gpus": 0.5},
            r"workers=8 x placement\.gpus_per_worker=1 beside placement\.evaluator_gpus=0\.5",
        ),
        (
            [{"CPU": 64.0, "GPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}],
            {"workers": 8, "gpus_per_worker": 1, "evaluator_gpus": 0.5},
            None,
        ),
        (
            [{"CPU": 2.0}],
            {"workers": 1, "evaluator_gpus": 0.5},
            r"evaluator_gpus=0\.5 does not fit: the nodes have 0 GPUs",
        ),
        ([{"CPU": 4.0}], {"workers": 4, "mode": "disaggregated"}, None),
        (
            [{"CPU": 4.0}],
            {"workers": 2, "mode": "teachers", "teacher_replicas": 4, "cpus_per_teacher": 0.5},
            None,
        ),
        (
            [{"CPU": 4.0}],
            {"workers": 3, "mode": "teachers", "teacher_replicas": 4, "cpus_per_teacher": 0.5},
            r"workers=3 x placement\.cpus_per_worker=1 beside placement\.teacher_replicas=4 x "
            r"placement\.cpus_per_teacher=0\.5 does not fit: the nodes have 4 CPUs",
        ),
        (
            [{"CPU": 8.0, "GPU": 1.0}],
            {"workers": 1, "mode": "teachers", "gpus_per_teacher": 2.0},
            r"teacher_replicas=1 x placement\.gpus_per_teacher=2 does not fit: the nodes have 1 GPUs",
        ),
        # half a GPU for the evaluator and half for the teacher leave seven whole ones
        (
            [{"CPU": 64.0, "GPU": 8.0}],
            {
                "workers": 7,
                "gpus_per_worker": 1,
                "evaluator_gpus": 0.5,
                "mode": "teachers",
                "gpus_per_teacher": 0.5,
            },
            None,
        ),
    ],
)
def test_what_does_not_fit_on_the_nodes_is_refused_with_the_numbers(
    nodes: list[dict[str, float]], placement: dict[str, Any], named: str | None
) -> None:
    cpus = placement.pop("cpus", 1)
    config = tiny_config(placement=placement)
    if named is None:
        check_room(nodes, config, cpus)
        return
    with pytest.raises(PlacementError, match=named):
        check_room(nodes, config, cpus)


@pytest.mark.parametrize("mode", ["colocated", "teachers", "disaggregated"])
@pytest.mark.parametrize(("cpus", "each"), [(2, 0.0), (4, 0.5), (8, 0.5)])
def test_chosen_workers_and_their_share_of_the_cpus_fit_beside_the_teachers(
    monkeypatch: pytest.MonkeyPatch, mode: str, cpus: int, each: float
) -> None:
    nodes = [{"CPU": float(cpus)}]
    placement = {"mode": mode, "cpus_per_teacher": each}
    workers = choose_workers(nodes, tiny_config(placement=placement))
    chosen = tiny_config(placement=placement | {"workers": workers})
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    share = worker_cpus(chosen)
    beside = 0.0 if mode == "colocated" else each
    assert share == int((cpus - beside) // chosen.placement.workers)
    check_room(nodes, chosen, share)


@pytest.mark.parametrize(
    ("cpus", "placement", "train", "expected"),
    [
        (2.0, {}, {}, 2),
        (1.0, {}, {}, 1),
        (2.0, {"cpus_per_worker": 2}, {}, 1),
        (2.0, {"mode": "teachers"}, {}, 2),
        (2.0, {"mode": "teachers", "cpus_per_teacher": 0.5}, {}, 1),
        (3.0, {"mode": "teachers", "cpus_per_teacher": 0.5}, {}, 2),
        (8.0, {"gpus_per_worker": 1}, {}, 1),
        (2.0, {}, {"batch_size": 3}, 1),
        (2.0, {}, {"batch_size": 6, "micro_batch_size": 2}, 1),
        (2.0, {}, {"batch_size": 8, "micro_batch_size": 2}, 2),
    ],
)
def test_number_of_workers_is_chosen_for_the_cluster(
    cpus: float, placement: dict[str, Any], train: dict[str, Any], expected: int
) -> None:
    config = tiny_config(placement=placement | {"workers": 0}, train=train)
    chosen = choose_workers([{"CPU": 0.0}, {"CPU": cpus, "GPU": 8.0}], config)
    assert chosen == expected
    placement = placement | {"workers": chosen}
    validate(tiny_config(placement=placement, train=train))


def test_plan_of_a_teacher_that_is_not_there_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.path"):
        plan(tiny_config(teacher={"path": "/nowhere/teacher"}))


def test_bench_prints_and_writes_what_it_promises(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    command = [
        sys.executable,
        str(BENCH),
        "--size",
        "edm16",
        "--batch",
        "2",
        "--updates",
        "1",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["results"]
    assert f"{result['seconds_median']:.3f} s per generator update" in done.stdout
    for role, counted in result["forward_equivalents"].items():
        assert counted == pytest.approx(result["forward_equivalents_planned"][role], rel=1e-6)
    assert result["samples_per_s"] == pytest.approx(2 * 5 / result["seconds_median"])
    seconds = RoleSeconds(**result["role_seconds"])
    assert seconds.window(5) == pytest.approx(result["seconds_median"], rel=0.7)  # another update of the same
    for phase, value in result["role_seconds"].items():
        assert value > 0 or phase == "teacher_for_critic"  # of which DMD2 has none
        assert re.search(rf"^  {phase} +{value:.4f}$", done.stdout, re.M)
    assert result["workload"]["teacher.guidance_scale"] == "1"
    # the process also holds what convolutions work in; the plan counts tensors
    assert 0.5 * result["peak_gib_planned"] < result["peak_gib"] < 3 * result["peak_gib_planned"] + 0.1


def test_bench_measures_a_job_and_says_what_is_wrong_with_it_in_a_line(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    command = [
        sys.executable,
        str(BENCH),
        "--updates",
        "1",
        "--threads",
        "1",
        "--batch",
        "2",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, "--job", "dmd2", "teacher.guidance_scale=1"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())["results"]
    assert (result["size"], result["batch_size"]) == ("dmd2", 2)
    assert result["critic_updates_per_generator"] == 2  # the job's own
    assert result["workload"]["the method's critic_answer in passes"] == 1
    assert result["workload"]["teacher.guidance_scale"] == "1"
    done = subprocess.run(
        [*command, "--job", "dmd2", "--preset", "none"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        "bench_step: error: --preset 'none' is unknown; valid: long, lora, four_step, "
    )
