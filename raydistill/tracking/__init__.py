"""Figures and artifacts of a run: one list of metric names, a journal on disk, and MLflow behind it.

    training ──Tracker.metrics()──> metrics.jsonl ──background thread──> MLflow (sqlite file or server)
                                    (never waits)   (batches, retries, in order)

The journal is the queue: what is in it and not yet in MLflow is sent when the server answers, also after a
restart. This package is the only place that imports mlflow, and it does so when the first Tracker is made.
"""

from raydistill.tracking.journal import journal_is_held, previous_run_id
from raydistill.tracking.mlflow_run import without_secrets
from raydistill.tracking.names import METRICS, check_metric_names
from raydistill.tracking.tracker import OFF, Tracker, TrackingConfig

__all__ = [
    "METRICS",
    "OFF",
    "Tracker",
    "TrackingConfig",
    "check_metric_names",
    "journal_is_held",
    "previous_run_id",
    "without_secrets",
]
