"""The train/eval gap, split by cause and layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from normkit.doctor.finding import plain
from normkit.results import Result, counted

__all__ = [
    "BATCH",
    "DOMAIN",
    "DROPOUT",
    "PADDING",
    "RANK",
    "STALE",
    "START",
    "UNFROZEN",
    "GapExplanation",
    "GapPart",
]

UNFROZEN, RANK, PADDING = "un-frozen statistics", "one rank's statistics", "padding"
START, STALE, DOMAIN = "start of the average", "stale statistics", "domain shift"
DROPOUT, BATCH = "dropout before batch norm", "statistics of each batch"

# The data needed to measure causes that are not visible in every case.
NEEDS = {
    UNFROZEN: "reference=, a state dict of what the layers were frozen at",
    RANK: "shards=, the loader of each rank",
    PADDING: "a layer called with mask=, or sequences with constant ends",
    DOMAIN: "train_loader=, where the loader gives other data",
}


@dataclass(frozen=True)
class GapPart:
    """The contribution of one cause, or one layer, to the gap.

    Attributes:
        name: The cause in words, or the dotted name of the layer.
        value: Its part, in units of the measure; positive where eval mode loses.
        error: Standard error over the batches.
    """

    name: str
    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, two standard errors to each side."""
        return self.value - 2 * self.error, self.value + 2 * self.error


@dataclass(frozen=True, repr=False)
class GapExplanation(Result):
    """The train/eval gap, and its parts by cause and layer.

    Attributes:
        batch: The measure with batch statistics, dropout off.
        running: The measure in eval mode.
        causes: Parts in the order of the swaps; they add up to the gap.
        layers: Parts of "stale statistics" by layer, in the order of execution; of many
            layers the last part is that of all those whose statistics are nearest.
        interaction: The gain of all layers together beyond the sum of their parts.
        batches: Number of batches.
        rank: The rank that the running statistics are of; None for all ranks.
    """

    batch: float
    running: float
    causes: list[GapPart]
    layers: list[GapPart]
    interaction: float
    batches: int
    rank: int | None = None

    @property
    def gap(self) -> float:
        """The loss of eval mode against batch statistics, in units of the measure."""
        return self.batch - self.running

    @property
    def cause(self) -> GapPart:
        """The largest part."""
        return max(self.causes, key=lambda part: part.value)

    def part(self, name: str) -> GapPart | None:
        """Return the part of one cause; None where it was not measured (not 0)."""
        return next((part for part in self.causes if part.name == name), None)

    @property
    def absent(self) -> dict[str, str]:
        """The causes that were not measured, each with the data it needs."""
        return {name: why for name, why in NEEDS.items() if self.part(name) is None}

    @property
    def layer(self) -> GapPart | None:
        """The layer with the largest part; None without batch norms."""
        return max(self.layers, key=lambda part: part.value, default=None)

    def to_text(self) -> str:
        """Return the parts, one per line."""
        lines = [
            f"{self.batch:.4g} with batch statistics, {self.running:.4g} in eval mode: "
            f"a gap of {self.gap:.4g} on "
            f"{counted(self.batches, 'batch', plural='batches')}"
        ]
        lines += [f"  {_line(part)}" for part in self.causes]
        if self.layers:
            lines.append("stale statistics, layer by layer, each swapped alone:")
            lines += [f"  {_line(part)}" for part in self.layers]
            lines.append(f"  {self.interaction:+10.4g}            interaction")
        if self.rank is not None:
            lines.append(f"the running statistics are those of rank {self.rank}")
        if self.absent:
            lines.append("not measured, and so included in the parts above:")
            lines += [f"  {name} (needs {why})" for name, why in self.absent.items()]
        return "\n".join(lines)

    def to_rows(self) -> list[dict[str, object]]:
        """Return one row per cause and layer, for tables in notebooks."""
        return [
            {"kind": kind, "name": p.name, "part": p.value, "±": 2 * p.error}
            for kind, parts in (("cause", self.causes), ("layer", self.layers))
            for p in parts
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as plain data."""
        return plain(
            {
                "gap": self.gap,
                "batch": self.batch,
                "running": self.running,
                "causes": [vars(part) for part in self.causes],
                "layers": [vars(part) for part in self.layers],
                "interaction": self.interaction,
                "batches": self.batches,
                "rank": self.rank,
                "absent": self.absent,
            }
        )


def _line(part: GapPart) -> str:
    return f"{part.value:+10.4g} ± {2 * part.error:<8.2g} {part.name}"
