"""The doctor on healthy programs: what it says where nothing is wrong.

What D37 and D39 measure there, below their thresholds, is recorded too.
"""

from __future__ import annotations

import collections
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from doctor.zoo import ON_FILES, PROGRAMS, run
from normkit.doctor.checks.spikes import DEVIATIONS, GAINED, RATIO
from normkit.doctor.checks.transformers import GAIN_SHARE

__all__ = ["lines", "measured"]

SEEDS = (0, 1)
LEAP = ("ratio", "deviations", "gained")


def measured() -> Iterator[dict[str, Any]]:
    """Train and examine every healthy program.

    Yields:
        The record of those run so far, after each one: the alarms by check and by run,
        the largest share of one gain (D37), and the leap of the loss that is nearest to
        a spike (D39). All programs are run with the first seed, then with the next.
    """
    names = [*PROGRAMS, *(ON_FILES if "NORMKIT_DATA" in os.environ else ())]
    errors: dict[str, list[str]] = collections.defaultdict(list)
    warnings: dict[str, list[str]] = collections.defaultdict(list)
    done: dict[str, list[int]] = {name: [] for name in names}
    gains: dict[str, float] = {}
    leaps: dict[str, list[float]] = {}
    for seed in SEEDS:
        for name in names:
            diagnosed, watched, loss = run(name, seed)
            found = [*diagnosed, *watched]
            for id_, severity in {(f.id, f.severity) for f in found}:
                if severity in ("error", "warning"):
                    kept = errors if severity == "error" else warnings
                    kept[id_].append(f"{name}/{seed}")
            shares = [
                f.value for f in found if f.id == "D37" and not math.isnan(f.value)
            ]
            if shares:
                gains[f"{name}/{seed}"] = max(shares)
            for f in watched:
                if f.id == "D39" and "ratio" in f.details:
                    # JSON has no infinity: there was no spread, or no gain.
                    leap = [min(f.details[key], 1e9) for key in LEAP]
                    leaps[f"{name}/{seed}"] = leap
            done[name].append(seed)
            print(name, seed, f"{loss:.3g}", dict(errors), dict(warnings), flush=True)
            yield {
                "programs": sum(map(bool, done.values())),
                "on_files": sum(bool(done[n]) for n in names if n in ON_FILES),
                "runs": sum(map(len, done.values())),
                "errors": dict(errors),
                "warnings": dict(warnings),
                "gains": gains,
                "leaps": leaps,
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
        f"{found['programs']} programs, up to {len(SEEDS)} seeds each, diagnosed and "
        f"watched ({runs} runs; {found['on_files']} programs on MNIST and CIFAR-10, "
        "the rest on digits).",
        f"Errors: {'; '.join(errors) or 'none'}. "
        f"Warnings: {'by check, as shares of the runs' if told else 'none'}.",
        *(
            ["", "| check | runs | which |", "| --- | --- | --- |", *told]
            if told
            else ()
        ),
        "",
        *_reached(found["gains"], found["leaps"]),
    ]


def _reached(gains: dict[str, float], leaps: dict[str, list[float]]) -> list[str]:
    """Return what D37 and D39 measured, beside their thresholds."""
    gain = max(gains, key=lambda name: gains[name])
    limits = (RATIO, DEVIATIONS, GAINED)
    near = {
        name: min(v / limit for v, limit in zip(leap, limits, strict=True))
        for name, leap in leaps.items()
    }
    leap = max(near, key=lambda name: near[name])
    ratio, deviations, gained = leaps[leap]
    return [
        f"The largest share of one gain (D37, {len(gains)} runs with such a norm) is "
        f"{gains[gain]:.3f}, of {gain.replace('_', ' ')}; a warning begins at "
        f"{GAIN_SHARE}.",
        f"The leap of the loss nearest to a spike (D39, {len(leaps)} runs) is that of "
        f"{leap.replace('_', ' ')}: {ratio:.2f} times the median before it, "
        f"{deviations:.3g} deviations, {gained:.2f} of what training had gained; a "
        f"spike is above {RATIO:g}, {DEVIATIONS:g} and {GAINED:g} of all three.",
    ]
