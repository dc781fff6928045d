"""The record of blocks and attention: one value per observation."""

from __future__ import annotations

import math
from typing import Any

from normkit.doctor.probes.blocks import Blocks
from normkit.doctor.probes.series import to_floats
from normkit.doctor.transformer_statistics import AttentionStatistics, BlockStatistics

__all__ = ["Parts"]

BLOCK = ("before", "after", "gradient")
ATTENTION = ("largest", "entropy", "sharp", "read", "hidden")

Series = dict[str, list[float]]


class Parts:
    """Series of numbers of each block and each attention, as long as observations.

    An observation in which a part did not run has NaN.
    """

    def __init__(self) -> None:
        self._count = 0
        self._blocks: dict[str, Series] = {}
        self._attention: dict[str, Series] = {}
        self._probes: Blocks | None = None

    def add(self, probes: Blocks | None) -> None:
        """Add what the probes measured since they were reset."""
        if probes is None:
            return
        self._probes = probes
        for keys, kept, parts in (
            (BLOCK, self._blocks, probes.in_order),
            (ATTENTION, self._attention, probes.attention.values()),
        ):
            measured = [(part.name, part.numbers()) for part in parts]
            values = iter(to_floats([v for _, each in measured for v in each.values()]))
            for name, each in measured:
                found = {key: next(values) for key in each}
                series = kept.setdefault(
                    name, {key: [math.nan] * self._count for key in keys}
                )
                for key in keys:
                    series[key].append(found.get(key, math.nan))
        self._count += 1

    def blocks(self) -> tuple[BlockStatistics, ...]:
        """Return the statistics of each block, in the order of execution."""
        return tuple(
            BlockStatistics(
                block.name,
                block.kind,
                block.follows,
                end=block.end,
                **_tuples(self._blocks[block.name]),
            )
            for block in (self._probes.in_order if self._probes else ())
            if block.name in self._blocks
        )

    def attention(self) -> tuple[AttentionStatistics, ...]:
        """Return the statistics of each attention, in the order of execution."""
        return tuple(
            AttentionStatistics(name, **_tuples(series))
            for name, series in self._attention.items()
        )

    def history(self) -> dict[str, Any]:
        """Return the record as plain data, with None where nothing was measured."""
        return {
            name: {
                part: {key: _with_gaps(values) for key, values in series.items()}
                for part, series in kept.items()
            }
            for name, kept in (
                ("blocks", self._blocks),
                ("attention", self._attention),
            )
        }


def _tuples(series: Series) -> dict[str, Any]:
    return {key: tuple(values) for key, values in series.items()}


def _with_gaps(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]
