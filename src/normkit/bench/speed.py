"""How fast each layer is, beside torch eager, torch.compile and a plain copy.

Every cell is one layer on one shape, layout and dtype, forward or backward, with what
follows it. `of copy` is our time over that of copying the tensor (numpy, one thread,
memory already there); `speedup` is torch's time over ours: below 1 is a loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import exp, log, prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import normkit
from normkit.bench.timing import Timing, in_turns
from normkit.environment import environment

__all__ = ["CASES", "QUICK", "Cell", "Speed", "SpeedCase", "speed"]

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class SpeedCase:
    """One layer on one kind of tensor.

    Attributes:
        layer: `"batch"`, `"group"`, `"instance"`, `"layer"` or `"rms"`.
        shape: Of the input.
        layout: `"nchw"` or `"nhwc"` for images, `"rows"` for others.
        dtype: Name of the input's dtype.
        follows: `"none"`, `"relu"`, or `"add+relu"` with a residual.
    """

    layer: str
    shape: tuple[int, ...]
    layout: str
    dtype: str = "float32"
    follows: str = "none"

    def __str__(self) -> str:
        follows = "" if self.follows == "none" else f"+{self.follows}"
        sizes = "×".join(map(str, self.shape))
        return f"{self.layer}{follows} {sizes} {self.layout} {self.dtype}"


def _images(shapes: list[tuple[int, ...]], dtype: str) -> Iterator[SpeedCase]:
    for shape in shapes:
        for layout in ("nchw", "nhwc"):
            for follows in ("none", "relu", "add+relu"):
                yield SpeedCase("batch", shape, layout, dtype, follows)


_RESNET = [
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 512, 28, 28),
    (32, 256, 14, 14),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
]
CASES: tuple[SpeedCase, ...] = (
    *_images(_RESNET, "float32"),
    *_images(_RESNET[:4], "bfloat16"),
    SpeedCase("batch", (4096, 1024), "rows"),
    SpeedCase("batch", (4096, 1024), "rows", "float32", "relu"),
    SpeedCase("batch", (256, 512), "rows"),
    *(
        SpeedCase(layer, shape, "nchw", "float32")
        for layer in ("group", "instance")
        for shape in (_RESNET[0], _RESNET[3], _RESNET[6])
    ),
    *(
        SpeedCase(layer, shape, "rows", dtype)
        for layer in ("layer", "rms")
        for shape in ((4096, 1024), (512, 4096), (8192, 256))
        for dtype in ("float32", "bfloat16")
    ),
    SpeedCase("batch", (8, 32), "rows"),
    SpeedCase("batch", (8, 16, 8, 8), "nchw"),
    SpeedCase("layer", (8, 32), "rows"),
)
QUICK: tuple[SpeedCase, ...] = (
    SpeedCase("batch", (32, 64, 56, 56), "nchw"),
    SpeedCase("batch", (32, 64, 56, 56), "nchw", "float32", "relu"),
    SpeedCase("batch", (32, 64, 56, 56), "nhwc", "float32", "relu"),
    SpeedCase("batch", (32, 64, 56, 56), "nhwc", "float32", "add+relu"),
    SpeedCase("batch", (32, 512, 28, 28), "nchw", "bfloat16", "relu"),
    SpeedCase("batch", (4096, 1024), "rows"),
    SpeedCase("group", (32, 64, 56, 56), "nchw"),
    SpeedCase("instance", (32, 64, 56, 56), "nchw"),
    SpeedCase("layer", (4096, 1024), "rows"),
    SpeedCase("rms", (4096, 1024), "rows"),
    SpeedCase("batch", (8, 32), "rows"),
    SpeedCase("layer", (8, 32), "rows"),
)


@dataclass(frozen=True)
class Cell:
    """One case in one direction.

    Attributes:
        case: What was run.
        direction: `"forward"` or `"backward"`.
        timings: By contestant: `"normkit"`, `"torch"`, `"copy"` and, where asked for,
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
        """The time of another contestant over ours."""
        return self.timings[over].cpu / self.timings["normkit"].cpu


