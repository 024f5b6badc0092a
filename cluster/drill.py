"""Does the placement change the numbers, and what does a death cost? Real jobs on a real cluster of three raylets.

    python cluster/drill.py --out drill.json

Every job is jobs/dmd2_coco.py on the same seed, small (batch 16, R 2) so that two cores are enough.

    placements   30 updates colocated, with two data-parallel ranks, with two that share the networks, with a teacher
                 pool, and with roles apart: losses, gradients and final weights against the colocated run's
    faults       roles apart and two teacher replicas on three raylets, one of them the driver's. A teacher replica, the
                 evaluator, a critic rank, a generator rank, a whole raylet with its ranks, and the driver are killed
                 (SIGKILL) in mid-step, each in a run of its own; the driver's job is submitted again, all others are
                 left alone. Final weights against the undisturbed run's
    service      two jobs of different guidance scales share one detached teacher service at the same time, against the
                 same jobs with a pool of their own; a third job with another teacher is refused

Exit code 0 if every run ended by itself with the weights that it should have.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from local_nodes import LocalNodes

from raydistill.checkpoint import Snapshots

ROOT = Path(__file__).resolve().parents[1]
UPDATES = 30
EVERY = 10
TIMEOUT_S = 600.0
SMALL = [
    "prepare.num_train=192", "prepare.num_val=64", "prepare.samples_per_shard=64", "train.batch_size=16",
    f"train.generator_updates={UPDATES}", "method.critic_updates_per_generator=2", f"checkpoint.every={EVERY}",
    "checkpoint.keep=10", "method.gan_weight_generator=0.03", "method.gan_weight_critic=0.03",
    f"evaluator.every={UPDATES // 2}", "evaluator.num_samples=32", "evaluator.batch_size=8",
    "evaluator.teacher_steps=2", "evaluator.grid_images=2",
]  # fmt: skip
APART = [
    "placement.mode=disaggregated", "placement.workers=2", "placement.critic_ranks=1", "placement.cpus_per_worker=1",
    "placement.teacher_replicas=2",
]  # fmt: skip
COMPARED = ("loss/", "grad_norm/", "sample/", "critic/", "eval/toyfid_", "eval/prompt_accuracy_")


class Job:
    """A run of the default job as a process of its own, joined to the cluster."""

    def __init__(self, folder: Path, name: str, address: str, overrides: list[str]):
        self.folder = folder / name
        self.name = name
        self._command = [
            sys.executable, str(ROOT / "jobs" / "dmd2_coco.py"), f"output_dir={folder}", f"name={name}", *SMALL,
            *overrides,
        ]  # fmt: skip
        self._environment = os.environ | {"RAY_ADDRESS": address, "PYTHONUNBUFFERED": "1"}
        self._log = folder / f"{name}.log"
        self._offset = 0
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command, env=self._environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def submit_again(self) -> None:
        """The same command once more, after the driver was killed."""
        self.process.wait()
        self.process = self._start()

    def output(self, start: int = 0) -> str:
        """What it printed from this character on."""
        return self._log.read_text(errors="replace")[start:]

    def step(self) -> int:
        """The last update whose losses are in the journal."""
        steps = [step for name, step in self.points() if name == "loss/dm"]
        return max(steps, default=0)

    def points(self) -> dict[tuple[str, int], float]:
        """Figures by name and step. Raises SystemExit if one is there twice."""
        found: dict[tuple[str, int], float] = {}
        journal = self.folder / "metrics.jsonl"
        lines = journal.read_text().splitlines() if journal.exists() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the last one may be half written
                entry = json.loads(line)
                for name, value in entry.get("values", {}).items():
                    if name.startswith(COMPARED) and (name, entry["step"]) in found:
                        raise SystemExit(f"{self.name}: {name} of update {entry['step']} is journaled twice")
                    found[name, entry["step"]] = value
        return found

    def times(self) -> tuple[float, float]:
        """When its first and its last update were logged, in seconds since the epoch."""
        lines = (json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines())
        stamps = [line["timestamp_ms"] / 1000 for line in lines if "loss/dm" in line.get("values", {})]
        return min(stamps), max(stamps)

    def wait_until(self, there: Callable[[], bool], what: str) -> None:
        """Poll until it is so. Raises SystemExit with the job's output if it ends before or takes too long."""
        until = time.monotonic() + TIMEOUT_S
        while not there():
            if self.process.poll() is not None or time.monotonic() > until:
                self.process.kill()
                raise SystemExit(f"{self.name}: {what} did not happen:\n{self.output()[-5000:]}")
            time.sleep(0.005)

    def finish(self) -> None:
        """Wait for its end. Raises SystemExit if it is not exit code 0."""
        try:
            code: int | str = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = f"none within {TIMEOUT_S:.0f} s"
        if code:
            raise SystemExit(f"{self.name}: exit code {code}:\n{self.output()[-5000:]}")

    def weights(self) -> dict[str, Any]:
        """Every tensor of its last snapshot, optimisers and EMA among them."""
        newest = Snapshots(str(self.folder / "snapshots"), keep=1).latest()
        if newest is None or newest.step != UPDATES:
            raise SystemExit(f"{self.name} has no snapshot of update {UPDATES}")
        return {
            f"{role}/{name}": tensor
            for role in ("generator", "critic")
            for name, tensor in newest.part(role)[0].items()
        }

    def rank_process(self, rank: int) -> psutil.Process:
        """The process of a rank, as Ray Train told last."""
        told = re.findall(r"pid=(\d+)\) world_rank=(\d+)", self.output())
        return psutil.Process(next(int(pid) for pid, of in reversed(told) if int(of) == rank))

    def actor_process(self, title: str) -> psutil.Process | None:
        """A process of the cluster whose title holds these words."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    return process
        return None


def digest(weights: dict[str, Any]) -> str:
    """Of every tensor."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        whole.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return whole.hexdigest()[:12]


