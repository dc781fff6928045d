"""Try the remedies on a copy: does what was named account for the harm?

A remedy writes better running statistics, taken from what the examination measured, so
that it needs no other pass than the one that shows whether eval mode does better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from normkit.doctor.case import Case
from normkit.doctor.examine import opened
from normkit.doctor.finding import Finding, plain
from normkit.doctor.statistics import ChannelStream, NormStatistics, Statistics

__all__ = ["REMEDIES", "Confirmation", "confirm", "set_statistics"]

# What a remedy must gain to count: a point of the metric, or a tenth of the loss.
LEAST_METRIC, LEAST_LOSS = 0.01, 0.1

Remedy = Callable[[nn.Module, Statistics], None]


@dataclass(frozen=True)
class Confirmation:
    """What one remedy did to eval mode, on a copy and on the same batches.

    Attributes:
        id: The check whose remedy it was.
        measure: "metric" (higher is better) or "loss" (lower is better).
        before: The measure in eval mode, mean over samples.
        after: The same with the remedy.
        error: Standard error of the difference, over the batches.
        helps: The remedy gains enough, and more than two standard errors.
    """

    id: str
    measure: str
    before: float
    after: float
    error: float
    helps: bool

    def to_text(self) -> str:
        """The outcome in one sentence."""
        verdict = "helps" if self.helps else "does not help"
        return (
            f"{self.id}: its remedy {verdict}; {self.measure} {self.before:.4g} before "
            f"and {self.after:.4g} after (±{2 * self.error:.2g})"
        )

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data."""
        return plain(vars(self))


def set_statistics(
    model: nn.Module,
    statistics: Statistics,
    choose: Callable[[NormStatistics], ChannelStream | None],
    names: Iterable[str] | None = None,
) -> None:
    """Write measured statistics into the running ones, in place.

    Args:
        model: The model; only its batch norms' running statistics change.
        statistics: What was measured.
        choose: Which stream of a layer to take; None leaves the layer alone.
        names: Only these layers; all that are not frozen by default.
    """
    modules = dict(model.named_modules())
    wanted = None if names is None else set(names)
    with torch.no_grad():
        for layer, norm in statistics.norms:
            stream = choose(norm)
            if stream is None or norm.frozen:
                continue
            if wanted is not None and layer.name not in wanted:
                continue
            module: Any = modules[layer.name]
            var = stream.pooled.unbiased_var
            kept = var.isfinite() & stream.pooled.mean.isfinite()
            for buffer, value in (
                (module.running_mean, stream.pooled.mean),
                (module.running_var, var),
            ):
                old = buffer.to("cpu", torch.float64)
                buffer.copy_(torch.where(kept, value, old))


def _as_in_training(model: nn.Module, statistics: Statistics) -> None:
    set_statistics(model, statistics, lambda norm: norm.stream)


def _with_dropout_off(model: nn.Module, statistics: Statistics) -> None:
    set_statistics(model, statistics, lambda norm: norm.quiet)


REMEDIES: dict[str, Remedy] = {
    **dict.fromkeys(("D01", "D02", "D03", "D04", "D17", "D31", "D32"), _as_in_training),
    "D11": _with_dropout_off,
}


def confirm(
    case: Case, statistics: Statistics, findings: Iterable[Finding]
) -> list[Confirmation]:
    """Try the remedy of each check that raised an alarm, each on a copy of its own."""
    found = statistics.evaluation
    if found is None:
        return []
    ids = dict.fromkeys(f.id for f in findings if f.is_alarm and f.id in REMEDIES)
    confirmations = []
    tried: dict[Remedy, Confirmation] = {}
    for id_ in ids:
        remedy = REMEDIES[id_]
        if remedy not in tried:
            with opened(case) as patient, torch.no_grad():
                patient.running_statistics()
                remedy(patient.model, statistics)
                walk = patient.walk(streams=False)
            if found.running_metric:
                before, after = found.running_metric, tuple(walk.metrics)
            else:
                before, after = found.running_loss, tuple(walk.losses)
            tried[remedy] = _compared(
                before, after, found.samples, is_metric=bool(found.running_metric)
            )
        confirmations.append(replace(tried[remedy], id=id_))
    return confirmations


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
    measure = "metric" if is_metric else "loss"
    return Confirmation("", measure, old, new, error, helps)
