"""The record of `watch`, and pages of findings, in a run of Weights & Biases.

    from normkit.integrations.wandb import log
    log(watch)                    # also a Diagnosis

W&B takes no number for a step that is past. The scalars have a step axis of their own,
`normkit/step`, so that a record can be written after the training.
"""

# Where the package is absent, pyright takes this file for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import wandb

from normkit.doctor import Diagnosis, Watch
from normkit.doctor.scalars import scalars_by_step
from normkit.errors import ArgumentError

__all__ = ["log"]


def log(result: Watch | Diagnosis, run: Any = None) -> int:
    """Log the scalars of a watch, and the page of a watch or a diagnosis.

    Args:
        result: What `normkit.watch` or `normkit.diagnose` returned.
        run: The run of W&B; None for the one that `wandb.init` began.

    Returns:
        The number of scalars.

    Raises:
        ArgumentError: No run has begun.
        DependencyError: The page needs `normkit[report]`.
    """
    run = wandb.run if run is None else run
    if run is None:
        raise ArgumentError("no run has begun: call wandb.init(…), or pass run=")
    written = 0
    if isinstance(result, Watch):
        run.define_metric("normkit/step", hidden=True)
        run.define_metric("normkit/*", step_metric="normkit/step")
        for step, values in scalars_by_step(result.history).items():
            run.log({"normkit/step": step, **values})
            written += len(values)
    page = f"normkit/{type(result).__name__.lower()}"
    run.log({page: wandb.Html(result.to_html(), inject=False)})
    return written
