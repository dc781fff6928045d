"""Processor time of a fold per batch norm, by the number of batch norms.

    python benchmarks/fold/cost.py run cost.jsonl [MODEL ...]

One thread, the least of three folds. `coverage.py table` shows the record.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from zoo import prepare_torchvision, randomise

__all__ = ["MODELS", "measure", "section"]

MODELS = (
    *("resnet18", "resnet50", "resnet152"),
    *("mobilenet_v2", "densenet121", "densenet201"),
)


def measure(name: str) -> dict[str, Any]:
    """Fold torchvision's model `name` and time it."""
    from torchvision import models

    from normkit import fold

    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    randomise(model)
    x = torch.randn(1, 3, 64, 64)
    times = []
    for _ in range(3):
        start = time.process_time()
        _, ledger = fold(model, x)
        times.append(time.process_time() - start)
    start = time.process_time()
    with torch.no_grad():
        model.double()(x.double())
    return {
        "name": name,
        "norms": len(ledger.entries),
        "folded": len(ledger.folded),
        "cpu_seconds": round(min(times), 3),
        "forward": round(time.process_time() - start, 3),
    }


def run(path: Path, names: list[str]) -> None:
    """Write a line per model, in the place of an older one."""
    prepare_torchvision()
    torch.set_num_threads(1)
    records = {record["name"]: record for record in _records(path)}
    for name in names or MODELS:
        records[name] = measure(name)
        print(records[name], flush=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in records.values()))


def _records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def section(path: Path) -> str:
    """Return the part of the docs' page on the time of a fold."""
    rows = [
        f"| {r['name']} | {r['norms']} | {r['folded']} | {r['cpu_seconds']:.2f} | "
        f"{1000 * r['cpu_seconds'] / r['norms']:.0f} | {r['forward']:.2f} |"
        for r in _records(path)
    ]
    return "\n".join(
        [
            "## What a fold costs",
            "",
            "Processor time of `fold`, proof included, on one thread, least of three;",
            "models of torchvision in float32, one image of 64×64.",
            "",
            "| model | batch norms | gone | s | ms per batch norm | one forward in "
            "float64, s |",
            "| --- | --: | --: | --: | --: | --: |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, out, *rest = sys.argv[1:]
    if what == "run":
        run(Path(out), rest)
