"""Check of the answers beside each other, and beside the classes: part of D34.

Answers of a trained network may all be one, or know the class by another number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.progress import has_learned_all
from normkit.doctor.checks.targets import BINARY, NLL, RANGES
from normkit.doctor.checks.thresholds import too_few
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import (
    Evaluation,
    OutputStatistics,
    Renumbered,
    Statistics,
)

__all__ = ["answers"]

# The loss of one answer for all samples over that of each sample's own, up to which its
# own is of no use: .30 and .29 of faces that fall on one point, .30 and .005 of others.
AS_GOOD = 1.05
# Share of the samples with one answer that cannot be chance.
MANY_SAME = 0.4

_D34 = partial(Finding, "D34", "basics")


def answers(statistics: Statistics) -> Iterator[Finding]:
    """Check the answers of a trained network against each other and the classes."""
    data, out = statistics.evaluation, statistics.output
    if out is None or not statistics.has_moved or too_few(statistics.samples):
        return
    if data is None:
        return
    # Vectors that are compared have a largest value, too, and no number of a class.
    is_worse = bool(data.common_loss) and (
        data.mean(data.batch_loss) > data.mean(data.common_loss)
    )
    if out.renumbered is not None and is_worse:
        yield _numbered_otherwise(out.renumbered)
    elif data.has_targets:
        yield from _one_point(statistics, data, out)
        yield from _one_answer(statistics, out)


def _numbered_otherwise(found: Renumbered) -> Finding:
    return _D34(
        "",
        "error",
        found.right,
        found.explained,
        f"{found.right:.0%} of the answers are right, and {found.explained:.0%} would "
        f"be with other numbers: the answer to class {found.label} is mostly class "
        f"{found.answer}. These targets number the classes in another order than those "
        "it was trained with",
        "make class numbers from one list of names for training, test and use: folders "
        "that are sorted as words come as 0, 1, 10, 11, 2",
        {"is_origin": True},
    )


def _one_answer(statistics: Statistics, out: OutputStatistics) -> Iterator[Finding]:
    """Check that different inputs do not get one answer, to the last bit.

    Scores that end in a function may lie at its end, and small ones cannot: as in a
    ReLU that is off.
    """
    is_bounded = out.activation in RANGES
    if not out.same > MANY_SAME or is_bounded or has_learned_all(statistics):
        return
    yield _D34(
        "",
        "warning",
        out.same,
        MANY_SAME,
        f"{out.same:.0%} of the samples get exactly the same answer, though their "
        "inputs differ: what the last layer reads does not depend on them",
        "look at what is read: the last position of a padded sequence is that of its "
        "padding, and units behind a ReLU may be off",
        {"is_symptom": True},
    )


def _one_point(
    statistics: Statistics, data: Evaluation, out: OutputStatistics
) -> Iterator[Finding]:
    """Check vectors whose loss is as small when all samples have one: they collapse.

    Of losses that compare the answers of samples with each other, by class numbers that
    they give no score to.
    """
    of_classes = NLL | BINARY | {"LogSoftmax", "Logsumexp"}
    if out.classes is None or of_classes & out.operations or statistics.has_just_begun:
        return
    own, common = data.mean(data.batch_loss), data.mean(data.common_loss)
    if not (math.isfinite(own + common) and 0 <= common <= own * AS_GOOD):
        return
    yield _D34(
        "",
        "warning",
        own,
        common / AS_GOOD,
        f"the loss is {own:.3g}, and {common:.3g} where all samples have one answer, "
        "the mean of their batch: vectors of different classes are pulled together",
        "compare all pairs or semi-hard ones until the loss falls, before the hardest; "
        "push different classes apart as well, and lower the learning rate",
    )
