"""The ledger of a fold: where each norm went, or why it stayed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

from normkit.fold.ir.graph import Node, Slot, Value
from normkit.fold.ir.nodes import BatchNorm
from normkit.fold.search.equalize import Equalized
from normkit.fold.search.plan import Norm, Plan
from normkit.results import Result

__all__ = ["FoldEntry", "FoldLedger", "entry_of"]

_MAX_READERS = 4
_MAX_NAMED = 6


@dataclass(frozen=True)
class FoldEntry:
    """One norm of the model.

    Attributes:
        name: Its path in the model.
        kind: Its class, e.g. `BatchNorm2d`.
        folded: Whether it was removed altogether; of a norm that measures its input,
            whether weight and bias were.
        where: The parameters that absorbed it, e.g. `("conv1.weight", "conv1.bias")`.
        how: The same in words, e.g. "into 'conv1' before it"; empty if it stayed.
        reason: Why it stayed, or why a part of it did; empty if it was removed.
        difference: The largest difference measured in float64 where the fold is
            complete, relative to the largest value there (1 if that is smaller); None
            if it stayed.
        parameters_saved: Number of stored numbers saved.
        multiplications_saved: Number of multiplications saved on the example inputs.
        picture: The part of the network around it, drawn in text; empty if it was
            removed.
        measures: Whether it measures its input (layer, group, instance, RMS norm) and
            still does so without its weight and bias.
        as_rms: Of a layer norm that was to become an RMS norm: whether it did, or why
            not; empty if it was not asked for.
    """

    name: str
    kind: str
    folded: bool
    where: tuple[str, ...] = ()
    how: str = ""
    reason: str = ""
    difference: float | None = None
    parameters_saved: int = 0
    multiplications_saved: int = 0
    picture: str = ""
    measures: bool = False
    as_rms: str = ""

    @property
    def reduced(self) -> bool:
        """True if only a sum per channel is left of it, or of its weight and bias."""
        return not self.folded and bool(self.how)

    @property
    def state(self) -> str:
        """One of "folded", "reduced" and "left"."""
        return "folded" if self.folded else "reduced" if self.reduced else "left"

    @property
    def detail(self) -> str:
        """Place that took the norm, reason why it stayed, or both."""
        return "; ".join(part for part in (self.how, self.reason, self.as_rms) if part)


@dataclass(frozen=True, repr=False)
class FoldLedger(Result):
    """Record of a fold, norm by norm.

    Attributes:
        entries: One per norm, in the order of the model.
        max_difference: The largest difference between the outputs of the original
            and of the folded model, both in float64 on two inputs, relative to the
            largest output (1 if that is smaller).
        proof: How that was measured.
        not_covered: What the measurement cannot tell.
        notice: What stands in the way of all folds, and what to do; printed first.
        equalized: Of `equalize=True`, one per linear map.

    Example:
        >>> gone = FoldEntry("bn1", "BatchNorm2d", True, how="into 'conv1' before it")
        >>> kept = FoldEntry("bn2", "BatchNorm2d", False, reason="it did not run")
        >>> ledger = FoldLedger((gone, kept), max_difference=0.0, proof="")
        >>> len(ledger.folded), [entry.name for entry in ledger.left]
        (1, ['bn2'])
    """

    entries: tuple[FoldEntry, ...]
    max_difference: float
    proof: str = ""
    not_covered: str = ""
    notice: str = ""
    equalized: tuple[Equalized, ...] = ()

    @property
    def folded(self) -> tuple[FoldEntry, ...]:
        """The norms that were removed, or lost weight and bias."""
        return tuple(entry for entry in self.entries if entry.folded)

    @property
    def left(self) -> tuple[FoldEntry, ...]:
        """The norms that stayed, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.folded)

    @property
    def parameters_saved(self) -> int:
        """Number of stored numbers that the folded model saves."""
        return sum(entry.parameters_saved for entry in self.entries)

    @property
    def multiplications_saved(self) -> int:
        """Number of multiplications saved on the example inputs."""
        return sum(entry.multiplications_saved for entry in self.entries)

    def to_text(self, *, pictures: bool = False) -> str:
        """Return the ledger as lines of text.

        Args:
            pictures: Draw the network around each norm that stayed.
        """
        total = len(self.entries)
        if not total:
            lines = ["no batch norm in this model", *self._equalized_lines()]
            return "\n".join([self.notice, *lines] if self.notice else lines)
        noun = "norms" if any(e.measures for e in self.entries) else "batch norms"
        head = (
            f"{len(self.folded)} of {total} {noun} folded, "
            f"{self.parameters_saved:,} stored numbers and "
            f"{self.multiplications_saved:,} multiplications saved"
        )
        lines = [self.notice, head] if self.notice else [head]
        if self.proof:
            lines.append(
                f"largest output difference {self.max_difference:.1e} ({self.proof})"
            )
        if self.not_covered and self.folded:
            lines.append(f"not covered: {self.not_covered}")
        width = max(len(entry.name) for entry in self.entries)
        for entry in self.entries:
            line = f"  {entry.name:<{width}}  {entry.state:<7} {entry.detail}"
            if entry.folded and entry.difference is not None:
                line += f"  ({entry.difference:.0e})"
            lines.append(line)
            if pictures and entry.picture:
                lines += [f"      {drawn}" for drawn in entry.picture.splitlines()]
        return "\n".join(lines + self._equalized_lines())

    def _equalized_lines(self) -> list[str]:
        if not self.equalized:
            return []
        done = [each for each in self.equalized if not each.reason]
        before = max((each.before for each in self.equalized), default=0.0)
        after = max((each.after for each in self.equalized), default=0.0)
        lines = [
            f"{len(done)} of {len(self.equalized)} linear maps equalized; one scale "
            f"per weight costs {before:.1f} bits at most before, {after:.1f} after"
        ]
        width = max(len(each.layer) for each in self.equalized)
        for each in self.equalized:
            detail = each.reason or f"with {', '.join(each.readers)}"
            bits = f"{each.before:5.1f} → {each.after:4.1f} bits"
            if each.costly:
                named = ", ".join(map(str, each.costly[:_MAX_NAMED]))
                more = len(each.costly) - _MAX_NAMED
                named += f" and {more} more" if more > 0 else ""
                detail += f"; channels {named} lose 4 bits or more: one scale per "
                detail += "channel keeps them"
            lines.append(f"  {each.layer:<{width}}  {bits}  {detail}")
        return lines

    def to_json(self) -> str:
        """Return the ledger as JSON text, every field included."""
        return json.dumps(
            {
                "folded": len(self.folded),
                "left": len(self.left),
                "max_difference": self.max_difference,
                "proof": self.proof,
                "not_covered": self.not_covered,
                "notice": self.notice,
                "parameters_saved": self.parameters_saved,
                "multiplications_saved": self.multiplications_saved,
                "entries": [asdict(entry) for entry in self.entries],
                "equalized": [asdict(each) for each in self.equalized],
            },
            indent=2,
        )

    def to_rows(self) -> list[dict[str, object]]:
        """Return one mapping per norm: layer, state, detail, difference."""
        return [
            {
                "layer": entry.name,
                "kind": entry.kind,
                "state": entry.state,
                "detail": entry.detail,
                "difference": entry.difference,
            }
            for entry in self.entries
        ]


