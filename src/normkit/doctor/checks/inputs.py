"""Check of the scale of the inputs: D28."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.eval_mode import costs_nothing
from normkit.doctor.checks.other_scale import SCALE_FIX, of_other_scale
from normkit.doctor.checks.progress import has_learned, has_learned_all
from normkit.doctor.checks.thresholds import MIN_SAMPLES
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import LayerStatistics, NotFinite, Statistics

__all__ = ["CHECKS", "input_scale"]

# |mean| in standard deviations, and the standard deviation itself: pixels from 0 to 1
# pass (MNIST: mean .13, sd .31), pixels from 0 to 255 (sd 79) and years do not.
INPUT_MEAN = 3.0
INPUT_LOW, INPUT_HIGH = 0.05, 20.0
# Largest spread of a column over their median. Of digits' pixels it is 1.5, of scaled
# columns beside those that are one in a hundred rows at most 10.
APART = 100.0
# Mean squared length, or mean sum, of a table's rows that is about 1.
UNIT = 1.5

_D28 = partial(Finding, "D28", "input_scale")


def input_scale(statistics: Statistics) -> Iterator[Finding]:
    """Check D28: inputs far from zero mean and unit variance."""
    found = None if statistics.data is None else statistics.data.input
    if found is None or not statistics.layers:
        return
    if int(found.count) < MIN_SAMPLES:
        reason = f"{int(found.count)} input values are too few"
        yield _D28("", "not_judged", evidence=reason)
        return
    if statistics.data is not None and statistics.data.are_ids:
        reason = "the inputs are whole numbers, and the model has embeddings for them"
        yield _D28("", "not_judged", evidence=reason)
        return
    mean, sd = float(found.mean), float(found.var.sqrt())
    if not math.isfinite(mean + sd):
        is_handled = _replaces_them(statistics)
        yield _D28(
            "",
            "info" if is_handled else "error",
            math.nan,
            math.inf,
            "the inputs hold values that are not finite (NaN or infinite)"
            + ", which the model replaces: its answers and losses are finite"
            * is_handled,
            "find the samples that have them: torch.isfinite(inputs).all()",
            {"is_not_finite": not is_handled},
        )
        return
    first = statistics.layers[0]
    yield from _raw_beside(statistics)
    single = [*_far_value(statistics)] or (
        [] if first.norm is not None else [*_columns_apart(statistics)]
    )
    if single:
        yield from single  # it is what the moments of all values show, too
        return
    is_far = not abs(mean) <= INPUT_MEAN * sd
    is_wide = not INPUT_LOW <= sd <= INPUT_HIGH
    severity: Severity = "warning" if is_far or is_wide else "clear"
    if first.role == "norm":
        # The first layer removes any scale.
        severity = "clear"
    is_harmless = severity == "warning" and not is_wide and has_learned_all(statistics)
    has_unit_rows = severity == "warning" and not is_far
    has_unit_rows &= _has_unit_rows(statistics)
    is_scaled = severity == "warning" and _is_scaled(first)
    if is_harmless or has_unit_rows or is_scaled:
        severity = "info"
    scaled, _ = of_other_scale(statistics)
    if severity == "warning" and scaled and not costs_nothing(statistics):
        severity = "error"
    threshold = INPUT_HIGH if sd > 1 else INPUT_LOW
    if is_far and not is_wide:
        threshold = INPUT_MEAN
    yield _D28(
        "",
        severity,
        sd if is_wide or not is_far else abs(mean) / sd if sd else math.inf,
        threshold,
        f"the inputs have mean {mean:.3g} and standard deviation {sd:.3g}"
        + "; the network has learned nevertheless" * is_harmless
        + "; the first layer gets them scaled" * is_scaled
        + "; rows of a table have a length or a sum of about 1" * has_unit_rows
        + f"; the running statistics of layer {scaled} are of inputs on another scale"
        * (severity == "error"),
        SCALE_FIX
        if severity == "error"
        else "subtract the mean of the training data and divide by its standard "
        "deviation",
    )


def _is_scaled(first: LayerStatistics) -> bool:
    """Return True where the forward scales what the first layer gets."""
    if first.input is None:
        return False
    mean, sd = float(first.input.mean), float(first.input.var.sqrt())
    return INPUT_LOW <= sd <= INPUT_HIGH and abs(mean) <= INPUT_MEAN * sd


def _raw_beside(statistics: Statistics) -> Iterator[Finding]:
    """Check further inputs, such as a few figures beside a picture or a text."""
    data = statistics.data
    for found in () if data is None else data.others:
        mean, sd = float(found.mean), float(found.var.sqrt())
        if int(found.count) < MIN_SAMPLES or not sd > INPUT_HIGH:
            continue
        yield _D28(
            "",
            "info" if has_learned(statistics) else "warning",
            sd,
            INPUT_HIGH,
            f"beside its first input the model gets values with mean {mean:.3g} and "
            f"standard deviation {sd:.3g}",
            "subtract the mean of the training data and divide by its standard "
            "deviation, column by column; of amounts take the logarithm first",
        )


def _has_unit_rows(statistics: Statistics) -> bool:
    """Return True for rows divided by their length or by their sum.

    As tf-idf of words, and as the words of papers in a graph (Kipf & Welling, 2017).
    """
    data = statistics.data
    if data is None or not data.is_table or data.input is None:
        return False
    width = int(data.input.count) / max(statistics.samples, 1)
    are_shares = data.are_shares and 1 / UNIT < width * float(data.input.mean) < UNIT
    return are_shares or 1 / UNIT < width * float(data.input.mean_square) < UNIT


def _replaces_them(statistics: Statistics) -> bool:
    """Return True for a model whose answers, losses and layers are finite."""
    out, found = statistics.output, statistics.evaluation
    losses = () if found is None else (*found.batch_loss, *found.running_loss)
    values = (*losses, *(() if out is None else (out.spread, out.scale)))
    is_clean = not any(s.not_finite != NotFinite() for s in statistics.layers)
    return bool(values) and is_clean and all(map(math.isfinite, values))


def _far_value(statistics: Statistics) -> Iterator[Finding]:
    """Check for a number that stands for a missing value."""
    far = None if statistics.data is None else statistics.data.far
    if far is None:
        return
    yield _D28(
        "",
        "warning",
        far.value,
        far.high if far.value > 0 else far.low,
        f"{far.share:.2g} of the entries of the inputs are {far.value:.6g}, and all "
        f"others lie from {far.low:.3g} to {far.high:.3g}: it seems to stand for "
        "missing values, and is most of their mean and variance",
        "put the mean of its column in its place, and tell the network by another "
        "column where it was",
    )


def _columns_apart(statistics: Statistics) -> Iterator[Finding]:
    """Check for columns of a table in units of very different size.

    A batch norm scales each by itself, and a layer norm by the largest. No fault of a
    network that has learned: its forward may scale them.
    """
    data = statistics.data
    if data is None or not data.is_table or data.columns is None:
        return
    spreads = data.columns.pooled.var.sqrt()
    spreads = spreads[spreads > 0]
    if len(spreads) < 2:
        return
    largest, middle = float(spreads.max()), float(spreads.median())
    if not largest > APART * middle:
        return
    yield _D28(
        "",
        "info" if has_learned(statistics) else "warning",
        largest / middle,
        APART,
        f"the standard deviations of the inputs' columns go from "
        f"{float(spreads.min()):.3g} to {largest:.3g} (median {middle:.3g})",
        "subtract the mean of each column of the training data, and divide by its "
        "standard deviation",
    )


CHECKS = {"D28": input_scale}
