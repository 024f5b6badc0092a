"""Runs on the shipped digits teacher, from their settings to an exported folder, and what they are refused for."""

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest

from raydistill.checkpoint import Snapshots, prefixed
from raydistill.config import apply_overrides, to_dict
from raydistill.data.reader import DataConfig
from raydistill.errors import ConfigError, DataError, RayDistillError
from raydistill.methods.sid import SiDConfig
from raydistill.models.denoiser import state_for_saving
from raydistill.runtime import digits
from raydistill.runtime.build import build_pipeline
from raydistill.runtime.commands import export, export_difference
from raydistill.runtime.run import run
from raydistill.runtime.settings import RunConfig, TeacherConfig
from raydistill.runtime.summary import warn_if_not_exportable
from tests.data.samples_on_disk import write_coco

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "train.batch_size=8", "train.generator_updates=3", "checkpoint.every=2", "evaluator.enabled=false",
    "checkpoint.keep=10", "placement.session=inline", "tracking.uri=off", "teacher.preflight=false",
]  # fmt: skip
RECIPES: dict[str, Callable[[], RunConfig]] = {
    "dmd2": digits.dmd2,
    "sid": digits.sid,
    "sida": lambda: digits.sida(generator_rest_updates=1, gan_start_update=2),
    "moment_matching_4": lambda: digits.moment_matching(4),
    "instant_4": lambda: digits.moment_matching(4, variant="instant"),
}


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def small(recipe: str, output_dir: Path, *more: str) -> RunConfig:
    return apply_overrides(RECIPES[recipe](), [*SMALL, f"output_dir={output_dir}", f"name={recipe}", *more])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_trains_and_its_exported_network_makes_its_very_images(
    output_dir: Path, tmp_path: Path, recipe: str
) -> None:
    summary = run(small(recipe, output_dir))
    updates, r = 3, summary["critic_updates"] // 3
    assert summary["generator_updates"] == updates
    assert summary["images"] == 8 * updates * (r + (recipe != "dmd2"))
    steps = 4 if recipe.endswith("4") else 1
    assert summary["generator_steps"] == steps
    described = json.loads((Path(summary["export"]) / "edm.json").read_text())["extra"]["generator"]
    assert len(described["sigmas"]) == steps
    assert described["sampler"] == ("ancestral" if steps == 4 else "few_step")

    folder = str(output_dir / recipe)
    out = export(folder, str(tmp_path / "export"), weights="raw")
    assert export_difference(folder, str(out), prompts=["3", "7"], weights="raw") == 0.0
    # what was trained, not what it began with
    assert export_difference(folder, str(out), prompts=["3", "7"], weights="raw", step=0) > 0.0
    with pytest.raises(ConfigError, match="exists already"):
        export(folder, str(out))


def test_a_generator_of_a_latent_teacher_that_diffusers_cannot_start_is_not_exported_and_told_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = RunConfig(
        name="vp", output_dir=str(tmp_path), teacher=TeacherConfig(path="builtin:scenes"), method=SiDConfig(),
        data=DataConfig(shards="none"),
    )  # fmt: skip
    weights = state_for_saving(build_pipeline(config).denoiser)
    snapshots = Snapshots(f"{config.run_dir}/snapshots", keep=1)
    snapshots.write_part(0, "generator", prefixed(weights, "weights/"), {})
    snapshots.commit(0, {"config": to_dict(config)})
    why = r"this method begins with 0\.9286 and samples by few_step \(method\.kind\)"
    with pytest.raises(ConfigError, match=why) as caught:
        export(config.run_dir, str(tmp_path / "export"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "export").exists()
    warn_if_not_exportable(config)
    assert "can be trained and sampled, but not exported" in caplog.text


@pytest.mark.parametrize(
    ("recipe", "override", "named"),
    [
        ("sid", "teacher.guidance_scale=2", r"teacher\.guidance_scale=2 needs an unconditional half"),
        (
            "sid",
            "method.guidance_scale_critic_training=2",
            r"method\.guidance_scale_critic_training=2 needs an",
        ),
        ("sid", "method.guidance_scale_critic=1.5", r"method\.guidance_scale_critic=1\.5 needs an"),
        ("sid", "method.alpha=5", r"method\.alpha=5\.0 must lie in -1 to 2"),
        ("sid", "method.sigma_init=90", r"method\.sigma_init=90\.0 must lie within .*0\.002 to 80"),
        ("moment_matching_4", "method.num_steps=0", r"method\.num_steps=0 must lie in 1\.\.64"),
        ("sid", "teacher.path=random:edm-mnist", r"teacher\.path='random:edm-mnist' is not one of"),
        ("sid", "teacher.path=/nowhere/net.pkl", r"teacher\.path='/nowhere/net\.pkl'"),
    ],
)
def test_bad_settings_are_one_line_before_a_run_is_opened(
    output_dir: Path, recipe: str, override: str, named: str
) -> None:
    with pytest.raises(RayDistillError, match=named) as caught:
        run(small(recipe, output_dir, "name=bad", override))
    assert "\n" not in str(caught.value).strip()
    assert not (output_dir / "bad").exists()


class _Call:
    """Pickles to a call of a function."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self._path}",)


def test_a_dry_run_refuses_what_the_run_would_and_executes_nothing(tmp_path: Path) -> None:
    evil = tmp_path / "network-snapshot.pkl"
    evil.write_bytes(pickle.dumps(OrderedDict(ema=_Call(tmp_path / "it-ran"))))
    apart = ["placement.mode=disaggregated", "placement.max_staleness=1"]
    for overrides, named in (
        (
            [f"teacher.path={evil}"],
            "asks for the global posix.system, which no EDM network snapshot needs; refused: nothing is executed",
        ),
        (apart, "placement.max_staleness=1 needs a method whose generator goes first; method.kind=sid"),
        (["teacher.guidance_scale=2"], "teacher.guidance_scale=2 needs an unconditional half"),
        (["teacher.prediction=epsilon"], "teacher.prediction=epsilon: what the EDM network"),
    ):
        done = subprocess.run(
            [sys.executable, "jobs/sid_cifar10.py", "--dry-run", f"output_dir={tmp_path / 'o'}", *overrides],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("raydistill: error: ")
        assert named in line
    assert not (tmp_path / "it-ran").exists()
    assert not (tmp_path / "o").exists()


def test_a_caption_in_the_shards_that_is_no_class_stops_the_run_by_its_name(tmp_path: Path) -> None:
    images = {f"{number}.png": (8, 8) for number in range(16)}
    captions = {number: ["7" if number % 2 else "seven"] for number in range(1, 17)}
    coco = write_coco(tmp_path / "coco", "train", images, captions)
    given = [f"prepare.coco={coco}", f"data.shards={tmp_path / 'shards'}"]
    with pytest.raises(
        DataError, match=r"caption 'seven' is no class number: .* 0 to 9 \(data\.shards"
    ) as caught:
        run(small("sid", tmp_path, *given))
    assert "\n" not in str(caught.value)
