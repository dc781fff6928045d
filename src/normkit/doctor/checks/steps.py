"""Steps that never reach the weights, by facts of the optimizer: part of D27.

A rate that has gone long before the end, an eps that is far above the gradients, and
weights too coarse for their steps. ‖Δw‖/‖w‖ alone does not tell them from a slow run.
And steps that were so large that what they left tells of them: weights of a thousand
times the usual size.
"""

from __future__ import annotations

import itertools
import math
import statistics as numbers
from collections.abc import Iterator, Sequence
from functools import partial

from normkit.doctor.checks.progress import (
    has_learned,
    has_learned_all,
    loss_fell,
)
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import (
    LayerStatistics,
    Statistics,
    TrainingStatistics,
    WeightStatistics,
)

__all__ = [
    "RECENT",
    "UPDATE_LOW",
    "blown_up",
    "is_left_out",
    "largest_step",
    "lost_steps",
    "median_step",
    "steps_of",
    "too_large_at_first",
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
# then learns nothing. 170 healthy programs have at most 0.17, but one of word vectors
# that begin near zero (0.42, and learns); Adam at 0.1 on convolutions has 0.36.
TOO_FAR = 0.3
# The same of the very first step, which is all that a watch of every fifth step sees
# of them: Adam at 0.1 has 1.4 to 1.6, 170 healthy programs at most 0.4, but for words
# and a hyperplane that begin near zero, and learn.
FIRST_TOO_FAR = 0.75
# ‖w‖ at the start over the usual one, from which a weight has a size of its own.
STARTED = 0.1

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


def blown_up(statistics: Statistics) -> Iterator[Finding]:
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


def too_large_at_first(statistics: Statistics) -> Iterator[Finding]:
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


def lost_steps(statistics: Statistics) -> Iterator[Finding]:
    """Check that the steps arrive: rate, eps of the optimizer, dtype of the weights."""
    yield from _rounded(statistics)
    yield from _none(statistics)
    loop = statistics.training
    if loop is None or loop.is_trial or (loop.updates or 0) < MIN_STEPS:
        return
    yield from _gone(loop)
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
