"""Batch norm through quantization: float, trained, statistics measured again, int8.

    python benchmarks/quantize/digits.py page.md
    python benchmarks/quantize/digits.py page.md --seeds 3

A CNN on scikit-learn's digits (on CIFAR-10 where NORMKIT_DATA has it) is trained in
float and then with fake quantization (torchao, pt2e); its statistics are measured again
by `normkit.calibrate`, and both are converted to int8. Each seed is one split of the
data, one start and one order of batches for all rows: differences are paired. The page
has medians over the seeds and order-statistic intervals. Needs
`pip install 'normkit[quant,demo]'`; a seed takes about a minute on a busy core.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

import normkit
from normkit.studies.data import Images
from normkit.studies.interval import median_interval
from normkit.studies.study import Trial
from normkit.studies.training import cnn, train

FLOAT, FLOAT_AGAIN = "float", "float, statistics measured again"
TRAINED, AGAIN = "fake quantization", "fake quantization, statistics measured again"
INT8, INT8_AGAIN = "int8", "int8, statistics measured again"
ROWS = (FLOAT, FLOAT_AGAIN, TRAINED, AGAIN, INT8, INT8_AGAIN)
# (what differs, from, to), in points of accuracy.
GAINS = (
    ("measuring again, in float", FLOAT, FLOAT_AGAIN),
    ("measuring again, with fake quantization", TRAINED, AGAIN),
    ("measuring again, in int8", INT8, INT8_AGAIN),
    ("int8 against float", FLOAT, INT8),
    ("int8, measured again, against float", FLOAT, INT8_AGAIN),
)
BATCH = 16
RATE, FINE_RATE = 0.05, 0.02


def measure(seed: int) -> dict[str, Any]:
    """Return the test accuracy of each row, in percent, for one seed."""
    root = os.environ.get("NORMKIT_DATA")
    trial = Trial(seed, Path(root) if root else None)
    images = trial.images("cifar10" if root else "digits", train=12_000).standardized()
    torch.manual_seed(seed)
    channels, side = images.x_train.shape[1], images.x_train.shape[-1]
    model = cnn(10, nn.BatchNorm2d, channels=channels, width=8, side=side)
    epoch = len(images.y_train) // BATCH
    train(model, images, images.batches(BATCH, 3 * epoch, trial.generator(1)), RATE)
    model.eval()
    found: dict[str, Any] = {"data": images.name, FLOAT: accuracy(model, images)}
    order = images.batches(BATCH, epoch, trial.generator(3))
    again = [images.x_train[rows] for rows in order]
    other = copy.deepcopy(model)
    normkit.calibrate(other, again)
    found[FLOAT_AGAIN] = accuracy(other, images)

    prepared = simulated(model, images)
    fine_tune(prepared, images, images.batches(BATCH, epoch, trial.generator(2)))
    for is_again, names in ((False, (TRAINED, INT8)), (True, (AGAIN, INT8_AGAIN))):
        other = copy.deepcopy(prepared)
        if is_again:
            report = normkit.calibrate(other, again)
            found["d_mean"] = max(layer.d_mean for layer in report.layers)
            found["d_var"] = max(layer.d_var for layer in report.layers)
        move_exported_model_to_eval(other)
        found[names[0]] = accuracy(other, images)
        found[names[1]] = accuracy(convert_pt2e(other), images)
    return found


def simulated(model: nn.Module, images: Images) -> nn.Module:
    """Return the graph of `model` prepared for quantization-aware training."""
    size = torch.export.Dim("n", min=2, max=1 << 16)
    program = torch.export.export(
        copy.deepcopy(model).train(),
        (images.x_train[:BATCH],),
        dynamic_shapes=({0: size},),
    )
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    return prepare_qat_pt2e(program.module(), quantizer)


def fine_tune(model: nn.Module, images: Images, batches: Tensor) -> None:
    """Train a prepared graph, which has no train() to call."""
    optimizer = torch.optim.SGD(model.parameters(), FINE_RATE, momentum=0.9)
    for rows in batches:
        loss = F.cross_entropy(model(images.x_train[rows]), images.y_train[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: Any, images: Images) -> float:
    """Return the share of right answers on the test images, in percent."""
    right = model(images.x_test).argmax(1) == images.y_test
    return 100 * float(right.float().mean())


def page(results: list[dict[str, Any]]) -> str:
    """Return the whole page."""
    data, seeds = results[0]["data"], len(results)
    name = {"digits": "scikit-learn's digits"}.get(data, data)

    def column(key: str) -> list[float]:
        return [result[key] for result in results]

    def gain(before: str, after: str) -> list[float]:
        pairs = zip(column(before), column(after), strict=True)
        return [new - old for old, new in pairs]

    return "\n".join(
        [
            "<!-- Written by `python benchmarks/quantize/digits.py`; do not edit. -->",
            "# Batch norm through quantization",
            "",
            f"A CNN with three batch norms on {name}: three epochs in float, one with "
            f"fake quantization in batches of {BATCH}, then int8 (torchao, pt2e, x86 "
            "quantizer: weights per channel, activations per tensor). Statistics are "
            "measured again by `normkit.calibrate` on one epoch. Test accuracy in "
            f"percent: median over {seeds} paired seeds and order-statistic interval.",
            "",
            "| | accuracy, % |",
            "| --- | --- |",
            *(f"| {row} | {median_interval(column(row))} |" for row in ROWS),
            "",
            "| difference, paired | points |",
            "| --- | --- |",
            *(
                f"| {text} | {median_interval(gain(before, after))} |"
                for text, before, after in GAINS
            ),
            "",
            "How far the statistics moved, the most of the three layers: d_mean "
            f"{median_interval(column('d_mean'))}, d_var "
            f"{median_interval(column('d_var'))} "
            "(a healthy network in training stays below 0.25 and 0.35).",
            "",
        ]
    )


def main() -> None:
    """Run the seeds and write the page after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for seed in range(options.seeds):
        start = time.monotonic()
        results.append(measure(seed))
        shown = {key: results[-1][key] for key in ROWS}
        print(seed, f"{time.monotonic() - start:.0f} s", shown, flush=True)
        options.out.write_text(page(results))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
