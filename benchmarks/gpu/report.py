"""The record of a run as text: state of the stages, wrong results, and one table."""

import math
from typing import Any

__all__ = ["is_good", "to_text"]

CONTESTANTS = ("eager", "compile", "copy", "today", "plain")


def is_good(data: dict[str, Any]) -> bool:
    """Return whether every stage ran, no case raised and no check is wrong."""
    stages = data["stages"].values()
    return not _wrong(data) and all(
        entry["status"] in ("done", "cut") and not entry["errors"] for entry in stages
    )


def to_text(data: dict[str, Any]) -> str:
    """Return the text of a record, also of one that was cut."""
    machine = data["stages"].get("machine", {}).get("rows", [])
    lines = [f"{key}: {value}" for row in machine for key, value in row.items()]
    for name, entry in data["stages"].items():
        left = [c for c in entry["planned"] if c not in entry["done"]]
        left = [c for c in left if c not in entry["errors"]]
        lines.append(
            f"{name}: {entry['status']}, {len(entry['rows'])} rows"
            + (f"; left out, no time: {', '.join(left)}" if left else "")
        )
        for case, trace in entry["errors"].items():
            lines += [f"ERROR in {name}, {case}:", trace.rstrip()]
    lines += [f"WRONG {row['check']}: {row['error']}" for row in _wrong(data)]
    measured = [
        row
        for entry in data["stages"].values()
        for row in entry["rows"]
        if "times" in row
    ]
    bandwidth = next((row["copy_bytes_per_second"] for row in machine), math.nan)
    lines += [_head(), *(_line(row, bandwidth) for row in measured)]
    return "\n".join(lines + _totals(measured))


def _wrong(data: dict[str, Any]) -> list[dict[str, Any]]:
    rows = (row for entry in data["stages"].values() for row in entry["rows"])
    # A NaN is wrong, too.
    return [r for r in rows if "check" in r and not r["error"] <= r["limit"]]


def _head() -> str:
    others = "".join(f"{name:>9}" for name in CONTESTANTS)
    numbers = f"{'ms':>9} {'GB/s':>6} {'share':>6}"
    return f"{'what':34} {'shape':20} {'pass':8} {numbers}{others}"


def _line(row: dict[str, Any], bandwidth: float) -> str:
    """Return a row: share of the copy's bandwidth, and the others' time over ours.

    At the end: bytes kept for the backward, or launches, of each contestant.
    """
    times, ours = row["times"], row["times"]["ours"]
    rate = row["bytes"] / ours if row.get("bytes") else math.nan
    others = "".join(
        f"{times[name] / ours:8.2f}x" if name in times else " " * 9
        for name in CONTESTANTS
    )
    extras = dict(row.get("saved_bytes", {}))
    if "launches" in row:
        extras = {name: sum(of.values()) for name, of in row["launches"].items()}
    return (
        f"{row['what']:34} {'x'.join(map(str, row['shape'])):20} {row['pass']:8} "
        f"{ours * 1e3:9.3f} {rate / 1e9:6.0f} {rate / bandwidth:6.0%}{others}"
        + "".join(f"  {name}: {value}" for name, value in extras.items())
    )


def _totals(rows: list[dict[str, Any]]) -> list[str]:
    """Return the time of all norms of a step, each as often as the network has it."""
    lines = []
    counted = [r for r in rows if r.get("count") and "eager" in r["times"]]
    for batch in sorted({r["shape"][0] for r in counted}):
        own = [r for r in counted if r["shape"][0] == batch]
        ours, eager = (
            sum(r["count"] * r["times"][name] for r in own)
            for name in ("ours", "eager")
        )
        lines.append(
            f"norms of a ResNet-50 at batch {batch}, {len(own)} rows: "
            f"{ours * 1e3:.2f} ms, torch eager {eager * 1e3:.2f}"
        )
    return lines