def say(*words: object) -> None:
    print(*words, flush=True)


# ---- placements


def placements(nodes: LocalNodes, folder: Path) -> dict[str, Any]:
    """The same 30 updates in every placement, against one colocated process."""
    quiet = ["evaluator.enabled=false", "placement.cpus_per_worker=1"]
    runs = {
        "colocated": ["placement.workers=1"],
        "teachers": ["placement.mode=teachers", "placement.workers=1", "placement.teacher_replicas=2"],
        "disaggregated": APART,
        "colocated, 2 ranks": ["placement.workers=2"],
        "sharded, 2 ranks": ["placement.workers=2", "placement.sharding=fsdp"],
    }
    jobs = {}
    for number, (name, overrides) in enumerate(runs.items()):
        jobs[name] = Job(folder, f"placement{number}", nodes.address, [*quiet, *overrides])
        jobs[name].finish()
        say(f"placements: {name} done")
    reference, expected = jobs["colocated"].weights(), jobs["colocated"].points()
    say()
    say(f"{UPDATES} updates, same seed, against one colocated process:")
    say(f"{'placement':<20}{'losses: first update':>22}{'all updates':>14}{'final weights':>16}  weights")
    results: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        weights, points = job.weights(), job.points()
        losses = {
            key: abs(points[key] - value) / max(abs(value), 1e-12)
            for key, value in expected.items()
            if key[0].startswith("loss/")
        }
        first = max(value for (_, step), value in losses.items() if step == 1)
        moved = max(
            float((weights[key].double() - tensor.double()).abs().max()) for key, tensor in reference.items()
        )
        results[name] = {
            "losses_first_update": first, "losses": max(losses.values()), "weights": moved, "digest": digest(weights),
        }  # fmt: skip
        say(f"{name:<20}{first:>22.1e}{max(losses.values()):>14.1e}{moved:>16.1e}  {digest(weights)}")
    say(
        "losses: largest relative difference; final weights: largest absolute one, optimisers and EMA among them."
    )
    say(
        "Two ranks add up a batch in another order than one: the first losses differ by rounding, and Adam, which"
    )
    say("divides small gradients by their size, lets that grow from update to update.")
    for name in ("teachers", "disaggregated"):
        if results[name]["losses"] or results[name]["digest"] != results["colocated"]["digest"]:
            raise SystemExit(f"{name} is not bit-equal to colocated")
    for name in ("colocated, 2 ranks", "sharded, 2 ranks"):
        two = results[name]
        if two["losses_first_update"] > 1e-5 or two["losses"] > 1e-3 or two["weights"] > 1e-3:
            raise SystemExit(f"{name}: they differ from one by more than the order of sums explains")
    return {"placements": results}


# ---- faults


@dataclass(frozen=True)
class Fault:
    """What is killed, and how it is found."""

    name: str
    strike: Callable[[Job, LocalNodes], None]
    restarts: bool = True
    """Training starts again from a snapshot."""
    after_a_step: bool = True
    """Half an update after an update was logged; else as soon as it is found at work."""
    again: bool = False
    """The job is to be submitted again."""


def kill_busy(title: str) -> Callable[[Job, LocalNodes], None]:
    """SIGKILL to a process of the cluster while it does what its title says."""

    def strike(job: Job, nodes: LocalNodes) -> None:
        found: list[psutil.Process] = []

        def is_there() -> bool:
            process = job.actor_process(title)
            if process is not None:
                found.append(process)
            return bool(found)

        job.wait_until(is_there, title)
        found[0].kill()

    return strike


