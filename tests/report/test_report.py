"""The report on real small runs: what it says, what it refuses, and that it says the same of folders and of MLflow."""

import json
import random
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from raydistill import cli
from raydistill.errors import ConfigError
from raydistill.eval.grids import grid_png, read_grid
from raydistill.report import write_experiment_report, write_report
from raydistill.report.runs import COUNTERS, LOSSES, Run, read_experiment, read_folder, read_runs
from raydistill.report.sections import differing, front, heat_maps
from raydistill.tracking import METRICS
from tests.report.page import Page
from tests.report.small_runs import RUNS, run_small

FRONT = "toyfid against prompt accuracy over guidance"
MAP = "Critic updates against guidance"
SAMPLES = "Samples of the same noise"


@pytest.fixture(scope="module")
def page(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(folders, tmp_path_factory.mktemp("page") / "report.html", "four runs"))


def ledger(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    entries: dict[str, dict[str, dict[str, float]]] = json.loads((folder / "evaluations.json").read_text())
    return entries


def test_the_final_table_holds_the_ledgers_figures_and_the_counters(page: Page, folders: list[Path]) -> None:
    _, *lines = page.tables["Final figures"]
    assert [line[0].removesuffix(" (the best)") for line in lines[:4]] == list(RUNS)
    for (ratio, guidance), line, folder in zip(RUNS.values(), lines, folders, strict=False):
        values = {int(step): entry["metrics"] for step, entry in ledger(folder).items()}
        teacher = values.pop(-1)["eval/teacher_toyfid_16"]
        toyfid = {step: values[step]["eval/toyfid_16"] for step in sorted(values)}
        best = min(toyfid, key=lambda step: toyfid[step])
        assert list(toyfid) == [0, 2, 4]
        assert line[1:13] == [
            "dmd2", "1", str(ratio), str(guidance), f"{toyfid[0]:.3f}", f"{toyfid[4]:.3f}", f"{toyfid[best]:.3f}",
            str(best), f"{toyfid[best] / teacher:.2f}x", f"{values[best]['eval/prompt_accuracy_16']:.3f}", "4 of 4",
            str(4 * ratio * 4),
        ]  # fmt: skip
        summary = json.loads((folder / "summary.json").read_text())
        assert abs(float(line[13]) - summary["wall_s"]) <= 0.51
    teachers = {line[0]: line[6] for line in lines[4:]}
    assert teachers == {
        f"teacher, ddim, 2 evaluations, guidance {guidance:g}": (
            f"{ledger(folder)['-1']['metrics']['eval/teacher_toyfid_16']:.3f}"
        )
        for guidance, folder in zip((1.5, 3.0), folders, strict=False)
    }


def test_the_protocol_of_the_figures_stands_under_them(page: Page, folders: list[Path]) -> None:
    protocol = ledger(folders[0])["4"]["protocol"]
    for name in (
        "detector",
        "detector_sha256",
        "reference_sha256",
        "captions_sha256",
        "num_samples",
        "weights",
    ):
        assert f"{name} {protocol[name]}" in page.sections["Final figures"]


def test_every_evaluation_is_a_point_of_six_curves_and_says_its_value(
    page: Page, folders: list[Path]
) -> None:
    labels = [chart["aria-label"] or "" for chart in page.attributes("svg") if chart.get("role") == "img"]
    for word in ("toyfid", "prompt accuracy"):
        for counter in ("generator updates", "generated images", "seconds of training"):
            assert sum(label.startswith(f"{word} against {counter}. ") for label in labels) == 1
    for name, folder in zip(RUNS, folders, strict=True):
        for step, entry in ledger(folder).items():
            if int(step) >= 0:
                said = f"{name}, update {step}: {entry['metrics']['eval/toyfid_16']:.4g}"
                assert page.titles.count(said) == 3


def test_the_map_has_a_cell_for_each_ratio_and_guidance(page: Page, folders: list[Path]) -> None:
    runs = read_runs(folders).runs
    best = {
        at: f"{run.figures[run.best]['eval/toyfid_16']:.3f}"
        for at, run in zip(RUNS.values(), runs, strict=True)
    }
    assert page.tables[MAP][:3] == [
        ["critic updates per generator's", "guidance 1.5", "guidance 3"],
        ["1", best[1, 1.5], best[1, 3.0]],
        ["2", best[2, 1.5], best[2, 3.0]],
    ]
    quality, accuracy = heat_maps(runs)
    for heat_map, sign in ((quality, 1), (accuracy, -1)):
        cells = sorted(
            (cell for line in heat_map.cells for cell in line if cell), key=lambda each: sign * each.value
        )
        if cells[0].value != cells[-1].value:
            assert (cells[0].ink, cells[-1].ink) == ("#fff", "#111")


def test_samples_of_all_runs_and_the_teachers_are_the_evaluators_own(page: Page, folders: list[Path]) -> None:
    captions = read_grid((folders[0] / "artifacts/grids/grid_00000004.png").read_bytes()).captions
    assert len(captions) == 3
    table = page.tables[SAMPLES]
    # across: four runs and two teachers; over training: three evaluations and the teacher's, for each run
    assert [len(line) for line in table if line[0] in ("run", "snapshot")] == [4] * 5
    assert table[0] == ["run", *captions]
    assert [line[0].rpartition(",")[0].rpartition(",")[0] for line in table[1:5]] == list(RUNS)
    assert [line[0] for line in table[5:7]] == [
        "teacher, 2 steps, guidance 1.5",
        "teacher, 2 steps, guidance 3",
    ]
    pictures = page.attributes("img")
    assert len(pictures) == 6 + 4 * 4
    assert all(captions[0] in str(picture["alt"]) for picture in pictures)
    # step 0 is the teacher's weights for all, so the same noise makes the same picture
    firsts = {picture["src"] for picture in pictures if str(picture["alt"]).startswith("update 0,")}
    assert len(firsts) == 1


def test_one_run_leaves_out_what_takes_several_and_says_why(folders: list[Path], tmp_path: Path) -> None:
    page = Page(write_report(folders[:1], tmp_path / "one.html", "one"))
    assert page.sections["toyfid against prompt accuracy"].startswith("One run makes no front")
    assert page.sections[MAP].startswith("No map: these runs differ neither in")
    assert FRONT not in page.tables
    assert MAP not in page.tables


def test_a_page_needs_nothing_from_anywhere_and_has_no_script(page: Page) -> None:
    for _, attributes in page.elements:
        for name in ("src", "href"):
            assert str(attributes.get(name, "data:")).startswith("data:")
    assert "@import" not in page.source
    assert "url(" not in page.source
    assert not page.attributes("script")


def test_strings_of_a_run_are_text_wherever_they_stand(folders: list[Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)<b>\"'&"
    folder = tmp_path / evil
    shutil.copytree(folders[0], folder)
    picture = folder / "artifacts/grids/grid_00000004.png"
    grid = read_grid(picture.read_bytes())
    for path in picture.parent.iterdir():
        path.write_bytes(grid_png(grid.rows, [evil] * len(grid.captions)))
    manifest = folder / "snapshots/step_00000004/manifest.json"
    document = json.loads(manifest.read_text())
    document["manifest"]["settings"] |= {"method.kind": evil, "seed": evil}
    manifest.write_text(json.dumps(document))
    entries = ledger(folder)
    page = Page(write_report([folder, folders[1]], tmp_path / "evil.html", evil))
    assert not page.attributes("script")
    assert not page.attributes("b")
    assert page.tables["Final figures"][1][:2] == [evil, evil]
    assert [line[1] for line in page.tables["Settings that differ"] if line[0] == "seed"] == [evil]
    assert page.tables[SAMPLES][0][1] == evil
    assert f"{evil}, update 4: {entries['4']['metrics']['eval/toyfid_16']:.4g}" in page.titles


def test_a_run_that_goes_on_is_reported_as_far_as_it_came(folders: list[Path], tmp_path: Path) -> None:
    """Its folder as it was between update 3 and 4: an evaluation in hand, a line of the journal half written."""
    folder = tmp_path / "going"
    shutil.copytree(folders[2], folder)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "snapshots/step_00000004")
    entries = ledger(folder)
    del entries["4"]
    (folder / "evaluations.json").write_text(json.dumps(entries))
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    last = next(number for number, line in enumerate(lines) if json.loads(line).get("step") == 4)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:last]) + lines[last][:25])
    page = Page(write_report([folder], tmp_path / "going.html", "going"))
    line = page.tables["Final figures"][1]
    assert line[11:13] == ["3 of 4", str(4 * 2 * 3)]
    assert line[6] == f"{entries['2']['metrics']['eval/toyfid_16']:.3f}"


