"""Steps that never reach the weights, by facts of the optimizer: part of D27.

A rate that has gone long before the end, an eps that is far above the gradients, and
weights too coarse for their steps. ‖Δw‖/‖w‖ alone does not tell them from a slow run.
"""

from __future__ import annotations

import itertools
import statistics as numbers
from collections.abc import Iterator, Sequence
from functools import partial

from normkit.doctor.checks.progress import (
    has_learned,
    loss_fell,
)
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import (
    LayerStatistics,
    Statistics,
    TrainingStatistics,
    WeightStatistics,
)
from normkit.results import counted

__all__ = [
    "MIN_STEPS",
    "RECENT",
    "UPDATE_LOW",
    "is_left_out",
    "largest_step",
    "lost_steps",
    "median_step",
    "steps_of",
]

# ‖Δw‖/‖w‖ per step below which a layer hardly moves; torchmortem's, a tenth of
# TheDeepChecker's.
UPDATE_LOW = 1e-5

# Updates whose median is one reading.
RECENT = 5
# Steps from which a rate shows that it has gone, and from which the way that the
# weights went says something.
MIN_STEPS = 100
# Steps after which a warm-up that goes on is no peek at the first of many.
LONG = 200
# Share of the steps at less than a thousandth of the largest rate, and that of steps at
# the largest rate which go as far as all. A cosine to zero has 0.02 and 0.5, a tenth
# after each third 0 and 0.37, 0.7 per epoch over 30 epochs 0.35 and 0.11.
GONE, WAY_LEFT = 0.5, 0.1
# The planned rate over the largest so far, and the share of steps that change the rate:
# one that is stepped with each batch changes with each, and in 100 steps accumulates
# over fewer than ten.
FAR_BELOW, CHANGES = 2.0, 0.1
# Share of the elements whose step eps makes less than a tenth, and the way that all
# steps together go at most, as a share of the weight. Who sets a large eps on purpose
# sets a rate to match: the weights move on. 114 healthy programs go 0.28 and more.
DAMPED, WAY = 0.5, 0.2
# Share of the updates that round to nothing, in any RECENT observed steps in a row,
# median over the layers. Accuracy after 300 steps on digits, in bfloat16 and in float32
# (perceptron and CNN, Adam and SGD): .11 and .66 at 0.95, .60 and .94 at 0.83, .24 and
# .59 at 0.81, .54 and .76 at 0.75; .97 and .99 at 0.50, 1.00 and 1.00 at 0.15.
LOST = 0.75
MIN_UPDATES = 20

_D27 = partial(Finding, "D27", "update_size", "")


def largest_step(ratios: Sequence[float]) -> float:
    """Return the largest median of RECENT updates in a row: what a layer once moved."""
    return max(_medians(ratios))


def _medians(values: Sequence[float]) -> list[float]:
    spans = range(max(len(values) - RECENT + 1, 1))
    return [numbers.median(values[i : i + RECENT]) for i in spans]


def steps_of(weight: WeightStatistics) -> list[float]:
    """Return the number of training steps that each observed update stands for.

    Those that are nearer to it than to another: a watch observes each of the first 20
    steps and then every fiftieth. One each where the steps are not known.
    """
    at = weight.updated_at
    if len(at) != len(weight.update_ratio):
        return [1.0] * len(weight.update_ratio)
    # Halfway between two steps, and half a step around the first and the last.
    between = [(i + j) / 2 for i, j in itertools.pairwise(at)]
    ends = [at[0] - 0.5, *between, at[-1] + 0.5] if at else []
    return [end - begin for begin, end in itertools.pairwise(ends)]


def median_step(weight: WeightStatistics, *, without: float = 0.0) -> float:
    """Return the median of ‖Δw‖/‖w‖ over the training steps.

    Args:
        weight: A weight with updates.
        without: Share of the steps, from the first on, that is left out.
    """
    steps = steps_of(weight)
    passed = itertools.accumulate(steps)
    kept = sorted(
        (ratio, n)
        for ratio, n, end in zip(weight.update_ratio, steps, passed, strict=True)
        if end > without * sum(steps)
    )
    half, below = sum(n for _, n in kept) / 2, 0.0
    for i, (ratio, n) in enumerate(kept):
        below += n
        if below > half:
            return ratio
        if below == half:
            return (ratio + kept[i + 1][0]) / 2
    return kept[-1][0]


def _mean_step(weight: WeightStatistics) -> float:
    steps = steps_of(weight)
    ways = (n * ratio for n, ratio in zip(steps, weight.update_ratio, strict=True))
    return sum(ways) / sum(steps)


def is_left_out(layer: LayerStatistics) -> bool:
    """Return True for a weight with gradients that the optimizer was not given.

    Another optimizer may hold it, or one of flattened weights: then it moves.
    """
    weight = layer.weight
    return (
        weight is not None
        and weight.is_left_out is True
        and any(weight.gradient_norm)
        and bool(weight.update_ratio)
        and not any(weight.update_ratio)
        and weight.norm == weight.norm_at_start
    )


def has_no_rate(weight: WeightStatistics) -> bool:
    """Return True for a weight that stays as it is at a learning rate of zero."""
    return weight.rate == 0 and not any(weight.update_ratio)


