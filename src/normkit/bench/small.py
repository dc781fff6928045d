"""Cost of small layers against torch.nn, where the call itself is most of the work.

Each case is one layer on sixteen small batches of N(0, 1), each batch once per turn: at
8 rows a mean may be further from 0 than a standard deviation by chance, which costs
time. Ours and torch's take turns in one process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import normkit
from normkit.bench.timing import Timing, in_turns, seeded
from normkit.environment import environment

__all__ = ["MODES", "SMALL_CASES", "Small", "SmallCase", "SmallCell", "small"]

_BATCHES = 16
_GROUPS = 8
_ROWS = ((8, 32), (64, 128), (256, 512))
_IMAGE = (8, 16, 8, 8)

MODES = {
    "forward": "training, with the graph for a backward",
    "forward and backward": "training, gradients of the input and of what is learned",
    "eval": "evaluation, under torch.no_grad()",
}


@dataclass(frozen=True)
class SmallCase:
    """A layer and its input.

    Attributes:
        layer: Its name in torch.nn and normkit.nn.
        shape: Shape of the input.
    """

    layer: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.layer} {'×'.join(map(str, self.shape))}"

    def made_by(self, library: Any) -> torch.nn.Module:
        """Build the layer from `torch.nn` or `normkit.nn`."""
        layer = getattr(library, self.layer)
        if self.layer in ("LayerNorm", "RMSNorm"):
            return layer(self.shape[-1])
        if self.layer == "GroupNorm":
            return layer(_GROUPS, self.shape[1])
        is_instance = self.layer.startswith("Instance")
        return layer(self.shape[1], **({"affine": True} if is_instance else {}))


SMALL_CASES: tuple[SmallCase, ...] = (
    *(SmallCase("BatchNorm1d", shape) for shape in _ROWS),
    SmallCase("BatchNorm2d", _IMAGE),
    *(
        SmallCase(layer, shape)
        for layer in ("LayerNorm", "RMSNorm", "GroupNorm")
        for shape in (*_ROWS, _IMAGE)
    ),
    SmallCase("InstanceNorm2d", _IMAGE),
)


@dataclass(frozen=True)
class SmallCell:
    """One case in one mode.

    Attributes:
        case: The case.
        mode: A name of `MODES`.
        ours: Time of one call of normkit's layer.
        torch: Time of one call of torch's.
    """

    case: SmallCase
    mode: str
    ours: Timing
    torch: Timing

    @property
    def difference(self) -> float:
        """Microseconds of ours minus torch's, by the least of many turns."""
        return 1e6 * (self.ours.cpu - self.torch.cpu)

    @property
    def median_difference(self) -> float:
        """The same, by the medians."""
        return 1e6 * (self.ours.cpu_median - self.torch.cpu_median)


