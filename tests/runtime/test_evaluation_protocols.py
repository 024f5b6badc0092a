"""Protocols from the driver's side: what stops a run before it starts, what can't be compared, several workers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raydistill.checkpoint import Snapshots, prefixed
from raydistill.cli import load_job
from raydistill.config import apply_overrides, flatten, to_dict
from raydistill.errors import ConfigError, RayDistillError
from raydistill.eval.protocol import Protocol
from raydistill.models.denoiser import state_for_saving
from raydistill.report import write_report
from raydistill.roles.evaluation_inputs import require_conditions
from raydistill.runtime import actors, digits
from raydistill.runtime.build import build_pipeline
from raydistill.runtime.commands import evaluate
from raydistill.runtime.compare import compare, row
from raydistill.runtime.compare import table as comparison_table
from raydistill.runtime.keeper import require_same_settings
from raydistill.runtime.prepare import prepare_builtin
from raydistill.runtime.run import resolve, run
from raydistill.runtime.services import build_evaluator, evaluate_snapshot
from raydistill.runtime.session import TEACHER_STEP
from raydistill.runtime.settings import RunConfig, validate
from raydistill.runtime.summary import table as summary_table
from raydistill.sweep.config import SweepConfig, checked
from tests.eval.detector_file import write_detector
from tests.eval.test_protocol import PROTOCOL

ROOT = Path(__file__).resolve().parents[2]
EDM = ["evaluator.protocol=edm-cifar10-5k", "evaluator.reference=nowhere.npz", "tracking.uri=off"]


def small(output_dir: Path, *overrides: str) -> RunConfig:
    config = replace(digits.sid(128), output_dir=str(output_dir))
    return apply_overrides(config, ["placement.session=inline", *overrides])


@pytest.mark.parametrize("session", ["inline", "ray"])
def test_a_start_without_detector_fails_before_anything_is_made(tmp_path: Path, session: str) -> None:
    config = small(tmp_path / "runs", *EDM, f"placement.session={session}")
    with pytest.raises(
        ConfigError, match=r"inception-2015-12-05\.pt is not there.*evaluator\.detector_file"
    ) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["evaluator.protocol=gigagan-coco5k"], r"conditions on captions, this teacher \(teacher\.path\) on class"),
        (["evaluator.protocol=fid50k"], r"evaluator\.protocol='fid50k' must be toy, one of"),
        (["evaluator.workers=3"], r"evaluator\.workers=3 needs placement\.session=ray"),
        (["evaluator.workers=0"], r"evaluator\.workers=0 must be at least 1"),
        (["evaluator.best_by=clip_score"], r"evaluator\.best_by=clip_score.* reports toyfid, toykid, accuracy"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_one_line(tmp_path: Path, overrides: list[str], complaint: str) -> None:
    with pytest.raises(RayDistillError, match=complaint) as caught:
        run(small(tmp_path, *overrides))
    assert "\n" not in str(caught.value)


PAPERS = [
    ("sid_cifar10", "paper", "edm-cifar10-50k"),
    ("dmd2_imagenet64", "paper", "dmd2-in64-50k"),
    ("moment_matching_imagenet64", "paper", "edm-in64-50k"),
    ("sid_lsg_coco", "paper", "gigagan-coco30k"),
    ("dmd2_coco", "sd15_gan", "gigagan-coco30k"),
    ("dmd2_sdxl", "paper", "dmd2-sdxl-coco10k"),
]


@pytest.mark.parametrize(("job", "preset", "protocol"), PAPERS)
def test_papers_recipes_name_their_protocol(job: str, preset: str, protocol: str) -> None:
    config = load_job(str(ROOT / "jobs" / f"{job}.py"))[1][preset]()
    assert config.evaluator.protocol == protocol
    assert not config.evaluator.teacher_figure
    require_conditions(config.evaluator, by_class=not config.evaluator.captions)


def test_a_papers_dry_run_says_what_a_start_would_miss(tmp_path: Path) -> None:
    job = [str(ROOT / "jobs" / "sid_cifar10.py"), "--preset", "paper", "--dry-run"]
    command = [sys.executable, *job, "teacher.path=random:edm-cifar10"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"evaluator\.protocol +edm-cifar10-50k\b", done.stdout)
    warning = done.stdout.splitlines()[-1]
    assert warning.startswith(
        "warning: a start would fail here: FID needs the detector inception-2015-12-05.pt (sha"
    )
    assert str(tmp_path / "inception-2015-12-05.pt") in warning


def test_a_run_is_not_resumed_under_another_protocol(tmp_path: Path) -> None:
    config = small(tmp_path)
    manifest = {"settings": flatten(config)}
    require_same_settings(
        apply_overrides(config, ["evaluator.workers=2", "evaluator.teacher_figure=false"]), 1, manifest
    )
    with pytest.raises(ConfigError, match=r"evaluator\.protocol: toy then, edm-cifar10-5k now"):
        require_same_settings(apply_overrides(config, EDM), 1, manifest)


def test_runs_of_two_protocols_are_not_compared_nor_swept(tmp_path: Path) -> None:
    file, sha256 = write_detector(tmp_path)
    reference = tmp_path / "nowhere.npz"
    reference.write_bytes(b"")
    settings = [
        *EDM,
        f"evaluator.detector_file={file}",
        f"evaluator.detector_sha256={sha256}",
        f"evaluator.reference={reference}",
    ]
    runs = [small(tmp_path), replace(small(tmp_path, *settings), name="other")]
    with pytest.raises(
        ConfigError, match=r"evaluator\.protocol is toy \(sid_digits\), edm-cifar10-5k \(other\)"
    ):
        compare("both", runs, at_once=1)
    sweep = SweepConfig(run=apply_overrides(digits.sid(128), EDM), space={"method.alpha": [1.0, 1.2]})
    assert sweep.figure == "eval/fid_5k"
    with pytest.raises(ConfigError, match=r"evaluator\.protocol can't be varied"):
        checked(replace(sweep, space={"evaluator.protocol": ["toy", "edm-cifar10-5k"]}))
    with pytest.raises(
        ConfigError, match=r"--metric 'eval/toyfid_1797' is reported by no trial; .*eval/fid_5k"
    ):
        checked(replace(sweep, metric="eval/toyfid_1797"))


FID = replace(
    PROTOCOL, name="edm-cifar10-5k", metric="fid", num_samples=5000, seed_rule="generator-per-image on cpu"
)


def ledger(folder: Path, protocol: Protocol, **figures: float) -> Path:
    """A run's folder with the figures of two steps."""
    folder.mkdir(parents=True)
    described = protocol.to_dict() | {"hash": protocol.hash()}
    entries = {
        str(step): {
            "state": "done",
            "metrics": {protocol.key(name): value + step for name, value in figures.items()},
            "protocol": described,
        }
        for step in (0, 2)
    }
    (folder / "evaluations.json").write_text(json.dumps(entries))
    return folder


