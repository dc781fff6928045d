"""The doctor on healthy programs: what it says where nothing is wrong."""

from __future__ import annotations

import collections
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from doctor.zoo import ON_FILES, PROGRAMS, run

__all__ = ["lines", "measured"]

SEEDS = (0, 1)


def measured() -> dict[str, Any]:
    """Train and examine every healthy program; the alarms by check and by run."""
    names = [*PROGRAMS, *(ON_FILES if "NORMKIT_DATA" in os.environ else ())]
    errors: dict[str, list[str]] = collections.defaultdict(list)
    warnings: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        for seed in SEEDS:
            diagnosed, watched, loss = run(name, seed)
            for found in {(f.id, f.severity) for f in diagnosed + watched}:
                if found[1] in ("error", "warning"):
                    kept = errors if found[1] == "error" else warnings
                    kept[found[0]].append(f"{name}/{seed}")
            print(name, seed, f"{loss:.3g}", dict(errors), dict(warnings), flush=True)
    return {
        "programs": len(names),
        "on_files": len(names) - len(PROGRAMS),
        "runs": len(names) * len(SEEDS),
        "errors": dict(errors),
        "warnings": dict(warnings),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return the outcome in Markdown."""
    runs, warnings = found["runs"], found["warnings"]
    told = [
        f"| {id_} | {len(names)} of {runs} ({len(names) / runs:.1%}) "
        f"| {', '.join(name.replace('_', ' ') for name in names)} |"
        for id_, names in sorted(warnings.items())
    ]
    errors = sorted(f"{i}: {', '.join(names)}" for i, names in found["errors"].items())
    return [
        "## Healthy programs",
        "",
        f"{found['programs']} programs, {len(SEEDS)} seeds each, diagnosed and watched "
        f"({runs} runs; {found['on_files']} programs on MNIST and CIFAR-10, the rest "
        "on digits).",
        f"Errors: {'; '.join(errors) or 'none'}. "
        f"Warnings: {'by check, as shares of the runs' if told else 'none'}.",
        *(
            ["", "| check | runs | which |", "| --- | --- | --- |", *told]
            if told
            else ()
        ),
    ]
