"""False alarms on fresh networks of timm, torchvision and transformers.

Each of tests/doctor/architectures.py is built with random weights, as its library
starts it and after `normkit.initialize`, diagnosed, and watched for 20 steps.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from doctor.architectures import STARTS, alarms, cases

__all__ = ["lines", "measured"]

LIBRARIES = ("timm", "torchvision", "transformers")


def measured(wanted: list[str]) -> dict[str, Any]:
    """Examine all architectures, or those whose name holds one of `wanted`."""
    found: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    names = [n for n in cases() if not wanted or any(part in n for part in wanted)]
    for name in names:
        for start in STARTS:
            run = f"{name} ({start})"
            try:
                told = alarms(name, start)
            except Exception as error:  # counted and printed, not hidden
                failed[run] = f"{type(error).__name__}: {str(error)[:120]}"
                print(run, "FAILED", failed[run], flush=True)
                continue
            if told:
                found[run] = sorted({f"{f.id} {f.severity}" for f in told})
            print(run, found.get(run, ""), flush=True)
            for finding in told if wanted else ():
                print("   ", finding.to_text().replace("\n", "\n    "))
    return {
        "architectures": len(names),
        "runs": len(names) * len(STARTS),
        "alarms": found,
        "failed": failed,
        "versions": {lib: version(lib) for lib in LIBRARIES if find_spec(lib)},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the outcome in Markdown."""
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    told = [f"| {run} | {', '.join(ids)} |" for run, ids in found["alarms"].items()]
    failed = [f"{run}: {why}" for run, why in found["failed"].items()]
    return [
        "## Fresh architectures",
        "",
        f"{found['architectures']} architectures of {versions}, with random weights as",
        "their library starts them and after `normkit.initialize`, diagnosed and",
        f"watched for 20 steps: {found['runs']} runs, {len(told)} with an alarm.",
        *(["", "Not run: " + "; ".join(failed) + "."] if failed else []),
        *(["", "| run | alarms |", "| --- | --- |", *told] if told else []),
    ]
