"""S3 goes away in mid-run and comes back: does the run go on, is everything there, and are its figures the same?

    python cluster/s3_outage.py --outage 20

starts an S3 service on this machine (s3_service.py), runs jobs/dmd2_coco.py small three times, and compares:

1. undisturbed: shards and snapshots in local folders;
2. outage: shards and snapshots on S3 over HTTP, the service killed with SIGKILL in mid-run and started again after so
   many seconds;
3. moved: the same, the run itself killed with SIGKILL, then the same command with another, empty output_dir, as on
   another machine, which has nothing but what is on S3.

    python cluster/s3_outage.py --ranks

runs instead a third of the updates on one worker under Ray Train, a third on two and the last on one again, each in an
empty folder, from the snapshots on S3 of the one before; their losses and gradient norms must be those of 1 to 1e-5.

Prints what happened; exit code 0 if all came to the figures (and 2 and 3 to the very weights) of 1 and S3 has every
snapshot whole.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import torch
from s3_service import S3Service

from raydistill.checkpoint import Snapshots

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "prepare.num_train=96", "prepare.num_val=48", "prepare.samples_per_shard=2", "data.shuffle_shards=1",
    "train.batch_size=8", "generator.lr_schedule=constant", "critic.lr_schedule=constant", "checkpoint.keep=2",
    "evaluator.num_samples=32", "evaluator.batch_size=16", "evaluator.teacher_steps=2", "evaluator.grid_images=2",
    "placement.workers=1", "evaluator.head_start_s=0",
)  # fmt: skip
"""More shards than are kept open, so that a run reads them from S3 again and again."""
BUCKET = "raydistill"
COMPARED = (
    "loss/", "grad_norm/", "critic/", "sample/", "lr/", "images", "eval/toyfid", "eval/prompt", "eval/teacher_"
)  # fmt: skip
_RUN_S = 900.0
_SAME = 1e-5
"""Of losses that two ranks add up in another order than one, relative."""


class Drill:
    """Runs in folders of their own below one, on one S3 service."""

    def __init__(self, folder: Path, service: S3Service, updates: int, overrides: list[str]):
        self.folder = folder
        self.service = service
        self.updates = updates
        self.overrides = [
            *SMALL, f"train.generator_updates={updates}", f"checkpoint.every={max(2, updates // 10)}",
            f"evaluator.every={max(1, updates // 2)}", *overrides,
        ]  # fmt: skip
        self.files = fsspec.filesystem("s3", endpoint_url=service.endpoint, skip_instance_cache=True)

    def run_dir(self, name: str) -> Path:
        return self.folder / name / "run"

    def start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, str(ROOT / "jobs" / "dmd2_coco.py"), f"output_dir={self.folder / name}", "name=run",
            *self.overrides, *more,
        ]  # fmt: skip
        with (self.folder / f"{name}.log").open("ab") as output:
            return subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=os.environ | self.service.environment
            )  # fmt: skip

    def on_s3(self, name: str) -> list[str]:
        return [
            f"data.shards=s3://{BUCKET}/shards", "prepare.coco=none", f"data.endpoint_url={self.service.endpoint}",
            f"checkpoint.uri=s3://{BUCKET}/{name}", f"checkpoint.endpoint_url={self.service.endpoint}",
            "checkpoint.retry_max_s=2",
        ]  # fmt: skip

    def finish(self, name: str, run: subprocess.Popen[bytes]) -> str:
        """Wait for a run; what it printed. Raises RuntimeError if it failed."""
        code = run.wait(_RUN_S)
        printed = (self.folder / f"{name}.log").read_text(errors="replace")
        if code:
            raise RuntimeError(f"run {name} failed: {printed.strip()[-800:]}")
        return printed

    def undisturbed(self) -> None:
        self.finish("undisturbed", self.start("undisturbed"))
        self.files.mkdir(BUCKET)
        (index,) = (self.folder / "undisturbed" / "data").glob("*/shards/index.json")
        for file in index.parent.glob("[!.]*"):
            self.files.put_file(str(file), f"{BUCKET}/shards/{file.name}")

    def outage(self, seconds: float) -> dict[str, Any]:
        """The service killed for so long once a tenth of the run is made and a snapshot is there."""
        run = self.start("outage", *self.on_s3("outage"))
        try:
            there = self._wait(run, "outage", lambda: self.copies("outage"))
            self._wait(run, "outage", lambda: last_update(self.run_dir("outage")) >= self.updates // 10)
            self.service.kill()
            before, stopped = last_update(self.run_dir("outage")), time.monotonic()
            time.sleep(seconds)
            during = last_update(self.run_dir("outage")) - before
            self.service.start()
            away = time.monotonic() - stopped
            printed = self.finish("outage", run)
        finally:
            run.kill()
            run.wait()
        return {
            "S3 away, s": round(away, 1),
            "killed after update": before,
            "snapshots on S3 by then": there,
            "updates while away": during,
            "uploads that failed": int(max(v for _, v in points(self.run_dir("outage"), "upload/retries"))),
            "restarts": int(max(v for _, v in points(self.run_dir("outage"), "restarts"))),
            "reads that were tried again": printed.count("next attempt in"),
            "told": _told(printed, ("snapshots wait", "takes snapshots again")),
        } | self._compared("outage", uploaded="outage")

    def moved(self) -> dict[str, Any]:
        """The run killed once a third of its updates is on S3, and begun where nothing is.

        In a folder of its own: under Ray the killed driver's workers may write into the old one for some seconds more.
        """
        run = self.start("moved", *self.on_s3("moved"))
        try:
            self._wait(run, "moved", lambda: max(self.copies("moved"), default=0) >= self.updates // 3)
        finally:
            run.kill()
            run.wait()
        reached = last_update(self.run_dir("moved"))
        elsewhere = "moved_elsewhere"
        printed = self.finish(elsewhere, self.start(elsewhere, *self.on_s3("moved")))
        resumed = re.findall(r"resumed from \S+step_0*(\d+)", printed)
        return {
            "killed after update": reached,
            "went on from update": int(resumed[-1]) if resumed else None,
            "told": _told(printed, ("fetched",)),
        } | self._compared(elsewhere, uploaded="moved")

    def ranks(self) -> dict[str, Any]:
        """One worker, two, and one again, in folders of their own on one address of snapshots."""
        went_on = []
        for number, workers in enumerate((1, 2, 1), start=1):
            name, updates = f"part_{number}", self.updates * number // 3
            more = (f"train.generator_updates={updates}", f"placement.workers={workers}")
            printed = self.finish(name, self.start(name, *self.on_s3("ranks"), *more))
            went_on += re.findall(r"resumed from \S+step_0*(\d+)", printed)[-1:]
        expected, found = figures(self.run_dir("undisturbed")), figures(self.run_dir("part_3"))
        keys = [key for key in expected if key[0].startswith(("loss/", "grad_norm/", "images"))]
        differences = [abs(found.get(key, torch.inf) / expected[key] - 1) for key in keys if expected[key]]
        return {
            "went on from updates": [int(step) for step in went_on],
            "figures": len(differences),
            "largest relative difference": max(differences),
        }

    def copies(self, name: str) -> list[int]:
        return Snapshots(f"s3://{BUCKET}/{name}/run/snapshots", 1, self.service.endpoint).steps()

    def _wait(self, run: subprocess.Popen[bytes], name: str, there: Callable[[], Any]) -> Any:
        until = time.monotonic() + _RUN_S
        while not (found := there()):
            if run.poll() is not None or time.monotonic() > until:
                log = (self.folder / f"{name}.log").read_text(errors="replace")
                raise RuntimeError(f"run {name} did not come so far: {log.strip()[-800:]}")
            time.sleep(0.1)
        return found

    def _compared(self, name: str, uploaded: str) -> dict[str, Any]:
        expected, found = figures(self.run_dir("undisturbed")), figures(self.run_dir(name))
        # the evaluator takes the newest snapshot only: under Ray a figure in the middle may be passed over
        optional = {
            key for key in expected | found if key[0].startswith("eval/") and 0 < key[1] < self.updates
        }
        wanted = expected.keys() - optional
        local = Snapshots(str(self.run_dir(name) / "snapshots"), 1)
        remote = Snapshots(f"s3://{BUCKET}/{uploaded}/run/snapshots", 1, self.service.endpoint)
        whole = [
            step for step in remote.steps() if remote.read(step).num_bytes
        ]  # reads and checks every byte
        return {
            "figures": len(wanted),
            "figures that differ": sorted(key for key in wanted if found.get(key) != expected[key]),
            "weights that differ": self._other_weights(remote),
            "snapshots here": local.steps(),
            "snapshots on S3, hashes checked": whole,
        }

    def _other_weights(self, remote: Snapshots) -> list[str]:
        ours = remote.read(self.updates)
        theirs = Snapshots(str(self.run_dir("undisturbed") / "snapshots"), 1).read(self.updates)
        return [
            f"{role}/{name}"
            for role in theirs.roles
            for name, tensor in theirs.part(role)[0].items()
            if not torch.equal(ours.part(role)[0][name], tensor)
        ]


def is_right(result: dict[str, Any]) -> bool:
    """Whether a run came to what the undisturbed one did, and S3 has what its folder has."""
    return (
        not result["figures that differ"]
        and not result["weights that differ"]
        and result["snapshots here"] == result["snapshots on S3, hashes checked"]
    )


def points(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric in a run's journal."""
    return [(step, value) for (found, step), value in _journal(run_dir).items() if found == name]


