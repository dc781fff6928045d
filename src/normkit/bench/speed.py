"""Speed of each layer against torch eager, torch.compile and a plain copy.

Every cell is one layer on one shape, layout and dtype, forward or backward, with its
epilogue. `of copy` is our time over that of copying the tensor (numpy, one thread, into
allocated memory); `speedup` is torch's time over ours: below 1 is a loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import exp, log, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.bench.cases import CASES, COMPILED, SpeedCase, inputs_of, ours, theirs
from normkit.bench.timing import Timing, in_turns, seeded
from normkit.environment import environment

__all__ = ["Cell", "Speed", "speed"]


@dataclass(frozen=True)
class Cell:
    """One case in one direction.

    Attributes:
        case: The case.
        direction: `"forward"` or `"backward"`.
        timings: By contestant: `"normkit"`, `"torch"`, `"copy"` and optionally
            `"compile"`.
    """

    case: SpeedCase
    direction: str
    timings: dict[str, Timing]

    @property
    def of_copy(self) -> float:
        """Our time over that of a copy of the tensor."""
        return self.timings["normkit"].cpu / self.timings["copy"].cpu

    def speedup(self, over: str = "torch") -> float:
        """Return the time of another contestant over ours."""
        return self.timings[over].cpu / self.timings["normkit"].cpu


@dataclass(frozen=True)
class Speed:
    """All cells, and the machine they were measured on."""

    cells: tuple[Cell, ...]
    environment: dict[str, Any]

    @classmethod
    def from_json(cls, text: str) -> Speed:
        """Read the result of `to_json`."""
        data = json.loads(text)
        cells = []
        for cell in data["cells"]:
            case = SpeedCase(**cell["case"] | {"shape": tuple(cell["case"]["shape"])})
            timings = {n: Timing(**t) for n, t in cell["timings"].items()}
            cells.append(Cell(case, cell["direction"], timings))
        return cls(tuple(cells), data["environment"])

    def groups(self) -> dict[str, float]:
        """Return the geometric mean of the speedup over eager, by kind of case."""
        return {
            name: _mean([cell.speedup() for cell in cells])
            for name, cells in self._by_kind().items()
        }

    def copies(self) -> dict[str, tuple[float, float]]:
        """Return the geometric means of our time and torch's over a plain copy's."""
        return {
            name: (
                _mean([cell.of_copy for cell in cells]),
                _mean([cell.of_copy * cell.speedup() for cell in cells]),
            )
            for name, cells in self._by_kind().items()
        }

    def _by_kind(self) -> dict[str, list[Cell]]:
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            case = cell.case
            if prod(case.shape) < 100_000:
                name = "small inputs"
            elif case.layer == "batch":
                name = f"batch norm, {case.layout}, {case.dtype}"
            else:
                name = f"{case.layer} norm, {case.dtype}"
            found.setdefault(f"{name}, {cell.direction}", []).append(cell)
        return found

    def to_json(self) -> str:
        """Return all measurements as plain data."""
        cells = [
            {
                "case": asdict(cell.case),
                "direction": cell.direction,
                "timings": {n: asdict(t) for n, t in cell.timings.items()},
                "of_copy": cell.of_copy,
                "speedup": cell.speedup(),
            }
            for cell in self.cells
        ]
        data = {"environment": self.environment, "cells": cells}
        return json.dumps(data | {"speedup_over_torch": self.groups()}, indent=1)

    def to_markdown(self) -> str:
        """Return the table, and the means below it."""
        has_compile = any("compile" in cell.timings for cell in self.cells)
        head = ["case", "", "normkit µs", "of copy", "torch ÷ ours"]
        head += ["compile ÷ ours"] if has_compile else []
        rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
        for cell in self.cells:
            row = [str(cell.case), cell.direction]
            row += [f"{cell.timings['normkit'].cpu * 1e6:,.1f}", f"{cell.of_copy:.2f}"]
            row += [_ratio(cell.speedup())]
            if has_compile:
                is_there = "compile" in cell.timings
                row += [_ratio(cell.speedup("compile")) if is_there else ""]
            rows.append(row)
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        means = "\n".join(
            f"| {name} | {_ratio(mean)} | {ours:.2f} | {theirs:.2f} |"
            for (name, mean), (ours, theirs) in zip(
                self.groups().items(), self.copies().values(), strict=True
            )
        )
        head = (
            "| geometric mean over | torch ÷ ours | ours, of copy | torch, of copy |\n"
            "| --- | ---: | ---: | ---: |"
        )
        return f"{head}\n{means}\n\n{table}"

    def to_text(self) -> str:
        """Return the same table in columns."""
        lines = [f"{'':58} {'µs':>10} {'of copy':>8} {'torch ÷ ours':>13}"]
        for cell in self.cells:
            name = f"{cell.case} {cell.direction}"
            micros = cell.timings["normkit"].cpu * 1e6
            lines.append(
                f"{name:58} {micros:10,.1f} {cell.of_copy:8.2f} "
                f"{_ratio(cell.speedup()):>13}"
            )
        lines += ["", "geometric means of torch ÷ ours"]
        lines += [
            f"{name:58} {_ratio(mean):>33}" for name, mean in self.groups().items()
        ]
        return "\n".join(lines)


def _mean(ratios: list[float]) -> float:
    return exp(sum(map(log, ratios)) / len(ratios))


def speed(
    cases: tuple[SpeedCase, ...] = CASES,
    *,
    budget: float = 480.0,
    threads: int = 1,
    with_compile: bool = False,
) -> Speed:
    """Measure the cases, forward and backward.

    Args:
        cases: The cases to run.
        budget: Seconds for everything, shared evenly; a cell takes at least three
            turns, so that a slow machine may need more.
        threads: Number of threads of torch and the kernels; restored afterwards.
        with_compile: Also measure torch.compile, in the few cases of `COMPILED`.
    """
    end = time.perf_counter() + budget
    shares = 2 * len(cases)
    cells: list[Cell] = []
    with seeded(threads):
        for case in cases:
            is_compiled = with_compile and case in COMPILED
            for cell in _measured(case, end, shares, is_compiled):
                cells.append(cell)
                shares -= 1
        found = json.loads(environment().to_json())
    return Speed(tuple(cells), found)


def _ratio(value: float) -> str:
    return f"{value:.2f}" + (" (slower)" if value < 0.995 else "")


def _measured(
    case: SpeedCase, end: float, shares: int, with_compile: bool
) -> Iterator[Cell]:
    x, *others = inputs_of(case)
    dy = torch.randn_like(x)
    contestants: dict[str, Callable[..., Tensor]] = {
        "normkit": ours(case),
        "torch": theirs(case),
    }
    if with_compile:
        torch.compiler.reset()
        contestants["compile"] = torch.compile(theirs(case), dynamic=False)
    source = np.zeros(x.numel() * x.element_size(), np.uint8)
    target = np.zeros_like(source)

    def copy() -> None:
        np.copyto(target, source)

    def forward(run: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: run(x, *others)

    def backward(run: Callable[..., Tensor]) -> Callable[[], object]:
        y = run(x, *others)
        inputs = [x, *(t for t in others if t.requires_grad)]
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    for direction, ready in (("forward", forward), ("backward", backward)):
        calls = {name: ready(run) for name, run in contestants.items()}
        left = max(end - time.perf_counter(), 0) / max(shares, 1)
        shares -= 1
        timings = in_turns({**calls, "copy": copy}, 0.9 * left)
        yield Cell(case, direction, timings)
