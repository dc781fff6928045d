"""Time several contestants in turns.

Load on the machine slows every contestant, so ratios hold where single times do not.
The minimum is the cost of the work, the median the cost on this machine.

A shared machine needs more care. A thread that could run may have to wait for a
processor, and with it all others at the next barrier: with two threads a call of 0.2 ms
then takes 16 or 60 (measured on two cores with three other processes), and no ratio of
such times means anything. With one, CPU time leaves the waiting out, but not the caches
that another process has filled. `in_turns(…, avoid_waiting=True)` therefore pauses
after a turn in which threads waited, because the system soon runs a process that has
slept, and leaves such turns out. Linux counts the waiting; elsewhere every turn counts.

A turn begins with a call that does not count. What was freed last decides whether the
allocator has pages for an output or asks the system for them, so that the first call
pays for the contestant before it, always the same one: a forward of batch norm over
400k values ran at 0.60 of torch's speed or at 0.90, by which of the two had begun.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

from normkit.torch_state import number_of_threads

__all__ = ["MAX_WAITING", "Timing", "Turn", "in_turns", "seeded", "undisturbed"]

# Waiting time of all threads over the time of a turn. Up to this share a turn counts;
# where fewer than three do, the quarter with the least waiting counts.
MAX_WAITING, _MIN_KEPT = 0.05, 0.25
_MIN_TURNS, _PAUSE = 3, 0.01


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        cpu: Least time of this process on all its cores.
        cpu_median: Median of that.
        wall: Least time on the clock.
        wall_median: Median of that.
        turns: Number of turns that count.
        waiting: Share of the time that threads waited for a processor, median of
            those turns; 0 where it was not measured.
    """

    cpu: float
    cpu_median: float
    wall: float
    wall_median: float
    turns: int
    waiting: float = 0.0

    @classmethod
    def of(cls, turns: list[Turn]) -> Timing:
        """Return the minimum and median of the turns that count."""
        kept = undisturbed(turns)
        cpu, wall = [t.cpu for t in kept], [t.wall for t in kept]
        waiting = median(t.waiting for t in kept)
        return cls(min(cpu), median(cpu), min(wall), median(wall), len(kept), waiting)


class Turn(NamedTuple):
    """Seconds of one call in one turn, and the share of them spent waiting."""

    cpu: float
    wall: float
    waiting: float = 0.0


def in_turns(
    contestants: dict[str, Callable[[], Any]],
    seconds: float,
    *,
    avoid_waiting: bool = False,
) -> dict[str, Timing]:
    """Measure every contestant in turn until `seconds` are spent.

    Args:
        contestants: Functions to call, by name.
        seconds: Time for all of them together; each has at least three turns.
        avoid_waiting: Pause after turns in which threads had to wait, and leave them
            out.

    Returns:
        The timings, by name. A turn of a fast contestant is many calls.
    """
    repeats = {name: _repeats(call) for name, call in contestants.items()}
    taken: dict[str, list[Turn]] = {name: [] for name in contestants}
    waited: Callable[[], float] = _waited if avoid_waiting else lambda: 0.0
    has_waited = False
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, taken.values())) < _MIN_TURNS:
        for name, call in contestants.items():
            times = range(repeats[name])
            if has_waited:
                time.sleep(_PAUSE)
            call()  # see above; it also wakes the other threads
            before = waited()
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in times:
                call()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            turn = Turn(cpu / len(times), wall / len(times), (waited() - before) / wall)
            has_waited = turn.waiting > MAX_WAITING
            taken[name].append(turn)
    return {name: Timing.of(turns) for name, turns in taken.items()}


def undisturbed(turns: list[Turn]) -> list[Turn]:
    """Return the turns without waiting, or else the quarter that waited least."""
    by_waiting = sorted(turns, key=lambda turn: turn.waiting)
    kept = [turn for turn in by_waiting if turn.waiting <= MAX_WAITING]
    least = max(_MIN_TURNS, int(_MIN_KEPT * len(turns)))
    return kept if len(kept) >= _MIN_TURNS else by_waiting[:least]


def _repeats(call: Callable[[], Any]) -> int:
    """Return the number of calls in half a millisecond: clocks are coarse."""
    call()
    start = time.perf_counter()
    call()
    return max(1, int(5e-4 / max(time.perf_counter() - start, 1e-7)))


def _waited() -> float:
    """Return the seconds that this process's threads have waited; 0 if unknown."""
    total = 0
    try:
        for task in os.listdir(_TASKS):
            with open(f"{_TASKS}/{task}/schedstat", "rb") as file:
                total += int(file.read().split()[1])
    except (OSError, IndexError):  # a thread has ended, or it is another system
        return 0.0
    return 1e-9 * total


_TASKS = "/proc/self/task"


@contextmanager
def seeded(threads: int) -> Generator[None]:
    """Set torch's seed to 0 and the number of threads; restore both after the block."""
    with number_of_threads(threads), torch.random.fork_rng():
        torch.manual_seed(0)
        yield
