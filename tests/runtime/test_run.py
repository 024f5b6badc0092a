"""Whole runs of the default job on a small data set: killed, stopped, resumed, under Ray, and fed bad input."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from raydistill.checkpoint import Snapshots
from raydistill.config import apply_overrides
from raydistill.data.prepare import prepare_coco
from raydistill.diffusion.random import Draws
from raydistill.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    PlacementError,
    TrackingError,
    TrainingError,
)
from raydistill.models.diffusers_hub import import_diffusers
from raydistill.runtime.build import build_pipeline
from raydistill.runtime.commands import evaluate, export, export_difference, open_run, sample, sample_images
from raydistill.runtime.run import resolve, run
from raydistill.runtime.services import build_evaluator
from raydistill.runtime.settings import RunConfig
from raydistill.tracking import Tracker

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "jobs" / "dmd2_coco.py"
SMALL = [
    "prepare.num_train=96", "prepare.num_val=48", "prepare.samples_per_shard=32", "train.batch_size=8",
    "train.generator_updates=6", "method.critic_updates_per_generator=2", "checkpoint.every=2", "evaluator.every=4",
    "evaluator.num_samples=32", "evaluator.batch_size=16", "evaluator.teacher_steps=2", "evaluator.grid_images=2",
    "checkpoint.keep=10", "placement.workers=1", "teacher.guidance_scale=2", "method.gan_weight_generator=0.03",
    "method.gan_weight_critic=0.03",
]  # fmt: skip
DIGITS_JOB = ROOT / "jobs" / "dmd2_imagenet64.py"
# under Ray every process imports what its networks need, and the digits' need no diffusers
SMALL_DIGITS = [
    *[text for text in SMALL if not text.startswith(("prepare.", "teacher."))], "train.log_every=1",
]  # fmt: skip
ROLES_APART = ["placement.mode=disaggregated", "placement.workers=2", "placement.cpus_per_worker=1"]
CHANGES_WITH_THE_CLOCK = (
    "time/",
    "throughput/",
    "memory/",
    "snapshot/",
    "eval/seconds",
    "eval/lag",
    "eval/queue",
    "eval/behind",
    "data/",
    "teacher/",
    "version/",
    "system/",
    "traffic/",
    "restarts",
)


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the names of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="rd", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def settings(output_dir: Path, name: str, *more: str) -> list[str]:
    return [f"output_dir={output_dir}", f"name={name}", "placement.session=inline", *SMALL, *more]


def digits_settings(digits_dir: Path, name: str, *more: str) -> list[str]:
    return [f"output_dir={digits_dir}", f"name={name}", *SMALL_DIGITS, *more]


def job(*overrides: str, file: Path = JOB, **environment: str) -> "subprocess.Popen[str]":
    # a test in this process that joined a cluster has left how it did
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    environment = inherited | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    return subprocess.Popen(
        [sys.executable, str(file), *overrides],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", timeout_s: float = 240) -> str:
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output
    return output


def recipe(*overrides: str) -> RunConfig:
    sys.path.insert(0, str(ROOT / "jobs"))
    try:
        import dmd2_coco
    finally:
        sys.path.pop(0)
    return apply_overrides(dmd2_coco.recipe(), overrides)


def points(run_dir: Path) -> dict[tuple[str, int], float]:
    """Every journaled figure that does not depend on the clock; a point that is there twice is an error."""
    found: dict[tuple[str, int], float] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.get("values", {}).items():
            if not name.startswith(CHANGES_WITH_THE_CLOCK):
                assert (name, entry["step"]) not in found
                found[name, entry["step"]] = value
    return found


def restarts(run_dir: Path) -> list[tuple[int, float]]:
    """At which updates training began again, and how often it had."""
    entries = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        (entry["step"], entry["values"]["restarts"])
        for entry in entries
        if "restarts" in entry.get("values", {})
    ]


@pytest.fixture(scope="module")
def whole(output_dir: Path) -> Path:
    """The undisturbed run."""
    output = finish(job(*settings(output_dir, "whole")))
    assert output.splitlines()[-1] == f"summary: {output_dir}/whole/summary.json"
    for words in (
        "toyfid (32)", "prompt accuracy (32)", "generator, 1 step, start", "teacher, 2 DDIM steps, guidance 2",
        "6 generator updates", "12 critic updates", "whole: update 6/6",
    ):  # fmt: skip
        assert words in output
    return output_dir / "whole"


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apart from the scenes' runs: other tests look for the only data set beside these."""
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="module")
def whole_digits(digits_dir: Path) -> Path:
    """The undisturbed run on the digits, without Ray."""
    finish(job(*digits_settings(digits_dir, "whole_digits", "placement.session=inline"), file=DIGITS_JOB))
    return digits_dir / "whole_digits"


