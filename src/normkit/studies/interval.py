"""Median of a few seeds, with an interval of order statistics.

Of n independent values, each lies below the true median with probability ½. So the
k-th smallest and the k-th largest enclose the median with probability

    1 − 2·P(Binomial(n, ½) < k)

whatever the distribution. k is the largest that keeps 95 %: the second of 10 seeds,
97.9 %. Fewer than six values cannot reach 95 %: their range is taken, and its coverage
stated (five: 93.8 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from normkit.errors import ArgumentError

__all__ = ["Interval", "Number", "coverage_of", "median_interval"]

# A number, or the bounds of one that a run could not measure: `(3.0, inf)` is "≥ 3".
Number = float | tuple[float, float]

_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A median with an interval that holds it.

    Attributes:
        median: The median over the seeds; of bounded values, that of the lower bounds.
        low: Lower end of the interval.
        high: Upper end.
        seeds: Number of values.
        coverage: Probability that such an interval holds the true median.
        median_high: The median of the upper bounds; `median` where all were measured.
        bounded: Number of seeds that gave bounds in place of a number.
    """

    median: float
    low: float
    high: float
    seeds: int
    coverage: float
    median_high: float
    bounded: int = 0

    def __str__(self) -> str:
        middle = _span(self.median, self.median_high)
        if self.low == self.high:
            return middle
        ends = f"{_short(self.low)}, {_short(self.high)}"
        known = f", bounds in {self.bounded} of {self.seeds}" if self.bounded else ""
        return f"{middle} [{ends}{known}]"


def median_interval(values: Sequence[Number]) -> Interval:
    """Return the median of `values` with its order-statistic interval.

    Args:
        values: One number per seed, or the pair of bounds of one.

    Raises:
        ArgumentError: There is no value, or one of them is not a number.

    Numerics:
        Of bounds, the lower ends make the lower end and the upper ends the upper one:
        the interval holds wherever in its bounds each number lies.

    Example:
        >>> str(median_interval([float(v) for v in range(10)]))
        '4.5 [1, 8]'
        >>> str(median_interval([(10.0, float("inf"))] * 10))
        '≥ 10 [10, ∞, bounds in 10 of 10]'
    """
    pairs = [v if isinstance(v, tuple) else (v, v) for v in values]
    if not pairs or any(math.isnan(end) for pair in pairs for end in pair):
        raise ArgumentError(
            f"an interval needs one number per seed, got {list(values)}; "
            "say what a diverged run counts as (0 accuracy, a bound on its steps)"
        )
    lows, highs = (sorted(ends) for ends in zip(*pairs, strict=True))
    rank, coverage = coverage_of(len(pairs))
    return Interval(
        median=_median(lows),
        low=float(lows[rank - 1]),
        high=float(highs[-rank]),
        seeds=len(pairs),
        coverage=coverage,
        median_high=_median(highs),
        bounded=sum(bool(low != high) for low, high in pairs),
    )


def coverage_of(count: int) -> tuple[int, float]:
    """Return the rank k of the ends for `count` values, and the interval's coverage.

    Example:
        >>> coverage_of(10)
        (2, 0.978515625)
        >>> coverage_of(5)
        (1, 0.9375)
    """

    def covered(rank: int) -> float:
        below = sum(math.comb(count, i) for i in range(rank))
        return 1 - 2 * below / 2**count

    rank = 1
    while rank < (count + 1) // 2 and covered(rank + 1) >= _LEVEL:
        rank += 1
    return rank, max(covered(rank), 0.0)


def _median(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    if len(ordered) % 2 or ordered[half - 1] == ordered[half]:
        return float(ordered[half])
    return float((ordered[half - 1] + ordered[half]) / 2)


def _span(low: float, high: float) -> str:
    if low == high:
        return _short(low)
    if high == math.inf:
        return f"≥ {_short(low)}"
    if low == -math.inf:
        return f"≤ {_short(high)}"
    return f"{_short(low)} to {_short(high)}"


def _short(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e5):
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:.0f}"
    # One digit more after a leading 1, where three are good to 1 % only.
    return f"{value:.4g}" if 1 <= size < 2 else f"{value:.3g}"
