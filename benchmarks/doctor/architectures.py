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
from textwrap import wrap
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from doctor.architectures import STARTS, alarms, cases

__all__ = ["lines", "measured"]

LIBRARIES = ("timm", "torchvision", "transformers")


def measured(
    wanted: list[str], before: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Examine all architectures, or those whose name holds one of `wanted`.

    Args:
        wanted: Parts of names.
        before: An earlier record, whose other runs are kept where `wanted` is given.

    Yields:
        The record of those examined so far, after each one: a run that is cut has a
        record of its part. Those wanted come in their order; of all, the small ones
        first, then the libraries take turns.
    """
    runs: dict[str, list[str]] = dict(before["runs"]) if wanted and before else {}
    every = list(cases())
    groups = [[n for n in every if n.startswith(f"{lib}/")] for lib in LIBRARIES]
    turns = [n for turn in zip_longest(*groups) for n in turn if n is not None]
    turns.sort(key=lambda name: not name.startswith(("timm/test_", "transformers/")))
    names = dict.fromkeys(n for part in wanted for n in turns if part in n)
    for name in names if wanted else turns:
        for start in STARTS:
            run = f"{name} ({start})"
            try:
                told = alarms(name, start)
            except Exception as error:  # counted and printed, not hidden
                runs[run] = [f"not run: {type(error).__name__}: {str(error)[:120]}"]
                print(run, *runs[run], flush=True)
                continue
            runs[run] = sorted({f"{f.id} {f.severity}" for f in told})
            print(run, runs[run] or "", flush=True)
            for finding in told:
                print("   ", finding.to_text().replace("\n", "\n    "), flush=True)
        yield {
            "of": len(every),
            "runs": dict(sorted(runs.items())),
            "versions": {lib: version(lib) for lib in LIBRARIES if find_spec(lib)},
        }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the outcome in Markdown."""
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items())
    runs: dict[str, list[str]] = found["runs"]
    failed = {run: ids for run, ids in runs.items() if ids and "not run" in ids[0]}
    told = {run: ids for run, ids in runs.items() if ids and run not in failed}
    names = sorted({run.rpartition(" ")[0] for run in runs if run not in failed})
    rows = [f"| {run} | {', '.join(ids)} |" for run, ids in told.items()]
    return [
        "## Fresh architectures",
        "",
        f"{len(names)} of {found['of']} architectures of {versions}, with",
        "random weights as their library starts them and after `normkit.initialize`,",
        f"diagnosed and watched for 20 steps: {len(runs) - len(failed)} runs, "
        f"{len(told)} with an alarm.",
        *wrap(f"{', '.join(names)}.", 100, break_on_hyphens=False),
        *[f"Not run: {run}, {ids[0]}." for run, ids in failed.items()],
        *(["", "| run | alarms |", "| --- | --- |", *rows] if told else []),
    ]
