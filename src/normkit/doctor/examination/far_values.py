"""A value of the inputs that stands far from all others, such as -9999 for missing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normkit.doctor.measurements import FarValue

__all__ = ["FarValues"]

# Least number of entries with the value, and the gap to the next as a multiple of the
# range of all others: no distribution that has a density leaves such a gap.
MIN_ENTRIES, GAP = 3, 5.0


class FarValues:
    """The least and the largest value of the inputs, and what lies between them."""

    def __init__(self) -> None:
        self._batches: list[tuple[float, ...]] = []
        self._entries = 0

    def add(self, x: Tensor) -> None:
        """Enter one batch; class and token numbers have no distance."""
        if not x.numel() or not x.is_floating_point():
            return
        x = x.detach()
        low, high = x.aminmax()
        is_low, is_high = x == low, x == high
        inf = torch.full((), math.inf, dtype=x.dtype, device=x.device)
        next_low = torch.where(is_low, inf, x).min()
        next_high = torch.where(is_high, -inf, x).max()
        numbers = [low, is_low.sum(), next_low, high, is_high.sum(), next_high]
        found = torch.stack([n.double() for n in numbers]).tolist()
        self._batches.append(tuple(found))
        self._entries += x.numel()

    def found(self) -> FarValue | None:
        """Return the far value; None without one."""
        if not self._batches:
            return None
        low = min(batch[0] for batch in self._batches)
        high = max(batch[3] for batch in self._batches)
        above = min(b[2] if b[0] == low else b[0] for b in self._batches)
        below = max(b[5] if b[3] == high else b[3] for b in self._batches)
        for value, entries, first, last in (
            (low, sum(b[1] for b in self._batches if b[0] == low), above, high),
            (high, sum(b[4] for b in self._batches if b[3] == high), below, low),
        ):
            others = abs(last - first)
            gap = abs(first - value)
            if entries >= MIN_ENTRIES and 0 < others < math.inf > gap > GAP * others:
                between = sorted((first, last))
                share = entries / self._entries
                return FarValue(value, share, between[0], between[1])
        return None
