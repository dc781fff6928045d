"""The ledger of a fold: where each batch norm went, or why it stayed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

__all__ = ["FoldEntry", "FoldLedger"]


@dataclass(frozen=True)
class FoldEntry:
    """One batch norm of the model.

    Attributes:
        name: Its path in the model.
        kind: Its class, e.g. `BatchNorm2d`.
        folded: Whether it is gone altogether.
        where: The parameters that took it in, e.g. `("conv1.weight", "conv1.bias")`.
        how: In words, e.g. "into 'conv1' before it"; empty if it stayed whole.
        reason: Why it stayed, or why a part of it did, in words; empty if it is gone.
        difference: The largest difference measured in float64 where the fold is
            complete, relative to the largest value there (1 if that is smaller); None
            if it stayed whole.
        parameters_saved: How many stored numbers fewer the model holds for it.
        multiplications_saved: How many fewer it makes on the example inputs.
        picture: The part of the network around it, drawn in text; empty if it is gone.
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

    @property
    def reduced(self) -> bool:
        """Whether it stayed as no more than a sum per channel."""
        return not self.folded and bool(self.how)


@dataclass(frozen=True)
class FoldLedger:
    """What a fold did, batch norm by batch norm.

    Attributes:
        entries: One per batch norm, in the order of the model.
        max_difference: The largest difference between the outputs of the original
            and of the folded model, both in float64 on two inputs, relative to the
            largest output (1 if that is smaller).
        proof: How that was measured, in words.

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

    @property
    def folded(self) -> tuple[FoldEntry, ...]:
        """The batch norms that are gone."""
        return tuple(entry for entry in self.entries if entry.folded)

    @property
    def left(self) -> tuple[FoldEntry, ...]:
        """The batch norms that stayed, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.folded)

    @property
    def parameters_saved(self) -> int:
        """How many stored numbers fewer the folded model holds."""
        return sum(entry.parameters_saved for entry in self.entries)

    @property
    def multiplications_saved(self) -> int:
        """How many multiplications fewer it makes on the example inputs."""
        return sum(entry.multiplications_saved for entry in self.entries)

    def to_text(self, *, pictures: bool = False) -> str:
        """The ledger as lines for a person.

        Args:
            pictures: Whether to draw what is around each batch norm that stayed.
        """
        total = len(self.entries)
        if not total:
            return "no batch norm in this model"
        head = (
            f"{len(self.folded)} of {total} batch norms folded, "
            f"{self.parameters_saved:,} stored numbers and "
            f"{self.multiplications_saved:,} multiplications saved"
        )
        lines = [head]
        if self.proof:
            lines.append(
                f"largest output difference {self.max_difference:.1e} ({self.proof})"
            )
        width = max(len(entry.name) for entry in self.entries)
        for entry in self.entries:
            if entry.folded:
                detail = f"folded  {entry.how}"
                if entry.difference is not None:
                    detail += f"  ({entry.difference:.0e})"
            else:
                detail = f"left    {entry.reason}"
                if entry.reduced:
                    detail = f"reduced {entry.how}; {entry.reason}"
            lines.append(f"  {entry.name:<{width}}  {detail}")
            if pictures and entry.picture:
                lines += [f"      {drawn}" for drawn in entry.picture.splitlines()]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The ledger as JSON text, every field included."""
        return json.dumps(
            {
                "folded": len(self.folded),
                "left": len(self.left),
                "max_difference": self.max_difference,
                "proof": self.proof,
                "parameters_saved": self.parameters_saved,
                "multiplications_saved": self.multiplications_saved,
                "entries": [asdict(entry) for entry in self.entries],
            },
            indent=2,
        )

    def __str__(self) -> str:
        return self.to_text()
