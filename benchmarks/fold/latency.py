"""Latency of folded models: eager, compiled, onnxruntime, OpenVINO; 1 image and 16.

    python benchmarks/fold/latency.py docs/fold_latency.md
    python benchmarks/fold/latency.py docs/fold_latency.md --seconds 3000

The original and the folded model run in turn on one thread, and processor time is
measured, not the clock: other work on the machine does not lengthen it but by the
caches that it shares. The table holds the ratio of the least and, in brackets, of the
median times, above 1 where the folded model is faster. The files are the original as
torch exports it, and what `fold_onnx` makes of that; both runtimes rewrite graphs
themselves, batch norms included. Ends within seven minutes on two quiet cores; no
measurement is begun after `--seconds`. A runtime that is not installed is left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
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
BATCHES = ((1, 30), (16, 10))
_SIZE = 96

Run = Callable[[torch.Tensor], Any]


def ratio(original: Run, folded: Run, x: torch.Tensor, rounds: int) -> str:
    """Time of `original` over that of `folded`, run in turn: least and median."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in (original, folded):
        run(x)
        run(x)
    for _ in range(rounds):
        for run, kept in zip((original, folded), times, strict=True):
            start = time.process_time()
            run(x)
            kept.append(time.process_time() - start)
    least, median = (
        found(times[0]) / found(times[1]) for found in (min, statistics.median)
    )
    return f"{least:.2f}× ({median:.2f})"


def eager(model: nn.Module, file: Path) -> Run:
    """Run the module."""
    return model


def compiled(model: nn.Module, file: Path) -> Run:
    """Run what torch.compile makes of the module."""
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


def onnxruntime(model: nn.Module, file: Path) -> Run:
    """Run the file in onnxruntime, with its default optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


def openvino(model: nn.Module, file: Path) -> Run:
    """Run the file in OpenVINO, set for latency."""
    import openvino as ov

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    ready = ov.Core().compile_model(str(file), "CPU", settings)
    return lambda x: ready(x.numpy())


ENGINES: dict[str, Callable[[nn.Module, Path], Run]] = {
    "eager": eager,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "compiled": compiled,
}


@torch.no_grad()
def measure(names: tuple[str, ...], out: Path, seconds: float) -> None:
    """Write the page to `out` after each measurement, the slow engine last."""
    from normkit.fold import fold

    engines = [
        name for name in ENGINES if name in ("eager", "compiled") or find_spec(name)
    ]
    started = time.monotonic()
    loads = [os.getloadavg()[0]]
    cells: dict[str, dict[str, str]] = {}
    with TemporaryDirectory() as folder:
        pairs: dict[str, list[tuple[nn.Module, Path]]] = {}
        for name in names:
            torch.manual_seed(0)
            model = case(name).build().eval()
            randomise(model)
            folded, ledger = fold(model, torch.randn(1, 3, 64, 64))
            files = _files(model, Path(folder) / name.replace("/", "_"))
            pairs[name] = list(zip((model, folded), files, strict=True))
            cells[name] = {"folded": f"{len(ledger.folded)} of {len(ledger.entries)}"}
        spent = time.monotonic() - started
        print(f"built, folded and exported in {spent:.0f} s", flush=True)
        for engine in engines:
            for name, pair in pairs.items():
                for batch, rounds in BATCHES:
                    found = "no time"
                    if time.monotonic() - started < seconds:
                        x = torch.randn(batch, 3, _SIZE, _SIZE)
                        runs = [ENGINES[engine](*each) for each in pair]
                        found = ratio(runs[0], runs[1], x, rounds)
                    cells[name][f"{engine}, {batch}"] = found
                print(name, cells[name], flush=True)
                loads.append(os.getloadavg()[0])
                out.write_text(page(cells, engines, loads))


def _files(model: nn.Module, path: Path) -> tuple[Path, Path]:
    """Return the files of `model` as torch exports it, and folded."""
    from normkit import fold_onnx

    original, folded = path.with_suffix(".onnx"), path.with_suffix(".folded.onnx")
    size = torch.export.Dim("n", min=1, max=64)
    torch.onnx.export(
        model,
        (torch.randn(2, 3, _SIZE, _SIZE),),
        str(original),
        dynamo=True,
        dynamic_shapes=({0: size},),
        external_data=False,
        optimize=False,
        verbose=False,
    )
    fold_onnx(original, folded, inputs=1)
    return original, folded


def page(
    cells: dict[str, dict[str, str]], engines: Iterable[str], loads: list[float]
) -> str:
    """Return the whole page."""
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"
    cores = os.cpu_count() or 1
    columns = ["folded", *(f"{e}, {b}" for e in engines for b, _ in BATCHES)]
    versions = [f"torch {torch.__version__}"] + [
        f"{name} {__import__(name).__version__.split('-')[0]}"
        for name in ("onnxruntime", "openvino")
        if name in engines
    ]
    return "\n".join(
        [
            "<!-- Written by `python benchmarks/fold/latency.py`; do not edit. -->",
            "# What folding saves at inference",
            "",
            "Processor time of the original over that of the folded model, for one",
            f"image and for sixteen of {_SIZE}×{_SIZE}: the least of runs in turn, and",
            f"in brackets their medians; {', '.join(versions)} on a CPU",
            f"({machine}). Above 1 the folded is faster. Load average "
            f"{min(loads):.1f} to {max(loads):.1f} on {cores} cores.",
            "onnxruntime and OpenVINO run the ONNX file as torch exports it and the "
            "file that `fold_onnx` makes of it; both fold batch norms themselves when "
            "they load a file.",
            "",
            "| model | " + " | ".join(columns) + " |",
            "| --- | --- |" + " --: |" * (len(columns) - 1),
            *(
                f"| {name} | " + " | ".join(row.get(c, "") for c in columns) + " |"
                for name, row in cells.items()
            ),
            "",
        ]
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="MODEL")
    parser.add_argument("--seconds", type=float, default=400.0)
    options = parser.parse_args()
    measure(tuple(options.names) or MODELS, options.out, options.seconds)
