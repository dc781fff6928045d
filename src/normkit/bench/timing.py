"""Time several ways of doing one thing, in turns.

Whatever slows the machine for a while slows every contestant, so ratios hold where
single times do not. The minimum is what the work costs, the median what it cost here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["Timing", "in_turns"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        cpu: Least time of this process on all its cores.
        cpu_median: Median of that.
        wall: Least time on the clock.
        wall_median: Median of that.
        turns: How often it was measured.
    """

    cpu: float
    cpu_median: float
    wall: float
    wall_median: float
    turns: int


def in_turns(
    contestants: dict[str, Callable[[], Any]], seconds: float
) -> dict[str, Timing]:
    """Measure every contestant in turn until `seconds` are spent.

    Args:
        contestants: What to call, by name.
        seconds: For all of them together; each has at least three turns.

    Returns:
        The timings, by name. A turn of a fast contestant is many calls.
    """
    repeats = {name: _repeats(call) for name, call in contestants.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, taken.values())) < 3:
        for name, call in contestants.items():
            times = range(repeats[name])
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in times:
                call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            taken[name].append((cpu / len(times), wall / len(times)))
    return {name: _timing(turns) for name, turns in taken.items()}


def _repeats(call: Callable[[], Any]) -> int:
    """Calls that take half a millisecond: clocks are too coarse for a few of them."""
    call()
    start = time.perf_counter()
    call()
    return max(1, int(5e-4 / max(time.perf_counter() - start, 1e-7)))


def _timing(turns: list[tuple[float, float]]) -> Timing:
    cpu, wall = [c for c, _ in turns], [w for _, w in turns]
    return Timing(min(cpu), median(cpu), min(wall), median(wall), len(turns))