LOGGED = {
    "generator_updates", "critic_updates", "images", "loss/dm", "loss/gan_generator", "loss/generator_total",
    "loss/dsm", "loss/gan_critic", "loss/critic_total", "grad_norm/dm", "grad_norm/gan_generator",
    "grad_norm/generator", "grad_norm/critic", "critic/real_accuracy", "critic/fake_accuracy", "critic/lag",
    "sample/mean", "sample/std", "sample/absmax", "lr/generator", "lr/critic", "clipped_steps/generator",
    "clipped_steps/critic",
}  # fmt: skip


def test_every_promised_figure_is_logged_at_every_update_and_the_preflights_before_the_first(
    whole: Path,
) -> None:
    found = points(whole)
    for step in range(1, 7):
        assert {name for name, at in found if at == step} >= LOGGED
    levels = {name for name, at in found if name.startswith("preflight/error_") and at == 0}
    assert levels == {f"preflight/error_{level}" for level in ("0.1", "0.3", "1", "3", "10")}
    last = next(
        entry["values"]
        for entry in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
        if entry.get("step") == 6 and "loss/dm" in entry.get("values", {})
    )
    assert last["throughput/images_per_s"] > 0
    assert last["time/update_s"] > last["time/data_s"] >= 0
    assert last["data/accepted"] == 8 * (6 + 6 + 12)  # generator's and critic's prompts, real samples


def test_summary_holds_the_promised_figures(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["method"] == "dmd2"
    assert (summary["generator_updates"], summary["critic_updates"], summary["images"]) == (6, 12, 96)
    found = points(whole)
    assert summary["toyfid_start"] == found["eval/toyfid_32", 0]
    assert summary["toyfid_end"] == found["eval/toyfid_32", 6]
    assert summary["toyfid_teacher"] == found["eval/teacher_toyfid_32", 0]
    assert summary["prompt_accuracy"] == found["eval/prompt_accuracy_32", 6]
    assert summary["wall_s"] > 0
    assert summary["evaluations_failed"] == {}
    assert summary["toyfid_samples"] == summary["prompt_accuracy_samples"] == 32
    assert [step for step, _, _ in summary["curve"]] == [0, 4, 6]
    assert "registered" not in summary  # nobody asked
    assert summary["toyfid_teacher"] < summary["toyfid_start"]
    assert sorted(p.name for p in (whole / "artifacts" / "grids").iterdir()) == [
        "grid_00000000.png", "grid_00000004.png", "grid_00000006.png",
    ]  # fmt: skip


def test_run_killed_in_mid_update_and_started_again_repeats_every_figure_in_one_mlflow_run(
    whole: Path, output_dir: Path
) -> None:
    overrides = settings(output_dir, "killed")
    process = job(*overrides)
    manifest = Path(Snapshots(str(output_dir / "killed" / "snapshots"), keep=1).path(2)) / "manifest.json"
    deadline = time.monotonic() + 180
    while not manifest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output_dir / "killed" / "summary.json").exists()

    output = finish(job(*overrides))
    assert "resumed from" in output
    assert points(output_dir / "killed") == points(whole)
    assert restarts(whole) == [(0, 0.0)]
    first, (step, count) = restarts(output_dir / "killed")
    assert first == (0, 0.0)
    assert step >= 2
    assert count == 1.0

    assert mlflow_steps(output_dir, "killed") == [1, 2, 3, 4, 5, 6]


