"""The files of dashboards/: Prometheus's own tool takes them, and every metric in them is one that runs report."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

from dashboards.draw import DASHBOARD, Window, in_unit, load_panels
from raydistill.runtime.prometheus import Figures, metric_of
from raydistill.tracking import METRICS
from tests.programs import missing

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "dashboards"
ALERTS = DASHBOARDS / "prometheus" / "alerts.yml"
KNOWN = {f"ray_{metric_of(name.replace('*', 'x'))[0]}" for name in METRICS}


def tool(name: str) -> str:
    """Of Debian's prometheus; `make test` fetches it."""
    found = shutil.which(name, path=f"{sys.prefix}/prometheus/usr/bin") or shutil.which(name)
    return found or missing("prometheus", f"make tools fetches it, with {name}, or put both on the PATH")


def promtool(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True)


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_a_figures_metric_is_its_name_and_the_label_is_what_stands_for_the_star() -> None:
    assert metric_of("loss/dm") == ("raydistill_loss_dm", "")
    assert metric_of("eval/toyfid_2000") == ("raydistill_eval_toyfid", "2000")
    assert metric_of("preflight/error_0.1") == ("raydistill_preflight_error", "0.1")
    assert metric_of("system/gpu_1_utilization_percentage") == (
        "raydistill_system_gpu_utilization_percentage",
        "1",
    )
    assert metric_of("data/rejected") == ("raydistill_data_rejected", "")
    assert metric_of("data/rejected/no_caption") == ("raydistill_data_rejected", "no_caption")
    with pytest.raises(KeyError, match="loss/unheard_of"):
        metric_of("loss/unheard_of")


def test_no_two_figures_share_a_series_and_every_metric_has_a_name_that_prometheus_takes() -> None:
    series = [metric_of(name.replace("*", "x")) for name in METRICS]
    assert len(set(series)) == len(METRICS)
    assert all(re.fullmatch(r"raydistill_[a-z0-9_]+", metric) for metric, _ in series)


def test_figures_that_can_not_be_shown_cost_whoever_has_them_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    figures = Figures("a run")
    figures.update({"loss/unheard_of": 1.0})
    thread = figures._thread
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert "Prometheus gets no more figures" in caplog.text
    figures.update({"loss/dm": 1.0})


def expressions() -> Iterator[tuple[str, str]]:
    """Where, and each piece of PromQL in dashboard and alerts."""
    for panel in load_panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    dashboard = json.loads(DASHBOARD.read_text())
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"${variable['name']}", variable["query"]["query"]
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"]
    for rule in rules():
        yield rule["alert"], rule["expr"]


def metrics_in(expression: str) -> Iterator[str]:
    """The metrics that an expression asks for; of __name__=~"a_(b|c)" each alternative."""
    for pattern in re.findall(r'__name__=~"([^"]+)"', expression):
        pieces = [
            alternatives.split("|") if alternatives else [plain]
            for alternatives, plain in re.findall(r"\(([^()]*)\)|([^()]+)", pattern)
        ]
        for chosen in itertools.product(*pieces):
            yield "".join(chosen)
    # what label_replace and Grafana's variables hold in quotes is no metric
    for name in re.findall(r"ray_\w+", re.sub(r'"[^"]*"', '""', expression)):
        yield re.sub(r"_(bucket|sum|count)$", "", name)


def test_every_metric_in_dashboard_and_alerts_is_in_the_one_list() -> None:
    asked = [(where, name) for where, text in expressions() for name in metrics_in(text)]
    assert len(asked) > 60
    for where, name in asked:
        assert any(re.fullmatch(name, known) for known in KNOWN), f"{where} asks for {name}"


def test_the_dashboard_shows_what_was_promised() -> None:
    shown = {
        name for panel in load_panels() for t in panel.get("targets", ()) for name in metrics_in(t["expr"])
    }
    for promised in (
        "time/update_s", "time/data_s", "time/teacher_wait_s", "time/critic_wait_s", "teacher/queue",
        "teacher/latency_s", "eval/queue", "eval/seconds", "eval/lag_updates", "eval/behind_updates",
        "throughput/images_per_s", "loss/generator_total", "loss/critic_total", "restarts", "traffic/teacher_bytes",
        "traffic/critic_bytes", "eval/toyfid_*", "eval/prompt_accuracy_*",
    ):  # fmt: skip
        assert f"ray_{metric_of(promised)[0]}" in shown


@pytest.mark.parametrize("file", ["README.md", "dashboards/README.md"])
def test_every_figure_that_a_readme_names_is_in_the_one_list(file: str) -> None:
    groups = {name.partition("/")[0] for name in METRICS if "/" in name}
    named = {
        word
        for word in re.findall(r"`([a-z_]+/[\w*/.]+)`", (ROOT / file).read_text())
        if word.partition("/")[0] in groups and not (ROOT / "raydistill" / word).exists()
    }
    assert named or file == "README.md"
    for word in named:
        assert word in METRICS or metric_of(word), word


