"""Check of the running statistics against the layer's inputs: D01."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.distance import Distance, distance, has_finite_inputs
from normkit.doctor.checks.eval_mode import (
    FITTING,
    FITTING_FIX,
    HARMLESS,
    LAGGING,
    METRIC_ERROR,
    SINGLE,
    STARTING,
    are_served_singly,
    costs_nothing,
    for_now,
    is_lagging,
    train_eval_gap,
    weights_fit_statistics,
)
from normkit.doctor.checks.other_scale import SCALE_FIX, of_other_scale
from normkit.doctor.checks.progress import (
    has_learned,
    is_starting,
    is_untrained,
)
from normkit.doctor.checks.thresholds import too_few
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import (
    NormStatistics,
    Statistics,
)

__all__ = ["CHECKS", "stale_statistics"]
# The loss of answers over that of their mean, from which they are of little use.
POOR = 0.5

_D01 = partial(Finding, "D01", "stale_statistics")


_POOR = (
    "; neither they nor batch statistics give good answers: the inputs are others than "
    "those of the training"
)
_INPUTS_FIX = (
    "prepare the inputs as those of the training were: range, mean and standard "
    "deviation of the training data, order of the columns"
)
_STALE_FIX = (
    "recompute the statistics for the current weights: normkit.calibrate(model, loader)"
)


def _costs_little(statistics: Statistics) -> bool:
    """Return True where eval mode loses at most `METRIC_ERROR` of a metric.

    Of answers that say nothing there is nothing to lose.
    """
    found = statistics.evaluation
    if found is None or not found.batch_metric or not has_learned(statistics):
        return False
    drop = found.mean(found.batch_metric) - found.mean(found.running_metric)
    return drop <= METRIC_ERROR and not too_few(sum(found.samples))


def _keeps_metric(statistics: Statistics) -> bool:
    """Return True where a metric tells no gap (D02) of a network that has learned."""
    found = statistics.evaluation
    gaps = {finding.severity for finding in train_eval_gap(statistics)}
    is_judged = found is not None and bool(found.batch_metric)
    return is_judged and gaps == {"clear"} and has_learned(statistics)


def _are_poor(statistics: Statistics) -> bool:
    """Return True where eval mode is hardly better than one answer for all samples."""
    found = statistics.evaluation
    if found is None or not found.common_loss:
        return False
    return found.mean(found.running_loss) > POOR * found.mean(found.common_loss) > 0


def stale_statistics(statistics: Statistics) -> Iterator[Finding]:
    """Check D01: the running statistics are not those of the layer's inputs."""
    is_fitting = weights_fit_statistics(statistics)
    is_single = are_served_singly(statistics)
    lags = is_lagging(statistics)
    nothing_learned = is_untrained(statistics)
    has_gap = any(finding.is_alarm for finding in train_eval_gap(statistics))
    is_harmless = costs_nothing(statistics) or _keeps_metric(statistics)
    costs_little, are_poor = _costs_little(statistics), _are_poor(statistics)
    yield from _of_other_inputs(statistics)
    scaled, factor = of_other_scale(statistics)
    for layer, norm in statistics.norms:
        if norm.frozen:
            continue
        found = None if norm.is_new or nothing_learned else distance(norm)
        if found is None:
            reason = _UNTRAINED if nothing_learned else _reason(norm)
            yield _D01(layer.name, "not_judged", evidence=reason)
            continue
        value, threshold = found.value_and_threshold
        severity, fix = found.severity, _STALE_FIX
        evidence = (
            f"running_mean is {found.mean:.2f} standard deviations off and running_var "
            f"by a factor of {math.exp(found.var):.2f}, on average over the channels"
        )
        if is_fitting and severity == "error" and are_poor and norm.tracked:
            severity, fix = "warning", _INPUTS_FIX
            evidence += _POOR
        elif is_fitting and severity != "clear":
            severity, fix = "info", FITTING_FIX
            evidence += FITTING
        elif is_single and severity != "clear":
            severity = "info"
            evidence += SINGLE
        elif severity != "clear" and is_starting(statistics):
            severity = "info"
            evidence += STARTING
        elif has_gap and found.outweighs and len(norm.calls) < 2:
            # A feature that is rare has statistics of few batches, and mostly costs
            # nothing: the gap shows that this channel is more than that.
            severity, value, threshold = "error", found.excess, float(found.channels)
            evidence = _of_channel(found, norm) + "; " + evidence
        elif severity == "warning" and (is_harmless or lags):
            severity = "info"
            evidence += HARMLESS if is_harmless else LAGGING
        elif severity == "error" and costs_little:
            severity = "warning"  # no graver than what it does
        is_of_inputs = layer.name == scaled and severity in ("error", "warning")
        if is_of_inputs:
            evidence += (
                f"; the variance of every channel is {factor:.3g} times that of "
                "training, and the statistics of the later norms are right: this "
                "loader gives the inputs on another scale"
            )
            fix = SCALE_FIX
        yield _D01(
            layer.name,
            for_now(statistics, severity),
            value,
            threshold,
            evidence,
            fix,
            {
                "d_mean": found.mean,
                "d_var": found.var,
                "noise": found.noise,
                "is_of_inputs": is_of_inputs,
            },
        )


def _of_other_inputs(statistics: Statistics) -> Iterator[Finding]:
    """Check the first norm, where it is frozen, against what it is given.

    Later layers see what the data of the new task make of the features of the old one.
    The first sees the inputs, through one layer: in healthy programs of fine-tuning its
    distances are at most .29 and .36.
    """
    layer, norm = next(iter(statistics.norms), (None, None))
    if layer is None or norm is None or not norm.frozen or norm.is_trainable:
        return
    if norm.momentum == 0 or norm.is_new or norm.is_identity:
        return
    found = distance(norm)
    if found is None or found.severity != "error":
        return
    value, threshold = found.value_and_threshold
    yield _D01(
        layer.name,
        "warning",
        value,
        threshold,
        "it is frozen, and its statistics are not those of what it is given: "
        f"running_mean is {found.mean:.2f} standard deviations off and running_var by "
        f"a factor of {math.exp(found.var):.2f}",
        "prepare the inputs as those of the checkpoint were: range, mean and standard "
        "deviation, order and number of channels",
        {"d_mean": found.mean, "d_var": found.var, "noise": found.noise},
    )


def _of_channel(found: Distance, norm: NormStatistics) -> str:
    channel = found.channel
    return (
        f"in eval mode channel {channel} has a mean square of {found.excess:.3g} after "
        f"normalization, more than all {found.channels} together ought to have: its "
        f"running_var is {float(norm.running_var[channel]):.2g}"
    )


_UNTRAINED = "the model has learned nothing yet, and has counted no batch"


def _reason(norm: NormStatistics) -> str:
    if norm.is_new:
        return "the layer is new and has counted no batch yet"
    if norm.in_training is None:
        return "the inputs were not measured with the weights held still"
    if not has_finite_inputs(norm):
        return "its inputs hold values that are not finite"
    samples = int(norm.in_training.sample_means.count.min())
    return (
        f"{samples} samples are too few to tell a stale estimate from a noisy one; "
        "give more batches"
    )


CHECKS = {"D01": stale_statistics}