@dataclass(frozen=True)
class Speed:
    """All cells, and the machine that they were measured on."""

    cells: tuple[Cell, ...]
    environment: dict[str, Any]

    def groups(self) -> dict[str, float]:
        """The geometric mean of the speedup over torch eager, by kind of case."""
        found: dict[str, list[float]] = {}
        for cell in self.cells:
            case = cell.case
            if prod(case.shape) < 100_000:
                name = "small inputs"
            elif case.layer == "batch":
                name = f"batch norm, {case.layout}, {case.dtype}"
            else:
                name = f"{case.layer} norm, {case.dtype}"
            found.setdefault(f"{name}, {cell.direction}", []).append(cell.speedup())
        return {
            name: exp(sum(map(log, ratios)) / len(ratios))
            for name, ratios in found.items()
        }

    def to_json(self) -> str:
        """Everything that was measured."""
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
        """The table, and the means below it."""
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
            f"| {name} | {_ratio(mean)} |" for name, mean in self.groups().items()
        )
        head = "| geometric mean over | torch ÷ ours |\n| --- | ---: |"
        return f"{table}\n\n{head}\n{means}"

    def to_text(self) -> str:
        """The same, in columns."""
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


def speed(
    cases: tuple[SpeedCase, ...] = CASES,
    *,
    seconds: float = 1.0,
    threads: int = 1,
    with_compile: bool = False,
) -> Speed:
    """Measure the cases, forward and backward.

    Args:
        cases: What to run.
        seconds: For each cell, all contestants together.
        threads: That torch and the kernels compute with; restored afterwards.
        with_compile: Also measure torch.compile, which takes seconds to compile each.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            cells = [
                cell
                for case in cases
                for cell in _measured(case, seconds, with_compile)
            ]
        found = json.loads(environment().to_json())
    finally:
        torch.set_num_threads(before)
    return Speed(tuple(cells), found)


def _ratio(value: float) -> str:
    return f"{value:.2f}" + (" (slower)" if value < 0.995 else "")


def _measured(case: SpeedCase, seconds: float, with_compile: bool) -> Iterator[Cell]:
    x, *others = _inputs(case)
    dy = torch.randn_like(x)
    ours, theirs = _ours(case), _theirs(case)
    contestants: dict[str, Callable[..., Tensor]] = {"normkit": ours, "torch": theirs}
    if with_compile:
        torch.compiler.reset()
        contestants["compile"] = torch.compile(theirs, dynamic=False)
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
        yield Cell(case, direction, in_turns({**calls, "copy": copy}, seconds))


def _inputs(case: SpeedCase) -> list[Tensor]:
    dtype, is_per_row = _DTYPES[case.dtype], case.layer in ("layer", "rms")
    x = torch.randn(case.shape).to(dtype)
    if case.layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    width = case.shape[-1] if is_per_row else case.shape[1]
    # Half inputs of rows meet weights of their dtype, of images those of float32.
    of_weights = dtype if case.layer != "batch" else torch.float32
    weight, bias = (torch.randn(width).to(of_weights).requires_grad_() for _ in "wb")
    given = [x.requires_grad_(), weight]
    if case.layer != "rms":
        given.append(bias)
    if case.follows == "add+relu":
        given.append(torch.randn_like(x).detach().requires_grad_())
    return given


def _ours(case: SpeedCase) -> Callable[..., Tensor]:
    f, width = normkit.functional, case.shape[-1:]
    activation = "none" if case.follows == "none" else "relu"
    if case.layer == "batch":
        mean, var = torch.zeros(case.shape[1]), torch.ones(case.shape[1])

        def batch(
            x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
        ) -> Tensor:
            return f.batch_norm(
                *(x, mean, var, weight, bias, True),
                activation=activation,
                residual=residual,
            )

        return batch
    if case.layer == "group":
        return lambda x, weight, bias: f.group_norm(x, 32, weight, bias)
    if case.layer == "instance":
        return lambda x, weight, bias: f.instance_norm(x, weight=weight, bias=bias)
    if case.layer == "layer":
        return lambda x, weight, bias: f.layer_norm(x, width, weight, bias)
    return lambda x, weight: f.rms_norm(x, width, weight)


def _theirs(case: SpeedCase) -> Callable[..., Tensor]:
    width = case.shape[-1:]
    if case.layer == "batch":
        mean, var = torch.zeros(case.shape[1]), torch.ones(case.shape[1])

        def batch(
            x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None
        ) -> Tensor:
            y = F.batch_norm(x, mean, var, weight, bias, True)
            # In place, as torchvision's networks do.
            if residual is not None:
                y += residual
            return y if case.follows == "none" else F.relu_(y)

        return batch
    if case.layer == "group":
        return lambda x, weight, bias: F.group_norm(x, 32, weight, bias)
    if case.layer == "instance":
        return lambda x, weight, bias: F.instance_norm(x, weight=weight, bias=bias)
    if case.layer == "layer":
        return lambda x, weight, bias: F.layer_norm(x, width, weight, bias)
    return lambda x, weight: F.rms_norm(x, width, weight)
