"""Check of the loss over the steps of a watched training: D39."""

from __future__ import annotations

import itertools
import math
import statistics as numbers
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from normkit.doctor.checks.thresholds import NOT_ITS_LOOP
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics

__all__ = ["CHECKS", "loss_spike"]

# Losses before a step that say what is usual, and after it that say whether more than
# one batch is high; as many as before say where the loss is then. Of few, all must be
# high. By chance the median of n losses is above 20 of the same noise in 7 of 100,000
# cases (n = 20) to 63 (11), and all of 5 in 2: the ranks of n + 20.
BEFORE, AFTER, FEW = 20, 5, 10
# A spike is above the median of those before by so many standard deviations (of the
# median absolute deviation), by its double, and by so much of what training has gained.
# Of healthy programs a generator comes nearest to all three, at 0.6 of them, and a
# transformer is next, at 0.4 (docs/doctor-score.md).
DEVIATIONS, RATIO, GAINED = 10.0, 2.0, 0.2
# A layer has moved where its step or gradient is so many times the median before.
MOVED = 4.0
# So many leaps at one distance, to a tenth of it and of FEW losses or more, are the
# loop's own: a copied target network, or an order of the batches.
PERIODS, EVEN = 3, 0.1

_D39 = partial(Finding, "D39", "loss_spike")


def loss_spike(statistics: Statistics) -> Iterator[Finding]:
    """Check D39: a spike of the loss, and the layer that changed first."""
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
    values = [value if math.isfinite(value) else math.inf for _, value in loop.losses]
    leaps = {at: _leap(values, at) for at in range(BEFORE, len(values))}
    spikes = [at for at, leap in leaps.items() if leap.share > 1]
    if not spikes:
        nearest = max(leaps.values(), key=lambda leap: leap.share)
        yield _D39(
            "",
            "clear",
            nearest.ratio,
            RATIO,
            f"none of {len(values)} losses leaps above those before it",
            details=nearest._asdict(),
        )
        return
    lasting = [at for at in spikes if _lasts(values, at, spikes[0])]
    at = (lasting or spikes)[0]
    usual = numbers.median(values[at - BEFORE : at])
    step = loop.losses[at][0]
    layer, how = _first_moved(statistics, step)
    period = 0.0 if layer else _period([loop.losses[i][0] for i in spikes])
    if period:
        how += (
            f"; it leaps every {period:.3g} steps, as when a target network is copied"
        )
    yield _D39(
        layer,
        "warning" if lasting and not period else "info",
        leaps[at].ratio,
        RATIO,
        f"at step {step} the loss leaps from {usual:.3g} to {loop.losses[at][1]:.3g}"
        + _clause(values, at, lasts=bool(lasting))
        + how,
        "clip the gradients, lower the learning rate of this layer or warm it up, and "
        "look at the batch of that step",
        {
            **leaps[at]._asdict(),
            "step": step,
            "spikes": [loop.losses[i][0] for i in spikes],
        },
    )


def _lasts(values: Sequence[float], at: int, first: int) -> bool:
    """Return True where the loss stays up after the leap at `at`.

    One large loss is one batch's: near zero, the losses of small batches differ by a
    factor of a hundred. So most of the later losses must be above every one before,
    and above what training came down from since the `first` leap, as it does after
    each copy of a target network. A rise of a few steps may lead to the leap.
    """
    usual = numbers.median(values[at - BEFORE : at])
    later = values[at : at + BEFORE]
    if len(later) < AFTER or numbers.median(later[:AFTER]) < RATIO * usual:
        return False
    start = max(min(first, at - BEFORE - AFTER), 0)
    highest = max(values[start : at - AFTER])
    level = numbers.median(later) if len(later) >= FEW else min(later)
    return level > highest


def _period(steps: Sequence[int]) -> float:
    """Return the number of steps from leap to leap, where it is one; else 0.

    A leap may be high for some steps: those that follow the one before within half of
    the longest distance belong to it.
    """
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    longest = max(gaps, default=0)
    starts = [
        steps[0],
        *(b for gap, b in zip(gaps, steps[1:], strict=True) if gap > longest / 2),
    ]
    between = [b - a for a, b in itertools.pairwise(starts)]
    if longest < FEW or len(between) < PERIODS - 1:
        return 0.0
    usual = numbers.median(between)
    # One that is passed over, because it is lower, leaves a multiple.
    is_even = all(abs(gap / usual - round(gap / usual)) <= EVEN for gap in between)
    return usual if is_even else 0.0


def _clause(values: Sequence[float], at: int, *, lasts: bool) -> str:
    later = values[at : at + BEFORE]
    if len(later) < AFTER:
        return "; too few losses follow to say whether it stays up"
    median = numbers.median(later)
    level = f"the median of {len(later)} losses from there on is {median:.3g}"
    return f", and stays up: {level}" if lasts else f"; {level}"


class _Leap(NamedTuple):
    """A loss against those before it.

    Attributes:
        ratio: It, over the median of those before.
        deviations: What it is above the median, over their spread.
        gained: The same over what training has gained.
    """

    ratio: float
    deviations: float
    gained: float

    @property
    def share(self) -> float:
        """The least of the three over its threshold: above 1 for a spike."""
        limits = (RATIO, DEVIATIONS, GAINED)
        return min(v / limit for v, limit in zip(self, limits, strict=True))


def _leap(values: Sequence[float], at: int) -> _Leap:
    value, before = values[at], values[at - BEFORE : at]
    if not all(map(math.isfinite, before)):
        return _Leap(0, 0, 0)  # it is over already
    if not math.isfinite(value):
        return _Leap(math.inf, math.inf, math.inf)
    usual = numbers.median(before)
    spread = 1.4826 * numbers.median(abs(v - usual) for v in before)
    gained = numbers.median(values[:AFTER]) - usual
    above = value - usual
    if not (usual > 0 and above > 0):
        return _Leap(0, 0, 0)
    return _Leap(
        value / usual,
        above / spread if spread > 0 else math.inf,
        above / gained if gained > 0 else math.inf,
    )


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