def test_a_sweeps_folder_stands_for_its_trials_under_their_names(folders: list[Path], tmp_path: Path) -> None:
    trials = [
        {"name": f"trial_{number}", "run_dir": str(folder), "settings": {"critic.lr": 1e-3 * (number + 1)},
         "metric": None, "state": "stopped" if number else "finished"}
        for number, folder in enumerate(folders)
    ]  # fmt: skip
    trials.append(trials[0] | {"name": "trial_9", "run_dir": str(tmp_path / "not-yet"), "state": "pending"})
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "sweep", "trials": trials}))
    page = Page(write_report([tmp_path], tmp_path / "sweep.html", "a sweep"))
    lines = page.tables["Final figures"][1:5]
    names = [f"trial_{number}: lr {1e-3 * (number + 1):.3g}" for number in range(4)]
    assert sorted(line[0].removesuffix(" (the best)") for line in lines) == names
    assert sum(line[0].endswith(" (the best)") for line in lines) == 1
    assert [line[11] for line in lines] == ["4 of 4", *["4 of 4, stopped"] * 3]
    (rates,) = [line for line in page.tables["Settings that differ"] if line[0] == "critic.lr"]
    assert rates[1:] == [str(0.001 * (number + 1)) for number in range(4)]
    assert (
        "Left out, because nothing of them has been evaluated so far: trial_9: lr 0.001 (pending)."
        in page.sections["a sweep"]
    )


