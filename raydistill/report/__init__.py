"""Runs as one HTML page that needs nothing else: curves, tables, pictures, all under one protocol.

run folders, sweep.json, MLflow  --runs-->  Run  --sections, samples-->  charts, rows, strips  --page-->  HTML
"""

from collections.abc import Sequence
from pathlib import Path

from raydistill.report.page import write_page
from raydistill.report.runs import read_experiment, read_runs

__all__ = ["write_experiment_report", "write_report"]


def write_report(
    runs: Sequence[Path | str], out: Path, title: str, *, tracking_uri: str | None = None
) -> Path:
    """Write the report on runs, also on ones that go on, and return its path.

    Args:
        runs: run folders, sweeps' folders (trials without figures are named and left out), or ids of MLflow runs.
        tracking_uri: MLflow's, for ids; runs/mlflow.db by default.

    Raises ConfigError for a run that is not there or has no figures and for figures of different protocols,
    TrackingError if MLflow does not answer or the page can't be written.
    """
    return write_page(read_runs(runs, tracking_uri), out, title)


def write_experiment_report(name: str, out: Path, title: str, *, tracking_uri: str | None = None) -> Path:
    """Write the report on all runs of an MLflow experiment that have figures. Raises as `write_report` does."""
    return write_page(read_experiment(name, tracking_uri), out, title)
