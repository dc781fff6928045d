"""The GPU kernels on a GPU: correctness at real shapes, then the bench.

    make gpu        PYTHONPATH=src:tests:. python -m benchmarks.gpu

Needs torch with CUDA and its triton, nothing else: no pytest, no network. It ends
within ten minutes, leaves out what does not fit and says so, and writes
benchmarks/results/DATE-HARDWARE.json beside the table it prints. `--rehearse` runs
all of it at tiny sizes in Triton's interpreter; its times mean nothing.
"""

import argparse
import datetime
import json
import math
import os
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Read the command line; the exit code is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    options = parser.parse_args()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        import kernels.interpreted  # noqa: F401
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print(
            "make gpu needs a CUDA device, and torch sees none here.", file=sys.stderr
        )
        return 2
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Check, measure, print and write."""
    import torch
    from benchmarks.gpu import correct, layers, networks
    from benchmarks.gpu.timing import Clock, Deadline, copy_bandwidth

    import normkit

    tiny = options.rehearse
    deadline = Deadline(60 * options.minutes)
    device = torch.device("cpu") if tiny else torch.device("cuda", 0)
    torch.manual_seed(20150211)
    machine = describe(torch, device)
    print(f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}")

    failures: list[str] = []
    checked: list[dict[str, object]] = []
    sizes = correct.Sizes(device, tiny)
    with normkit.backend("gpu"):
        for name, check in correct.CHECKS.items():
            try:
                results = check(sizes)
            except Exception as error:
                # One broken check must not hide what the others find.
                results = [(f"{name}: {type(error).__name__}: {error}", math.inf, 0.0)]
            for what, error, limit in results:
                checked.append({"check": what, "error": error, "limit": limit})
                if not error <= limit:
                    failures.append(f"{what}: {error:.2e}, at most {limit:.0e}")
            print(f"{name}: {len(results)} checks, {deadline.left:.0f} s left")
            if not tiny:
                torch.cuda.empty_cache()
    for failure in failures:
        print("WRONG", failure)

    clock = Clock(device, rounds=1, warmup=0) if tiny else Clock(device)
    bandwidth = copy_bandwidth(clock, 1 if tiny else 4096)
    print(f"a plain copy moves {bandwidth / 1e9:.0f} GB/s")
    found: list[layers.Result] = []
    left_out: list[str] = []
    for batch in (2,) if tiny else (64, 256, 32, 128):
        if not deadline.allows(60):
            left_out.append(f"norms at batch {batch}")
            continue
        shapes = [(16, 4, (1, 1, 1))] if tiny else layers.RESNET_50
        of_batch = list(
            layers.resnet_norms(
                *(clock, bandwidth, batch),
                with_compile=batch == 64,
                deadline=deadline,
                shapes=shapes,
            )
        )
        print(table(of_batch, bandwidth))
        print(total(of_batch, batch))
        found += of_batch
    if deadline.allows(60):
        widths = {"sizes": ((8, 64),)} if tiny else {}
        of_rows = list(layers.rows(clock, bandwidth, deadline, **widths))
        print(table(of_rows, bandwidth))
        found += of_rows
    else:
        left_out.append("rows")

    steps = []
    small = {"size": 32, "depths": (1, 1)} if tiny else {}
    for compiled, batch in ((False, 2),) if tiny else (
        (False, 64), (False, 256), (True, 64)
    ):  # fmt: skip
        if not deadline.allows(90 if compiled else 40):
            left_out.append(f"ResNet-50 {'compiled' if compiled else 'eager'} {batch}")
            continue
        step = networks.resnet_50_step(clock, batch, compiled=compiled, **small)
        steps.append(step)
        print(
            f"ResNet-50 {step.mode}, batch {batch}: {step.ours * 1e3:.2f} ms against "
            f"{step.torchs * 1e3:.2f} ({step.torchs / step.ours:.2f}x), keeps "
            f"{step.saved_ours / 1e6:.0f} MB against {step.saved_torchs / 1e6:.0f}"
        )
    for what in left_out:
        print(f"left out, no time: {what}")

    report = {
        "machine": machine,
        "copy_bytes_per_second": bandwidth,
        "correctness": checked,
        "layers": [r.to_json() for r in found],
        "networks": [s.to_json() for s in steps],
        "left_out": left_out,
        "seconds": round(60 * options.minutes - deadline.left),
    }
    if not tiny or options.out:
        print(f"written to {write(report, options.out or RESULTS)}")
    if failures:
        print(f"{len(failures)} of {len(checked)} checks are WRONG")
    return 1 if failures else 0


def describe(torch, device) -> dict[str, object]:
    """Return the device and the versions."""
    import triton

    import normkit

    about: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "device": "interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "normkit": normkit.__version__,
        "python": sys.version.split()[0],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["device"] = properties.name
        about["multiprocessors"] = properties.multi_processor_count
        about["memory_bytes"] = properties.total_memory
        about["cuda"] = torch.version.cuda
    return about


def table(results, bandwidth: float) -> str:
    """One line per layer and direction."""
    lines = [
        f"{'layer':12} {'shape':22} {'pass':8} {'ms':>8} {'GB/s':>6} {'of copy':>7} "
        f"{'eager':>7} {'compile':>7}"
    ]
    for r in results:
        rate = r.bytes / r.ours
        compiled = "" if r.compiled is None else f"{r.compiled / r.ours:6.2f}x"
        shape = "x".join(map(str, r.shape))
        lines.append(
            f"{r.layer:12} {shape:22} {r.direction:8} {r.ours * 1e3:8.3f} "
            f"{rate / 1e9:6.0f} {rate / bandwidth:6.0%} {r.eager / r.ours:6.2f}x "
            f"{compiled:>7}"
        )
    return "\n".join(lines)


def total(results, batch: int) -> str:
    """All norms of one step, each as often as the network has it."""

    def seconds(of: str) -> float:
        return sum(r.count * (getattr(r, of) or math.nan) for r in results)

    ours, eager, compiled = seconds("ours"), seconds("eager"), seconds("compiled")
    versus = "" if math.isnan(compiled) else f", torch.compile {compiled * 1e3:.2f}"
    return (
        f"all norms of ResNet-50 at batch {batch}: {ours * 1e3:.2f} ms, floor "
        f"{seconds('floor') * 1e3:.2f} ({seconds('floor') / ours:.0%}), torch eager "
        f"{eager * 1e3:.2f}{versus}"
    )


def write(report: dict, folder: Path) -> Path:
    """Write the report under the date and the name of the hardware."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = report["machine"]
    hardware = re.sub(r"[^a-z0-9]+", "-", str(machine["device"]).lower()).strip("-")
    path = folder / f"{machine['date']}-{hardware}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=True) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
