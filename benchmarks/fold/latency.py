"""What folding saves: eager and compiled, one image and sixteen.

    python benchmarks/fold/latency.py docs/fold_latency.md

The original and the folded model run in turn, so that a busy machine hits both alike;
the table holds the ratio of the medians, above 1 where the folded model is faster.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from zoo import case, randomise

MODELS = (
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/mobilenet_v2",
    "torchvision/efficientnet_b0",
    "timm/repvgg_a0",
)
_SIZE = 96


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
def rows(names: tuple[str, ...]) -> list[str]:
    """One line of the table per model."""
    from normkit.fold import fold

    lines = []
    for name in names:
        torch.manual_seed(0)
        model = case(name).build().eval()
        randomise(model)
        folded, ledger = fold(model, torch.randn(1, 3, 64, 64))
        cells = [name, f"{len(ledger.folded)} of {len(ledger.entries)}"]
        for prepare in (lambda m: m, torch.compile):
            pair = [prepare(model), prepare(folded)]
            for batch, rounds in ((1, 15), (16, 5)):
                x = torch.randn(batch, 3, _SIZE, _SIZE)
                for each in pair:
                    each(x)
                    each(x)
                one, other = pair
                found = ratio(
                    lambda m=one, x=x: m(x), lambda m=other, x=x: m(x), rounds
                )
                cells.append(f"{found:.2f}×")
        torch._dynamo.reset()
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return lines


def page(lines: list[str]) -> str:
    """The whole page."""
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
    return "\n".join(
        [
            "<!-- Written by `python benchmarks/fold/latency.py`; do not edit. -->",
            "# What folding saves at inference",
            "",
            "Time of the original over time of the folded model, for one image and for",
            f"sixteen of {_SIZE}×{_SIZE}, medians of runs in turn; torch "
            f"{torch.__version__} on a CPU ({machine}).",
            "",
            "| model | folded | eager, 1 | eager, 16 | compiled, 1 | compiled, 16 |",
            "| --- | --- | --: | --: | --: | --: |",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    out, *names = sys.argv[1:]
    Path(out).write_text(page(rows(tuple(names) or MODELS)))
