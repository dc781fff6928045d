"""Weights rounded after training: one scale per weight, equalized, one per channel.

    python benchmarks/quantize/post_training.py run --seeds 10
    python benchmarks/quantize/post_training.py page

Trains a CNN of depthwise and pointwise convolutions on scikit-learn's digits, folds its
batch norms, and rounds the weights alone: what one scale for each weight costs, what
`normkit.fold(equalize=True)` gives back, and what one scale per channel gives. A seed
is one line of post_training.jsonl, is not repeated, and takes about ten seconds. `page`
writes the medians and their order-statistic intervals into docs/guide/quantize.md.
Needs `pip install 'normkit[demo]'`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normkit
from normkit.bench.marks import written
from normkit.studies.data import Images
from normkit.studies.interval import median_interval
from normkit.studies.study import Trial
from normkit.studies.training import accuracy, train

HERE = Path(__file__).parent
RECORD = HERE / "post_training.jsonl"
PAGE = HERE.parents[1] / "docs" / "guide" / "quantize.md"
COMMAND = "python benchmarks/quantize/post_training.py page"

FLOAT, LOST, LOST_AGAIN = "float", "lost", "lost, equalized"
BITS = (8, 6, 5, 4)
SCALES = ("one scale per weight", "the same, equalized", "one scale per channel")
BATCH, EPOCHS, RATE = 16, 5, 0.05


def depthwise_cnn(classes: int, channels: int = 1, width: int = 16) -> nn.Sequential:
    """Build a convolution, then three pairs of a depthwise and a pointwise one."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    for stride in (1, 2, 1):
        layers += [
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        ]
        width *= 2
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*layers)


@torch.no_grad()
def rounded(model: nn.Module, bits: int, *, per_channel: bool) -> nn.Module:
    """Return a copy whose weights take 2ᵇⁱᵗˢ − 1 values per scale, symmetric."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            size = weight.abs()
            size = size.flatten(1).amax(1) if per_channel else size.amax().reshape(1)
            step = (size / (2 ** (bits - 1) - 1)).clamp(min=1e-30)
            step = step.reshape(-1, *(1,) * (weight.dim() - 1))
            weight.copy_((weight / step).round() * step)
    return copied


def measure(seed: int) -> dict[str, Any]:
    """Return the test accuracies of one seed, in percent, and the bits lost."""
    trial = Trial(seed, None)
    images = trial.images("digits", train=2_000).standardized()
    torch.manual_seed(seed)
    model = depthwise_cnn(10)
    steps = EPOCHS * (len(images.y_train) // BATCH)
    train(model, images, images.batches(BATCH, steps, trial.generator(1)), RATE)
    model.eval()
    folded, _ = normkit.fold(model, images.x_test[:2])
    even, ledger = normkit.fold(model, images.x_test[:2], equalize=True)
    found: dict[str, Any] = {"seed": seed, FLOAT: _of(model, images)}
    found[LOST] = max(each.before for each in ledger.equalized)
    found[LOST_AGAIN] = max(each.after for each in ledger.equalized)
    for bits in BITS:
        whole = (rounded(each, bits, per_channel=False) for each in (folded, even))
        each = rounded(folded, bits, per_channel=True)
        for name, other in zip(SCALES, (*whole, each), strict=True):
            found[f"{bits}, {name}"] = _of(other, images)
    return found


def _of(model: nn.Module, images: Images) -> float:
    return 100 * accuracy(model, images.x_test, images.y_test)


def records(path: Path = RECORD) -> list[dict[str, Any]]:
    """Return the measured seeds, in order."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted(map(json.loads, lines), key=lambda record: record["seed"])


def run(seeds: int) -> None:
    """Measure the seeds that the record lacks."""
    done = {record["seed"] for record in records()}
    for seed in range(seeds):
        if seed not in done:
            start = time.process_time()
            found = measure(seed)
            with RECORD.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{time.process_time() - start:.0f} s", found, flush=True)


def block(found: list[dict[str, Any]]) -> str:
    """Return the tables."""

    def cell(name: str) -> str:
        return str(median_interval([record[name] for record in found]))

    def gain(bits: int, to: str) -> str:
        names = (f"{bits}, {SCALES[0]}", f"{bits}, {to}")
        return str(median_interval([r[names[1]] - r[names[0]] for r in found]))

    return "\n".join(
        [
            f"| bits lost by the channel of the least range, {len(found)} seeds | |",
            "| --- | --- |",
            f"| folded | {cell(LOST)} |",
            f"| folded and equalized | {cell(LOST_AGAIN)} |",
            "",
            f"| accuracy, % (in float {cell(FLOAT)}) | {' | '.join(SCALES)} |",
            "| --- | --- | --- | --- |",
            *(
                f"| {bits} bits | {' | '.join(cell(f'{bits}, {n}') for n in SCALES)} |"
                for bits in BITS
            ),
            "",
            f"| gain over one scale per weight, paired | {' | '.join(SCALES[1:])} |",
            "| --- | --- | --- |",
            *(
                f"| {bits} bits | {' | '.join(gain(bits, n) for n in SCALES[1:])} |"
                for bits in BITS
            ),
        ]
    )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "run":
        run(options.seeds)
    else:
        PAGE.write_text(written(PAGE, COMMAND, block(records())))


if __name__ == "__main__":
    main()