def test_sigterm_writes_a_snapshot_and_the_same_command_goes_on(whole: Path, output_dir: Path) -> None:
    overrides = settings(output_dir, "stopped", "checkpoint.every=1000", "evaluator.every=1000")
    process = job(*overrides)
    folder = output_dir / "stopped"
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        if (
            '"loss/dm"' in (folder / "metrics.jsonl").read_text()
            if (folder / "metrics.jsonl").exists()
            else False
        ):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "the same command goes on from its snapshot" in output
    steps = Snapshots(str(folder / "snapshots"), keep=1).steps()
    assert 0 < steps[-1] < 6
    finish(job(*overrides))
    losses = {
        key: value for key, value in points(whole).items() if key[0].startswith(("loss/", "grad_norm/"))
    }
    assert {k: v for k, v in points(folder).items() if k[0].startswith(("loss/", "grad_norm/"))} == losses


@pytest.mark.ray
def test_driver_killed_under_ray_and_started_again_repeats_every_figure(
    whole: Path, output_dir: Path
) -> None:
    overrides = settings(
        output_dir, "kill_ray", "placement.session=ray", "placement.cpus_per_worker=1",
        "evaluator.idle_priority=false",
    )  # fmt: skip
    process = job(*overrides)
    folder = output_dir / "kill_ray"
    wait_for(process, lambda: 2 in Snapshots(str(folder / "snapshots"), keep=1).steps())
    process.kill()
    process.communicate()
    assert not (folder / "summary.json").exists()
    output = finish(job(*overrides), timeout_s=400)
    assert "resumed from" in output
    assert output.splitlines()[-1] == f"summary: {folder}/summary.json"
    # bit for bit those of the undisturbed run without Ray
    same_under_ray(points(folder), points(whole))
    assert mlflow_steps(output_dir, "kill_ray") == [1, 2, 3, 4, 5, 6]


def same_under_ray(found: dict[tuple[str, int], float], expected: dict[tuple[str, int], float]) -> None:
    # the evaluator takes the newest snapshot only, so a figure in the middle may be passed over
    optional = {key for key in expected if key[0].startswith("eval/") and key[1] == 4} | {
        key for key in expected | found if key[0] == "eval/skipped"
    }
    assert {k: v for k, v in found.items() if k not in optional} == {
        k: v for k, v in expected.items() if k not in optional
    }


def mlflow_steps(output_dir: Path, name: str) -> list[int]:
    """Steps of a loss in the one MLflow run of this name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output_dir}/mlflow.db")
    experiment = client.get_experiment_by_name("raydistill")
    assert experiment is not None
    runs = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == name]
    assert [r.info.status for r in runs] == ["FINISHED"]
    return [point.step for point in client.get_metric_history(runs[0].info.run_id, "loss/dm")]


@pytest.mark.ray
def test_divergence_under_ray_ends_with_one_line_that_names_the_setting_and_a_whole_replay(
    digits_dir: Path,
) -> None:
    bad = digits_settings(
        digits_dir, "diverges_under_ray", *ROLES_APART,
        "generator.lr=1e30", "generator.warmup_steps=0", "evaluator.enabled=false",
    )  # fmt: skip
    process = job(*bad, file=DIGITS_JOB)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    assert re.search(r"raydistill: error: .*non-finite .*\.lr, now", output)
    replays = list((digits_dir / "diverges_under_ray" / "replay").iterdir())  # of the role that failed first
    assert replays
    for folder in replays:
        assert Snapshots(str(folder), keep=1).latest() is not None


def kill_process_of(nodes: "subprocess.Popen[str]", title: str) -> None:
    """SIGKILL to the first of the cluster's processes whose title holds these words, once there is one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in psutil.Process(nodes.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(child.cmdline()):
                    child.kill()
                    return
        time.sleep(0.02)
    pytest.fail(f"no process {title} appeared")