def test_mlflow_says_the_same_as_the_folders(
    folders: list[Path], output_dir: Path, parent_id: str, tmp_path: Path
) -> None:
    uri = f"sqlite:///{output_dir}/mlflow.db"
    local = {run.name: run for run in read_runs(folders).runs}
    for found in (read_experiment("raydistill", uri), read_runs([parent_id], uri)):
        assert found.left_out == []
        assert {run.name for run in found.runs} == set(RUNS)
        for run in found.runs:
            own = local[run.name]
            for field in ("figures", "protocols", "teacher", "teacher_protocol", "points", "grid_steps"):
                assert getattr(run, field) == getattr(own, field), field
            assert run.settings.items() >= own.settings.items()
            assert run.read_picture(2) == own.read_picture(2)
    single = read_runs([read_runs([parent_id], uri).runs[1].where, folders[0]], uri).runs
    assert [run.name for run in single] == list(RUNS)[1::-1]
    of_all = Page(write_experiment_report("raydistill", tmp_path / "all.html", "all", tracking_uri=uri))
    lines = of_all.tables["Final figures"][1:5]
    assert [line[0].removesuffix(" (the best)") for line in lines] == list(RUNS)


def test_runs_of_one_name_are_told_apart_by_their_folders(folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / folders[0].name)
    names = [run.name for run in read_runs([folders[0], tmp_path / folders[0].name]).runs]
    assert names == [f"{folders[0].name} ({folder})" for folder in (folders[0], tmp_path / folders[0].name)]


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says on stderr when it refuses."""
    with pytest.raises(SystemExit) as end:
        cli.main(["report", *map(str, arguments)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("raydistill: error: ")


def test_figures_of_different_protocols_are_refused_by_name_of_what_differs(
    folders: list[Path], output_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_small(tmp_path, "fewer", "evaluator.num_samples=12", "train.generator_updates=1", "tracking.uri=off")
    capsys.readouterr()  # what the run said
    out = tmp_path / "mixed.html"
    hashes = [
        ledger(folder)["0"]["protocol"]["captions_sha256"] for folder in (folders[0], tmp_path / "fewer")
    ]
    assert one_line(capsys, *folders[:2], tmp_path / "fewer", "--out", out) == (
        f"{folders[0].name} and fewer: these figures can't be compared, their protocols differ in num_samples (16, "
        f"12); captions_sha256 ({', '.join(map(repr, hashes))}); evaluate again with equal evaluator settings"
    )
    assert not out.exists()


def test_a_ledger_that_mixes_protocols_by_itself_is_refused(folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "mixed")
    entries = ledger(tmp_path / "mixed")
    entries["2"]["protocol"]["weights"] = "raw"  # type: ignore[assignment]
    (tmp_path / "mixed/evaluations.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"^mixed: these figures .* differ in weights \('ema', 'raw'\)"):
        read_runs([tmp_path / "mixed"])


def test_bad_input_is_one_line_at_once(
    folders: list[Path], output_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "begun/snapshots").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    uri = f"sqlite:///{output_dir}/mlflow.db"
    with socket.socket() as silent:
        # it takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            nobody = closed.getsockname()[1]
        unknown = "0" * 32
        for arguments, said in (
            ([], "report needs runs (raydistill report runs/NAME ...) or --experiment NAME, one of the two"),
            ([folders[0], "--experiment", "x"], "report needs runs"),
            (["runs/nothing"], "no run folder 'runs/nothing' here; give runs/NAME, a sweep's folder or the id of"),
            ([tmp_path / "other"], f"{tmp_path / 'other'} is no run's folder: it holds neither evaluations.json nor"),
            ([tmp_path / "begun"], f"run {tmp_path / 'begun'} has no figures so far: wait for its first evaluation"),
            ([unknown, "--tracking-uri", uri], f"no run {unknown} at {uri} (--tracking-uri)"),
            (["--experiment", "x", "--tracking-uri", uri], f"no experiment 'x' at {uri}; there are 'raydistill'"),
            (["--experiment", "Default", "--tracking-uri", uri], "experiment 'Default': none of its 0 runs has"),
            (["--experiment", "x", "--tracking-uri", f"sqlite:///{tmp_path}/no.db"], f"no MLflow store at {tmp_path}"),
            (["--experiment", "x", "--tracking-uri", f"http://127.0.0.1:{nobody}"], "the tracking store http://127.0"),
            (["--experiment", "x", "--tracking-uri", f"http://127.0.0.1:{port}"], "the tracking store http://127.0.0"),
            (["--experiment", "x", "--tracking-uri", f"postgresql://a:b@127.0.0.1:{nobody}/x"], "the tracking store"),
            (["--experiment", "x", "--tracking-uri", "runs/mlflow.db"], "tracking.uri is 'runs/mlflow.db'; MLflow has"),
        ):  # fmt: skip
            assert said in one_line(capsys, *arguments)
    assert not (tmp_path / "no.db").exists()


def made_up(run: Run, toyfid: float, accuracy: float, **settings: str) -> Run:
    return replace(
        run,
        figures={0: {"eval/toyfid_16": toyfid, "eval/prompt_accuracy_16": accuracy}},
        settings={**run.settings, **settings},
    )


def test_the_front_holds_exactly_the_runs_that_no_other_beats(folders: list[Path]) -> None:
    run = read_folder(folders[0])
    draw = random.Random(0)
    for _ in range(50):
        runs = [made_up(run, draw.randint(1, 6), draw.randint(1, 6)) for _ in range(7)]
        figures = [(r.figures[0]["eval/toyfid_16"], r.figures[0]["eval/prompt_accuracy_16"]) for r in runs]
        unbeaten = {
            (f, a)
            for f, a in figures
            if not any((g <= f and b >= a) and (g, b) != (f, a) for g, b in figures)
        }
        found = [
            (r.figures[0]["eval/toyfid_16"], r.figures[0]["eval/prompt_accuracy_16"]) for r in front(runs)
        ]
        assert found == sorted(unbeaten)


def test_settings_that_differ_are_those_with_a_part_in_what_is_learnt(folders: list[Path]) -> None:
    run = read_folder(folders[0])
    other = made_up(run, 1, 1, **{"name": "b", "critic.lr": "0.5", "data.cache_mb": "1", "method.own": "7"})
    assert differing([run, other]) == {
        "critic.lr": [run.settings["critic.lr"], "0.5"],
        "method.own": ["", "7"],
    }
    assert differing([run]) == {}


def test_a_counter_between_logged_steps_lies_on_the_line_through_them(folders: list[Path]) -> None:
    run = replace(read_folder(folders[0]), points={"images": [(10, 640.0), (20, 1280.0), (40, 5120.0)]})
    assert [run.at("images", step) for step in (0, 5, 10, 15, 30, 50)] == [0, 320, 640, 960, 3200, 7040]
    assert replace(run, points={"images": []}).at("images", 5) is None


def test_every_figure_that_is_drawn_is_one_that_runs_report() -> None:
    assert {*COUNTERS, *LOSSES} <= METRICS.keys()
