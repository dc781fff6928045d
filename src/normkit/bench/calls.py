"""A record of `normkit bench calls`: its cells, and what a cell says.

A ratio is torch's median over ours, above 1 where normkit is faster: of process CPU
time with one thread; of wall time with more, because CPU time adds up the threads. What
is reported of a cell is the median over its passes. Passes in which threads had to wait
for a processor count only where a cell has no other: with several threads they measure
the scheduler, and with one a cache that another process has filled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass
from statistics import median
from typing import Any

from normkit.bench.call_cases import CallCase
from normkit.bench.call_cost import CallCost
from normkit.bench.timing import MAX_WAITING, Timing

__all__ = ["MODES", "CallCell", "Calls", "is_calm", "threads_in_words"]

MODES = ("training", "eval")


@dataclass(frozen=True)
class CallCell:
    """One case in one mode with one number of threads.

    Attributes:
        case: Layer, form and size.
        mode: "training" or "eval".
        threads: Number of threads of torch and of the kernels.
        passes: What each pass measured, by contestant: "ours", "torch" and "clone", or
            the name and version of a peer.
    """

    case: CallCase
    mode: str
    threads: int
    passes: tuple[dict[str, Timing], ...]

    def __str__(self) -> str:
        return f"{self.case}, {self.mode}, {threads_in_words(self.threads)}"

    @property
    def is_disturbed(self) -> bool:
        """True when several threads of ours or torch's had to wait in every pass."""
        return self.is_unknown("torch")

    @property
    def ratios(self) -> tuple[float, ...]:
        """Torch's median over ours in each pass that counts."""
        return tuple(
            self._time(p["torch"]) / self._time(p["ours"])
            for p in self._counting("torch")
        )

    @property
    def ratio(self) -> float:
        """Torch's time over ours: below 1 is a loss."""
        return self.time_of("torch")

    @property
    def spread(self) -> float:
        """The largest ratio of a pass over the least, minus 1."""
        return max(self.ratios) / min(self.ratios) - 1

    def is_unknown(self, contestant: str) -> bool:
        """Return whether several threads of ours or of `who` had to wait in every pass.

        With one thread CPU time leaves the waiting out, and is near the truth.
        """
        return self.threads > 1 and not any(is_calm(p, contestant) for p in self.passes)

    def time_of(self, contestant: str) -> float:
        """Return the time of a contestant over ours: the median over the passes."""
        return median(
            self._time(p[contestant]) / self._time(p["ours"])
            for p in self._counting(contestant)
        )

    def over(self, contestant: str) -> float:
        """Return the microseconds that ours takes more: the median over the passes."""
        return median(
            1e6 * (self._time(p["ours"]) - self._time(p[contestant]))
            for p in self._counting("torch")
        )

    def _counting(self, contestant: str) -> tuple[dict[str, Timing], ...]:
        calm = tuple(p for p in self.passes if is_calm(p, contestant))
        return calm or self.passes

    def _time(self, timing: Timing) -> float:
        # CPU time adds up the threads.
        return timing.cpu_median if self.threads == 1 else timing.wall_median


def is_calm(measured: dict[str, Timing], contestant: str = "torch") -> bool:
    """Return whether ours and another contestant ran without waiting for a CPU."""
    return all(measured[name].waiting <= MAX_WAITING for name in ("ours", contestant))


@dataclass(frozen=True)
class Calls:
    """Record of `normkit bench calls`.

    Attributes:
        cells: Cells of the grid.
        cost: Microseconds of a call, by layer.
        environment: Machine and versions.
        peers: Cells with other libraries among the contestants.
        absent: Libraries that were asked for and are not installed.
    """

    cells: tuple[CallCell, ...]
    cost: tuple[CallCost, ...]
    environment: dict[str, Any]
    peers: tuple[CallCell, ...] = ()
    absent: tuple[str, ...] = ()

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads in the record."""
        return tuple(dict.fromkeys(cell.threads for cell in self.cells))

    @classmethod
    def from_json(cls, text: str) -> Calls:
        """Read the result of `to_json`."""
        data = json.loads(text)
        cost = tuple(CallCost.from_json(entry) for entry in data["cost"])
        return cls(
            tuple(map(_cell, data["calls"])),
            cost,
            data["environment"],
            tuple(map(_cell, data.get("peers", ()))),
            tuple(data.get("absent", ())),
        )

    def to_json(self) -> str:
        """Write the record as JSON, one line for each cell.

        A timing is a list of its attributes, in seconds: least and median CPU time,
        least and median wall time, number of turns, share of waiting.
        """
        head = json.dumps(self.environment, indent=1)
        parts = {
            "cost": [asdict(entry) for entry in self.cost],
            "calls": list(map(_entry, self.cells)),
            "peers": list(map(_entry, self.peers)),
        }
        lists = ",\n".join(
            f'"{name}": [\n' + ",\n".join(map(json.dumps, entries)) + "\n]"
            for name, entries in parts.items()
        )
        absent = json.dumps(self.absent)
        return f'{{\n"environment": {head},\n"absent": {absent},\n{lists}\n}}'


def _entry(cell: CallCell) -> dict[str, Any]:
    return {
        "case": asdict(cell.case),
        "shape": cell.case.shape,
        "mode": cell.mode,
        "threads": cell.threads,
        "ratio": round(cell.ratio, 4),
        "passes": [
            {name: astuple(timing) for name, timing in measured.items()}
            for measured in cell.passes
        ],
    }


def _cell(entry: dict[str, Any]) -> CallCell:
    return CallCell(
        CallCase(**entry["case"]),
        entry["mode"],
        entry["threads"],
        tuple(
            {name: Timing(*values) for name, values in measured.items()}
            for measured in entry["passes"]
        ),
    )


def threads_in_words(count: int) -> str:
    """Return "1 thread", "2 threads", and so on."""
    return f"{count} thread{'s' * (count != 1)}"
