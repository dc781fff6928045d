"""What folding saves: eager and compiled, one image and sixteen.

    python benchmarks/fold/latency.py docs/fold_latency.md

The original and the folded model run in turn, so that a busy machine hits both alike;
the table holds the ratio of the medians, above 1 where the folded model is faster.
Ends within six minutes on two quiet cores.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo import case, randomise

MODELS = (
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/mobilenet_v2",
    "torchvision/efficientnet_b0",
    "timm/repvgg_a0",
)
_SIZE = 96
# No measurement is begun later; compiling takes most of it.
_SECONDS = 300


def ratio(original: Callable[[], Any], folded: Callable[[], Any], rounds: int) -> float:
    """Median time of `original` over that of `folded`, measured in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, kept in zip((original, folded), times, strict=True):
            start = time.perf_counter()
            run()
            kept.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


@torch.no_grad()
def measure(names: tuple[str, ...], out: Path) -> None:
    """Write the page to `out` after each measurement, eager ones first."""
    from normkit.fold import fold

    started = time.monotonic()
    cells: dict[str, list[str]] = {}
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name in names:
        torch.manual_seed(0)
        model = case(name).build().eval()
        randomise(model)
        folded, ledger = fold(model, torch.randn(1, 3, 64, 64))
        pairs[name] = (model, folded)
        cells[name] = [name, f"{len(ledger.folded)} of {len(ledger.entries)}"]
    for compiled in (False, True):
        for name, pair in pairs.items():
            for batch, rounds in ((1, 15), (16, 5)):
                has_time = time.monotonic() - started < _SECONDS
                found = _ratio(pair, batch, rounds, compiled) if has_time else None
                cells[name].append("no time" if found is None else f"{found:.2f}×")
            print(" | ".join(cells[name]), flush=True)
            out.write_text(page(cells.values()))


def _ratio(
    pair: tuple[nn.Module, nn.Module], batch: int, rounds: int, compiled: bool
) -> float:
    x = torch.randn(batch, 3, _SIZE, _SIZE)
    torch._dynamo.reset()
    runs: list[Callable[[], Any]] = []
    for model in pair:
        ready: Any = torch.compile(model, dynamic=False) if compiled else model
        ready(x)
        ready(x)
        runs.append(lambda ready=ready: ready(x))
    return ratio(runs[0], runs[1], rounds)


def page(rows: Iterable[list[str]]) -> str:
    """Return the whole page."""
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
    return "\n".join(
        [
            "<!-- Written by `python benchmarks/fold/latency.py`; do not edit. -->",
            "# What folding saves at inference",
            "",
            "Time of the original over time of the folded model, for one image and for",
            f"sixteen of {_SIZE}×{_SIZE}, medians of runs in turn; torch "
            f"{torch.__version__} on a CPU ({machine}). Above 1 the folded is faster.",
            "",
            "| model | folded | eager, 1 | eager, 16 | compiled, 1 | compiled, 16 |",
            "| --- | --- | --: | --: | --: | --: |",
            *("| " + " | ".join([*row, *[""] * (6 - len(row))]) + " |" for row in rows),
            "",
        ]
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    out, *names = sys.argv[1:]
    measure(tuple(names) or MODELS, Path(out))
