"""The record as a page of the documentation."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

from benchmarks.convert.compare import TOLERANCE, ZERO

__all__ = ["page"]

Record = dict[str, Any]

_MEASURES = ("eval", "train", "gradients", "state")
_NOTHING_TO_FUSE = "no activation and no plain sum"
_REASONS = {
    _NOTHING_TO_FUSE: "nothing follows that could be fused",
    "returned": "nothing follows that could be fused",
    "readers": "several read the output",
    "is fused into the other batch norm": "the other operand of a sum is fused with it",
    "changed in place": "what it needs is changed in place",
    "times": "the layer runs several times",
    "not called": "the layer does not run",
    "hooks": "hooks",
}


def page(records: Iterable[Record]) -> str:
    """Markdown."""
    every = list(records)
    ran = [r for r in every if "failed" not in r]
    failed = [r for r in every if "failed" in r]
    norms, swapped = (sum(r[key] for r in ran) for key in ("norms", "swapped"))
    apart = [r for r in ran if max(r[k] for k in _MEASURES) > TOLERANCE]
    casts = [r for r in apart if r.get("in_float64", 1.0) <= TOLERANCE]
    rest = [r for r in apart if r not in casts]
    equal = [r for r in ran if r not in apart]
    lines = [
        "<!-- Written by `python -m benchmarks.convert page`; do not edit. -->",
        "# Converting real architectures in one line",
        "",
        *_wrapped(
            '`normkit.convert(model, to="normkit", example_inputs=x)` on models of '
            "timm, torchvision and transformers with random weights, in float64, each "
            "compared with itself before: outputs in eval mode, outputs and gradients "
            "of a training step under random cotangents, and the state after it."
        ),
        "",
        *_wrapped(
            f"{len(ran)} of {len(every)} models ran. Of their {norms:,} norms "
            f"{swapped:,} were exchanged, by layers that compute the same. Everything "
            f"compared is equal to {TOLERANCE:.0e} of the largest value in "
            f"{len(equal)} models (the largest distance is {_largest(equal):.0e}). In "
            f"{len(casts)} a norm asks for float32 in its forward, where the original "
            f"rounds and ours does not: they differ by up to {_largest(casts):.0e}, "
            f"and by {_widened(casts):.0e} where both get float64 for every float32 "
            f"that a forward asks for. {_of_the_rest(rest)}"
        ),
        "",
        *_wrapped(
            f"Gradients below {ZERO:.0e} of the largest in both models are left out: "
            "that of a bias before a batch norm is 0, and what is computed is "
            f"rounding, of another size each time. {_zeros(ran)}{_earlier(ran)}"
        ),
        "",
        "## What was fused",
        "",
        *_wrapped(
            "A batch norm computes together with the activation that alone reads it, "
            "and the sum before that. The column *an activation alone* leaves out "
            "those that nothing follows which could be fused, and those whose output "
            "several read."
        ),
        "",
        *_fused(ran),
        "",
        "What kept the others:",
        "",
        *_left(ran),
        "",
        "## What was not exchanged",
        "",
        *_untouched(ran),
        "",
        "## Each model",
        "",
        "| model | norms | exchanged | fused | of batch norms | distance |",
        "| --- | --: | --: | --: | --: | --: |",
        *(_row(r) for r in ran),
    ]
    if failed:
        lines += ["", "## Not measured", "", "| model | why |", "| --- | --- |"]
        lines += [
            f"| {r['name']} | {' '.join(r['failed'].replace('|', '/').split())[:120]} |"
            for r in failed
        ]
    return "\n".join([*lines, ""])


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 80, break_long_words=False, break_on_hyphens=False)


def _largest(records: list[Record]) -> float:
    return max((r[k] for r in records for k in _MEASURES), default=0.0)


def _widened(records: list[Record]) -> float:
    return max((r["in_float64"] for r in records), default=0.0)


def _of_the_rest(rest: list[Record]) -> str:
    if not rest:
        return "None differs for another reason."
    return f"Differ by more: {'; '.join(map(_beside_rounding, rest))}."


def _beside_rounding(record: Record) -> str:
    told = f"{record['name']} by {_largest([record]):.0e}"
    if "times_rounding" not in record:
        return f"{told}, not settled"
    return (
        f"{told}, {record['times_rounding']:.1f} times what the last digit of its "
        "inputs and parameters moves it by"
    )


def _zeros(records: list[Record]) -> str:
    pairs = [r["zeros"] for r in records if "zeros" in r]
    if not pairs:
        return ""
    theirs, ours = (max(pair[k] for pair in pairs) for k in (0, 1))
    nearer = sum(pair[1] <= pair[0] for pair in pairs)
    return (
        f"The largest that torch gives is {theirs:.0e}, ours {ours:.0e}; ours is the "
        f"smaller in {nearer} of {len(pairs)} models."
    )


def _library(record: Record) -> str:
    return record["name"].partition("/")[0]


def _fused(records: list[Record]) -> list[str]:
    lines = [
        "| | batch norms | an activation alone | fused | with a sum |",
        "| --- | --: | --: | --: | --: |",
    ]
    for library in dict.fromkeys(map(_library, records)):
        mine = [r for r in records if _library(r) == library]
        took, left = _summed(mine, "fused"), _summed(mine, "unfused")
        every = took.total() + left.total()
        apart = ("returned", "readers", _NOTHING_TO_FUSE)
        alone = every - sum(left[reason] for reason in apart)
        sums = sum(n for kind, n in took.items() if kind.startswith("add+"))
        cells = (library, every, alone, took.total(), sums)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _summed(records: list[Record], key: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for record in records:
        found.update(record[key])
    return found


def _left(records: list[Record]) -> list[str]:
    found: Counter[str] = Counter()
    for reason, count in _summed(records, "unfused").items():
        found[_REASONS.get(reason, reason)] += count
    return [f"- {count} × {reason}" for reason, count in found.most_common()]


def _earlier(records: list[Record]) -> str:
    count = sum("earlier" in r for r in records)
    if not count:
        return ""
    return (
        f" {count} of the models are of an earlier measurement, which counted "
        "gradients below a millionth of the largest relative to that."
    )


def _untouched(records: list[Record]) -> list[str]:
    lines: list[str] = []
    for record in records:
        if record["untouched"]:
            (reason,) = set(record["untouched"].values())
            kinds = ", ".join(record["not_known"]) or "norms"
            lines.append(
                f"- {record['name']}: {len(record['untouched'])} {kinds}: {reason} "
                f"(`{next(iter(record['untouched']))}` and others like it)"
            )
    return lines or ["Nothing."]


def _row(record: Record) -> str:
    took = sum(record["fused"].values())
    every = took + sum(record["unfused"].values())
    distance = record.get("in_float64", max(record[k] for k in _MEASURES))
    cells = (
        *(record["name"], record["norms"], record["swapped"]),
        *(took if every else "", every or "", f"{distance:.0e}"),
    )
    return "| " + " | ".join(map(str, cells)) + " |"