def kill_rank(rank: int) -> Callable[[Job, LocalNodes], None]:
    return lambda job, nodes: job.rank_process(rank).kill()


def kill_raylet(job: Job, nodes: LocalNodes) -> None:
    """The node of a rank, with everything on it."""
    nodes.kill(nodes.node_of(job.rank_process(0).pid))


FAULTS = [
    Fault("teacher replica", kill_busy("ray::_TeacherActor.answer"), restarts=False),
    Fault("evaluator", kill_busy("ray::_EvaluatorActor.evaluate"), restarts=False, after_a_step=False),
    Fault("critic rank", kill_rank(1)),
    Fault("generator rank", kill_rank(0)),
    Fault("raylet", kill_raylet),
    Fault("driver", lambda job, nodes: job.process.kill(), again=True),
]


def faults(nodes: LocalNodes, folder: Path, wanted: list[str]) -> dict[str, Any]:
    """One run for each fault, against the undisturbed one."""
    undisturbed = Job(folder, "undisturbed", nodes.address, APART)
    undisturbed.finish()
    expected = digest(undisturbed.weights())
    figures = compared(undisturbed)
    say(f"faults: the undisturbed run is done, weights {expected}")
    rows = []
    for fault in FAULTS:
        if fault.name not in wanted:
            continue
        row = {"fault": fault.name} | one_fault(nodes, folder, fault)
        job_weights, job_figures = row.pop("weights"), row.pop("figures")
        row["same_weights"] = job_weights == expected
        row["figures_lost_or_changed"] = sum(job_figures.get(key) != value for key, value in figures.items())
        rows.append(row)
        say(f"faults: {fault.name} done, weights {job_weights}")
        if fault.name == "raylet":
            nodes.add()
    say()
    say(f"SIGKILL in mid-step of {UPDATES} updates, snapshots every {EVERY}, on three raylets:")
    say(
        f"{'killed':<17}{'in update':>10}{'recovered after':>17}{'recomputed':>12}{'same weights':>14}"
        f"{'figures lost':>14}  what happened"
    )
    for row in rows:
        say(
            f"{row['fault']:<17}{row['in_update']:>10}{row['seconds']:>15.1f} s{row['recomputed']:>12}"
            f"{'yes' if row['same_weights'] else 'NO':>14}{row['figures_lost_or_changed']:>14}  {row['happened']}"
        )
    say(
        "recovered after: from the kill to the first update that had not been done before (the evaluator: to the figure"
    )
    say(
        "in hand); recomputed: updates done again; figures: losses, gradients, evaluations missing or changed."
    )
    if not all(row["same_weights"] and not row["figures_lost_or_changed"] for row in rows):
        raise SystemExit("a run did not end as the undisturbed one")
    return {"faults": rows}


def compared(job: Job) -> dict[tuple[str, int], float]:
    """Figures that a fault must not change; those of the evaluator in mid-run may be passed over by newer ones."""
    return {
        key: value
        for key, value in job.points().items()
        if key[0].startswith(COMPARED) and not (key[0].startswith("eval/") and 0 < key[1] < UPDATES)
    }


def one_fault(nodes: LocalNodes, folder: Path, fault: Fault) -> dict[str, Any]:
    """Run, strike in the second half of an update, wait for the end."""
    job = Job(folder, fault.name.replace(" ", "_"), nodes.address, APART)
    half = UPDATES // 2
    job.wait_until(lambda: job.step() >= half, "half of the updates")
    if fault.after_a_step:
        now, started = job.step(), time.monotonic()
        job.wait_until(lambda: job.step() > now, "an update")
        time.sleep((time.monotonic() - started) / 2)
    read = len(job.output())
    fault.strike(job, nodes)
    struck = time.monotonic()
    steps = job.step()
    if fault.again:
        job.submit_again()
    if fault.restarts:
        # figures of updates that were done before may come late, so the journal alone does not tell
        job.wait_until(lambda: "resumed from" in job.output(read), "a restart")
        steps = job.step()
    if fault.after_a_step:
        job.wait_until(lambda: job.step() > steps, "an update after the kill")
    else:
        job.wait_until(lambda: is_evaluated(job, half), f"the figure of update {half}")
    seconds = time.monotonic() - struck
    job.finish()
    after = job.output(read)
    resumed = [int(step) for step in re.findall(r"resumed from \S*step_(\d+)", after)]
    return {
        "in_update": steps + 1,
        "seconds": seconds,
        "recomputed": steps - resumed[-1] if resumed else 0,
        "happened": what_happened(after, resumed, fault),
        "weights": digest(job.weights()),
        "figures": compared(job),
    }