@pytest.fixture
def three_raylets() -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A cluster of three raylets, the head without CPUs; its process and its address."""
    nodes = subprocess.Popen(
        [sys.executable, str(ROOT / "cluster" / "local_nodes.py"), "--nodes", "3", "--cpus", "2"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert nodes.stdout is not None
    address = re.search(r"RAY_ADDRESS=(\S+)", nodes.stdout.readline())
    assert address is not None
    yield nodes, address[1]
    nodes.terminate()
    nodes.wait(60)


def wait_for(process: "subprocess.Popen[str]", there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.ray
def test_services_ranks_and_a_whole_node_may_be_killed_and_nothing_is_lost_doubled_or_changed(
    whole: Path, output_dir: Path, three_raylets: tuple["subprocess.Popen[str]", str]
) -> None:
    """Roles apart on three raylets: the figures and weights are those of the undisturbed run in one process."""
    nodes, address = three_raylets
    process = job(
        *settings(output_dir, "deaths", "placement.session=ray"),
        *ROLES_APART, "placement.teacher_replicas=2", "evaluator.idle_priority=false",
        RAY_ADDRESS=address,
        RAY_AUTH_TOKEN="f" * 64,  # of a cluster that asks for one, as this one does not
    )  # fmt: skip
    folder = output_dir / "deaths"
    snapshots = Snapshots(str(folder / "snapshots"), keep=1)
    wait_for(process, lambda: 0 in snapshots.steps())
    assert process.poll() is None, process.communicate()[0]
    raylet = next(
        child.parent()
        for child in psutil.Process(nodes.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(child.cmdline())
    )
    assert raylet is not None
    assert "raylet" in raylet.name()
    kill_process_of(nodes, "ray::_EvaluatorActor")
    kill_process_of(nodes, "ray::_TeacherActor")
    kill_process_of(nodes, "ray::_TrackerActor")
    wait_for(process, lambda: 2 in snapshots.steps())  # early enough that the run can't end before
    raylet.kill()  # and everything that it started, both ranks among it
    output = finish(process, timeout_s=400)
    assert "resumed from" in output
    assert output.splitlines()[-1] == f"summary: {folder}/summary.json"
    same_under_ray(points(folder), points(whole))
    assert mlflow_steps(output_dir, "deaths") == [1, 2, 3, 4, 5, 6]
    newest = Snapshots(str(folder / "snapshots"), keep=1).latest()
    reference = Snapshots(str(whole / "snapshots"), keep=1).latest()
    assert newest is not None
    assert reference is not None
    for role in ("generator", "critic"):
        for name, tensor in reference.part(role)[0].items():
            assert torch.equal(newest.part(role)[0][name], tensor), name


@pytest.mark.ray
def test_two_workers_under_ray_train_draw_the_same_and_differ_by_the_order_of_sums_only(
    whole_digits: Path, digits_dir: Path, short_folder: Path
) -> None:
    # where Ray's workers look for a cluster unless they are told: here, one that is gone
    (short_folder / "ray").mkdir()
    (short_folder / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    overrides = digits_settings(digits_dir, "two_workers", "placement.workers=0", "evaluator.enabled=false")
    output = finish(job(*overrides, file=DIGITS_JOB, RAY_TMPDIR=str(short_folder)), timeout_s=400)
    assert "PlacementGroupCleaner" not in output
    one, two = points(whole_digits), points(digits_dir / "two_workers")
    # only the first update's losses come before Adam has divided by tiny gradients
    for name in ("loss/dm", "loss/gan_generator", "grad_norm/dm", "sample/absmax", "sample/std"):
        assert two[name, 1] == pytest.approx(one[name, 1], rel=1e-4), name
    assert two["loss/dm", 6] == pytest.approx(one["loss/dm", 6], rel=0.1)
    manifest = Snapshots(str(digits_dir / "two_workers" / "snapshots"), keep=1).latest()
    assert manifest is not None
    assert manifest.manifest["world_size"] == 2


@pytest.mark.ray
def test_sigterm_under_ray_writes_a_snapshot_first(digits_dir: Path) -> None:
    never = ["checkpoint.every=100000", "evaluator.enabled=false", "train.generator_updates=4000"]
    process = job(*digits_settings(digits_dir, "stopped_ray", *ROLES_APART, *never), file=DIGITS_JOB)
    journal = digits_dir / "stopped_ray" / "metrics.jsonl"
    wait_for(process, lambda: journal.exists() and '"loss/dm"' in journal.read_text())
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "the same command goes on from its snapshot" in output
    snapshots = Snapshots(str(digits_dir / "stopped_ray" / "snapshots"), keep=1)
    assert snapshots.steps()[-1] > 0
    newest = snapshots.latest()
    assert newest is not None
    for role in ("generator", "critic"):  # each written by its own rank, at the same update
        assert newest.part(role)[0]


def test_samples_evaluation_and_export_of_a_finished_run(whole: Path, tmp_path: Path) -> None:
    picture = sample(
        str(whole), prompts=["a red circle", "a blue square"], out=str(tmp_path / "s.png"), num_images=2
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    figures = evaluate(str(whole))
    journaled = points(whole)
    assert figures["step"] == 6
    assert figures["eval/toyfid_32"] == pytest.approx(journaled["eval/toyfid_32", 6], rel=1e-6)
    best = json.loads((whole / "summary.json").read_text())
    again = evaluate(best["export"])
    assert (again["step"], again["eval/toyfid_32"]) == (
        best["best_step"],
        pytest.approx(best["toyfid_best"], rel=1e-6),
    )
    with pytest.raises(ConfigError, match="leave --step and --weights out"):
        evaluate(best["export"], step=6)
    out = export(str(whole), str(tmp_path / "export"), step=6, single_file=str(tmp_path / "one.safetensors"))
    card = (out / "README.md").read_text()
    assert "num_inference_steps=1, guidance_scale=1.0" in card
    assert f"| toyfid_32 | {figures['eval/toyfid_32']:.4g} |" in card
    assert f"| hash | {figures['protocol_hash']} |" in card
    assert "| teacher.guidance_scale | `2.0` |" in card
    assert (out / "grid.png").read_bytes() == (whole / "artifacts/grids/grid_00000006.png").read_bytes()
    assert (tmp_path / "one.safetensors").stat().st_size > 5_000_000
    raw = export(str(whole), str(tmp_path / "raw"), step=6, weights="raw")
    assert "These weights were not evaluated." in (raw / "README.md").read_text()
    assert not (raw / "grid.png").exists()
    assert (
        json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "LCMScheduler"
    )
    assert export_difference(str(whole), str(out), prompts=["a red circle", "a square"], step=6) < 2e-4
    config, snapshot = open_run(str(whole), 6, None)
    assert config.evaluator.weights == "ema"
    pipeline = build_pipeline(config)
    tensors, _ = snapshot.part("generator")
    pipeline.denoiser.load_state_dict(
        {name.removeprefix("ema/"): t for name, t in tensors.items() if name.startswith("ema/")}
    )
    prompts = ["a red circle", "a small blue square"]
    noise = Draws(0).normal("sample/noise", 0, range(2), pipeline.latent_shape)
    loaded = import_diffusers().DiffusionPipeline.from_pretrained(out)
    images = loaded(
        prompts, num_inference_steps=1, guidance_scale=1.0, latents=noise, output_type="pt"
    ).images
    ours = (sample_images(config, pipeline, prompts, 0, range(2)) / 2 + 0.5).clamp(0, 1)
    assert float((images - ours).abs().max()) < 2e-4
    with pytest.raises(ConfigError, match="exists already"):
        export(str(whole), str(tmp_path / "export"))
    with pytest.raises(ConfigError, match="holds no snapshot"):
        evaluate(str(tmp_path))


def test_resuming_with_settings_that_change_the_numbers_is_refused(whole: Path, output_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator\.lr: .* then, 0\.5 now"):
        run(recipe(*settings(output_dir, "whole", "generator.lr=0.5", "train.generator_updates=9")))
    assert mlflow_steps(output_dir, "whole") == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # which also sees that it is FINISHED still


def test_second_run_of_a_name_that_is_going_on_is_refused(output_dir: Path) -> None:
    given = settings(output_dir, "going_on", "tracking.uri=off")
    config = resolve(recipe(*given))
    tracker = Tracker(config.tracking, config.run_dir, config.name)
    try:
        for more in ([], ["resume=false"]):
            with pytest.raises(ConfigError, match=r"name='going_on' is going on"):
                run(recipe(*given, *more))
    finally:
        tracker.finish()
    assert Path(config.run_dir).is_dir()


def test_diverging_run_stops_before_the_step_names_the_term_and_keeps_what_replays_it(
    whole: Path, output_dir: Path
) -> None:
    bad = settings(
        output_dir, "diverges", "generator.lr=1e30", "generator.warmup_steps=0", "evaluator.enabled=false"
    )
    with pytest.raises(TrainingError, match=r"non-finite .*\.lr, now"):
        run(recipe(*bad))
    replay = Snapshots(str(output_dir / "diverges" / "replay"), keep=1).latest()
    assert replay is not None
    # the generator's first step threw its weights away; the critic's second step is the first to see it
    assert replay.manifest["optimizer_steps"] == {"generator": 1, "critic": 1}
    assert "critic step 1" in replay.manifest["stopped_by"]


@pytest.mark.parametrize(
    ("overrides", "error", "named"),
    [
        (["data.shards=/nowhere/shards", "prepare.coco=none"], DataError, r"/nowhere/shards"),
        (["train.micro_batch_size=3"], ConfigError, r"train\.batch_size=8 is not divisible"),
        (["tracking.uri=http://127.0.0.1:9"], TrackingError, r"tracking\.uri"),
        (["teacher.path=/nowhere/teacher"], ConfigError, r"teacher\.path='/nowhere/teacher'"),
        (["placement.workers=2"], PlacementError, r"placement\.workers=2"),
        (["evaluator.num_samples=4000"], ConfigError, r"evaluator\.num_samples=4000"),
        (
            ["evaluator.weights=ema", "generator.ema_halflife_images=0"],
            ConfigError,
            r"generator\.ema_halflife_images",
        ),
        (["method.timesteps=[1500]"], ConfigError, r"method\.timesteps"),
        (["teacher.prediction=v_prediction"], ConfigError, r"preflight: .*set teacher\.prediction=epsilon"),
        (["output_dir=s3://bucket/runs"], ConfigError, r"output_dir"),
        (["name=data", "resume=false"], ConfigError, r"name='data'"),
        (["name=.."], ConfigError, r"name='\.\.'"),
        (["train.micro_batch_size=0"], ConfigError, r"train\.micro_batch_size=0"),
        (["generator.lr_gan_stage=-1"], ConfigError, r"generator\.lr_gan_stage"),
        (["generator.betas=[0,1]"], ConfigError, r"generator\.betas"),
        (["generator.ema_halflife_images=-1"], ConfigError, r"generator\.ema_halflife_images=-1"),
        (["evaluator.teacher_steps=0"], ConfigError, r"evaluator\.teacher_steps=0"),
        (["evaluator.head_start_s=900"], ConfigError, r"evaluator\.head_start_s=900"),
        (["prepare.num_train=0"], ConfigError, r"prepare\.num_train=0"),
        (
            ["placement.mode=teachers"],
            PlacementError,
            r"placement\.mode=teachers needs placement\.session=ray",
        ),
        (["placement.teacher_service=x"], PlacementError, r"teacher_service='x' needs placement\.mode"),
        (["placement.teacher_kept_graphs=0"], PlacementError, r"placement\.teacher_kept_graphs=0"),
        (["placement.teacher_chunk_size=0"], PlacementError, r"placement\.teacher_chunk_size=0"),
        (
            ["placement.max_teacher_replicas=1", "placement.teacher_replicas=2"],
            PlacementError,
            r"max_teacher_replicas=1",
        ),
        (["placement.max_staleness=2"], PlacementError, r"placement\.max_staleness=2 must be 0 or 1"),
        (
            ["placement.max_staleness=1"],
            PlacementError,
            r"max_staleness=1 needs placement\.mode=disaggregated",
        ),
        (
            ["placement.wire_dtype=bf16"],
            PlacementError,
            r"wire_dtype=bf16 needs placement\.mode=teachers or disagg",
        ),
        (["placement.evaluator_gpus=-1"], PlacementError, r"placement\.evaluator_gpus=-1"),
        (["placement.device_gib=0"], PlacementError, r"placement\.device_gib=0 must be positive"),
        (
            ["placement.gpus_per_worker=1", "placement.device_gib=0.01"],
            PlacementError,
            r"takes 0\.\d\d GiB of each worker \(teacher .*a GPU has 0\.01 GiB \(placement\.device_gib\)",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_that_names_the_setting(
    whole: Path, output_dir: Path, overrides: list[str], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named) as caught:
        run(recipe(*settings(output_dir, "bad", *overrides)))
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize(
    ("uri", "error", "told"),
    [
        ("http://127.0.0.1:9", TrackingError, r"http://127\.0\.0\.1:9 does not answer"),
        ("ftp://host", ConfigError, r"tracking\.uri is 'ftp://host'"),
    ],
)
def test_a_store_that_can_not_be_is_refused_before_data_is_made(
    tmp_path: Path, uri: str, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        run(recipe(*settings(tmp_path / "runs", "nowhere", f"tracking.uri={uri}")))
    assert not (tmp_path / "runs").exists()


@pytest.mark.ray
def test_bad_data_under_ray_is_one_line_and_no_run_is_opened(output_dir: Path) -> None:
    process = job(*settings(output_dir, "bad_ray", "placement.session=ray", "prepare.coco=/nowhere"))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert re.search(r"raydistill: error: .*/nowhere", output)
    assert not (output_dir / "bad_ray").exists()


@pytest.mark.parametrize("preset", [[], ["--preset", "long"], ["--preset", "four_step"]], ids=str)
def test_dry_run_shows_settings_bytes_and_forwards_and_leaves_nothing(
    tmp_path: Path, preset: list[str]
) -> None:
    out = tmp_path / "runs"
    shown = finish(job("--dry-run", f"output_dir={out}", *preset))
    for words in (
        "method.critic_updates_per_generator", "GiB, all on a worker", "\nteacher", "\ngenerator", "\ncritic",
        "forward equivalents per generator update", "TFLOP",
    ):  # fmt: skip
        assert words in shown
    assert not out.exists()


def test_relative_paths_are_made_absolute_where_the_run_is_started_and_hub_ids_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    given = [
        "teacher.path=teacher",
        "data.shards=s/*.tar",
        "prepare.coco=none",
        "evaluator.coco=c",
        "output_dir=o",
    ]
    config = resolve(recipe(*given, "data.cache_dir=cache"))
    assert config.teacher.path == f"{tmp_path}/teacher"
    assert (config.data.shards, config.data.cache_dir) == (f"{tmp_path}/s/*.tar", f"{tmp_path}/cache")
    assert (config.prepare.coco, config.evaluator.coco) == (None, f"{tmp_path}/c")
    assert config.output_dir == f"{tmp_path}/o"
    remote = resolve(recipe("teacher.path=owner/name", "data.shards=s3://bucket/x", "prepare.coco=none"))
    assert (remote.teacher.path, remote.data.shards) == ("owner/name", "s3://bucket/x")
    assert remote.evaluator.coco.startswith(str(tmp_path / "runs" / "data"))


def test_shards_without_latents_and_text_are_encoded_on_the_way_and_train_the_same(
    whole: Path, output_dir: Path
) -> None:
    coco = next((output_dir / "data").iterdir()) / "coco"
    raw = output_dir / "raw_shards"
    prepare_coco(str(coco), "train", str(raw), samples_per_shard=32, image_size=32, progress=False)
    quiet = ["prepare.coco=none", "evaluator.enabled=false", "train.generator_updates=1"]
    run(recipe(*settings(output_dir, "raw", f"data.shards={raw}", *quiet)))
    stored, encoded = points(whole), points(output_dir / "raw")
    for name in ("loss/dm", "loss/dsm", "loss/gan_critic", "sample/std"):  # stored ones are float16
        assert encoded[name, 1] == pytest.approx(stored[name, 1], rel=1e-2), name


def test_four_step_preset_trains_evaluates_and_exports(whole: Path, output_dir: Path) -> None:
    output = finish(job("--preset", "four_step", *settings(output_dir, "four", "train.generator_updates=2")))
    assert "generator, 4 steps, end" in output
    summary = json.loads((output_dir / "four" / "summary.json").read_text())
    assert summary["generator_steps"] == 4
    scheduler = json.loads((Path(summary["export"]) / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "LCMScheduler"
    loaded = import_diffusers().LCMScheduler.from_config(scheduler)
    loaded.set_timesteps(4)
    assert loaded.timesteps.tolist() == [999, 749, 499, 249]


def test_sdxl_job_trains_by_backward_simulation_evaluates_and_exports(output_dir: Path) -> None:
    small = settings(output_dir, "xl", "train.generator_updates=2")
    finish(job(*small, file=JOB.with_name("dmd2_sdxl.py")))
    summary = json.loads((output_dir / "xl" / "summary.json").read_text())
    assert (summary["generator_steps"], summary["teacher"]) == (4, "builtin:scenes-xl")
    assert summary["toyfid_end"] > 0
    assert (output_dir / "xl/export/text_encoder_2/model.safetensors").is_file()
    difference = export_difference(
        str(output_dir / "xl"), summary["export"], prompts=["a red circle"], step=summary["exported_step"]
    )
    assert difference < 2e-4


def test_timesteps_that_diffusers_cannot_visit_cost_the_export_only_and_are_told_of_first(
    whole: Path, output_dir: Path
) -> None:
    few = ["method.timesteps=[999,600]", "train.generator_updates=1", "evaluator.enabled=false"]
    output = finish(job(*settings(output_dir, "uneven", *few)))
    assert output.index("can be trained and sampled, but not exported") < output.index("update 1/1")
    assert "not exported: no diffusers scheduler visits the timesteps [999, 600]" in output


def test_figures_do_not_depend_on_the_batch_size_and_the_shipped_teacher_follows_its_captions(
    whole: Path, output_dir: Path
) -> None:
    answers = []
    for size in (7, 32):
        config, snapshot = open_run(str(whole), 6, None)
        config = apply_overrides(config, [f"evaluator.batch_size={size}", "evaluator.teacher_steps=10"])
        evaluator = build_evaluator(config)
        answers.append((evaluator.evaluate(snapshot), evaluator.evaluate_teacher()))
    (small, teacher), (large, _) = answers
    for name, value in large.metrics.items():
        if name != "eval/seconds":
            assert small.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    assert small.protocol["hash"] == large.protocol["hash"]
    assert teacher.metrics["eval/teacher_prompt_accuracy_32"] >= 0.9


def test_shards_of_another_teacher_are_refused(whole: Path, output_dir: Path) -> None:
    data = next((output_dir / "data").iterdir()) / "shards"
    index = json.loads((data / "index.json").read_text())
    assert index["encoder"]
    other = output_dir / "other_shards"
    other.mkdir()
    for file in data.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "index.json").write_text(json.dumps(index | {"encoder": "0" * 64}))
    with pytest.raises(DataError, match=r"teacher\.path"):
        run(recipe(*settings(output_dir, "other", f"data.shards={other}", "prepare.coco=none")))


def test_full_disk_at_a_snapshot_names_the_setting_and_leaves_older_ones_whole(
    whole: Path, output_dir: Path
) -> None:
    import resource

    # a run that has two snapshots already, and with constant rates may go on to more updates
    constant = ["generator.lr_schedule=constant", "critic.lr_schedule=constant"]
    quiet = ["tracking.uri=off", "evaluator.enabled=false", *constant]
    run(recipe(*settings(output_dir, "full", *quiet, "train.generator_updates=2")))
    snapshots = Snapshots(str(output_dir / "full" / "snapshots"), keep=1)
    before = snapshots.steps()
    assert before == [0, 2]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, hard))
    try:
        with pytest.raises(CheckpointError, match=r"output_dir|checkpoint\.keep"):
            run(recipe(*settings(output_dir, "full", *quiet)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert snapshots.steps() == before
    newest = snapshots.latest()
    assert newest is not None
    assert newest.part("generator")[0]  # its hashes are checked when it is read
    run(recipe(*settings(output_dir, "full", *quiet)))  # with room again, it goes on
    assert snapshots.steps()[-1] == 6
