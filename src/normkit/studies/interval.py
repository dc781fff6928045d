"""Median of a few seeds and its bootstrap interval.

The percentile bootstrap draws the seeds with replacement and takes the median of each
draw; 95 % of those medians lie in the interval. With five seeds that is nearly the
range of the values. Order statistics need no draws and assume nothing about the
distribution: the k-th smallest and the k-th largest of n values miss the median with
probability 2·P(Binomial(n, ½) < k) (David, Nagaraja, Order Statistics, § 7.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normkit.errors import ArgumentError

__all__ = ["Interval", "bootstrap", "order_statistics"]

# 2000 draws put the ends of a 95 % interval on the right value for up to 20 seeds.
_DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval; `inf` is a value like any other.

    Attributes:
        median: The median over the seeds.
        low: Lower end of the interval.
        high: Upper end.
        seeds: Number of values.
    """

    median: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.low == self.high:
            return _short(self.median)
        return f"{_short(self.median)} [{_short(self.low)}, {_short(self.high)}]"


def bootstrap(values: Sequence[float]) -> Interval:
    """Return the median of `values` with its 95 % percentile-bootstrap interval.

    Args:
        values: One number per seed; `inf` means "never", as in steps to a target.

    Raises:
        ArgumentError: There is no value, or one of them is not a number.

    Numerics:
        The draws come from a generator of a fixed seed: the same values always give
        the same interval. Quantiles are values that occur, so `inf` is allowed.

    Example:
        >>> bootstrap([3.0, 1.0, 2.0])
        Interval(median=2.0, low=1.0, high=3.0, seeds=3)
    """
    array = _checked(values)
    picks = np.random.default_rng(0).integers(array.size, size=(_DRAWS, array.size))
    medians = _median(array[picks])
    low, high = np.quantile(medians, [0.025, 0.975], method="inverted_cdf")
    return Interval(float(_median(array)), float(low), float(high), int(array.size))


def order_statistics(values: Sequence[float]) -> Interval:
    """Return the median of `values` with its interval of order statistics.

    It covers the median of the distribution with probability 95 % or more, whatever
    the distribution: with 6 to 8 seeds it is the whole range, with 9 to 11 the second
    to the second last.

    Args:
        values: One number per seed, 6 or more; `inf` means "never".

    Raises:
        ArgumentError: There are fewer, or one of them is not a number.

    Example:
        >>> order_statistics(range(1, 11))
        Interval(median=5.0, low=2.0, high=9.0, seeds=10)
    """
    array = np.sort(_checked(values))
    n = array.size
    if n < 6:
        raise ArgumentError(
            f"an interval of order statistics that covers 95 % needs 6 seeds, got {n}"
        )
    # The largest k that misses with probability 5 % or less.
    k, missed = 0, 2.0
    while missed <= 0.05 * 2**n:
        k += 1
        missed += 2.0 * math.comb(n, k)
    low, high = float(array[k - 1]), float(array[n - k])
    return Interval(float(_median(array)), low, high, int(n))


def _checked(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not array.size or np.isnan(array).any():
        raise ArgumentError(
            f"an interval needs one number per seed, got {list(values)}; "
            "say what a diverged run counts as (0 accuracy, infinite steps)"
        )
    return array


def _median(array: np.ndarray) -> np.ndarray:
    """Return the lower median along the last axis: a value that occurs."""
    ordered = np.sort(array, axis=-1)
    return ordered[..., (array.shape[-1] - 1) // 2]


def _short(value: float) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return {"inf": "never", "-inf": "-∞", "nan": "nan"}[str(value)]
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e5):
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:.0f}"
    # One digit more after a leading 1, where three are good to 1 % only.
    return f"{value:.4g}" if 1 <= size < 2 else f"{value:.3g}"
