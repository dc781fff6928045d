"""Rows of a weight that equal another row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EqualRows"]


@dataclass(frozen=True)
class EqualRows:
    """The rows of a weight that equal another row, in groups.

    Rows with equal weights and equal gradients stay equal for ever: they are one unit.
    """

    rows: int
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, weight: Tensor) -> EqualRows:
        """Return the equal rows of a weight, units along its first dimension."""
        if weight.shape[0] < 2 or weight.dim() < 2:
            return cls(1, ())
        rows = weight.detach().flatten(1).cpu()
        rows = rows.float() if rows.element_size() < 4 else rows
        # The first values tell nearly all rows apart.
        groups = _grouped(rows[:, :8], range(len(rows)))
        groups = [found for group in groups for found in _grouped(rows, group)]
        return cls(len(rows), tuple(map(tuple, groups)))

    def share(self, gradient: Tensor | None = None) -> float:
        """Return the share of rows equal to another (and with an equal gradient)."""
        if gradient is None:
            return sum(map(len, self.groups)) / self.rows
        alike = 0
        for group in self.groups:
            places = torch.tensor(group, device=gradient.device)
            theirs = gradient.detach().index_select(0, places)
            theirs = theirs.to_dense() if theirs.is_sparse else theirs
            theirs = theirs.flatten(1).double()
            away = (theirs - theirs[:1]).abs().amax(1)
            same = int((away <= 1e-4 * theirs.abs().amax()).sum())
            alike += same if same > 1 else 0
        return alike / self.rows


def _grouped(rows: Tensor, among: Iterable[int]) -> list[list[int]]:
    """Return the groups of two or more equal rows."""
    groups: dict[bytes, list[int]] = {}
    values = rows.numpy()
    for index in among:
        groups.setdefault(values[index].tobytes(), []).append(index)
    return [group for group in groups.values() if len(group) > 1]
