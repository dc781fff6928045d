"""The time of a call over the number of values: normkit, torch.nn, and a plain clone.

Between a few thousand values, where Python is all the cost, and some millions, where
memory is, lie most layers of real networks. Every cell is one layer at one size, in
training (forward, and the gradients of the input and of the parameters) or in eval
(under `torch.no_grad()`). The three contestants take turns in one process.

A ratio is torch's median over ours, above 1 where normkit is faster: of process CPU
time with one thread; of wall time with more, because CPU time adds up the threads. The
clone is that of the input in its layout, without a graph: the least that any of this
can cost.

The grid is measured in three passes that are minutes apart, each with new layers and
tensors, so that neither one busy spell nor one placement in memory decides a cell:
whether the heap gives back its top after every call, and takes it again page by page,
moves single passes by a factor of two. The last part of the budget goes to the cells
whose passes differ most. What is reported is the median over the passes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from math import prod
from statistics import median
from typing import Any

import torch

from normkit.bench.call_cases import CALL_CASES, CallCase, ours, theirs
from normkit.bench.call_cost import CallCost, call_cost
from normkit.bench.timing import Timing, in_turns
from normkit.environment import environment

__all__ = ["MODES", "CallCell", "Calls", "calls"]

MODES = ("training", "eval")
# Each pass takes this share of the budget; the rest is for the cells whose passes
# differ, each of them so often at most.
_PASSES, _SHARE_OF_A_PASS, _MAX_REPEATS = 3, 0.27, 4
# One turn of a large training step takes 0.1 to 0.5 s; small ones take thousands.
_LARGE, _WEIGHT_OF_LARGE = 1_000_000, 2.0
_COST_BUDGET = 12.0


@dataclass(frozen=True)
class CallCell:
    """One case in one mode with one number of threads.

    Attributes:
        case: Layer, form and size.
        mode: "training" or "eval".
        threads: Number of threads of torch and of the kernels.
        passes: What each pass measured, by contestant: "ours", "torch" and "clone".
    """

    case: CallCase
    mode: str
    threads: int
    passes: tuple[dict[str, Timing], ...]

    def __str__(self) -> str:
        return f"{self.case}, {self.mode}, {_threads(self.threads)}"

    @property
    def ratios(self) -> tuple[float, ...]:
        """Torch's median over ours in each pass."""
        return tuple(
            self._time(p["torch"]) / self._time(p["ours"]) for p in self.passes
        )

    @property
    def ratio(self) -> float:
        """The median of `ratios`: below 1 is a loss."""
        return median(self.ratios)

    @property
    def spread(self) -> float:
        """The largest ratio of a pass over the least, minus 1."""
        return max(self.ratios) / min(self.ratios) - 1

    def over(self, contestant: str) -> float:
        """Microseconds that ours takes more: the median over the passes."""
        return median(
            1e6 * (self._time(p["ours"]) - self._time(p[contestant]))
            for p in self.passes
        )

    def _time(self, timing: Timing) -> float:
        # CPU time adds up the threads.
        return timing.cpu_median if self.threads == 1 else timing.wall_median


@dataclass(frozen=True)
class Calls:
    """All cells, the cost of a call, and the machine that they were measured on."""

    cells: tuple[CallCell, ...]
    cost: tuple[CallCost, ...]
    environment: dict[str, Any]

    @property
    def threads(self) -> tuple[int, ...]:
        """The numbers of threads that were measured."""
        return tuple(dict.fromkeys(cell.threads for cell in self.cells))

    @classmethod
    def from_json(cls, text: str) -> Calls:
        """Read a record that `to_json` wrote."""
        data = json.loads(text)
        cells = tuple(
            CallCell(
                CallCase(**cell["case"]),
                cell["mode"],
                cell["threads"],
                tuple(
                    {name: Timing(*values) for name, values in measured.items()}
                    for measured in cell["passes"]
                ),
            )
            for cell in data["calls"]
        )
        cost = tuple(CallCost.from_json(entry) for entry in data["cost"])
        return cls(cells, cost, data["environment"])

    def to_json(self) -> str:
        """Write everything that was measured, one line for each cell.

        A timing is a list of its attributes, in seconds: least and median CPU time,
        least and median wall time, number of turns.
        """
        cells = [
            json.dumps(
                {
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
            )
            for cell in self.cells
        ]
        cost = [json.dumps(asdict(entry)) for entry in self.cost]
        head = json.dumps(self.environment, indent=1)
        return (
            f'{{\n"environment": {head},\n"cost": [\n{_lines(cost)}\n],\n'
            f'"calls": [\n{_lines(cells)}\n]\n}}'
        )


def _lines(entries: list[str]) -> str:
    return ",\n".join(entries)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count != 1)}"


