"""Confirm findings: apply each repair to a copy of the model and measure again.

A repair of the running statistics is measured on batches that the diagnosis did not
read. Where the loader had no more, its batches are split, and each part is run with the
statistics of the others.
Faults that eval mode does not show (a batch of one, frozen layers that move)
are examined again: the finding must be gone, and eval mode no worse.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from normkit.doctor.channel_statistics import ChannelStatistics
from normkit.doctor.checks.thresholds import MIN_SAMPLES
from normkit.doctor.examination.case import Case
from normkit.doctor.examination.examine import examine
from normkit.doctor.examination.working_copy import open_working_copy
from normkit.doctor.finding import Finding, plain
from normkit.doctor.fixes.repairs import (
    REPAIRS,
    Repair,
    as_in_training,
    can_repair,
    torch_momentum,
)
from normkit.doctor.measurements import (
    Evaluation,
    Statistics,
    mean_over_samples,
    standard_error,
)
from normkit.modeling.batch import num_samples
from normkit.progress import tracked
from normkit.results import Result

__all__ = ["Confirmation", "confirm", "declined_unseen", "repairable"]

# The least gain that counts: a point of the metric, or a tenth of the loss.
MIN_METRIC_GAIN, MIN_LOSS_GAIN = 0.01, 0.1
# The parts that the batches are split into; each is held out once.
FOLDS = 10
# Fewer batches held out, or samples in them, give no standard error to rely on: the
# batches of the diagnosis are split.
MIN_HELD_OUT = 4
# Faults that eval mode does not show: the same check runs again.
EXAMINED_AGAIN = ("D06", "D07", "D16", "D34")
_OF_STATISTICS = {
    id_ for id_, act in REPAIRS.items() if act in (as_in_training, torch_momentum)
}

Check = Callable[[Statistics], Iterable[Finding]]


@dataclass(frozen=True, repr=False)
class Confirmation(Result):
    """The effect of one repair on eval mode, on a copy.

    Attributes:
        id: The check whose finding was repaired.
        measure: "metric" (higher is better), "loss" (lower is better), or "alarms",
            the number of layers with an alarm of the check.
        before: The measure in eval mode, mean over samples.
        after: The measure with the repair.
        error: Standard error of the difference, over the batches; 0 for alarms.
        improves: The gain is above two standard errors, in the metric, or in the loss
            where the metric is no worse; for alarms the same as `helps`.
        helps: The gain is large enough and above two standard errors; for alarms: none
            is left, and the metric or loss is no worse.
        harms: The loss is as large.
    """

    id: str
    measure: str
    before: float
    after: float
    error: float
    helps: bool
    harms: bool = False
    improves: bool = False

    def to_text(self) -> str:
        """Return the outcome as one sentence."""
        verdict = "helps" if self.helps else "does not help"
        spread = f" (±{2 * self.error:.2g})" if self.error else ""
        return (
            f"{self.id}: its fix {verdict}; {self.measure} {self.before:.4g} before "
            f"and {self.after:.4g} after{spread}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as plain data."""
        return plain(vars(self))


def repairable(
    findings: Iterable[Finding], statistics: Statistics
) -> dict[str, list[Finding]]:
    """Return the alarms that have a repair, by check, in the order to apply them."""
    found: dict[str, list[Finding]] = {}
    findings = list(findings)
    harmful = declined_unseen(findings)
    for finding in findings:
        if finding.id in harmful:
            continue
        if finding.is_alarm and can_repair(finding, statistics):
            found.setdefault(finding.id, []).append(finding)
    return {id_: found[id_] for id_ in REPAIRS if id_ in found}


def declined_unseen(findings: Iterable[Finding]) -> dict[str, str]:
    """Return the alarms whose repair no trial may show to help, with the reason.

    On a loader with inputs on another scale any statistics of it look better.
    """
    alarms = [finding for finding in findings if finding.is_alarm]
    if not any(f.details.get("is_of_inputs", False) for f in alarms):
        return {}
    reason = (
        "this loader gives the inputs on another scale than training did, whose "
        "statistics would be lost"
    )
    return {f.id: f"{f.id}: {reason}" for f in alarms if f.id in _OF_STATISTICS}


def confirm(
    case: Case,
    statistics: Statistics,
    findings: Iterable[Finding],
    checks: Mapping[str, Check],
    *,
    progress: bool = False,
) -> list[Confirmation]:
    """Try the repair of each check with an alarm, each on its own copy.

    `progress` shows a bar over the repairs.
    """
    if statistics.evaluation is None:
        return []
    alarms = [f for f in findings if f.is_alarm]
    groups = repairable(alarms, statistics)
    if len(_OF_STATISTICS & groups.keys()) > 1:
        # Better statistics would confirm the others as much as small batches.
        groups.pop("D05", None)
    folds = min(FOLDS, len(case.batches))
    parts = [replace(case, batches=case.batches[i::folds]) for i in range(folds)]
    seen: list[Statistics] = []
    done: dict[Repair, Confirmation] = {}
    outcome = {}
    for id_, group in tracked(groups.items(), "confirm", shown=progress):
        repair = REPAIRS[id_]
        if id_ in EXAMINED_AGAIN:
            check = checks[id_]
            outcome[id_] = _examined_again(case, statistics, group, repair, check)
            continue
        if id_ in _OF_STATISTICS:
            repair = as_in_training  # a momentum has no effect in eval mode
        if _is_enough(case.held_out):
            if repair not in done:
                done[repair] = _on_others(case, statistics, group, repair)
            outcome[id_] = done[repair]
            continue
        if len(case.batches) < 2:
            continue  # nothing to hold out
        if not seen:
            seen = [examine(replace(part, gradient_batches=0)) for part in parts]
        if repair not in done:
            done[repair] = _held_out(parts, seen, group, repair)
        outcome[id_] = done[repair]
    ids = dict.fromkeys(f.id for f in alarms if f.id in outcome)
    return [replace(outcome[id_], id=id_) for id_ in ids]


