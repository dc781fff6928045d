"""The time of norms on inputs that are neither contiguous nor in channels_last.

Tokens of patches, images that were permuted for a layer norm over channels (ConvNeXt),
heads of an attention (norms of queries and keys), sequences seen as channels, slices.
`normkit bench calls` has none of these layouts. Ours, torch's and a clone of the input
take turns; process CPU time, one thread.

Run: `python benchmarks/layouts.py [seconds for each case] [README.md]`; the second
writes the table between its marks in that page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normkit.nn
from normkit.bench.marks import written
from normkit.bench.timing import in_turns, seeded
from normkit.environment import environment

COMMAND = "python benchmarks/layouts.py"
Case = tuple[Callable[[Any], nn.Module], Callable[[], Tensor]]
CASES: dict[str, Case] = {
    "layer, 16 tokens of 64, transposed": (
        lambda lib: lib.LayerNorm(64),
        lambda: torch.randn(2, 64, 16).transpose(1, 2),
    ),
    "layer, 196 tokens of 384, transposed": (
        lambda lib: lib.LayerNorm(384),
        lambda: torch.randn(4, 384, 196).transpose(1, 2),
    ),
    "layer, image of 96 channels, permuted": (
        lambda lib: lib.LayerNorm(96),
        lambda: torch.randn(2, 96, 28, 28).permute(0, 2, 3, 1),
    ),
    "layer, 6 heads of 64": (
        lambda lib: lib.LayerNorm(64),
        lambda: torch.randn(4, 196, 6, 64).transpose(1, 2),
    ),
    "RMS, 6 heads of 64": (
        lambda lib: lib.RMSNorm(64),
        lambda: torch.randn(4, 196, 6, 64).transpose(1, 2),
    ),
    "batch, sequence seen as channels": (
        lambda lib: lib.BatchNorm1d(64),
        lambda: torch.randn(8, 100, 64).transpose(1, 2),
    ),
    "group, sequence seen as channels": (
        lambda lib: lib.GroupNorm(4, 64),
        lambda: torch.randn(8, 100, 64).transpose(1, 2),
    ),
    "instance, sequence seen as channels": (
        lambda lib: lib.InstanceNorm1d(64),
        lambda: torch.randn(8, 100, 64).transpose(1, 2),
    ),
    "batch, every second column of an image": (
        lambda lib: lib.BatchNorm2d(16),
        lambda: torch.randn(8, 16, 14, 28)[..., ::2],
    ),
}


def measure(name: str, seconds: float) -> str:
    """Return the row of a case: torch's time over ours, least and median."""
    build, values = CASES[name]
    cells = []
    with seeded(1):
        for training in (True, False):
            x = values()
            dy = torch.randn(x.shape)
            calls: dict[str, Callable[[], Any]] = {"clone": x.clone}
            for who, library in (("ours", normkit.nn), ("torch", torch.nn)):
                layer = build(library).train(training)
                calls[who] = _step(layer, x, dy) if training else _eval(layer, x)
            taken = in_turns(calls, seconds)
            ours, theirs, clone = taken["ours"], taken["torch"], taken["clone"]
            least = theirs.cpu / ours.cpu
            median = theirs.cpu_median / ours.cpu_median
            cells += [f"{least:.2f} ({median:.2f})", f"{ours.cpu / clone.cpu:.1f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    given = x.detach().requires_grad_()
    wanted = [given, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(given), wanted, dy)


def _eval(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def main() -> None:
    """Print the table, or write it into a page."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    here = environment()
    lines = [
        f"{here.cpu}, one thread, torch {here.torch}. torch ÷ ours, least (median); of "
        "a clone: our least time over that of a clone of the input.",
        "",
        "| | training, with gradients | of a clone | eval | of a clone |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(measure(name, seconds) for name in CASES),
    ]
    table = "\n".join(lines)
    if len(sys.argv) > 2:
        page = Path(sys.argv[2])
        page.write_text(written(page, COMMAND, table), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