def test_a_report_refuses_two_protocols_and_shows_one_without_second_figure(tmp_path: Path) -> None:
    one = ledger(tmp_path / "one", FID, fid=3.0)
    other = ledger(tmp_path / "other", replace(FID, resize="crop-lanczos256-clean299"), fid=2.0)
    toy = ledger(tmp_path / "toy", PROTOCOL, toyfid=1.0, prompt_accuracy=0.5)
    for folders in ([one, toy], [one, other]):
        with pytest.raises(
            ConfigError, match=r"can't be compared, their protocols differ in .*resize|metric"
        ):
            write_report(folders, tmp_path / "page.html", "both")
    again = ledger(tmp_path / "again", FID, fid=4.0)
    page = write_report([one, again], tmp_path / "page.html", "FID alone").read_text()
    assert "generator-per-image on cpu" in page
    assert "No front: the protocol's reference has no images" in page
    assert "lower is better." in page
    scored = ledger(tmp_path / "scored", FID, fid=3.0, clip_score=0.3)
    page = write_report([scored], tmp_path / "page.html", "with a score").read_text()
    assert "clip score" in page


def test_a_run_without_its_teachers_figure_says_nothing_of_it(tmp_path: Path) -> None:
    few = [
        "train.generator_updates=1",
        "evaluator.num_samples=40",
        "evaluator.teacher_figure=false",
        "tracking.uri=off",
    ]
    summary = run(small(tmp_path, *few, "teacher.preflight=false"))
    steps = json.loads((Path(summary["run_dir"]) / "evaluations.json").read_text()).keys()
    assert steps == {"0", "1"}
    assert summary["toyfid_teacher"] is None
    assert not list((tmp_path / "teacher_figures").glob("*"))
    printed = summary_table(summary)
    assert "toyfid (40)" in printed
    assert "teacher," not in printed
    compared = comparison_table([row(summary)])
    assert compared.splitlines()[0].startswith(
        "| run | steps | toyfid (40), start | end | lower by | label accuracy |"
    )
    assert "teacher" not in compared


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run's folder with a snapshot of its teacher's weights, and its data."""
    config = resolve(
        small(
            tmp_path_factory.mktemp("runs"), "evaluator.num_samples=90", "evaluator.batch_size=20",
            "evaluator.teacher_steps=2", "evaluator.weights=raw", "evaluator.grid_images=2", "evaluator.threads=1",
            "evaluator.idle_priority=false", "placement.session=ray", "evaluator.workers=3",
        )
    )  # fmt: skip
    validate(config)
    prepare_builtin(config)
    weights = state_for_saving(build_pipeline(config).denoiser)
    snapshots = Snapshots(f"{config.run_dir}/snapshots", keep=1)
    snapshots.write_part(0, "generator", prefixed(weights, "weights/"), {})
    snapshots.write_part(0, "critic", prefixed(weights, "weights/denoiser."), {})
    snapshots.commit(0, {"config": to_dict(config)})
    return config


def test_evaluate_takes_the_protocols_settings(snapshot: RunConfig, tmp_path: Path) -> None:
    found = evaluate(snapshot.run_dir, num_samples=40, settings=["evaluator.teacher_figure=false"])
    assert found["protocol"] == "digits-val"
    assert {name for name in found if name.startswith("eval/")} == {
        "eval/toyfid_40", "eval/toykid_40", "eval/label_accuracy_40", "eval/seconds",
    }  # fmt: skip
    file, sha256 = write_detector(tmp_path)
    own = [
        f"evaluator.detector_file={file}",
        f"evaluator.detector_sha256={sha256}",
        "evaluator.reference=x.npz",
    ]
    with pytest.raises(
        ConfigError, match=r"x\.npz is not there; evaluator\.protocol=edm-cifar10-50k@40 compares"
    ):
        evaluate(snapshot.run_dir, num_samples=40, settings=["evaluator.protocol=edm-cifar10-50k", *own])
    with pytest.raises(ConfigError, match=r"'teacher\.dtype=bf16': only settings of the evaluator"):
        evaluate(snapshot.run_dir, settings=["teacher.dtype=bf16"])


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        logging_level="WARNING",
    )
    yield
    ray.shutdown()


def process_of(handle: Any) -> int:
    return int(ray.get(handle.__ray_call__.remote(lambda _: os.getpid())))


@pytest.mark.ray
def test_three_evaluators_find_the_figures_of_one_and_outlive_a_death(
    snapshot: RunConfig, cluster: None
) -> None:
    torch.set_num_threads(1)
    local = build_evaluator(snapshot)
    alone = evaluate_snapshot(local, snapshot, 0)
    handles = actors.start_evaluators(to_dict(snapshot), 3, 0.0)
    judge = actors.ActorEvaluator(handles[0])

    def asked(step: int) -> dict[str, Any]:
        judge.start(step)
        found = judge.collect(120.0)
        assert found is not None
        assert found.protocol["hash"] == (alone.protocol["hash"] if step == 0 else found.protocol["hash"])
        return dict(found.metrics)

    def same(found: dict[str, Any], expected: dict[str, float]) -> None:
        for name, value in expected.items():
            if name != "eval/seconds":
                assert found[name] == pytest.approx(value, rel=1e-6), name

    same(asked(0), alone.metrics)
    # one helper is killed and comes back, the other one is gone for good
    pid = process_of(handles[1])
    os.kill(pid, signal.SIGKILL)
    ray.kill(handles[2])
    time.sleep(0.5)
    same(asked(0), alone.metrics)
    assert process_of(handles[1]) != pid
    teacher = local.evaluate_teacher().metrics
    for cached in (Path(snapshot.output_dir) / "teacher_figures").glob("*.json"):
        cached.unlink()
    same(asked(TEACHER_STEP), teacher)
