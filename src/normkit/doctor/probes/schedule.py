"""Which training steps are observed, and what that costs."""

from __future__ import annotations

import statistics as numbers
import time
from collections import deque
from numbers import Integral

from normkit.errors import ArgumentError

__all__ = ["Schedule"]

# By default every step of the start, where runs go wrong and as many as D25 and D27
# need, and later every fiftieth. 28 of 400 steps are then observed: where an observed
# step takes 2.4 times as long, the run takes 1.1 times as long; that of a small
# perceptron takes more on a slow machine. Measured: docs/doctor-score.md.
FIRST_STEPS, LATER_EVERY = 20, 50
# Step times of which the median is taken.
TIMED = 200


class Schedule:
    """The steps to observe, and the time that steps took.

    Args:
        every: Observe every n-th step; None for `FIRST_STEPS`, then every
            `LATER_EVERY`-th.

    Raises:
        ArgumentError: `every` is no int, or below 1.
    """

    def __init__(self, every: int | None) -> None:
        if every is not None and (not isinstance(every, Integral) or every < 1):
            raise ArgumentError(
                f"every={every!r} observes no step; give an int of 1 or more, or None"
            )
        self.every = every
        self._times = {
            is_observed: deque[float](maxlen=TIMED) for is_observed in (True, False)
        }
        self._counts = {True: 0, False: 0}
        self._began: tuple[float, bool] | None = None

    def is_observed(self, step: int) -> bool:
        """Return True for a step to observe; steps count from 0."""
        if self.every is not None:
            return step % self.every == 0
        return step < FIRST_STEPS or step % LATER_EVERY == 0

    def begin(self, *, is_observed: bool) -> None:
        """Record that a step begins, which ends the one before."""
        now = time.perf_counter()
        if self._began is not None:
            began, was_observed = self._began
            self._times[was_observed].append(now - began)
        self._began = now, is_observed
        self._counts[is_observed] += 1

    @property
    def cost(self) -> float | None:
        """Time added by the probes as a share of the run without them.

        Medians of observed and other steps are compared; None where one of the two is
        missing.
        """
        observed, others = self._times[True], self._times[False]
        if not (observed and others):
            return None
        base = numbers.median(others)
        added = (numbers.median(observed) - base) * self._counts[True]
        return max(added, 0.0) / (base * sum(self._counts.values()))
