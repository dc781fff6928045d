"""False alarms on fresh networks of timm, torchvision and transformers.

Each of tests/doctor/architectures.py is built with random weights, as its library
starts it and after `normkit.initialize`, diagnosed, and watched for 20 steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from doctor.architectures import STARTS, alarms, cases

__all__ = ["lines", "measured"]

LIBRARIES = ("timm", "torchvision", "transformers")


def measured(wanted: list[str]) -> Iterator[dict[str, Any]]:
    """Examine all architectures, or those whose name holds one of `wanted`.

    Yields:
        The record of those examined so far, after each one: a run that is cut has a
        record of its part. The small ones come first, then the libraries take turns.
    """
    found: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    names = [n for n in cases() if not wanted or any(part in n for part in wanted)]
    groups = [[n for n in names if n.startswith(f"{lib}/")] for lib in LIBRARIES]
    turns = [n for turn in zip_longest(*groups) for n in turn if n is not None]
    turns.sort(key=lambda name: not name.startswith(("timm/test_", "transformers/")))
    for count, name in enumerate(turns, 1):
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
            for finding in told:
                print("   ", finding.to_text().replace("\n", "\n    "), flush=True)
        yield {
            "architectures": count,
            "of": len(turns),
            "runs": count * len(STARTS) - len(failed),
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
        f"{found['architectures']} of {found['of']} architectures of {versions}, with",
        "random weights as",
        "their library starts them and after `normkit.initialize`, diagnosed and",
        f"watched for 20 steps: {found['runs']} runs, {len(told)} with an alarm.",
        *(["", "Not run: " + "; ".join(failed) + "."] if failed else []),
        *(["", "| run | alarms |", "| --- | --- |", *told] if told else []),
    ]
