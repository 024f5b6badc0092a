"""How much memory do the trials of a sweep save by sharing one teacher? Measured on this machine.

    python cluster/shared_teacher.py --out shared_teacher.json

makes a teacher of random weights (the scenes' teacher with wider layers), sweeps two guidance scales of DMD2 over it,
both trials at once, first with one teacher for all and then with one for each, and looks while they train for the
teacher's weights in the memory of every process of theirs. Exit code 0 if the shared ones are there once, the others
more often, and the losses are the same in both sweeps. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
SCENES = ROOT / "raydistill" / "assets" / "scenes_teacher"
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+) (\d+)\s*(.*)")
_CHUNK = 1 << 24
_SIGNATURE_BYTES = 4096
_WAIT_S = 900.0
_TRIALS = 2
_UPDATES = 100
# once it is evaluated no student, critic or evaluated generator has the teacher's own weights any more
_LOOK_AT = 10


def make_teacher(folder: Path, width: int) -> tuple[int, bytes]:
    """Write the teacher; returns the bytes of its network's weights, and some of a convolution that are nowhere else,
    laid out as networks in use have them (channels last).

    In the file they lie otherwise, and so in memory that a process has freed after it had read them; those of a linear
    layer would be the same, and mapped from the file.
    """
    from raydistill.models.diffusers_hub import import_diffusers

    shutil.copytree(SCENES, folder, ignore=shutil.ignore_patterns("unet", "figures.json"))
    model = import_diffusers().UNet2DConditionModel
    described = json.loads((SCENES / "unet" / "config.json").read_text())
    torch.manual_seed(0)
    unet = model.from_config(described | {"block_out_channels": [width, 2 * width]})
    unet.save_pretrained(folder / "unet")
    weights = unet.state_dict()
    kernel = max((each for each in weights.values() if each.ndim == 4), key=lambda each: each.numel())
    laid_out = kernel.permute(0, 2, 3, 1).contiguous()
    return sum(each.nbytes for each in weights.values()), laid_out.numpy().tobytes()[:_SIGNATURE_BYTES]


def measure(folder: Path, teacher: Path, signature: bytes, *, shared: bool) -> dict[str, Any]:
    """Run the sweep and look. Raises RuntimeError if it fails."""
    name = "shared" if shared else "own"
    command = [
        sys.executable, "-m", "raydistill.cli", "sweep", str(ROOT / "jobs" / "dmd2_coco.py"),
        "--over", "teacher.guidance_scale=1.5,3", "--no-asha", *([] if shared else ["--own-teachers"]),
        f"name={name}", f"output_dir={folder}/runs", f"teacher.path={teacher}", "teacher.preflight=false",
        "train.batch_size=2", f"train.generator_updates={_UPDATES}", "train.log_every=1",
        "method.critic_updates_per_generator=1", "evaluator.every=10", "evaluator.num_samples=16",
        "evaluator.batch_size=16", "evaluator.idle_priority=false", "evaluator.teacher_steps=2",
        "evaluator.grid_images=2",
        "prepare.num_train=64", "prepare.num_val=32", "prepare.samples_per_shard=32", "placement.cpus_per_worker=1",
    ]  # fmt: skip
    with (folder / f"{name}.log").open("wb") as log:
        sweep = psutil.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + _WAIT_S
        while not all(_evaluated(folder / "runs" / f"{name}-{n:03d}") for n in range(_TRIALS)):
            if sweep.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the trials did not get to update {_LOOK_AT}: see {folder / name}.log")
            time.sleep(0.2)
        processes = [sweep, *sweep.children(recursive=True)]
        looked = look(processes, signature)
        if any(_losses(folder / "runs" / f"{name}-{n:03d}")[-1][0] == _UPDATES for n in range(_TRIALS)):
            raise RuntimeError(f"a trial was over before its memory was looked at: see {folder / name}.log")
        if sweep.wait(_WAIT_S):
            raise RuntimeError(f"the sweep failed: see {folder / name}.log")
    finally:
        for child in (*sweep.children(recursive=True), sweep) if sweep.is_running() else ():
            child.kill()
    counted = json.loads((folder / "runs" / name / "sweep.json").read_text())["teacher_copies"]
    losses = [_losses(folder / "runs" / f"{name}-{n:03d}") for n in range(_TRIALS)]
    return looked | {"counted_by_the_sweep": counted, "losses": losses}


def _losses(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    found = []
    for line in (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)[1:]:
        entry = json.loads(line) if line.endswith(b"\n") else {}  # the last may be half written
        losses = {n: v for n, v in entry.get("values", {}).items() if n.startswith("loss/")}
        if losses:
            found.append((entry["step"], losses))
    return found


def _evaluated(run_dir: Path) -> bool:
    ledger = run_dir / "evaluations.json"
    return ledger.is_file() and str(_LOOK_AT) in json.loads(ledger.read_text())


def look(processes: list[psutil.Process], signature: bytes) -> dict[str, Any]:
    """Where in memory the bytes lie, a place that several processes share once, and what all processes hold."""
    for process in processes:
        process.suspend()  # nothing moves meanwhile
    try:
        found = {place: process for process in processes for place in _places(process, signature)}
        holders = sorted(
            "object store" if isinstance(place[0], str) else _named(process)
            for place, process in found.items()
        )
        memory = sum(process.memory_full_info().pss for process in processes)
    finally:
        for process in processes:
            process.resume()
    return {"copies": len(found), "held_by": holders, "gib_of_all_processes": round(memory / 2**30, 2)}


def _named(process: psutil.Process) -> str:
    return " ".join(process.cmdline()[:1])


def _places(process: psutil.Process, signature: bytes) -> Iterator[tuple[Any, ...]]:
    root = Path("/proc", str(process.pid))
    with (root / "mem").open("rb", buffering=0) as memory:
        for line in (root / "maps").read_text().splitlines():
            start, end, rights, offset, device, inode, path = _REGION.fullmatch(line).groups()  # type: ignore[union-attr]
            in_memory = not path.startswith("/") or path.startswith("/dev/shm")
            if not rights.startswith("r") or not in_memory or path.startswith(("[vvar", "[vsyscall")):
                continue
            begin = int(start, 16)
            for address in _found(memory, begin, int(end, 16), signature):
                if rights.endswith("s"):
                    yield device, inode, int(offset, 16) + address - begin
                else:
                    yield process.pid, address


def _found(memory: Any, start: int, end: int, signature: bytes) -> Iterator[int]:
    for at in range(start, end, _CHUNK):
        data = _read(memory, at, min(_CHUNK + len(signature) - 1, end - at))
        found = data.find(signature)
        while found >= 0:
            yield at + found
            found = data.find(signature, found + 1)


def _read(memory: Any, at: int, count: int) -> bytes:
    """Of another process's memory, up to what it has reserved and never written."""
    read = b""
    try:
        memory.seek(at)
        while len(read) < count and (more := memory.read(count - len(read))):
            read += more
    except (OSError, ValueError):
        pass
    return read


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=192, help="channels of the first layers (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="to write the figures to, as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rdmem", dir="/tmp", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        size, signature = make_teacher(folder / "teacher", arguments.width)
        print(
            f"a teacher of {size / 2**20:.0f} MiB, {_TRIALS} trials of DMD2 at once, each with its evaluator"
        )
        print(f"{'':<28}{'copies in memory':>18}{'all processes':>16}")
        figures: dict[str, Any] = {"teacher_mib": round(size / 2**20, 1)}
        for name, shared in (("one teacher for all trials", True), ("a teacher for each", False)):
            try:
                found = measure(folder, folder / "teacher", signature, shared=shared)
            except RuntimeError as error:
                print(f"shared_teacher: error: {error}", file=sys.stderr)
                for log in folder.glob("*.log"):
                    print(log.read_text()[-3000:], file=sys.stderr)
                return 2
            print(f"{name:<28}{found['copies']:>18}{found['gib_of_all_processes']:>12.2f} GiB", flush=True)
            print(f"    held by {', '.join(found['held_by'])}")
            figures["shared" if shared else "own"] = found
    same = figures["shared"].pop("losses") == figures["own"].pop("losses")
    print(f"the losses of both trials are {'the same' if same else 'NOT THE SAME'} in both sweeps")
    figures["same_losses"] = same
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")
    counted = figures["shared"]["counted_by_the_sweep"]
    return 0 if same and figures["shared"]["copies"] == counted == 1 < figures["own"]["copies"] else 1


if __name__ == "__main__":
    sys.exit(main())