def lost_steps(statistics: Statistics) -> Iterator[Finding]:
    """Check that the steps arrive: rate, eps of the optimizer, dtype of the weights."""
    yield from _rounded(statistics)
    yield from _none(statistics)
    loop = statistics.training
    if loop is None or loop.is_trial or (loop.updates or 0) < MIN_STEPS:
        return
    yield from _gone(loop)
    yield from _slow_cycle(loop)
    yield from _damped(statistics, loop)
    yield from _too_small(statistics, loop)


def _none(statistics: Statistics) -> Iterator[Finding]:
    """Check for an optimizer that never makes a step."""
    loop = statistics.training
    if loop is None or loop.is_trial or loop.updates != 0:
        return
    weights = [s.weight for s in statistics.of_role("weight") if s.weight is not None]
    has_gradients = any(any(w.gradient_norm) for w in weights)
    # Another optimizer may move them.
    is_still = all(w.norm == w.norm_at_start for w in weights)
    if loop.forwards >= MIN_STEPS and has_gradients and is_still:
        yield _D27(
            "warning",
            0.0,
            1.0,
            f"the model was called {loop.forwards} times in training mode and its "
            "weights got gradients, and the optimizer made no step",
            "call optimizer.step() behind loss.backward()",
        )


def _gone(loop: TrainingStatistics) -> Iterator[Finding]:
    """Check for a learning rate that has gone long before the end."""
    made, found = loop.updates, loop.optimizer
    if found is None or not made or not found.full_steps:
        return
    share, way = found.gone / made, found.full_steps / made
    if share > GONE and way < WAY_LEFT:
        yield _D27(
            "warning",
            way,
            WAY_LEFT,
            f"{share:.0%} of the {made} steps were made at less than a thousandth of "
            "the largest learning rate; all together go as far as "
            f"{found.full_steps:.3g} steps at that rate",
            "step the schedule once per epoch if its numbers are epochs, or give it "
            "the number of all steps",
        )


def _slow_cycle(loop: TrainingStatistics) -> Iterator[Finding]:
    """Check for a cycle of the rate that is counted in steps and not stepped so."""
    made, found = loop.updates or 0, loop.optimizer
    if found is None or found.planned is None or found.planned < FAR_BELOW:
        return
    if found.changes > CHANGES * made:
        return
    yield _D27(
        "warning",
        1 / found.planned,
        1 / FAR_BELOW,
        f"the schedule plans a largest rate {found.planned:.3g} times that of the "
        f"{made} steps, and changed the rate {counted(found.changes, 'time')}",
        "call scheduler.step() behind each optimizer.step(): OneCycleLR and CyclicLR "
        "count batches",
    )


def _too_small(statistics: Statistics, loop: TrainingStatistics) -> Iterator[Finding]:
    """Check for steps that lead nowhere, or a warm-up longer than the training."""
    made, found = loop.updates or 0, loop.optimizer
    if found is None or made < LONG:
        return
    way = _way(statistics, made)
    if way is None or has_learned(statistics) or loss_fell(statistics):
        return
    if way < WAY:
        rises = " (the learning rate rises to the last)" * found.is_rising
        yield _D27(
            "warning",
            way,
            WAY,
            f"all {made} steps together{rises} moved a weight by at most {way:.2g} of "
            "its size (median over layers), and the error of the answers has not "
            "fallen far",
            "warm up over the first few hundredths of the steps, or train on"
            if found.is_rising
            else "raise the learning rate",
        )


def _way(statistics: Statistics, made: int) -> float | None:
    """Return the way that all steps together go at most, as a share of the weight."""
    moved = [
        _mean_step(layer.weight) * made
        for layer in statistics.of_role("weight")
        if layer.weight is not None and layer.weight.update_ratio
    ]
    return numbers.median(moved) if moved else None


def _damped(statistics: Statistics, loop: TrainingStatistics) -> Iterator[Finding]:
    """Check for an eps that is far above the roots it is added to."""
    made, found = loop.updates, loop.optimizer
    if found is None or found.eps is None or not made or found.damped <= DAMPED:
        return
    way = _way(statistics, made)
    if way is not None and way < WAY:
        yield _D27(
            "warning",
            way,
            WAY,
            f"eps={found.eps:g} of the optimizer is ten times the root of the mean "
            f"squared gradient, or more, in {found.damped:.0%} of the elements; all "
            f"{made} steps moved a weight by at most {way:.2g} of its size (median "
            "over layers)",
            "lower eps (torch's default is 1e-8), or raise the learning rate with it",
        )


def _rounded(statistics: Statistics) -> Iterator[Finding]:
    """Check for updates below half of the last digit of their weights."""
    least = [
        min(_medians(layer.weight.lost))
        for layer in statistics.of_role("weight")
        if layer.weight is not None and len(layer.weight.lost) >= MIN_UPDATES
    ]
    if not least:
        return
    share = numbers.median(least)
    if share > LOST:
        yield _D27(
            "warning",
            1 - share,
            1 - LOST,
            f"in any {RECENT} observed steps {share:.0%} or more of the updates round "
            "to nothing: they are below half of the last digit of weights in half "
            "precision",
            "keep the weights in float32 and run the model under torch.autocast",
        )
