"""Figures and artifacts of a run: one list of metric names, a journal on disk, and MLflow behind it.

    training ──Tracker.metrics()──> metrics.jsonl ──background thread──> MLflow (sqlite file or server)
                                    (never waits)   (batches, retries, in order)

The journal is the queue: what is in it and not yet in MLflow is sent when the server answers, also after a
restart. This package is the only place that imports mlflow, and it does so when the first Tracker is made.
"""

from raydistill.tracking.history import History, RecordedRun
from raydistill.tracking.journal import (
    JOURNAL_FILES,
    hand_over,
    has_unsent,
    journal_is_held,
    previous_run_id,
    read_metrics,
)
from raydistill.tracking.mlflow_run import code_commit, without_secrets
from raydistill.tracking.names import METRICS, check_metric_names
from raydistill.tracking.registry import download_model, register_model
from raydistill.tracking.tracker import (
    OFF,
    RunInput,
    Tracker,
    TrackingConfig,
    check_tracking,
    require_store,
)

__all__ = [
    "JOURNAL_FILES",
    "METRICS",
    "OFF",
    "History",
    "RecordedRun",
    "RunInput",
    "Tracker",
    "TrackingConfig",
    "check_metric_names",
    "check_tracking",
    "code_commit",
    "download_model",
    "hand_over",
    "has_unsent",
    "journal_is_held",
    "previous_run_id",
    "read_metrics",
    "register_model",
    "require_store",
    "without_secrets",
]
