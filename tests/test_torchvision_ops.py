import subprocess
import sys
from pathlib import Path

CALL = """
from raydistill.torchvision_ops import ensure_torchvision_importable
print(ensure_torchvision_importable())
print(ensure_torchvision_importable())
"""
USE = """
import torch, torchvision.transforms as transforms
from torchvision.ops import nms
print(tuple(transforms.Resize(8)(torch.zeros(3, 16, 16)).shape))
"""
# what the compiled library of a torchvision that fits does when it is loaded
MATCHING = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def run(code: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True)


def test_torchvision_is_importable_and_something_is_done_only_if_it_was_not() -> None:
    fits = run("import torchvision").returncode == 0
    child = run(CALL + USE)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split("\n")[:3] == [str(not fits), "False", "(3, 8, 8)"]


def test_a_torchvision_that_fits_is_left_alone() -> None:
    # where this machine's pair does not fit, its operators are declared first, as a fitting binary would do
    fits = run("import torchvision").returncode == 0
    child = run(("" if fits else MATCHING) + CALL + USE)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split("\n")[:3] == ["False", "False", "(3, 8, 8)"]


def test_a_machine_without_torchvision_needs_nothing() -> None:
    child = run("import sys; sys.modules['torchvision'] = None" + CALL)
    assert child.stdout.split() == ["False", "False"], child.stderr


def test_any_other_failure_of_torchvision_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('the disk is on fire')")
    child = run(CALL, tmp_path)
    assert child.returncode != 0
    assert "the disk is on fire" in child.stderr
