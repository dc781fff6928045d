"""How GPU times are taken: interleaved, from device events, inputs rotated past the L2.

Each round runs every contestant once; a contestant's time is the median of its rounds.
Nothing on the card is set: it is measured as it is found.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["Clock", "Deadline", "copy_bandwidth"]


@dataclass
class Deadline:
    """A wall-clock limit that long parts ask before they start."""

    seconds: float
    start: float = field(default_factory=time.perf_counter)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.perf_counter() - self.start)

    def allows(self, seconds: float) -> bool:
        """Whether a part that takes so long still fits."""
        return self.left >= seconds


@dataclass(frozen=True)
class Clock:
    """Measures functions on one device.

    Attributes:
        device: Where they run; on a CPU the times mean nothing and only rehearse.
        rounds: Timed rounds.
        warmup: Rounds before them.
    """

    device: torch.device
    rounds: int = 15
    warmup: int = 3

    def medians(self, contestants: Sequence[Callable[[int], object]]) -> list[float]:
        """Seconds per call of each; a contestant is told the number of the round."""
        times: list[list[float]] = [[] for _ in contestants]
        for turn in range(self.warmup + self.rounds):
            for own, run in zip(times, contestants, strict=True):
                seconds = self._once(run, turn)
                if turn >= self.warmup:
                    own.append(seconds)
        return [statistics.median(own) for own in times]

    def _once(self, run: Callable[[int], object], turn: int) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run(turn)
            return time.perf_counter() - start
        torch.cuda.synchronize()
        # The device waits about a millisecond, so that the host has queued the work of
        # one layer before its time begins.
        torch.cuda._sleep(2_000_000)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(turn)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def copy_bandwidth(clock: Clock, mebibytes: int) -> float:
    """Bytes read and written per second by a plain copy of that size."""
    x = torch.empty(mebibytes << 20, dtype=torch.uint8, device=clock.device)
    y = torch.empty_like(x)
    (seconds,) = clock.medians([lambda turn: y.copy_(x)])
    return 2 * x.numel() / seconds
