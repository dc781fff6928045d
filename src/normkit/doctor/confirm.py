"""Try the remedies on a copy: does what was named account for the harm?

Remedies of the running statistics need no other pass than the one that shows whether
eval mode does better. What eval mode does not show (a batch of one, frozen layers that
move) is examined again: is the finding gone, and eval mode no worse?
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from normkit.doctor.case import Case
from normkit.doctor.examine import examine, opened
from normkit.doctor.finding import Finding, plain
from normkit.doctor.remedies import (
    REMEDIES,
    Remedy,
    as_in_training,
    has_remedy,
    torch_momentum,
)
from normkit.doctor.statistics import Evaluation, Statistics

__all__ = ["Confirmation", "confirm", "remedied"]

# What a remedy must gain to count: a point of the metric, or a tenth of the loss.
LEAST_METRIC, LEAST_LOSS = 0.01, 0.1
# What eval mode does not show: the same check looks again.
LOOKED_AT_AGAIN = ("D06", "D07", "D16", "D34")
_OF_STATISTICS = {
    id_ for id_, act in REMEDIES.items() if act in (as_in_training, torch_momentum)
}

Check = Callable[[Statistics], Iterable[Finding]]


@dataclass(frozen=True)
class Confirmation:
    """What one remedy did to eval mode, on a copy and on the same batches.

    Attributes:
        id: The check whose remedy it was.
        measure: "metric" (higher is better), "loss" (lower is better), or "alarms",
            the number of layers for which the check still raises one.
        before: The measure in eval mode, mean over samples.
        after: The same with the remedy.
        error: Standard error of the difference, over the batches; 0 for alarms.
        helps: The remedy gains enough, and more than two standard errors; no alarm is
            left, and the metric or loss is no worse.
        harms: It loses as much.
    """

    id: str
    measure: str
    before: float
    after: float
    error: float
    helps: bool
    harms: bool = False

    def to_text(self) -> str:
        """The outcome in one sentence."""
        verdict = "helps" if self.helps else "does not help"
        spread = f" (±{2 * self.error:.2g})" if self.error else ""
        return (
            f"{self.id}: its remedy {verdict}; {self.measure} {self.before:.4g} before "
            f"and {self.after:.4g} after{spread}"
        )

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return plain(vars(self))


def remedied(
    findings: Iterable[Finding], statistics: Statistics
) -> dict[str, list[Finding]]:
    """The alarms that have a remedy, by check, in the order to apply the remedies."""
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.is_alarm and has_remedy(finding, statistics):
            found.setdefault(finding.id, []).append(finding)
    return {id_: found[id_] for id_ in REMEDIES if id_ in found}


def confirm(
    case: Case,
    statistics: Statistics,
    findings: Iterable[Finding],
    checks: Mapping[str, Check],
) -> list[Confirmation]:
    """Try the remedy of each check that raised an alarm, each on a copy of its own."""
    if statistics.evaluation is None:
        return []
    alarms = [f for f in findings if f.is_alarm]
    groups = remedied(alarms, statistics)
    if len(_OF_STATISTICS & groups.keys()) > 1:
        # Better statistics would speak for the others as much as for small batches.
        groups.pop("D05", None)
    done: dict[Remedy, Confirmation] = {}
    outcome = {}
    for id_, group in groups.items():
        remedy = REMEDIES[id_]
        if id_ in LOOKED_AT_AGAIN:
            check = checks[id_]
            outcome[id_] = _looked_at_again(case, statistics, group, remedy, check)
            continue
        if id_ in _OF_STATISTICS:
            remedy = as_in_training  # a momentum is not seen in eval mode
        if remedy not in done:
            done[remedy] = _measured(case, statistics, group, remedy)
        outcome[id_] = done[remedy]
    ids = dict.fromkeys(f.id for f in alarms if f.id in outcome)
    return [replace(outcome[id_], id=id_) for id_ in ids]


def _measured(
    case: Case, statistics: Statistics, findings: list[Finding], remedy: Remedy
) -> Confirmation:
    """Eval mode on the same batches, before and after."""
    with opened(case) as patient, torch.no_grad():
        patient.running_statistics()
        remedy(patient.model, statistics, findings)
        walk = patient.walk(streams=False)
    assert statistics.evaluation is not None
    return _series(statistics.evaluation, tuple(walk.metrics), tuple(walk.losses))


def _looked_at_again(
    case: Case,
    statistics: Statistics,
    findings: list[Finding],
    remedy: Remedy,
    check: Check,
) -> Confirmation:
    """The check's alarms before and after; eval mode must not be worse."""
    try:
        model = copy.deepcopy(case.model)
    except Exception:  # deepcopy calls anything that a model may hold
        unknown = float(len(findings))
        return Confirmation("", "alarms", unknown, math.nan, 0.0, helps=False)
    remedy(model, statistics, findings)
    after = examine(replace(case, model=model))
    left = sum(f.is_alarm and has_remedy(f, after) for f in check(after))
    assert statistics.evaluation is not None
    assert after.evaluation is not None
    metrics, losses = after.evaluation.running_metric, after.evaluation.running_loss
    harms = _series(statistics.evaluation, metrics, losses).harms
    helps = left == 0 and not harms
    return Confirmation("", "alarms", len(findings), left, 0.0, helps, harms)


def _series(
    found: Evaluation, metrics: tuple[float, ...], losses: tuple[float, ...]
) -> Confirmation:
    is_metric = bool(found.running_metric)
    before = found.running_metric if is_metric else found.running_loss
    after = metrics if is_metric else losses
    return _compared(before, after, found.samples, is_metric=is_metric)


def _compared(
    before: tuple[float, ...],
    after: tuple[float, ...],
    samples: tuple[int, ...],
    *,
    is_metric: bool,
) -> Confirmation:
    """Compare two series of one number per batch, batch by batch."""
    total = sum(samples)
    old, new = (
        sum(n * v for n, v in zip(samples, series, strict=True)) / total
        for series in (before, after)
    )
    sign = 1.0 if is_metric else -1.0
    gains = [sign * (a - b) for a, b in zip(after, before, strict=True)]
    mean = sum(gains) / len(gains)
    error = math.nan
    if len(gains) > 1:
        spread = sum((g - mean) ** 2 for g in gains) / (len(gains) - 1)
        error = math.sqrt(spread / len(gains))
    least = LEAST_METRIC if is_metric else LEAST_LOSS * abs(old)
    # A model that gave NaN and gives numbers now has gained, whatever the difference.
    is_cured = math.isnan(old) and math.isfinite(new)
    helps = is_cured or (sign * (new - old) > least and mean > 2 * error)
    harms = not is_cured and sign * (new - old) < -least and mean < -2 * error
    measure = "metric" if is_metric else "loss"
    return Confirmation("", measure, old, new, error, helps, harms)