@dataclass(frozen=True)
class Small:
    """All cells, and the machine that they were measured on."""

    cells: tuple[SmallCell, ...]
    environment: dict[str, Any]

    @classmethod
    def from_json(cls, text: str) -> Small:
        """Read the result of `to_json`."""
        data = json.loads(text)
        cells = tuple(
            SmallCell(
                SmallCase(cell["layer"], tuple(cell["shape"])),
                cell["mode"],
                Timing(**cell["ours"]),
                Timing(**cell["torch"]),
            )
            for cell in data["small"]
        )
        return cls(cells, data["environment"])

    def to_json(self) -> str:
        """Return all measurements as plain data."""
        cells = [
            {
                "layer": cell.case.layer,
                "shape": cell.case.shape,
                "mode": cell.mode,
                "difference_us": cell.difference,
                "ours": asdict(cell.ours),
                "torch": asdict(cell.torch),
            }
            for cell in self.cells
        ]
        return json.dumps({"environment": self.environment, "small": cells}, indent=1)

    def to_markdown(self) -> str:
        """Return a row for each case: torch's µs, and the difference of ours."""
        head = "| µs: torch.nn, ours − torch.nn (of medians) |"
        rule = "| --- |"
        for mode in MODES:
            head, rule = f"{head} {mode} | |", f"{rule} ---: | ---: |"
        rows = [head, rule]
        for case in dict.fromkeys(cell.case for cell in self.cells):
            row = f"| {case} |"
            for mode in MODES:
                found = [c for c in self.cells if (c.case, c.mode) == (case, mode)]
                row += _columns(found[0]) if found else " | |"
            rows.append(row)
        return "\n".join([*rows, "", self.summary()])

    def summary(self) -> str:
        """Return how many cases meet the goal, and by how much the worst misses it."""
        worst = max(self.cells, key=lambda cell: cell.difference)
        near = sum(cell.difference <= 2 for cell in self.cells)
        return (
            f"{near} of {len(self.cells)} are within 2 µs of torch.nn; the most is "
            f"{worst.difference:+,.1f} µs: {worst.case}, {worst.mode}."
        )

    def to_text(self) -> str:
        """Return the same table in columns."""
        lines = [f"{'µs':50} {'torch.nn':>9} {'ours −':>9} {'of medians':>11}"]
        for cell in self.cells:
            name = f"{cell.case} {cell.mode}"
            lines.append(
                f"{name:50} {cell.torch.cpu * 1e6:9,.1f} {cell.difference:+9,.1f} "
                f"{cell.median_difference:+11,.1f}"
            )
        return "\n".join([*lines, "", self.summary()])


def _columns(cell: SmallCell) -> str:
    return (
        f" {cell.torch.cpu * 1e6:,.1f} | {cell.difference:+,.1f} "
        f"({cell.median_difference:+,.1f}) |"
    )


def small(cases: tuple[SmallCase, ...] = SMALL_CASES, *, budget: float = 90.0) -> Small:
    """Measure the layers against torch.nn's in every mode, with one thread.

    Args:
        cases: The cases to run.
        budget: Seconds for everything, shared evenly; a cell takes at least three
            turns.
    """
    end, left = time.perf_counter() + budget, len(cases) * len(MODES)
    cells: list[SmallCell] = []
    with seeded(threads=1):
        for case in cases:
            for mode in MODES:
                share = max(end - time.perf_counter(), 0) / left
                cells.append(_measured(case, mode, share))
                left -= 1
        found = json.loads(environment().to_json())
    return Small(tuple(cells), found)


def _measured(case: SmallCase, mode: str, seconds: float) -> SmallCell:
    batches = [torch.randn(case.shape) for _ in range(_BATCHES)]
    layers = {"ours": case.made_by(normkit.nn), "torch": case.made_by(torch.nn)}
    calls = {name: _call(layer, mode, batches) for name, layer in layers.items()}
    # The cost of first calls (imports, plans of a shape) does not count.
    for call in calls.values():
        call()
    found = in_turns(calls, seconds)
    return SmallCell(case, mode, _per_batch(found["ours"]), _per_batch(found["torch"]))


def _call(
    layer: torch.nn.Module, mode: str, batches: list[Tensor]
) -> Callable[[], None]:
    if mode == "eval":
        layer.eval()

        def evaluate() -> None:
            with torch.no_grad():
                for x in batches:
                    layer(x)

        return evaluate
    if mode == "forward":

        def forward() -> None:
            for x in batches:
                layer(x)

        return forward
    parameters, dy = list(layer.parameters()), torch.randn_like(batches[0])
    for x in batches:
        x.requires_grad_()

    def train() -> None:
        for x in batches:
            torch.autograd.grad(layer(x), [x, *parameters], dy)

    return train


def _per_batch(timing: Timing) -> Timing:
    return Timing(
        timing.cpu / _BATCHES,
        timing.cpu_median / _BATCHES,
        timing.wall / _BATCHES,
        timing.wall_median / _BATCHES,
        timing.turns,
    )