def test_promtool_takes_the_configuration_and_its_rules() -> None:
    done = promtool("check", "config", DASHBOARDS / "prometheus" / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_prometheus_answers_every_panel_where_a_run_tells_all_its_figures(tmp_path: Path) -> None:
    """What a run really tells is test_live's; this needs no Ray."""
    window = Window(0.0, 1800.0, "a", scrape_s=60.0)
    series = []
    for name in METRICS:
        metric, of = metric_of(name.replace("*", "2000"))
        if name == "teacher/latency_s":
            for le, rate in (("0.5", 1), ("1", 3), ("+Inf", 3)):
                series.append((f'ray_{metric}_bucket{{run="a",le="{le}"}}', f"0+{rate}x40"))
        else:
            series.append((f'ray_{metric}{{run="a"' + (f',of="{of}"}}' if of else "}"), "1+1x40"))
    queries = [window.expand(t["expr"]) for panel in load_panels() for t in panel.get("targets", ())]
    there = [{"labels": "{}", "value": 1}]
    test = {
        "interval": "1m",
        "input_series": [{"series": one, "values": values} for one, values in series],
        "promql_expr_test": [
            {"eval_time": "30m", "expr": f"count({query}) > bool 0", "exp_samples": there}
            for query in queries
        ],
    }
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_none_when_it_should_not() -> None:
    done = promtool("test", "rules", ALERTS.with_name("alerts_test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
    cases = ALERTS.with_name("alerts_test.yml").read_text()
    for rule in rules():
        assert f'alertname="{rule["alert"]}"' in cases


def test_an_alert_that_never_fires_and_one_that_always_does_are_noticed(tmp_path: Path) -> None:
    shutil.copy(ALERTS.with_name("alerts_test.yml"), tmp_path)
    for comparison in ("== 0", ">= 0"):
        wrong = ALERTS.read_text().replace(
            "min by (run) (ray_raydistill_teacher_replicas) == 0",
            f"min by (run) (ray_raydistill_teacher_replicas) + 1 {comparison}",
        )
        assert wrong != ALERTS.read_text()
        (tmp_path / "alerts.yml").write_text(wrong)
        done = promtool("test", "rules", tmp_path / "alerts_test.yml")
        assert done.returncode != 0
        assert "RaydistillNoTeacher" in done.stdout + done.stderr


def complaints(dashboard: dict[str, Any]) -> list[str]:
    schema = json.loads(Path(__file__).with_name("grafana_schema.json").read_text())
    return [
        f"{error.json_path}: {error.message}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(dashboard)
    ]


def test_the_dashboard_is_one_by_grafanas_own_types() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert complaints(dashboard) == []
    panel = next(each for each in dashboard["panels"] if each["type"] == "timeseries")
    for broken in (
        panel | {"titel": "a misspelt key"},
        panel | {"targets": [{"refId": "A", "expr": "up"}]},
        panel | {"gridPos": {"x": "left"}},
        panel | {"options": {"legend": {"displayMode": "loud"}}},
    ):
        assert len(complaints(dashboard | {"panels": [broken]})) == 1


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = load_panels()
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for at in (panel["gridPos"] for panel in panels):
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_what_grafana_is_provisioned_with_is_what_the_dashboard_asks_for() -> None:
    provisioning = DASHBOARDS / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "raydistill.yaml").read_text())["datasources"]
    dashboard = json.loads(DASHBOARD.read_text())
    variable = next(each for each in dashboard["templating"]["list"] if each["name"] == "datasource")
    assert variable["query"] == source["type"] == "prometheus"
    assert variable["current"]["value"] == source["uid"]
    scraped = yaml.safe_load((DASHBOARDS / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scraped["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "raydistill.yaml").read_text())["providers"]
    assert (
        f"dashboards/grafana/dashboards:{provider['options']['path']} "
        in (DASHBOARDS / "README.md").read_text()
    )


def test_grafanas_variables_are_filled_in_as_grafana_does() -> None:
    window = Window(0.0, 3600.0, run="a|b", scrape_s=5.0)
    assert window.expand('x{run=~"$run"}[$__range]') == 'x{run=~"a|b"}[3600s]'
    assert window.expand("rate(x[$__rate_interval])") == "rate(x[20s])"


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.0, "Bps", "0 B/s"),
        (1536.0, "Bps", "1.5 KiB/s"),
        (200 * 1024.0**2, "bytes", "200 MiB"),
        (0.25, "percentunit", "25 %"),
        (90.0, "s", "90 s"),
        (600.0, "s", "10 min"),
        (7200.0, "s", "2.0 h"),
        (math.inf, "s", "inf"),
    ],
)
def test_values_are_written_in_the_panels_units_also_numpys_of_an_axis(
    value: float, unit: str, words: str
) -> None:
    assert in_unit(value, unit, None) == words
    assert in_unit(np.float64(value), unit, None) == words
