"""Check of the loss over the steps of a watched training: D39."""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from normkit.doctor.checks.thresholds import NOT_ITS_LOOP
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import Statistics

__all__ = ["CHECKS", "loss_spike"]

# Losses before a step that say what is usual, and after it that say whether it lasts.
BEFORE, AFTER = 20, 5
# A spike is above the median of those before by so many standard deviations (of the
# median absolute deviation), by its double, and by so much of what training has gained.
DEVIATIONS, RATIO, GAINED = 10.0, 2.0, 0.2
# A layer has moved where its step or gradient is so many times the median before.
MOVED = 4.0

_D39 = partial(Finding, "D39", "loss_spike")


def loss_spike(statistics: Statistics) -> Iterator[Finding]:
    """Check D39: a loss that leaps, and the layer that moved first."""
    loop = statistics.training
    if loop is None:
        return
    reason = ""
    if loop.is_trial:
        reason = NOT_ITS_LOOP
    elif len(loop.losses) <= BEFORE:
        reason = (
            f"{len(loop.losses)} losses are too few; give each to watch.log(loss=…)"
        )
    if reason:
        yield _D39("", "not_judged", evidence=reason)
        return
    values = [value for _, value in loop.losses]
    spikes = [at for at in range(BEFORE, len(values)) if _is_spike(values, at)]
    if not spikes:
        yield _D39(
            "",
            "clear",
            max(_ratio(values, at) for at in range(BEFORE, len(values))),
            RATIO,
            f"none of {len(values)} losses leaps above those before it",
        )
        return
    at = spikes[0]
    usual = numbers.median(values[at - BEFORE : at])
    later = values[at : at + AFTER]
    # What is over after a step or two was one batch's.
    lasts = len(later) == AFTER and not numbers.median(later) < RATIO * usual
    severity: Severity = "warning" if lasts else "info"
    step = loop.losses[at][0]
    layer, how = _first_moved(statistics, step)
    yield _D39(
        layer,
        severity,
        _ratio(values, at),
        RATIO,
        f"at step {step} the loss leaps from {usual:.3g} to {values[at]:.3g}"
        + (", and stays up" if lasts else ", once")
        + how,
        "clip the gradients, lower the learning rate of this layer or warm it up, and "
        "look at the batch of that step",
        {"step": step, "spikes": [loop.losses[i][0] for i in spikes]},
    )


def _is_spike(values: Sequence[float], at: int) -> bool:
    value, before = values[at], values[at - BEFORE : at]
    if not all(map(math.isfinite, before)):
        return False  # it is over already
    if not math.isfinite(value):
        return True
    usual = numbers.median(before)
    spread = 1.4826 * numbers.median(abs(v - usual) for v in before)
    gained = numbers.median(values[:AFTER]) - usual
    above = value - usual
    return (
        usual > 0
        and value > RATIO * usual
        and above > DEVIATIONS * spread
        and above > GAINED * gained
    )


def _ratio(values: Sequence[float], at: int) -> float:
    usual = numbers.median(values[at - BEFORE : at])
    return values[at] / usual if usual > 0 else math.nan


def _first_moved(statistics: Statistics, step: int) -> tuple[str, str]:
    """Return the layer whose step or gradient leapt first, and a clause on it."""
    loop = statistics.training
    steps = () if loop is None else loop.steps
    places = [i for i, observed in enumerate(steps) if observed <= step]
    series = _movements(statistics, len(steps))
    for place in places[-BEFORE:]:
        leaps = {
            (name, kind): values[place] / usual
            for (name, kind), values in series.items()
            if (usual := _usual(values, place)) > 0
        }
        found = max(leaps, key=lambda key: leaps[key], default=None)
        if found is not None and not leaps[found] <= MOVED:
            name, kind = found
            return name, (
                f"; the first to move was this layer, at step {steps[place]}: its "
                f"{kind} was {leaps[found]:.3g} times the usual"
            )
    return "", "; no layer's step or gradient leapt in the observed steps before"


def _movements(
    statistics: Statistics, steps: int
) -> Mapping[tuple[str, str], Sequence[float]]:
    """Return the series that were measured at every observed step."""
    found = {}
    for layer in statistics.of_role("weight"):
        if layer.weight is None:
            continue
        found[layer.name, "step"] = layer.weight.update_ratio
        found[layer.name, "gradient"] = layer.weight.gradient_norm
    return {key: values for key, values in found.items() if len(values) == steps}


def _usual(values: Sequence[float], place: int) -> float:
    before = [v for v in values[max(place - BEFORE, 0) : place] if math.isfinite(v)]
    return numbers.median(before) if len(before) >= 3 else 0.0


CHECKS = {"D39": loss_spike}