def what_happened(output: str, resumed: list[int], fault: Fault) -> str:
    """From what the job said."""
    told = []
    if resumed:
        who = "the job, submitted again, went on" if fault.again else "Ray Train restarted the ranks"
        told.append(f"{who} from the snapshot of update {resumed[-1]}")
    if lost := len(re.findall(r"teacher replica \S+ was lost", output)):
        told.append(f"{lost} quer{'y' if lost == 1 else 'ies'} asked of another replica")
    if not fault.after_a_step:
        told.append(f"it made the figure of update {UPDATES // 2} again")  # which was waited for
    return ", ".join(told) or "nothing was told"


def is_evaluated(job: Job, update: int) -> bool:
    """Whether the figures of a snapshot are there."""
    return any(step == update and name.startswith("eval/") for name, step in job.points())


# ---- service


def service(nodes: LocalNodes, folder: Path) -> dict[str, Any]:
    """Two jobs at once on one service, and a third that must be refused."""
    one = [
        "evaluator.enabled=false", "placement.mode=teachers", "placement.workers=1", "placement.cpus_per_worker=1",
    ]  # fmt: skip
    scales = {"scale2": "teacher.guidance_scale=2", "scale3": "teacher.guidance_scale=3"}
    alone = {}
    for name, scale in scales.items():
        job = Job(folder, f"alone_{name}", nodes.address, [*one, scale])
        job.finish()
        alone[name] = digest(job.weights())
    shared = [*one, "placement.teacher_service=drill"]
    jobs = {name: Job(folder, f"shared_{name}", nodes.address, [*shared, s]) for name, s in scales.items()}
    jobs["scale2"].wait_until(lambda: jobs["scale2"].step() > 1, "an update")
    other = folder / "other_teacher"
    shutil.copytree(ROOT / "raydistill/assets/scenes_teacher", other)
    change_one_weight(other / "unet" / "diffusion_pytorch_model.safetensors")
    # with shards of its own: those of the others hold their teacher's latents, and it would be refused for that
    (folder / "third").mkdir()
    third = Job(folder / "third", "third", nodes.address, [*shared, f"teacher.path={other}"])
    code = third.process.wait(TIMEOUT_S)
    refused = next((line for line in third.output().splitlines() if line.startswith("raydistill: error")), "")
    for job in jobs.values():
        job.finish()
    at_once = min(job.times()[1] for job in jobs.values()) - max(job.times()[0] for job in jobs.values())
    together = {name: digest(job.weights()) for name, job in jobs.items()}
    say()
    say(f"one detached teacher service for two jobs, which trained at the same time for {at_once:.0f} s:")
    for name, scale in scales.items():
        same = "the same" if alone[name] == together[name] else "NOT the same"
        say(f"  {scale}: weights {together[name]}, with a pool of its own {alone[name]}: {same}")
    say(f"  a third with another teacher, exit code {code}: {refused}")
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(
            [sys.executable, "-m", "raydistill.cli", "teachers", "--stop", "drill"],
            env=os.environ | {"RAY_ADDRESS": nodes.address}, check=True, capture_output=True,
        )  # fmt: skip
    if at_once <= 0 or alone != together or code != 2 or "teacher_service" not in refused:
        raise SystemExit("the shared service changed a job, or did not refuse another teacher")
    return {"service": {"alone": alone, "together": together, "refused": refused}}


def change_one_weight(path: Path) -> None:
    """Another teacher of the same shapes."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    first = sorted(weights)[0]
    weights[first] = weights[first] + 1e-3
    save_file(weights, path)


@contextlib.contextmanager
def output_folder(given: Path | None) -> Iterator[Path]:
    """The given one, which must be new, or a temporary one."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="raydistill_drill", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    given.mkdir(parents=True)
    yield given.resolve()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("placements", "faults", "service")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run (all)")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--faults", nargs="+", choices=names, default=names, help="faults to try (all)")
    parser.add_argument("--runs", type=Path, help="new folder to keep the runs in (a temporary one)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with output_folder(arguments.runs) as folder, LocalNodes(3, cpus=2) as nodes:
        say(f"three raylets at {nodes.address}, runs in {folder}")
        if "placements" in arguments.only:
            results |= placements(nodes, folder)
        if "faults" in arguments.only:
            results |= faults(nodes, folder, arguments.faults)
        if "service" in arguments.only:
            results |= service(nodes, folder)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")
        say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
