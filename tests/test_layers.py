"""Who may import whom, read from the source: layers, a door for each third party, nothing heavy on top."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

# Each may import those before it, and itself.
SPINE = ("errors", "diffusion", "models", "methods", "roles", "runtime", "report", "sweep", "cli", "jobs")
# Beside the spine: these import errors and diffusion; roles and what follows import them.
BESIDE = ("data", "eval", "checkpoint", "tracking")
# These import errors only, and anyone may import them.
LEAVES = ("config", "object_store", "torchvision_ops")
# One file across the table: the words that captions and the scorer of captions share.
EXCEPTIONS = {("raydistill/data/scenes.py", "raydistill.eval.features")}

DOORS = {
    "diffusers": ("raydistill/models/diffusers_hub.py", "jobs/train_teacher.py"),
    "transformers": ("raydistill/models/diffusers_hub.py", "jobs/train_teacher.py"),
    "peft": ("raydistill/models/lora.py",),
    "mlflow": ("raydistill/tracking/",),
    "webdataset": ("raydistill/data/",),
    "s3fs": ("raydistill/object_store.py",),
    "sklearn": ("raydistill/data/",),
    "fsspec": ("raydistill/object_store.py", "raydistill/checkpoint/folders.py"),
    "botocore": ("raydistill/object_store.py",),
    "cleanfid": ("raydistill/eval/",),
    # the benchmark measures Ray itself, with actors and ranks that do nothing
    "ray": ("raydistill/runtime/", "raydistill/sweep/", "jobs/bench_orchestration.py"),
    "ray.train": ("raydistill/runtime/ray_train.py", "jobs/bench_orchestration.py"),
    "ray.tune": ("raydistill/sweep/",),
    "optuna": ("raydistill/sweep/",),
}
DISTRIBUTIONS = {"PIL": "pillow", "cleanfid": "clean-fid", "sklearn": "scikit-learn"}
# Parts of a declared dependency's interface: its errors (aiohttp, botocore), and what it can't be without.
COMES_WITH = {"aiohttp": "ray", "grpc": "ray", "botocore": "s3fs", "torchvision": "clean-fid"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every import in a file, also inside functions and through import_module("...")."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            else:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def allowed(layer: str) -> set[str]:
    """The top-level names that a layer may import."""
    if layer in LEAVES:
        return {"errors", layer}
    if layer in BESIDE:
        return {"errors", "diffusion", layer, *LEAVES}
    before = set(SPINE[: SPINE.index(layer) + 1]) | set(LEAVES)
    if SPINE.index(layer) >= SPINE.index("roles"):
        before |= set(BESIDE)
    return before


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(root: Path) -> list[str]:
    """One line for each import under `root` that the tables above forbid."""
    found = []
    for path in sorted([*(root / "raydistill").rglob("*.py"), *(root / "jobs").rglob("*.py")]):
        where = path.relative_to(root).as_posix()
        parts = path.relative_to(root).with_suffix("").parts
        layer = "jobs" if parts[0] == "jobs" else parts[1]
        if path.stem in ("utils", "util", "common", "helpers"):
            found.append(f"{where}: a helper lives with its noun")
        if layer not in (*SPINE, *BESIDE, *LEAVES, "__init__"):
            found.append(f"{where}: {layer} has no place in the layer table")
            continue
        for line, name in imports(path):
            at = f"{where}:{line}: {name}"
            if name.startswith("."):
                found.append(f"{at} is a relative import")
            elif any(is_below(name, package) for package in ("jobs", "tests", "cluster")):
                found.append(f"{at} is outside the package")
            elif is_below(name, "raydistill"):
                target = name.partition(".")[2].partition(".")[0]
                shared = any(where == file and is_below(name, module) for file, module in EXCEPTIONS)
                if layer == "__init__" or (target not in allowed(layer) and not shared):
                    found.append(f"{at} is not for {layer}")
                if layer == "methods" and path.stem != "__init__" and is_below(name, "raydistill.methods"):
                    own = name.split(".")[2:3] in ([path.stem], ["method"])
                    if not own:
                        found.append(f"{at}: a method doesn't import another")
            for package, doors in DOORS.items():
                if is_below(name, package) and not any(where.startswith(door) for door in doors):
                    found.append(f"{at} has another door: {', '.join(doors)}")
    return found


def third_parties(folder: Path) -> set[str]:
    """Distribution names of what the files under `folder` import from outside."""
    tops = {name.split(".")[0] for path in folder.rglob("*.py") for _, name in imports(path)}
    siblings = {path.stem for path in folder.rglob("*.py")}
    outside = {top for top in tops - siblings - {"raydistill"} if top not in sys.stdlib_module_names}
    return {canonicalize_name(DISTRIBUTIONS.get(top, top)) for top in outside}


def test_no_import_runs_against_the_layers_or_through_another_door() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        (
            "raydistill/diffusion/x.py",
            "from raydistill.models.denoiser import Denoiser",
            "is not for diffusion",
        ),
        ("raydistill/methods/x.py", "def f():\n    import raydistill.runtime.run", "is not for methods"),
        ("raydistill/methods/x.py", "from raydistill.methods.dmd2 import DMD2", "doesn't import another"),
        ("raydistill/methods/x.py", "from raydistill.data import reader", "is not for methods"),
        ("raydistill/eval/x.py", "from raydistill import models", "is not for eval"),
        ("raydistill/data/x.py", "from raydistill.eval.features import COLOURS", "is not for data"),
        ("raydistill/roles/x.py", "from raydistill.cli import main", "is not for roles"),
        ("raydistill/config.py", "from raydistill.runtime import settings", "is not for config"),
        ("raydistill/__init__.py", "from raydistill.config import flatten", "is not for __init__"),
        ("raydistill/runtime/x.py", "import jobs.dmd2_coco", "outside the package"),
        ("raydistill/runtime/x.py", "from . import run", "relative import"),
        ("raydistill/runtime/x.py", "from ray.train.torch import TorchTrainer", "has another door"),
        ("raydistill/roles/x.py", "import ray", "has another door"),
        ("raydistill/roles/x.py", "import importlib\nimportlib.import_module('mlflow')", "has another door"),
        ("raydistill/models/x.py", "from diffusers import UNet2DConditionModel", "has another door"),
        ("jobs/x.py", "import s3fs", "has another door"),
        ("raydistill/data/utils.py", "", "lives with its noun"),
        ("raydistill/helper.py", "", "no place in the layer table"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("raydistill/roles/x.py", "from raydistill.data.reader import Batch\nimport raydistill.tracking"),
        ("raydistill/runtime/ray_train.py", "import ray.train\nfrom raydistill.roles.world import World"),
        ("raydistill/methods/x.py", "from raydistill.methods.method import Method\nimport torch"),
        ("raydistill/data/scenes.py", "from raydistill.eval.features import COLOURS"),
        ("jobs/x.py", "from raydistill.cli import job_main"),
    ],
)
def test_an_allowed_import_is_not_complained_about(tmp_path: Path, path: str, source: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    used = third_parties(ROOT / "raydistill") | third_parties(ROOT / "jobs")
    assert {COMES_WITH.get(name, name) for name in used} - declared == set()
    # scipy is declared for its upper bound; s3fs is what fsspec loads for s3:// addresses.
    assert declared - used - {"scipy", "s3fs"} == set()


def test_every_direct_dependency_has_a_tested_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    text = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {pin.name: pin for pin in (Requirement(line) for line in text if line and line[0] != "#")}
    for wanted in map(Requirement, lines):
        pin = pins[wanted.name]
        assert next(iter(pin.specifier)).operator == "=="
        assert wanted.specifier.contains(next(iter(pin.specifier)).version), f"{pin} is not within {wanted}"


@pytest.mark.parametrize(
    "module",
    ["raydistill", "raydistill.errors", "raydistill.config", "raydistill.cli", "raydistill.methods",
     "raydistill.runtime.local_cluster", "raydistill.runtime.submit"],
)  # fmt: skip
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    heavy = {"torch", "ray", "mlflow", "diffusers", "transformers", "numpy", "pydantic", "webdataset", "s3fs"}
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", ["raydistill.runtime.actors", "raydistill.runtime.ray_train"])
def test_services_that_need_no_network_do_not_wait_for_the_libraries_of_networks(module: str) -> None:
    heavy = {"mlflow", "diffusers", "transformers", "torchvision", "s3fs"}
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & {heavy!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