def entry_of(
    norm: Norm,
    kind: str,
    plan: Plan,
    stored: int,
    untied: Mapping[Slot, Slot] = MappingProxyType({}),
    *,
    note: str = "",
) -> FoldEntry:
    """Return the ledger's entry for `norm`.

    Args:
        norm: A norm.
        kind: The name of its class or operation.
        plan: The fold.
        stored: Number of numbers that the model stored for it.
        untied: The slots that no longer share a parameter, and one that each left.
        note: What stays in its place, if that is worth a word.
    """
    reason = plan.reasons.get(norm.path, "")
    solution = plan.solutions.get(norm.path)
    measures = not any(isinstance(node, BatchNorm) for node in norm.nodes)
    measures &= bool(norm.nodes)
    why = plan.as_rms.get(norm.path)
    as_rms = "" if why is None else f"it stays a layer norm: {why}"
    as_rms = "it is an RMS norm now" if why == "" else as_rms
    if solution is None:
        drawn = _picture(norm.nodes[0], reason) if norm.nodes else ""
        return FoldEntry(
            norm.path,
            kind,
            folded=False,
            reason=reason,
            picture=drawn,
            measures=measures,
            as_rms=as_rms,
        )
    created = sum(solution.edits[slot].numel() for slot in solution.created)
    is_whole = solution.remainder is None
    how = solution.describe()
    for slot, other in untied.items():
        created += solution.edits[slot].numel()
        how += f", where {slot.name} gets numbers of its own, not those of {other.name}"
    how += f"; {note}" if note else ""
    if solution.remainder is not None:
        created += solution.remainder.numel()
        left = "its bias" if measures else "a sum per channel"
        what = ", its weight alone" if measures else ", its scale alone"
        how += what
        reason = f"{left} stays, the rest is removed; {reason}"
    return FoldEntry(
        name=norm.path,
        kind=kind,
        folded=is_whole,
        where=tuple(slot.name for slot in solution.edits),
        how=how,
        reason="" if is_whole else reason,
        difference=plan.differences[norm.path],
        parameters_saved=stored - created,
        multiplications_saved=sum(
            math.prod(node.outputs[0].shape) for node in norm.nodes
        ),
        picture="" if is_whole else _picture(norm.nodes[0], reason),
        measures=measures,
        as_rms=as_rms,
    )


def _picture(norm: Node, reason: str) -> str:
    """Draw the network around a norm that stayed, as a small tree.

    Nodes that the reason names are marked with ✗.
    """

    def line(depth: int, label: str) -> str:
        told = reason.replace(f"the output of {label}", "")
        mark = "   ✗" if label in told else ""
        return f"{'   ' * depth}{'└─ ' if depth else ''}{label}{mark}"

    def readers(value: Value, depth: int, last: Node | None) -> list[str]:
        others = [node for node in dict.fromkeys(value.readers) if node is not last]
        others.sort(key=lambda node: node.label not in reason)
        lines = [line(depth, node.label) for node in others[:_MAX_READERS]]
        if len(others) > _MAX_READERS:
            lines.append(line(depth, f"{len(others) - _MAX_READERS} more"))
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
