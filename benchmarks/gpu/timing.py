"""How GPU times are taken: interleaved, from device events, inputs rotated past the L2.

Each round runs every contestant once; a contestant's time is the median of its rounds.
Nothing on the card is set: it is measured as it is found.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Bench", "copy_bandwidth"]


@dataclass(frozen=True)
class Bench:
    """A device, and how functions are measured on it.

    Attributes:
        device: Where they run.
        is_dry: Toy sizes in Triton's interpreter; times mean nothing.
        rounds: Timed rounds.
        warmup: Rounds before them.
    """

    device: torch.device
    is_dry: bool = False
    rounds: int = 15
    warmup: int = 3

    def compile(
        self, function: Callable[..., Any], *, fullgraph: bool = True
    ) -> Callable[..., Any]:
        """Return `torch.compile(function)`; a dry run traces and compiles nothing."""
        backend = "eager" if self.is_dry else "inductor"
        return torch.compile(
            function, fullgraph=fullgraph, backend=backend, dynamic=False
        )

    def medians(
        self, contestants: Mapping[str, Callable[[int], object]]
    ) -> dict[str, float]:
        """Return seconds per call of each; a contestant is told the round's number."""
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(self.warmup + self.rounds):
            for name, run in contestants.items():
                seconds = self._once(run, turn)
                if turn >= self.warmup:
                    times[name].append(seconds)
        return {name: statistics.median(own) for name, own in times.items()}

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


def copy_bandwidth(bench: Bench) -> float:
    """Return bytes read and written per second by a plain copy of 4 GiB."""
    size = 1 << (12 if bench.is_dry else 32)
    x = torch.empty(size, dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    return 2 * size / bench.medians({"copy": lambda turn: y.copy_(x)})["copy"]
