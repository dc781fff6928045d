"""Steps that were far too large, by what they did: part of D27.

By a loss that rose until it was not finite; by weights far above the usual size, which
they have left; by their first sizes, where nothing was learned since; and by trained
weights that have become several times as large.
"""

from __future__ import annotations

import math
import statistics as numbers
from collections.abc import Iterator, Sequence
from dataclasses import replace

from normkit.doctor.checks.progress import (
    READING,
    has_learned,
    has_learned_all,
    loss_fell,
)
from normkit.doctor.checks.steps import MIN_STEPS, RECENT, largest_step
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import LayerStatistics, Statistics

__all__ = ["too_large"]

# ‖w‖ over that of entries with variance 1/fan_in, of half of the weights or more. 114
# trained healthy programs have at most 4.1 in any layer. Rates that are too high have
# left 8 to 19 behind batch norms, whose steps shrink as the weights grow, and 100 to 3
# million elsewhere.
BLOWN_UP, BLOWN_SHARE = 10.0, 0.5
# The same where no watch saw the start, which may have been large: Xavier's with a gain
# of 16 has 16, a standard normal √fan_in. And the root mean square of the entries, of
# which a standard normal has 1.
BLOWN_UNSEEN, BLOWN_RMS = 30.0, 2.0

# The largest median of RECENT ‖Δw‖/‖w‖ in a row, median over the layers, of a run that
# then learns nothing. 173 watches of healthy programs have at most 0.25, or up to 0.9
# where weights begin near zero, and learn; Adam at 0.1 on convolutions has 0.36.
TOO_FAR = 0.3
# The same of the very first step, which is all that a watch of every fifth step sees
# of them: Adam at 0.1 has 1.4 to 1.6, healthy programs at most 0.36, or 2.3 and more
# where weights begin near zero, and learn.
FIRST_TOO_FAR = 0.75
# ‖w‖ at the start over the usual one, from which a weight has a size of its own.
STARTED = 0.1
# Growth of weights that came trained. Fine-tuning a transformer leaves 1.04 to 1.12 of
# them at 0.001, and 3.1 to 4.2 at 0.03, which learns nothing.
OUTGROWN = 2.5
# A finite loss over those of the start, in the last READING before one that is not
# finite; the same of the gradients of the weights. A logarithm of zero comes without.
ROSE = 10.0


def too_large(statistics: Statistics) -> Iterator[Finding]:
    """Check for steps that were far too large, by what they did."""
    for check in (_diverged, _blown_up, _at_first, _outgrown):
        found = [*check(statistics)]
        yield from found
        if found:
            return


def _diverged(statistics: Statistics) -> Iterator[Finding]:
    """Check for a loss that rose until it, or a weight, was not finite."""
    loop = statistics.training
    if loop is None or loop.is_trial:
        return
    ratio, what = _rise([value for _, value in loop.losses]), "loss"
    if math.isnan(ratio):
        rises = [
            _rise(layer.weight.gradient_norm)
            for layer in statistics.of_role("weight")
            if layer.weight is not None
        ]
        known = [rise for rise in rises if not math.isnan(rise)]
        if not known or 2 * len(known) < len(rises):
            return
        ratio, what = numbers.median(known), "gradient of a weight (median over layers)"
    if not ratio > ROSE:
        return
    yield Finding(
        "D27",
        "update_size",
        "",
        "error",
        ratio,
        ROSE,
        f"the {what} rose to {ratio:.2g} times that of the start, and then was not "
        "finite: the steps were too large",
        "start again at a learning rate of a tenth or less, or clip the gradients",
        {"has_diverged": True},
    )


def _outgrown(statistics: Statistics) -> Iterator[Finding]:
    """Check for trained weights that a fine-tuning has made several times as large.

    What they held is gone then; those of a start may grow so.
    """
    loop = statistics.training
    if loop is None or loop.is_trial or (loop.updates or 0) < MIN_STEPS:
        return
    if not statistics.began_trained or loss_fell(statistics):
        return
    # It has learned what is new, and not only kept what it could.
    if has_learned(replace(statistics, began_trained=False)):
        return
    grown = [
        (layer.weight.norm / layer.weight.norm_at_start, layer.name)
        for layer in statistics.of_role("weight")
        if layer.weight is not None
        and not layer.is_output
        and layer.weight.norm_at_start > 0
    ]
    if not grown or not numbers.median(ratio for ratio, _ in grown) > OUTGROWN:
        return
    for ratio, name in sorted(grown, reverse=True):
        if ratio > OUTGROWN:
            yield Finding(
                "D27",
                "update_size",
                name,
                "warning",
                ratio,
                OUTGROWN,
                f"the network was trained before, and its weight is {ratio:.2g} times "
                "as large as it came; the error of the answers has not fallen: what it "
                "held is lost",
                "load it again, and train on at a tenth of the rate or less",
                {"is_origin": True},
            )


