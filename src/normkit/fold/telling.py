"""From a plan to the ledger: what happened to one batch norm, and a picture."""

from __future__ import annotations

import math

from normkit.fold.graph import Value
from normkit.fold.ledger import FoldEntry
from normkit.fold.nodes import BatchNorm
from normkit.fold.plan import Norm, Plan

__all__ = ["entry_of", "picture"]

_MOST_READERS = 4


def entry_of(norm: Norm, kind: str, plan: Plan, stored: int) -> FoldEntry:
    """The ledger's entry for `norm`.

    Args:
        norm: A batch norm.
        kind: The name of its class or operation.
        plan: What was done.
        stored: How many numbers the model held for it.
    """
    reason = plan.reasons.get(norm.path, "")
    solution = plan.solutions.get(norm.path)
    if solution is None:
        drawn = picture(norm.nodes[0], reason) if norm.nodes else ""
        return FoldEntry(norm.path, kind, folded=False, reason=reason, picture=drawn)
    created = sum(solution.edits[slot].numel() for slot in solution.created)
    is_whole = solution.remainder is None
    if solution.remainder is not None:
        created += solution.remainder.numel()
        reason = f"a sum per channel stays, the rest is gone; {reason}"
    return FoldEntry(
        name=norm.path,
        kind=kind,
        folded=is_whole,
        where=tuple(slot.name for slot in solution.edits),
        how=solution.in_words() + ("" if is_whole else ", its scale alone"),
        reason="" if is_whole else reason,
        difference=plan.differences[norm.path],
        parameters_saved=stored - created,
        multiplications_saved=sum(
            math.prod(node.outputs[0].shape) for node in norm.nodes
        ),
        picture="" if is_whole else picture(norm.nodes[0], reason),
    )


def picture(norm: BatchNorm, reason: str) -> str:
    """The part of the network around a batch norm that stayed, as a small tree.

    What the reason names is marked with ✗.
    """

    def line(depth: int, label: str) -> str:
        told = reason.replace(f"the output of {label}", "")
        mark = "   ✗" if label in told else ""
        return f"{'   ' * depth}{'└─ ' if depth else ''}{label}{mark}"

    def readers(value: Value, depth: int, last: BatchNorm | None) -> list[str]:
        others = [node for node in dict.fromkeys(value.readers) if node is not last]
        others.sort(key=lambda node: node.label not in reason)
        lines = [line(depth, node.label) for node in others[:_MOST_READERS]]
        if len(others) > _MOST_READERS:
            lines.append(line(depth, f"{len(others) - _MOST_READERS} more"))
        if value.pinned:
            lines.append(line(depth, f"({value.pinned})"))
        return lines

    source, result = norm.inputs[0], norm.outputs[0]
    maker = source.producer
    lines: list[str] = []
    if maker is not None:
        above = maker.inputs[0].producer if maker.inputs else None
        lines += [line(0, above.label if above else "the model's input")]
        lines += [line(1, maker.label)]
    else:
        lines += [line(0, "the model's input")]
    depth = len(lines)
    lines += [line(depth, f"{norm.label}   ← stays")]
    lines += readers(result, depth + 1, None)
    lines += readers(source, depth, norm)
    return "\n".join(lines)
