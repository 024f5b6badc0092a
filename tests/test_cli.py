"""The commands as a user meets them: help, exit codes, one-line errors, job files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raydistill import cli
from raydistill.errors import DataError
from raydistill.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "train",
    "plan",
    "sample",
    "evaluate",
    "export",
    "report",
    "methods",
    "submit",
    "teachers",
    "up",
    "down",
)

# A job file with settings of its own: what is tested here is the command line, not a run.
JOB = '''
"""A job."""
import sys
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Method:
    critic_updates_per_generator: int = 5
    """Critic optimiser steps for one generator optimiser step."""

@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "short"
    """The run's name."""
    method: Method = Method()

def recipe() -> Config:
    """Distils something."""
    return Config()

def long() -> Config:
    return Config(name="long")

PRESETS = {"long": long}

if __name__ == "__main__":
    from raydistill.cli import job_main
    job_main(recipe, PRESETS)
'''


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.py"
    path.write_text(JOB)
    return path


def shell(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
        check=False,
    )


def raydistill(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return shell("-m", "raydistill.cli", *arguments, **env)


def test_help_names_every_command_with_examples_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom raydistill.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n"
        "    heavy = {'torch', 'ray', 'mlflow', 'diffusers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "    print('heavy:', *heavy)\n    sys.exit(end.code)"
    )
    done = shell("-c", code)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout
    assert "raydistill train jobs/dmd2_coco.py method.critic_updates_per_generator=10" in done.stdout
    assert done.stdout.endswith("heavy:\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: raydistill {command}" in capsys.readouterr().out


def test_methods_json_lists_paper_needs_and_job_of_each_method() -> None:
    done = raydistill("methods", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == set(METHODS)
    for name, row in rows.items():
        assert row["job"] == METHODS[name].job
        assert row["paper"]
        assert row["needs"]


def test_a_job_file_shows_its_settings_with_overrides_applied(job: Path) -> None:
    done = shell(job, "--help-settings", "method.critic_updates_per_generator=7")
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert rows == [
        ["name", "short", "The run's name."],
        [
            "method.critic_updates_per_generator",
            "7",
            "Critic optimiser steps for one generator optimiser step.",
        ],
    ]


def test_a_preset_is_another_recipe_of_the_same_job(job: Path) -> None:
    assert shell(job, "--help-settings", "--preset", "long").stdout.split()[:2] == ["name", "long"]
    assert "Distils something." in shell(job, "--help").stdout
    assert "long" in shell(job, "--help").stdout


def test_train_runs_the_recipe_of_a_job_file(job: Path) -> None:
    done = raydistill("train", job, "--help-settings", "--preset", "long", "name=other")
    assert done.stdout.split()[:2] == ["name", "other"]


def test_overrides_may_stand_between_the_options(job: Path) -> None:
    words = [
        "method.critic_updates_per_generator=9",
        "--help-settings",
        "name=a",
        "--preset",
        "long",
        "name=b",
    ]
    for done in (shell(job, *words), raydistill("train", job, *words)):
        rows = [line.split()[:2] for line in done.stdout.splitlines()]
        assert rows == [["name", "b"], ["method.critic_updates_per_generator", "9"]]
    assert "unrecognized arguments: --steps" in raydistill("train", job, "--steps", "3").stderr
    assert "unrecognized arguments: 3" in raydistill("methods", "3").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["method.critic_updates=7"], ["'method.critic_updates=7'", "method.critic_updates_per_generator"]),
        (["method.critic_updates_per_generator=x"], ["method.critic_updates_per_generator=x", "integer"]),
        (["--preset", "huge"], ["--preset 'huge'", "valid: long"]),
    ],
)
def test_a_bad_argument_is_one_line_on_stderr_and_exit_code_2(
    job: Path, arguments: list[str], words: list[str]
) -> None:
    for done in (shell(job, *arguments), raydistill("train", job, *arguments)):
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("raydistill: error: ")
        assert done.stderr.count("\n") == 1
        for word in words:
            assert word in done.stderr


def test_a_job_that_is_not_there_or_is_none_is_an_error_that_says_so(tmp_path: Path) -> None:
    missing = raydistill("train", "jobs/none.py")
    assert missing.returncode == 2
    assert "no job file 'jobs/none.py'" in missing.stderr
    plain = tmp_path / "plain.py"
    plain.write_text("x = 1\n")
    assert "defines no function `recipe`" in raydistill("train", plain).stderr


def test_submit_without_a_command_says_what_is_missing() -> None:
    done = raydistill("submit", "--")
    assert done.returncode == 2
    assert "raydistill submit -- python jobs/dmd2_coco.py" in done.stderr


def test_a_foreseen_error_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise DataError("shard a.tar\n  has no captions")

    assert cli._guarded(fail) == 2
    assert capsys.readouterr().err == "raydistill: error: shard a.tar has no captions\n"


def test_the_traceback_is_shown_on_demand(job: Path) -> None:
    done = shell(job, "nonsense=1", RAYDISTILL_TRACEBACK="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("raydistill: error: unknown setting")


def test_an_unforeseen_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli._guarded(lambda: 1 // 0)


def test_ctrl_c_ends_with_130() -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    assert cli._guarded(interrupt) == 130