def _rise(values: Sequence[float]) -> float:
    """Return the most before a value that is not finite, over the median of the start.

    nan where there is no such value, or not enough before it.
    """
    end = next((i for i, v in enumerate(values) if not math.isfinite(v)), None)
    if end is None or end <= READING:
        return math.nan
    start = numbers.median(abs(v) for v in values[:READING])
    # A log-likelihood that falls far below zero has not risen.
    return max(values[max(READING, end - READING) : end]) / (start or math.inf)


def _blown_up(statistics: Statistics) -> Iterator[Finding]:
    """Check for weights that steps have made far larger than any start.

    They may be small by now, as the gradients of dead units are, and relative to the
    weights they are in any case. The output layer is left out: targets may be large.
    """
    found = [
        (layer.weight.norm / layer.weight.usual_norm, layer)
        for layer in statistics.of_role("weight")
        if layer.weight is not None and not layer.is_output
    ]
    large = [(ratio, layer) for ratio, layer in found if _is_blown_up(ratio, layer)]
    if not large or len(large) < BLOWN_SHARE * len(found):
        return
    has_stood = has_learned_all(statistics)
    is_seen = any(math.isfinite(s.weight.norm_at_start) for _, s in large if s.weight)
    for ratio, layer in sorted(large, key=lambda each: -each[0]):
        yield Finding(
            "D27",
            "update_size",
            layer.name,
            "info" if has_stood else "warning",
            ratio,
            BLOWN_UP if is_seen else BLOWN_UNSEEN,
            f"its weight is {ratio:.3g} times as large as one of so many inputs "
            "begins: steps that were far too large have made it so"
            + "; the network has learned nevertheless"
            * has_stood,
            "start again at a learning rate of a tenth or less; check that gradients "
            "are cleared, and that the loss is a mean and not a sum",
            {"is_origin": True},
        )


def _at_first(statistics: Statistics) -> Iterator[Finding]:
    """Check for first steps that replaced the weights, after which nothing is learned.

    Adam's step has the size of the rate, whatever the gradients: at 0.1 a few leave
    nothing of weights that began at 0.05, and units that are dead from then on.
    """
    loop = statistics.training
    if loop is None or loop.is_trial or (loop.updates or 0) < MIN_STEPS:
        return
    moved = [
        (layer.name, weight.update_ratio)
        for layer in statistics.of_role("weight")
        if (weight := layer.weight) is not None
        and len(weight.update_ratio) >= RECENT
        and weight.norm_at_start > STARTED * weight.usual_norm
    ]
    if not moved or has_learned(statistics) or loss_fell(statistics):
        return
    is_first_seen = bool(loop.steps) and loop.steps[0] == 0
    for what, threshold, sizes in (
        (
            f"{RECENT} observed steps in a row each",
            TOO_FAR,
            [(largest_step(ratios), name) for name, ratios in moved],
        ),
        (
            "the first step",
            FIRST_TOO_FAR,
            [(ratios[0], name) for name, ratios in moved if is_first_seen],
        ),
    ):
        middle = numbers.median(size for size, _ in sizes) if sizes else 0.0
        if not threshold < middle < math.inf:
            continue
        for size, name in sorted(sizes, reverse=True):
            if size > threshold:
                yield Finding(
                    "D27",
                    "update_size",
                    name,
                    "warning",
                    size,
                    threshold,
                    f"{what} changed its weight by {size:.2g} of its size, and the "
                    "error of the answers has not fallen since: it was replaced",
                    "start again at a learning rate of a tenth or less",
                    {"is_origin": True},
                )
        return


def _is_blown_up(ratio: float, layer: LayerStatistics) -> bool:
    weight = layer.weight
    if weight is None or not weight.size or not math.isfinite(ratio):
        return False
    if math.isfinite(weight.norm_at_start):
        return ratio > BLOWN_UP and weight.norm > weight.norm_at_start * BLOWN_UP / 2
    return ratio > BLOWN_UNSEEN and weight.norm / weight.size**0.5 > BLOWN_RMS