def figures(run_dir: Path) -> dict[tuple[str, int], float]:
    """Every journaled figure that does not depend on the clock."""
    return {key: value for key, value in _journal(run_dir).items() if key[0].startswith(COMPARED)}


def last_update(run_dir: Path) -> int:
    return max((step for name, step in _journal(run_dir) if name == "generator_updates"), default=0)


def _journal(run_dir: Path) -> dict[tuple[str, int], float]:
    journal, found = run_dir / "metrics.jsonl", {}
    # the last line may be half written
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    for line in lines:
        entry = json.loads(line)
        for name, value in entry.get("values", {}).items():
            if (name, entry["step"]) in found:
                raise RuntimeError(f"{name} is there twice at update {entry['step']}")
            found[name, entry["step"]] = value
    return found


def _told(printed: str, words: tuple[str, ...]) -> list[str]:
    return [line[:240] for line in printed.splitlines() if any(word in line for word in words)][:6]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outage", type=float, default=20.0, metavar="S", help="seconds (%(default)s)")
    parser.add_argument("--updates", type=int, default=100, help="of each run (%(default)s)")
    parser.add_argument("--ranks", action="store_true", help="other numbers of ranks instead of outages")
    parser.add_argument(
        "overrides", nargs="*", help="settings of the runs, for instance placement.session=inline"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rd-s3-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        with S3Service(folder / "moto.log") as service:
            os.environ.update(service.environment)
            drill = Drill(folder, service, arguments.updates, arguments.overrides)
            drill.undisturbed()
            if arguments.ranks:
                result = drill.ranks()
                print("\n".join(f"{what}: {value}" for what, value in result.items()))
                return 0 if result["largest relative difference"] < _SAME else 1
            results = {"outage": drill.outage(arguments.outage), "moved": drill.moved()}
    for name, result in results.items():
        print(f"{name}:")
        for what, value in result.items():
            for line in value if what == "told" else [value]:
                print(f"  {what}: {line}")
    wrong = [name for name, result in results.items() if not is_right(result)]
    print(
        f"not the undisturbed run's: {', '.join(wrong)}"
        if wrong
        else "both are the undisturbed run to the last bit"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
