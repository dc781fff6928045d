"""Results of a comparison of two models: differences, layers, the parting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Comparison", "LayerAgreement", "Pair", "Parting"]

# Labels of a region that are listed; the middle of a longer one is left out.
_MAX_LISTED = 12


@dataclass(frozen=True)
class Comparison:
    """Both models on one input.

    Attributes:
        inputs: Which input, in words.
        difference: The largest difference of the outputs, relative to the largest value
            of the first model; inf where structure, shapes or integers differ.
        problem: Why there is no difference to give; empty if both ran.
    """

    inputs: str
    difference: float
    problem: str = ""


@dataclass(frozen=True)
class LayerAgreement:
    """A value of the first model, and the value of the second that is the same.

    Attributes:
        name: Its name in the first model.
        kind: The operation that computed it.
        found_at: The name in the second model; empty if it has no such value.
        difference: Their difference; None if `found_at` is empty.
    """

    name: str
    kind: str
    found_at: str
    difference: float | None


@dataclass(frozen=True)
class Pair:
    """A value that both models name alike.

    Attributes:
        name: The name that they share, or that of the first model's value.
        label_a: The operation that computed it in the first model.
        label_b: The same in the second.
        difference: The largest one, relative to the largest value of the first; inf
            where the shapes differ.
        relation: How the second depends on the first, if that is known.
    """

    name: str
    label_a: str
    label_b: str
    difference: float
    relation: str = ""


@dataclass(frozen=True)
class Parting:
    """First place where two models part.

    Attributes:
        place: The first value of the first model that the second lacks where it should
            have it: by a name that both know, else the first of `region_a`.
        pair: The two values at `place`; None without a name that both know.
        last: The last values that agree before it, by their labels in each model;
            empty if they are the inputs.
        region_a: The operations of the first model between values that agree and
            outputs that do not, in order.
        region_b: The same of the second model.
        note: What the second model computes in that place instead, if that is known.
    """

    place: str
    pair: Pair | None
    last: tuple[tuple[str, str], ...]
    region_a: tuple[str, ...]
    region_b: tuple[str, ...]
    note: str = ""

    def to_text(self) -> str:
        """Return a few lines of text."""
        lines = [f"they part at {self.place}"]
        if self.pair is not None:
            relation = f"; {self.pair.relation}" if self.pair.relation else ""
            lines.append(
                f"  a {self.pair.label_a}, b {self.pair.label_b}: differ by "
                f"{self.pair.difference:.1e}{relation}"
            )
        if self.note:
            lines.append(f"  {self.note}")
        before = ", ".join(
            a if a == b else f"{a} of a, {b} of b" for a, b in self.last[-3:]
        )
        lines.append(f"  the last that agrees before: {before or 'the inputs'}")
        lines.append(f"  a from there on: {_listed(self.region_a)}")
        lines.append(f"  b from there on: {_listed(self.region_b)}")
        return "\n".join(lines)


def _listed(labels: Sequence[str]) -> str:
    if len(labels) <= _MAX_LISTED:
        return " → ".join(labels) or "nothing"
    half = _MAX_LISTED // 2
    left = len(labels) - 2 * half
    return " → ".join((*labels[:half], f"{left} more", *labels[-half:]))
