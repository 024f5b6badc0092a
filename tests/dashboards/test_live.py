"""A real Prometheus watches a real run under Ray, roles apart; every panel of the dashboard has something to show.

Both have ports and folders of their own, so that no other Ray or Prometheus of this machine is touched or asked.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.draw import Series, Window, ask, draw, load_panels
from raydistill.runtime.local_cluster import free_ports
from raydistill.runtime.prometheus import metric_of
from raydistill.tracking import METRICS
from tests.dashboards.test_files import tool

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
NAME = "watched"
UPDATES = 20
SETTINGS = [
    f"name={NAME}", "placement.session=ray", "placement.mode=disaggregated", "placement.workers=2",
    "placement.cpus_per_worker=1", "prepare.num_train=96", "prepare.num_val=48", "prepare.samples_per_shard=32",
    "train.batch_size=8", f"train.generator_updates={UPDATES}", "method.critic_updates_per_generator=2",
    "checkpoint.every=10", "evaluator.every=10", "evaluator.num_samples=32", "evaluator.batch_size=16",
    "evaluator.teacher_steps=2", "evaluator.grid_images=2", "evaluator.idle_priority=false",
    "method.gan_weight_generator=0.03", "method.gan_weight_critic=0.03",
]  # fmt: skip


@dataclass(frozen=True)
class Watched:
    """A run that is over and the Prometheus that saw it."""

    url: str
    window: Window
    run_dir: Path

    def ask(self, query: str) -> list[Series]:
        return ask(self.url, {"expr": query, "legendFormat": ""}, self.window)

    def api(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=30) as answer:
            return json.load(answer)["data"]


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    # a short path, for Ray's sockets
    with tempfile.TemporaryDirectory(prefix="rd", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        (port,) = free_ports(1)
        url = f"http://127.0.0.1:{port}"
        with (home / "prometheus.log").open("wb") as log:
            prometheus = subprocess.Popen(
                [
                    tool("prometheus"), f"--config.file={configuration(home)}", f"--storage.tsdb.path={home}/tsdb",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            started = time.time()
            run_to_its_end(home)
            yield Watched(url, Window(started, time.time(), NAME, scrape_s=1.0), home / "runs" / NAME)
        finally:
            prometheus.terminate()
            prometheus.wait(30)


def configuration(home: Path) -> Path:
    """Ours, with an interval for a run of seconds and the place of this test's Ray."""
    given = yaml.safe_load((ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text())
    given["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    given["rule_files"] = [str(ROOT / "dashboards" / "prometheus" / "alerts.yml")]
    (discovery,) = given["scrape_configs"][0]["file_sd_configs"]
    (home / "ray").mkdir()
    (place,) = discovery["files"]
    discovery |= {"files": [str(home / Path(place).relative_to("/tmp"))], "refresh_interval": "1s"}
    path = home / "prometheus.yml"
    path.write_text(yaml.safe_dump(given))
    return path


def run_to_its_end(home: Path) -> None:
    dropped = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"RAY_TMPDIR": str(home), "RAY_metrics_report_interval_ms": "2000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "jobs/dmd2_coco.py", f"output_dir={home}/runs", *SETTINGS],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def journal(watched: Watched) -> dict[str, set[float]]:
    """All values of each figure, as the run's own record has them."""
    found: dict[str, set[float]] = {}
    for line in (watched.run_dir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).get("values", {}).items():
            found.setdefault(name, set()).add(value)
    return found


def test_every_query_of_every_panel_returns_figures_of_the_run(watched: Watched) -> None:
    for panel in load_panels():
        for target in panel.get("targets", ()):
            series = ask(watched.url, target, watched.window)
            assert any(map(math.isfinite, (v for each in series for v in each.values))), (
                f"{panel['title']}: {target['expr']}"
            )
            assert all(each.labels.get("run", NAME) == NAME for each in series)


def test_prometheus_holds_what_the_run_recorded_under_its_name_and_with_its_meaning(watched: Watched) -> None:
    shown = 0
    for name, values in journal(watched).items():
        metric, of = metric_of(name)
        found = watched.ask(f'ray_{metric}{{run="{NAME}", of="{of}"}}')
        shown += bool(found)
        # of the pool the manager tells too, which looks at it more often
        if not name.startswith("teacher/"):
            assert {value for each in found for value in each.values} <= values, name
    assert shown == len(journal(watched))
    help_text = watched.api("metadata?metric=ray_raydistill_critic_lag")["ray_raydistill_critic_lag"]
    assert help_text == [{"type": "gauge", "help": METRICS["critic/lag"], "unit": ""}]


def test_the_last_figures_of_a_run_are_seen_and_then_it_is_gone(watched: Watched) -> None:
    (updates,) = watched.ask(f'max by (run) (ray_raydistill_generator_updates{{run="{NAME}"}})')
    assert updates.values[-1] == UPDATES
    (target,) = watched.ask(f'max by (run) (ray_raydistill_target_updates{{run="{NAME}"}})')
    assert target.values[-1] == UPDATES
    deadline = time.monotonic() + 60
    now = urllib.parse.urlencode({"query": "ray_raydistill_target_updates"})
    while watched.api(f"query?{now}")["result"] and time.monotonic() < deadline:
        time.sleep(0.5)
    assert watched.api(f"query?{now}")["result"] == []


def test_the_latency_of_every_answer_of_the_teacher_is_counted(watched: Watched) -> None:
    counts = watched.ask(f'sum by (run) (ray_raydistill_teacher_latency_s_count{{run="{NAME}"}})')
    assert counts[0].values[-1] >= UPDATES  # one query an update


def test_the_alert_rules_are_loaded_and_none_fails(watched: Watched) -> None:
    (group,) = watched.api("rules")["groups"]
    assert [rule["name"] for rule in group["rules"] if rule["health"] != "ok" or rule.get("lastError")] == []
    firing = watched.ask('ALERTS{alertstate="firing"}')
    assert {each.labels["alertname"] for each in firing} <= {
        "RaydistillQualityFell"
    }  # so few samples say anything


def test_the_picture_has_every_panel(watched: Watched, tmp_path: Path) -> None:
    out = tmp_path / "dashboard.png"
    assert draw(watched.url, watched.window, out, "a run") == []
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_question_that_can_not_be_answered_is_refused_in_one_line(watched: Watched) -> None:
    with pytest.raises(SystemExit, match=r"refuses 'max by': "):
        watched.ask("max by")
    with pytest.raises(SystemExit, match=r"no Prometheus answers at http://127.0.0.1:\d+ \(--prometheus\)"):
        ask(f"http://127.0.0.1:{free_ports(1)[0]}", {"expr": "up", "legendFormat": ""}, watched.window)
