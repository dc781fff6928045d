"""A gauge: how a tensor of the folded network relates to the one it stands for.

The folded network may hold another tensor than the original did, as long as every
reader knows:  stored = scale·true + shift, element by element. A batch norm is gone
when its input and its output are the same stored tensor, that is, when its own affine
map has become the gauge of its input, or the inverse gauge of its output, or a part
of each. Whether the neighbours can bear that is the matter of `nodes`.

A scale of 0 can be crossed one way only, so a gauge carries both directions and may
lack one. Scale and shift are float64, have the rank of the tensor, and size 1 along
every dimension on which they do not depend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.affine import Affine

__all__ = ["Gauge", "compact", "per_channel"]


@dataclass(frozen=True)
class Gauge:
    """Both directions of stored = scale·true + shift.

    At least one is known, except in the record of a fold, where neither says that no
    such relation holds.

    Attributes:
        to_stored: true → stored, or None where a scale of 0 forbids it.
        to_true: stored → true, or None where a scale of 0 forbids it.
    """

    to_stored: Affine | None
    to_true: Affine | None

    @classmethod
    def identity(cls, rank: int) -> Gauge:
        """Stored and true are the same."""
        same = Affine.identity((1,) * rank, dtype=torch.float64)
        return cls(same, same)

    @classmethod
    def storing(cls, affine: Affine) -> Gauge:
        """The gauge by which stored = affine(true)."""
        crossable = bool((affine.scale != 0).all())
        return cls(affine, affine.inverse() if crossable else None)

    @classmethod
    def reading(cls, affine: Affine) -> Gauge:
        """The gauge by which true = affine(stored)."""
        crossable = bool((affine.scale != 0).all())
        return cls(affine.inverse() if crossable else None, affine)

    @property
    def rank(self) -> int:
        """The number of dimensions of the tensor it belongs to."""
        return self._known.scale.dim()

    @property
    def is_identity(self) -> bool:
        """Whether stored and true are the same tensor."""
        known = self._known
        return bool((known.scale == 1).all()) and bool((known.shift == 0).all())

    @property
    def has_shift(self) -> bool:
        """Whether a true 0 is stored as something else."""
        return bool((self._known.shift != 0).any())

    @property
    def has_scale(self) -> bool:
        """Whether any scale differs from 1."""
        return bool((self._known.scale != 1).any())

    @property
    def is_positive(self) -> bool:
        """Whether the map keeps order: every scale is 0 or above."""
        return bool((self._known.scale >= 0).all())

    @property
    def depends_on(self) -> tuple[int, ...]:
        """The dimensions along which scale or shift change."""
        known = self._known
        return tuple(
            dim
            for dim in range(self.rank)
            if known.scale.shape[dim] > 1 or known.shift.shape[dim] > 1
        )

    def then(self, other: Gauge) -> Gauge:
        """Both changes, this one first; neither direction may be left."""
        stored = true = None
        if self.to_stored is not None and other.to_stored is not None:
            stored = self.to_stored.then(other.to_stored)
        if self.to_true is not None and other.to_true is not None:
            true = other.to_true.then(self.to_true)
        return Gauge(stored, true)

    def map(self, move: Callable[[Tensor], Tensor]) -> Gauge:
        """The gauge with `move` applied to the scales and shifts as tensors."""

        def moved(affine: Affine | None) -> Affine | None:
            if affine is None:
                return None
            return Affine(move(affine.scale), move(affine.shift))

        return Gauge(moved(self.to_stored), moved(self.to_true))

    def agrees_with(self, other: Gauge) -> bool:
        """Whether both describe the same relation, to 1e-11 of its size."""
        if self is other:
            return True
        if self.to_stored is not None and other.to_stored is not None:
            return _same(self.to_stored, other.to_stored)
        if self.to_true is not None and other.to_true is not None:
            return _same(self.to_true, other.to_true)
        return False

    @property
    def _known(self) -> Affine:
        known = self.to_stored or self.to_true
        assert known is not None
        return known


def compact(values: Tensor) -> Tensor:
    """`values` with size 1 along each dimension on which they do not depend.

    NaN marks a place that is free to take any value; what is free everywhere
    stays NaN.

    Example:
        >>> compact(torch.tensor([[1.0, 1.0], [2.0, float("nan")]]))
        tensor([[1.],
                [2.]])
    """
    has_free = bool(values.isnan().any())
    for dim in range(values.dim()):
        if values.shape[dim] <= 1:
            continue
        if not has_free:
            first = values.narrow(dim, 0, 1)
            values = first if torch.equal(values, first.expand_as(values)) else values
            continue
        free = values.isnan()
        low = values.masked_fill(free, torch.inf).amin(dim, keepdim=True)
        high = values.masked_fill(free, -torch.inf).amax(dim, keepdim=True)
        if bool((low >= high).all()):
            # Low is above high only where everything is free.
            values = low.masked_fill(low > high, torch.nan)
    return values


def per_channel(affine: Affine, dim: int, channels: int) -> Affine:
    """The two `(channels,)` vectors of an affine that depends on `dim` alone."""
    return Affine(
        _vector(affine.scale, dim, channels), _vector(affine.shift, dim, channels)
    )


def _vector(values: Tensor, dim: int, channels: int) -> Tensor:
    return values.movedim(dim, 0).reshape(-1).expand(channels)


def _same(left: Affine, right: Affine) -> bool:
    size = left.shift.abs().amax() + right.shift.abs().amax()
    scales = torch.broadcast_tensors(left.scale, right.scale)
    shifts = torch.broadcast_tensors(left.shift, right.shift)
    return torch.allclose(*scales, rtol=1e-11, atol=0.0) and torch.allclose(
        *shifts, rtol=1e-11, atol=1e-11 * float(size)
    )
