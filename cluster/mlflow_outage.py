"""MLflow goes away in mid-run and comes back: is its history of the run complete, in order, and without doubles?

    python cluster/mlflow_outage.py --outage 30

starts PostgreSQL and MLflow's server (cluster/mlflow_server.py), a real run without Ray on the digits, kills the server
in mid-run, starts it again after so many seconds, and compares every metric's history in MLflow with the run's journal.
Prints what happened; exit code 0 if MLflow has everything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from mlflow_server import MlflowServer

from raydistill.tracking import has_unsent

ROOT = Path(__file__).resolve().parents[1]
_FIRST_UPDATES_S = 600.0


def drill(folder: Path, outage_s: float, updates: int, overrides: list[str]) -> dict[str, Any]:
    """What happened, and per metric how the history in MLflow differs from the journal ("" where it does not).

    Raises RuntimeError if the run does not get under way, or fails.
    """
    runs = folder / "runs"
    journal = runs / "outage" / "metrics.jsonl"
    with MlflowServer(folder / "server") as server:
        command = [
            sys.executable, str(ROOT / "jobs" / "sid_cifar10.py"), f"output_dir={runs}", "name=outage",
            "placement.session=inline", f"train.generator_updates={updates}", "train.log_every=1",
            f"tracking.uri={server.uri}", "tracking.retry_max_s=2", *overrides,
        ]  # fmt: skip
        run = _start(command, folder / "run.log")
        try:
            _wait_for_update(run, journal, updates // 10, folder / "run.log")
            server.stop()
            before, stopped = _last_update(journal), time.monotonic()
            time.sleep(outage_s)
            during = _last_update(journal) - before
            server.start()
            away = time.monotonic() - stopped
            again = 0
            while run.wait() == 0 and has_unsent(str(journal.parent)) and again < 3:
                # it ended before the server was back; what it could not send, the same command sends
                again += 1
                run = _start(command, folder / "run.log")
            if run.returncode:
                raise RuntimeError(f"the run failed: {_tail(folder / 'run.log')}")
        finally:
            run.kill()
            run.wait()
        printed = (folder / "run.log").read_text()
        return {
            "server_away_s": round(away, 1),
            "killed_after_update": before,
            "updates_while_away": during,
            "commands": 1 + again,
            "points": sum(len(history) for history in _journaled(journal).values()),
            "told": [line for line in printed.splitlines() if "MLflow at" in line],
            "differences": _differences(server.uri, journal),
        }


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def _differences(uri: str, journal: Path) -> dict[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run_id = json.loads(journal.read_text().splitlines()[0])["run_id"]
    found = {}
    for name, expected in _journaled(journal).items():
        history = [(each.step, each.value) for each in client.get_metric_history(run_id, name)]
        steps = [step for step, _ in history]
        if history == expected:
            found[name] = ""
        elif len(set(steps)) < len(steps):
            found[name] = "doubled"
        else:
            found[name] = f"{len(history)} of {len(expected)} points, or in another order"
    return found


def _journaled(journal: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric's (step, value) in the order of their times, as MLflow orders them."""
    found = defaultdict(list)
    for line in journal.read_text().splitlines()[1:]:
        entry = json.loads(line)
        for name, value in entry.get("values", {}).items():
            found[name].append((entry["timestamp_ms"], entry["step"], value))
    return {name: [(step, value) for _, step, value in sorted(points)] for name, points in found.items()}


def _last_update(journal: Path) -> int:
    lines = (
        journal.read_bytes().splitlines()[1:-1] if journal.exists() else []
    )  # the last may be half written
    entries = (json.loads(line) for line in lines if b'"generator_updates"' in line)
    return max((int(entry["step"]) for entry in entries), default=0)


def _wait_for_update(run: subprocess.Popen[bytes], journal: Path, update: int, log: Path) -> None:
    until = time.monotonic() + _FIRST_UPDATES_S
    while _last_update(journal) < update:
        if run.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"update {update} was not reached: {_tail(log)}")
        time.sleep(0.2)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-500:]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--outage", type=float, default=30.0, metavar="S", help="seconds (%(default)s)")
    parser.add_argument("--updates", type=int, default=600, help="of the run (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydistill-outage-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL may run as another user
        happened = drill(Path(folder), arguments.outage, arguments.updates, [])
    differences = happened.pop("differences")
    for name, value in happened.items():
        print(f"{name}: {value}")
    wrong = {name: how for name, how in differences.items() if how}
    for name, how in wrong.items():
        print(f"{name}: {how}")
    print(
        f"{len(differences) - len(wrong)} of {len(differences)} metrics are complete and in order in MLflow"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
