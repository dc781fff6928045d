"""The record of `watch`, and pages of findings, in a run of MLflow.

    from normkit.integrations.mlflow import log
    log(watch)                    # also a Diagnosis

A page is the artifact `normkit/watch.html` or `normkit/diagnosis.html`.
"""

# Where the package is absent, pyright takes this file for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import time

import mlflow
from mlflow.entities import Metric

from normkit.doctor import Diagnosis, Watch
from normkit.doctor.scalars import scalars
from normkit.errors import ArgumentError

__all__ = ["log"]

# The most that MLflow takes in one request.
MAX_METRICS = 1000


def log(result: Watch | Diagnosis, run_id: str | None = None) -> int:
    """Log the scalars of a watch, and the page of a watch or a diagnosis.

    Args:
        result: What `normkit.watch` or `normkit.diagnose` returned.
        run_id: The run; None for the active one.

    Returns:
        The number of scalars.

    Raises:
        ArgumentError: No run is active.
        DependencyError: The page needs `normkit[report]`.
    """
    active = mlflow.active_run()
    if run_id is None and active is None:
        raise ArgumentError("no run is active: call mlflow.start_run(), or pass run_id")
    run_id = run_id or active.info.run_id  # type: ignore[union-attr]
    client = mlflow.MlflowClient()
    metrics: list[Metric] = []
    if isinstance(result, Watch):
        now = int(1000 * time.time())
        metrics = [
            Metric(tag, value, now, step)
            for tag, value, step in scalars(result.history)
        ]
    for start in range(0, len(metrics), MAX_METRICS):
        client.log_batch(run_id, metrics[start : start + MAX_METRICS])
    page = f"normkit/{type(result).__name__.lower()}.html"
    client.log_text(run_id, result.to_html(), page)
    return len(metrics)
