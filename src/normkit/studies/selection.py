"""Choice of a learning rate: on validation data, one per arm, away from the edges.

A rate chosen on the test set makes the test accuracy a maximum over the grid. A rate
at the edge of its grid may not be the best one: what is measured with it is shown and
not judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Pick", "edges", "pick"]


@dataclass(frozen=True)
class Pick:
    """The chosen rate of an arm.

    Attributes:
        index: Its place in the grid.
        rate: The rate.
        at_edge: It is the smallest or the largest of the grid.
    """

    index: int
    rate: float
    at_edge: bool


def pick(scores: Sequence[Sequence[float]], rates: Sequence[float]) -> Pick:
    """Choose the rate of the best mean validation score over the seeds.

    Args:
        scores: `[seed][rate]`, larger is better; a number that is not finite is the
            worst there is. Where all are the worst, no rate is better than another
            and none is at the edge.
        rates: The grid, in ascending order.

    Example:
        >>> pick([[80.0, 95.0, 90.0], [82.0, 94.0, float("nan")]], (0.1, 0.3, 1.0))
        Pick(index=1, rate=0.3, at_edge=False)
    """
    # After any finite score, and finite itself, so that means of it compare.
    worst = -1e9
    totals = [
        sum(row[i] if math.isfinite(row[i]) else worst for row in scores)
        for i in range(len(rates))
    ]
    index = max(range(len(rates)), key=totals.__getitem__)
    none_works = all(not math.isfinite(v) for row in scores for v in row)
    return Pick(index, rates[index], not none_works and index in (0, len(rates) - 1))


def edges(picks: Mapping[str, Pick]) -> str:
    """Return why parts that compare these arms are not judged, or an empty string.

    `picks` has one by the name of its arm.

    Example:
        >>> edges({"plain": Pick(2, 1.0, True), "other": Pick(1, 0.3, False)})
        'not judged: best rate 1 of plain is at the edge of the grid'
    """
    found = [
        f"best rate {one.rate:g} of {arm} is at the edge of the grid"
        for arm, one in picks.items()
        if one.at_edge
    ]
    return f"not judged: {', '.join(found)}" if found else ""
