"""Examine a model and run the checks on what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.doctor import checks
from normkit.doctor.diagnosis import Diagnosis
from normkit.doctor.examination.case import open_case
from normkit.doctor.examination.examine import examine
from normkit.doctor.over_ranks import merge_readings, together
from normkit.errors import ArgumentError
from normkit.modeling.batch import Forward, Targets
from normkit.sync import alone
from normkit.sync.groups import Group

__all__ = ["diagnose"]


def diagnose(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    *,
    forward: Forward | None = None,
    targets: Targets | None = None,
    metric: Callable[[Any, Any], float] | None = None,
    max_batches: int = 50,
    gradient_batches: int = 8,
    checks_to_run: Iterable[str] | None = None,
    seed: int = 0,
    process_group: Group = None,
    progress: bool = False,
) -> Diagnosis:
    """Find what is wrong with the normalization of a model, by name and layer.

    The same batches go through the model three times with the weights held still: as
    in training, with batch statistics and dropout off, and in eval mode. The checks
    then read the measurements of each layer.

    Args:
        model: Any module. The model and all random states are restored bit for bit;
            the passes run on a copy when it can be copied.
        loader: Batches as in training, in the size and order of training:
            `(inputs, targets)`, inputs a tensor, a tuple of positional arguments or a
            mapping of named ones.
        loss_fn: `loss_fn(output, targets)`, one number.
        forward: `forward(model, batch)` returns the output, for any other batch.
        targets: `targets(batch)` returns the targets; by default the second item of the
            batch, or the batch itself where there is none.
        metric: `metric(output, targets)`, higher is better. For scores `(N, K)` and
            integer targets `(N,)` it is the accuracy unless given.
        max_batches: The most batches to examine. Up to ten that follow are drawn too,
            and held out for `confirm` and `repair`.
        gradient_batches: Number of batches on which gradients are computed.
        checks_to_run: Ids of the checks, such as `["D01"]`; all by default.
        seed: Random seed; the same model, batches and seed give the same diagnosis.
        process_group: The ranks that each hold a part of the data; all must call this
            function. Each examines its own batches, and all get the same findings: for
            each check and layer that of the rank where it is worst. None examines this
            rank's batches, with synchronized layers on this rank alone, so that one
            rank may call.
        progress: Show a progress bar.

    Returns:
        The `Diagnosis`, with `findings`, `not_judged` and `clear`.

    Raises:
        ArgumentError: The loader is empty, `loss_fn` returns more than one number,
            `checks_to_run` is a string or names a check that does not exist, or the
            model has no values (on meta) or a mode that is fixed (traced).
        RanksError: Another rank of `process_group` failed; with its error.

    Example:
        >>> import torch, normkit
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.001))
        >>> x = 5 + 3 * torch.randn(40, 32, 4)
        >>> for batch in x:
        ...     _ = model(batch)
        >>> found = diagnose(model, list(x))
        >>> found.named
        ['D04', 'D01', 'D03']
        >>> found.findings[0].layer
        '1'
    """
    if isinstance(checks_to_run, str):
        raise ArgumentError(
            f"checks_to_run={checks_to_run!r} is a string, and must be a list of ids; "
            f"write checks_to_run=[{checks_to_run!r}]"
        )

    def examined() -> Diagnosis:
        # Gradients are measured, also inside torch.inference_mode.
        with alone(), torch.inference_mode(False):
            case = open_case(
                model,
                loader,
                loss_fn,
                forward=forward,
                targets=targets,
                metric=metric,
                max_batches=max_batches,
                gradient_batches=gradient_batches,
                seed=seed,
                keeps_some=True,
                progress=progress,
            )
            statistics = examine(case, progress=progress)
        return Diagnosis(checks.run(statistics, checks_to_run), statistics, case)

    if process_group is None:
        return examined()
    own, by_rank = together(examined, process_group)
    readings = merge_readings(by_rank)
    return replace(own, readings=readings, process_group=process_group)
