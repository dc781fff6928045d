"""The GPU kernels on a GPU: correctness at real shapes, then measurements, in stages.

    make gpu        PYTHONPATH=src:tests:. python -m benchmarks.gpu --budget 480

Needs torch with CUDA and its triton, nothing else: no pytest, no network. Every result
is in the JSON file at once; a cut loses nothing, and `--show FILE` prints its table.
`--dry-run` runs all of it at toy sizes in Triton's interpreter; its times mean nothing.
"""

import argparse
import datetime
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Read the command line; the exit code is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=480, help="seconds in all")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="default: all")
    parser.add_argument("--out", type=Path, help="JSON file, or a folder for it")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a record")
    parser.add_argument("--dry-run", action="store_true", help="interpreted, tiny")
    options = parser.parse_args()
    if options.show is None:
        return run(options, parser)
    return show(options.show)


def show(path: Path) -> int:
    """Print the table of a record."""
    from benchmarks.gpu import report

    data = json.loads(path.read_text())
    print(report.to_text(data))
    print(f"written to {path}")
    return 0 if report.is_good(data) else 1


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the stages, and print what there is in any case."""
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        import kernels.interpreted  # noqa: F401
    # All imports come before the fork, none of them touches CUDA.
    from benchmarks.gpu import stages

    every = all_stages(is_dry=options.dry_run)
    known = [stage.name for stage in every]
    asked = options.stages or known
    for name in asked:
        if name not in known:
            parser.error(f"--stages {name}: it must be of {', '.join(known)}")
    path = path_of(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        chosen = [s for s in every if s.name in {"machine", *asked}]
        stages.run_stages(chosen, path, options.budget)
    finally:
        code = show(path)
    return code


def all_stages(*, is_dry: bool) -> list[Any]:
    """Return the stages in order; all but the first know the copy's bandwidth."""
    import torch
    from benchmarks.gpu import correct, layers, networks, sync, tiles
    from benchmarks.gpu.stages import Case, Record, Stage
    from benchmarks.gpu.timing import Bench

    from normkit.kernels.choose import asked_for_name

    def start() -> Bench:
        device = torch.device("cpu") if is_dry else torch.device("cuda", 0)
        torch.manual_seed(20150211)
        asked_for_name.set("gpu")  # no silent fallback
        rounds = {"rounds": 1, "warmup": 0} if is_dry else {}
        return Bench(device, is_dry, **rounds)

    def machine(record: Record) -> list[Case]:
        return [Case("device and copy", functools.partial(describe, start()))]

    def after_machine(cases: Any, record: Record) -> list[Case]:
        if not record.rows("machine"):
            raise RuntimeError("no device was found; the stage `machine` says why")
        return cases(start())

    measured = (
        ("smoke", 90, correct.cases),
        ("bytes", 160, layers.cases),
        ("network", 110, networks.cases),
        ("tiles", 70, tiles.cases),
        ("sync", 30, sync.cases),
    )
    return [Stage("machine", 20, machine)] + [
        Stage(name, seconds, functools.partial(after_machine, cases))
        for name, seconds, cases in measured
    ]


def path_of(options: argparse.Namespace) -> Path:
    """Return the file of the record: under the date and time, unless it is named."""
    out = options.out or RESULTS
    if out.suffix == ".json":
        return out
    kind = "dry-run" if options.dry_run else "gpu"
    return out / f"{datetime.date.today()}-{time.strftime('%H%M%S')}-{kind}.json"


def describe(bench: Any) -> list[dict[str, object]]:
    """Return the device, the versions, and the bandwidth of a plain copy."""
    import torch
    import triton
    from benchmarks.gpu.timing import copy_bandwidth

    import normkit

    about: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "device": "interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "normkit": normkit.__version__,
        "python": sys.version.split()[0],
    }
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        about["device"] = properties.name
        about["multiprocessors"] = properties.multi_processor_count
        about["memory_bytes"] = properties.total_memory
        about["cuda"] = torch.version.cuda
    return [{**about, "copy_bytes_per_second": copy_bandwidth(bench)}]


if __name__ == "__main__":
    sys.exit(main())