def _is_enough(held_out: list[Any]) -> bool:
    samples = sum(map(num_samples, held_out))
    return len(held_out) >= MIN_HELD_OUT and samples >= MIN_SAMPLES


def _on_others(
    case: Case, statistics: Statistics, findings: list[Finding], repair: Repair
) -> Confirmation:
    """Compare eval mode before and after on batches that nothing was read from."""
    with (
        open_working_copy(replace(case, batches=case.held_out)) as working,
        torch.no_grad(),
    ):
        working.use_running_statistics()
        before = working.run("answers")
        repair(working.model, statistics, findings)
        after = working.run("answers")
    whole = Evaluation(
        samples=tuple(before.samples),
        batch_loss=(),
        running_loss=tuple(before.losses),
        running_metric=tuple(before.metrics),
    )
    return _compared(whole, tuple(after.metrics), tuple(after.losses))


def _held_out(
    parts: list[Case],
    seen: list[Statistics],
    findings: list[Finding],
    repair: Repair,
) -> Confirmation:
    """Compare eval mode before and after, each part with the others' statistics."""
    metrics, losses = [], []
    for index, part in enumerate(parts):
        others = _merged([one for i, one in enumerate(seen) if i != index])
        with open_working_copy(part) as working, torch.no_grad():
            working.use_running_statistics()
            repair(working.model, others, findings)
            after = working.run("answers")
        metrics += after.metrics
        losses += after.losses
    before = [one.evaluation for one in seen if one.evaluation is not None]
    whole = Evaluation(
        samples=tuple(n for one in before for n in one.samples),
        batch_loss=(),
        running_loss=tuple(v for one in before for v in one.running_loss),
        running_metric=tuple(v for one in before for v in one.running_metric),
    )
    return _compared(whole, tuple(metrics), tuple(losses))


def _merged(parts: list[Statistics]) -> Statistics:
    """Return the first part with the channel statistics of all parts."""
    norms = [{layer.name: norm for layer, norm in part.norms} for part in parts]
    layers = []
    for layer in parts[0].layers:
        norm = layer.norm
        if norm is not None:
            same = [each[layer.name] for each in norms if layer.name in each]
            norm = replace(
                norm,
                in_training=_merged_channels([n.in_training for n in same]),
                without_dropout=_merged_channels([n.without_dropout for n in same]),
            )
        layers.append(replace(layer, norm=norm))
    return replace(parts[0], layers=tuple(layers))


def _merged_channels(
    parts: list[ChannelStatistics | None],
) -> ChannelStatistics | None:
    known = [part for part in parts if part is not None]
    return functools.reduce(ChannelStatistics.merge, known) if known else None


def _examined_again(
    case: Case,
    statistics: Statistics,
    findings: list[Finding],
    repair: Repair,
    check: Check,
) -> Confirmation:
    """Compare the check's alarms before and after; eval mode must not be worse."""
    try:
        model = copy.deepcopy(case.model)
    except Exception:  # deepcopy calls anything that a model may hold
        unknown = float(len(findings))
        return Confirmation("", "alarms", unknown, math.nan, 0.0, helps=False)
    repair(model, statistics, findings)
    after = examine(replace(case, model=model))
    left = sum(f.is_alarm and can_repair(f, after) for f in check(after))
    assert statistics.evaluation is not None
    assert after.evaluation is not None
    metrics, losses = after.evaluation.running_metric, after.evaluation.running_loss
    harms = _compared(statistics.evaluation, metrics, losses).harms
    helps = left == 0 and not harms
    return Confirmation("", "alarms", len(findings), left, 0.0, helps, harms, helps)


def _compared(
    found: Evaluation, metrics: tuple[float, ...], losses: tuple[float, ...]
) -> Confirmation:
    """Compare eval mode before and after, by the metric where there is one."""
    loss = _by_batch("loss", found.running_loss, losses, found.samples)
    if not found.running_metric:
        return loss
    metric = _by_batch("metric", found.running_metric, metrics, found.samples)
    is_no_worse = not metric.after < metric.before
    return replace(metric, improves=metric.improves or (is_no_worse and loss.improves))


def _by_batch(
    measure: str,
    before: tuple[float, ...],
    after: tuple[float, ...],
    samples: tuple[int, ...],
) -> Confirmation:
    """Compare two series of one number per batch, batch by batch."""
    old, new = (mean_over_samples(series, samples) for series in (before, after))
    sign = 1.0 if measure == "metric" else -1.0
    gains = [sign * (a - b) for a, b in zip(after, before, strict=True)]
    mean, error = sum(gains) / len(gains), standard_error(gains)
    least = MIN_METRIC_GAIN if measure == "metric" else MIN_LOSS_GAIN * abs(old)
    # A model that gave NaN and gives numbers now has gained, whatever the difference.
    is_cured = math.isnan(old) and math.isfinite(new)
    improves = is_cured or (mean > 2 * error and sign * (new - old) > 0)
    helps = is_cured or (improves and sign * (new - old) > least)
    harms = not is_cured and sign * (new - old) < -least and mean < -2 * error
    return Confirmation("", measure, old, new, error, helps, harms, improves)
