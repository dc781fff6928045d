"""The doctor on healthy programs: what it says where nothing is wrong.

What D37 and D39 measure there, below their thresholds, is recorded too.
"""

from __future__ import annotations

import collections
import itertools
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
NO_LIMIT = 1e9


def measured(
    wanted: list[str], before: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Train and examine healthy programs, or the runs whose name holds one of `wanted`.

    Args:
        wanted: Parts of names such as "gru/0".
        before: An earlier record, whose other runs are kept where `wanted` is given.

    Yields:
        The record of the runs so far, after each one: the alarms, the largest share of
        one gain (D37), and the leap of the loss that is nearest to a spike (D39). All
        programs are run with the first seed, then with the next.
    """
    names = [*PROGRAMS, *(ON_FILES if "NORMKIT_DATA" in os.environ else ())]
    kept = before if wanted and before else {}
    runs: dict[str, list[str]] = dict(kept.get("runs", {}))
    gains: dict[str, float] = dict(kept.get("gains", {}))
    leaps: dict[str, list[float]] = dict(kept.get("leaps", {}))
    for seed, name in itertools.product(SEEDS, names):
        key = f"{name}/{seed}"
        if wanted and not any(part in key for part in wanted):
            continue
        diagnosed, watched, loss = run(name, seed)
        found = [*diagnosed, *watched]
        runs[key] = sorted({f"{f.id} {f.severity}" for f in found if f.is_alarm})
        shares = [f.value for f in found if f.id == "D37" and not math.isnan(f.value)]
        if shares:
            gains[key] = max(shares)
        for f in watched:
            if f.id == "D39" and "ratio" in f.details:
                # JSON has no infinity: there was no spread, or no gain.
                leaps[key] = [min(f.details[part], NO_LIMIT) for part in LEAP]
        print(key, f"{loss:.3g}", runs[key], gains.get(key), leaps.get(key), flush=True)
        yield {"runs": runs, "gains": gains, "leaps": leaps}


def lines(found: dict[str, Any]) -> list[str]:
    """Return the outcome in Markdown."""
    runs: dict[str, list[str]] = found["runs"]
    names = {key.partition("/")[0] for key in runs}
    by_check: dict[str, list[str]] = collections.defaultdict(list)
    for key, ids in runs.items():
        for id_ in ids:
            by_check[id_].append(key.replace("_", " "))
    told = [
        f"| {id_} | {len(keys)} of {len(runs)} ({len(keys) / len(runs):.1%}) "
        f"| {', '.join(keys)} |"
        for id_, keys in sorted(by_check.items())
    ]
    return [
        "## Healthy programs",
        "",
        f"{len(names)} programs, {len(SEEDS)} seeds each, diagnosed and watched "
        f"({len(runs)} runs; {len(names & set(ON_FILES))} programs on MNIST and "
        "CIFAR-10, the rest on digits).",
        f"Alarms: {'by check, as shares of the runs' if told else 'none'}.",
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
    if not (gains and leaps):
        return []
    gain = max(gains, key=lambda name: gains[name])
    limits = (RATIO, DEVIATIONS, GAINED)
    near = {
        name: min(v / limit for v, limit in zip(leap, limits, strict=True))
        for name, leap in leaps.items()
    }
    leap = max(near, key=lambda name: near[name])
    ratio, deviations, gained = leaps[leap]
    above = "and training had gained nothing"
    if gained < NO_LIMIT:
        above = f"{gained:.2f} of what training had gained"
    return [
        f"The largest share of one gain (D37, {len(gains)} runs with such a norm) is "
        f"{gains[gain]:.3f}, of {gain.replace('_', ' ')}; a warning begins at "
        f"{GAIN_SHARE}.",
        f"The leap of the loss nearest to a spike (D39, {len(leaps)} runs; the others "
        "are older than this record of leaps and gains) is that of "
        f"{leap.replace('_', ' ')}: {ratio:.2f} times the median before it, "
        f"{deviations:.3g} deviations, {above}; a spike is above {RATIO:g}, "
        f"{DEVIATIONS:g} and {GAINED:g} of all three.",
    ]
