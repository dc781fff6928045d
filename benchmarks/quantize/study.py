"""Batch norm through quantization: float, trained, statistics measured again, int8.

    python benchmarks/quantize/study.py run --seeds 10
    python benchmarks/quantize/study.py run --seeds 10 --data cifar10
    python benchmarks/quantize/study.py page

`run` trains a CNN on scikit-learn's digits, or on CIFAR-10 where NORMKIT_DATA has it:
in float, then one epoch more in float and, from the same weights, with fake
quantization (torchao, pt2e); statistics are measured again by `normkit.calibrate`, and
all is converted to int8. Each seed is one split of the data, one start and one order of
batches for all rows: differences are paired. A seed is one line of record.jsonl and is
not repeated; it takes about a minute on a quiet core. `page` writes the medians and
their order-statistic intervals into docs/guide/quantize.md. Needs
`pip install 'normkit[quant,demo]'`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit
from normkit.bench.marks import written
from normkit.errors import ArgumentError
from normkit.studies.data import Images
from normkit.studies.interval import coverage_of, median_interval
from normkit.studies.study import Trial
from normkit.studies.training import accuracy, cnn, train

HERE = Path(__file__).parent
RECORD = HERE / "record.jsonl"
PAGE = HERE.parents[1] / "docs" / "guide" / "quantize.md"
COMMAND = "python benchmarks/quantize/study.py page"
DATA = ("digits", "cifar10")

FLOAT, FLOAT_MORE = "float", "float, one epoch more"
FLOAT_AGAIN = "float, one epoch more, measured again"
TRAINED, AGAIN = "fake quantization", "fake quantization, measured again"
INT8, INT8_AGAIN = "int8", "int8, measured again"
ROWS = (FLOAT, FLOAT_MORE, FLOAT_AGAIN, TRAINED, AGAIN, INT8, INT8_AGAIN)
# (what differs, from, to), in points of accuracy.
GAINS = (
    ("measuring again, in float", FLOAT_MORE, FLOAT_AGAIN),
    ("measuring again, with fake quantization", TRAINED, AGAIN),
    ("measuring again, in int8", INT8, INT8_AGAIN),
    ("conversion to int8, not measured again", TRAINED, INT8),
    ("int8 against float, both trained alike", FLOAT_MORE, INT8),
    ("int8, measured again, against float", FLOAT_MORE, INT8_AGAIN),
)
BATCH = 16
# Of CIFAR-10; the digits have 1,297.
TRAIN_IMAGES = 2_000
RATE, FINE_RATE = 0.05, 0.02


def measure(data: str, seed: int) -> dict[str, Any]:
    """Return the test accuracy of each row, in percent, for one seed."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    root = os.environ.get("NORMKIT_DATA")
    trial = Trial(seed, Path(root) if root else None)
    images = trial.images(data, train=TRAIN_IMAGES).standardized()
    if images.name != data:
        raise ArgumentError(f"no {data}*.npz in NORMKIT_DATA, which is {root}")
    torch.manual_seed(seed)
    channels, side = images.x_train.shape[1], images.x_train.shape[-1]
    model = cnn(10, nn.BatchNorm2d, channels=channels, width=8, side=side)
    epoch = len(images.y_train) // BATCH
    train(model, images, images.batches(BATCH, 3 * epoch, trial.generator(1)), RATE)
    found: dict[str, Any] = {"data": data, "seed": seed, FLOAT: _of(model, images)}
    fine = images.batches(BATCH, epoch, trial.generator(2))
    order = images.batches(BATCH, epoch, trial.generator(3))
    again = [images.x_train[r] for r in order]

    more = copy.deepcopy(model)
    train(more, images, fine, FINE_RATE)
    found[FLOAT_MORE] = _of(more, images)
    normkit.calibrate(more, again)
    found[FLOAT_AGAIN] = _of(more, images)

    prepared = simulated(model, images)
    fine_tune(prepared, images, fine)
    for is_again, names in ((False, (TRAINED, INT8)), (True, (AGAIN, INT8_AGAIN))):
        other = copy.deepcopy(prepared)
        if is_again:
            report = normkit.calibrate(other, again)
            found["d_mean"] = max(layer.d_mean for layer in report.layers)
            found["d_var"] = max(layer.d_var for layer in report.layers)
        move_exported_model_to_eval(other)
        found[names[0]] = _right(other, images)
        found[names[1]] = _right(convert_pt2e(other), images)
    return found


def simulated(model: nn.Module, images: Images) -> nn.Module:
    """Return the graph of `model` prepared for quantization-aware training."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

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


def _of(model: nn.Module, images: Images) -> float:
    """Return the share of right answers of a module in eval mode, in percent."""
    return 100 * accuracy(model, images.x_test, images.y_test)


@torch.no_grad()
def _right(model: Any, images: Images) -> float:
    """Return that of a graph, which is in eval mode and has no other."""
    right = model(images.x_test).argmax(1) == images.y_test
    return 100 * float(right.float().mean())


def records(path: Path = RECORD) -> list[dict[str, Any]]:
    """Return the measured seeds, of each data set in the order of the seeds."""
    if not path.exists():
        return []
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(found, key=lambda r: (DATA.index(r["data"]), r["seed"]))


def run(data: str, seeds: int) -> None:
    """Measure the seeds that the record lacks."""
    done = {record["seed"] for record in records() if record["data"] == data}
    for seed in range(seeds):
        if seed in done:
            continue
        start = time.monotonic()
        found = measure(data, seed)
        with RECORD.open("a") as file:
            file.write(json.dumps(found) + "\n")
        shown = {key: round(found[key], 2) for key in ROWS}
        print(data, seed, f"{time.monotonic() - start:.0f} s", shown, flush=True)


def block(results: list[dict[str, Any]]) -> str:
    """Return the tables, one column per data set."""
    by_data = {
        data: [r for r in results if r["data"] == data]
        for data in DATA
        if any(r["data"] == data for r in results)
    }
    names = {"digits": "digits", "cifar10": "CIFAR-10"}
    heads = [f"{names[data]}, {len(found)} seeds" for data, found in by_data.items()]
    tests = {"digits": 500, "cifar10": 2000}
    rule = "| --- |" + " --- |" * len(by_data)

    def row(name: str, values: Any) -> str:
        cells = (str(median_interval(values(found))) for found in by_data.values())
        return f"| {name} | {' | '.join(cells)} |"

    rows = [row(name, lambda found, n=name: [r[n] for r in found]) for name in ROWS]
    gains = [
        row(text, lambda found, a=old, b=new: [r[b] - r[a] for r in found])
        for text, old, new in GAINS
    ]
    moved = [
        row(f"{name}, the largest of the layers", lambda f, k=name: [r[k] for r in f])
        for name in ("d_mean", "d_var")
    ]
    points = [f"{100 / tests[data]:.2g}" for data in by_data]
    holds = [f"{100 * coverage_of(len(found))[1]:.3g} %" for found in by_data.values()]
    return "\n".join(
        [
            f"| accuracy, % | {' | '.join(heads)} |",
            rule,
            *rows,
            f"| an interval holds the median with | {' | '.join(holds)} |",
            "",
            f"| difference, paired, points | {' | '.join(heads)} |",
            rule,
            *gains,
            f"| one test image | {' | '.join(points)} |",
            "",
            f"| how far the statistics moved | {' | '.join(heads)} |",
            rule,
            *moved,
        ]
    )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "page"))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--data", choices=DATA, default="digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "run":
        run(options.data, options.seeds)
    else:
        PAGE.write_text(written(PAGE, COMMAND, block(records())))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
