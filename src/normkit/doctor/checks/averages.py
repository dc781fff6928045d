"""Checks of how the running statistics are kept: D03 and D04."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.distance import distance
from normkit.doctor.checks.eval_mode import (
    FITTING,
    FITTING_FIX,
    HARMLESS,
    LAGGING,
    MOMENTUM_HIGH,
    STARTING,
    costs_nothing,
    for_now,
    is_lagging,
    train_eval_gap,
    weights_fit_statistics,
)
from normkit.doctor.checks.progress import is_starting, is_untrained
from normkit.doctor.checks.thresholds import above
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import LayerStatistics, NormStatistics, Statistics
from normkit.results import counted

__all__ = ["CHECKS", "ema_not_warm", "momentum_convention"]

# The weight of the initial values (mean 0, variance 1) in the running statistics: .05
# after 29 steps at momentum .1, 299 at .01, 2995 at .001.
INITIAL_WEIGHT = 0.05

# The initial values have 5 % after 600 batches. The reversed convention gives .001 to
# .003.
MOMENTUM_LOW = 0.005

_D03 = partial(Finding, "D03", "ema_not_warm")
_D04 = partial(Finding, "D04", "momentum_convention")


def ema_not_warm(statistics: Statistics) -> Iterator[Finding]:
    """Check D03: the initial values still have weight in the running statistics."""
    is_fitting = weights_fit_statistics(statistics)
    nothing_learned = is_untrained(statistics)
    for layer, norm in statistics.norms:
        if norm.frozen or norm.momentum is None:
            continue
        if norm.is_new or nothing_learned:
            reason = "the layer is new and has counted no batch yet"
            yield _D03(layer.name, "not_judged", evidence=reason)
            continue
        if not norm.tracks:
            yield _not_tracking(layer, norm, is_fitting=is_fitting)
            continue
        if norm.tracked is None or not (norm.tracked or norm.has_default_buffers):
            reason = "the layer does not count its batches (num_batches_tracked)"
            yield _D03(layer.name, "not_judged", evidence=reason)
            continue
        if not 0 <= norm.momentum <= 1:
            reason = f"momentum is {norm.momentum:g}, outside 0 to 1"
            yield _D03(layer.name, "not_judged", evidence=reason)
            continue
        weight = (1 - norm.momentum) ** norm.tracked
        severity, threshold = above(weight, warning=INITIAL_WEIGHT)
        measured = distance(norm)
        if severity != "clear" and measured is not None:
            if measured.is_small:
                severity = "clear"  # set by a calibration
            elif is_fitting:
                severity = "info"  # right for weights trained on them
            elif measured.severity == "error" and norm.momentum > MOMENTUM_LOW:
                # This is the cause; at a lower momentum D04 is.
                severity = "error"
        is_harmless = severity == "warning" and costs_nothing(statistics)
        lags = severity == "warning" and not is_harmless and is_lagging(statistics)
        if is_harmless or lags:
            severity = "info"
        is_early = severity != "clear" and is_starting(statistics)
        if is_early or (statistics.while_training and severity == "warning"):
            severity = "info"  # eval mode has not been asked for yet
        is_right = is_fitting and severity == "info"
        yield _D03(
            layer.name,
            for_now(statistics, severity),
            weight,
            threshold,
            f"after {counted(norm.tracked, 'batch', plural='batches')} at momentum "
            f"{norm.momentum:g} the initial mean 0 and variance 1 still have a weight "
            f"of {weight:.0%}"
            + FITTING * is_right
            + STARTING * is_early
            + HARMLESS * is_harmless
            + LAGGING * lags,
            FITTING_FIX
            if is_right
            else "train longer before eval, or normkit.calibrate(model, loader), or "
            "momentum=None for a cumulative average",
            {"momentum": norm.momentum, "tracked": norm.tracked},
        )


def _not_tracking(
    layer: LayerStatistics, norm: NormStatistics, *, is_fitting: bool
) -> Finding:
    """Return the finding on a layer whose flag says that it tracks nothing.

    torch reads it in training mode; in eval mode it takes the buffers where there are
    some.
    """
    found = distance(norm)
    severity: Severity = "info" if found is None or is_fitting else found.severity
    return _D03(
        layer.name,
        severity,
        1.0,
        INITIAL_WEIGHT,
        "track_running_stats is False, so that training never updates the running "
        "statistics; the layer has them nevertheless, and eval mode uses them",
        "set track_running_stats=True and normkit.calibrate(model, loader); a layer "
        "that should keep none is made with track_running_stats=False",
        {"momentum": norm.momentum, "tracked": norm.tracked},
    )


def _held(momentum: float) -> str:
    """Return of which batches the running statistics are, at a high momentum."""
    batches = float(f"{1 / momentum:.2g}")
    if batches < 1.5:
        return "the running statistics are those of the last batch"
    return f"the running statistics hold only the last {batches:g} batches"


def momentum_convention(statistics: Statistics) -> Iterator[Finding]:
    """Check D04: the momentum looks like that of the other convention, 1 − momentum."""
    has_gap = any(finding.is_alarm for finding in train_eval_gap(statistics))
    is_fitting = weights_fit_statistics(statistics)
    for layer, norm in statistics.norms:
        momentum = norm.momentum
        if momentum == 0 and has_gap and not norm.is_constant:
            yield from _never_updated(layer, norm)
        # A momentum of 0 is a way to freeze the statistics.
        if norm.frozen or momentum is None or momentum == 0:
            continue
        is_high, is_low = momentum >= MOMENTUM_HIGH, momentum <= MOMENTUM_LOW
        threshold = MOMENTUM_LOW if is_low else MOMENTUM_HIGH
        measured = None if norm.is_new else distance(norm)
        severity: Severity = "clear"
        off: Severity = "clear"
        reason = ""
        if measured is not None and not is_fitting:
            off = measured.severity
        if is_high or is_low:
            severity = "warning"
            if off == "error" or (off == "warning" and has_gap):
                severity = "error"
            elif is_low and measured is not None and measured.is_small:
                # Slow but arrived: the statistics are right.
                severity = "info"
            elif is_low and (reason := _too_early(statistics, norm)):
                severity = "info"
        what = (
            _held(momentum)
            if is_high
            else f"the running statistics need {3 / momentum:,.0f} batches to forget "
            "their initial values"
        )
        yield _D04(
            layer.name,
            severity,
            momentum,
            threshold,
            f"momentum {momentum:g} means new = {1 - momentum:g}·old + "
            f"{momentum:g}·batch here: {what}"
            + ("" if off == "clear" else ", and they are off")
            + reason,
            f"set momentum={round(1 - momentum, 6):g} if the value was written for the "
            "convention new = momentum·old + …; torch's default is 0.1; "
            "then normkit.calibrate(model, loader)"
            if is_high
            else "set momentum=0.1 (torch's default), then "
            "normkit.calibrate(model, loader)",
            {"momentum": momentum, "tracked": norm.tracked},
        )


def _never_updated(layer: LayerStatistics, norm: NormStatistics) -> Iterator[Finding]:
    """Check a momentum of 0, which keeps the statistics out of eval mode alone."""
    found = distance(norm)
    if found is None or found.severity == "clear":
        return
    yield _D04(
        layer.name,
        found.severity,
        0.0,
        MOMENTUM_LOW,
        "momentum 0 never updates the running statistics, which eval mode uses; "
        "training mode normalizes by each batch, and so the weights fit others: "
        f"running_mean is {found.mean:.2f} standard deviations off and running_var by "
        f"a factor of {math.exp(found.var):.2f}",
        "set momentum=0.1 (torch's default), then normkit.calibrate(model, loader); "
        "to keep the statistics on purpose freeze the layer: "
        "normkit.convert(model, to='frozen')",
        {"momentum": 0.0, "tracked": norm.tracked},
    )


def _too_early(statistics: Statistics, norm: NormStatistics) -> str:
    """Return why a slow average can have done no harm yet; "" where it can.

    MNASNet has a momentum of 3e-4, right for the 10,000 batches of its training.
    """
    if norm.is_new:
        return "; no batch has been counted yet"
    if statistics.while_training and not norm.is_read_in_eval:
        return "; no call in eval mode has read them yet"
    return ""


CHECKS = {"D03": ema_not_warm, "D04": momentum_convention}