def calls(
    cases: Sequence[CallCase] = CALL_CASES,
    *,
    threads: Sequence[int] = (1, 2),
    budget: float = 960.0,
) -> Calls:
    """Measure the cases beside torch.nn and a clone, in training and in eval.

    Args:
        cases: What to run.
        threads: Numbers of threads, each for the whole grid.
        budget: Seconds for everything. A cell takes at least three turns of each
            contestant in each of three passes, so a slow machine may need more.
    """
    before = torch.get_num_threads()
    for_cost = min(_COST_BUDGET, 0.1 * budget)
    cells: list[CallCell] = []
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            torch.set_num_threads(1)
            cost = call_cost(for_cost)
            for count in threads:
                torch.set_num_threads(count)
                seconds = (budget - for_cost) / len(threads)
                cells += _Grid(cases, count).measure(seconds)
    finally:
        torch.set_num_threads(before)
    return Calls(tuple(cells), cost, json.loads(environment().to_json()))


class _Grid:
    """The passes of every cell, and which cell needs another."""

    def __init__(self, cases: Sequence[CallCase], threads: int) -> None:
        trials = [(case, mode) for case in cases for mode in MODES]
        self.cells = [CallCell(*trial, threads, ()) for trial in trials]

    def measure(self, seconds: float) -> list[CallCell]:
        end = time.perf_counter() + seconds
        for _ in range(_PASSES):
            self._pass(time.perf_counter() + _SHARE_OF_A_PASS * seconds)
        share = _SHARE_OF_A_PASS * seconds / len(self.cells)
        while time.perf_counter() < end:
            worst = max(range(len(self.cells)), key=self._disagreement)
            if len(self.cells[worst].passes) >= _PASSES + _MAX_REPEATS:
                break
            self._run(worst, share)
        return self.cells

    def _pass(self, end: float) -> None:
        left = sum(_weight(cell.case) for cell in self.cells)
        for place, cell in enumerate(self.cells):
            weight = _weight(cell.case)
            self._run(place, (end - time.perf_counter()) * weight / left)
            left -= weight

    def _run(self, place: int, seconds: float) -> None:
        end = time.perf_counter() + seconds
        cell = self.cells[place]
        contestants = contestants_of(cell.case, cell.mode)
        # What the first calls cost (imports, plans of a shape) is no part of a call.
        for call in contestants.values():
            call()
        found = in_turns(contestants, end - time.perf_counter())
        measured = {name: _rounded(timing) for name, timing in found.items()}
        self.cells[place] = replace(cell, passes=(*cell.passes, measured))

    def _disagreement(self, place: int) -> float:
        """How far the passes are apart, less with every pass beyond the first three."""
        cell = self.cells[place]
        extra = len(cell.passes) - _PASSES
        return -1.0 if extra >= _MAX_REPEATS else cell.spread / (1 + extra)


def _weight(case: CallCase) -> float:
    return _WEIGHT_OF_LARGE if prod(case.shape) > _LARGE else 1.0


def _rounded(timing: Timing) -> Timing:
    """To nanoseconds, so that a record of hundreds of cells stays readable."""
    return Timing(
        *(round(timing.cpu, 9), round(timing.cpu_median, 9)),
        *(round(timing.wall, 9), round(timing.wall_median, 9)),
        timing.turns,
    )


def contestants_of(case: CallCase, mode: str) -> dict[str, Callable[[], object]]:
    """The calls that take turns: "ours", "torch" and "clone"."""
    training = mode == "training"
    of_normkit, of_torch = case.layers(training=training)
    given = case.inputs()
    x, dy = given["x"], given["dy"]
    plain = x.detach()
    inputs = [x, given["residual"]] if "residual" in given else [x]
    forwards = {
        "ours": (of_normkit, ours(of_normkit, given)),
        "torch": (of_torch, theirs(case, of_torch, given)),
    }
    found: dict[str, Callable[[], object]] = {}
    for tensor in inputs:
        tensor.requires_grad_(training)
    for name, (layer, forward) in forwards.items():
        wanted = [*inputs, *layer.parameters()]
        found[name] = (
            _step(forward, wanted, dy) if training else _without_graph(forward)
        )
    found["clone"] = plain.clone
    return found


def _step(
    forward: Callable[[], torch.Tensor], wanted: list[torch.Tensor], dy: torch.Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward(), wanted, dy)


def _without_graph(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
    def evaluate() -> None:
        with torch.no_grad():
            forward()

    return evaluate
