"""A gauge: how a tensor of the folded network relates to the original one.

The folded network may hold another tensor than the original did, as long as every
reader accounts for it:  stored = scale·true + shift, element by element. A batch norm
is removed when its input and its output are the same stored tensor, that is, when its
own affine map has become the gauge of its input, or the inverse gauge of its output,
or a part of each. Which gauges the neighbours permit is in `nodes`.

A scale of 0 has no inverse, so a gauge holds both directions and may lack one. Scale
and shift are float64, have the rank of the tensor, and size 1 along every dimension on
which they do not depend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.affine import Affine

__all__ = [
    "Gauge",
    "close",
    "compact",
    "fit",
    "per_channel",
    "storing",
    "with_rank",
]

# Number of elements that are kept spread; the identities are kept for ever.
_MAX_KEPT = 8192


@dataclass(frozen=True, eq=False)
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

    @staticmethod
    @functools.cache
    def identity(rank: int) -> Gauge:
        """Return the gauge of an unchanged tensor with `rank` dimensions."""
        same = Affine.identity((1,) * rank, dtype=torch.float64, device="cpu")
        return Gauge(same, same)

    @classmethod
    def storing(cls, affine: Affine) -> Gauge:
        """Return the gauge with stored = affine(true)."""
        return cls(affine, _inverse(affine))

    @classmethod
    def reading(cls, affine: Affine) -> Gauge:
        """Return the gauge with true = affine(stored)."""
        return cls(_inverse(affine), affine)

    # A search asks these questions of one gauge many times; a gauge never changes.

    @property
    def rank(self) -> int:
        """The number of dimensions of its tensor."""
        return self._known.scale.dim()

    @functools.cached_property
    def is_identity(self) -> bool:
        """True if stored and true are the same tensor."""
        return not self.has_scale and not self.has_shift

    @functools.cached_property
    def has_shift(self) -> bool:
        """True if a true 0 is stored as another number."""
        return bool(self._known.shift.count_nonzero())

    @functools.cached_property
    def has_scale(self) -> bool:
        """True if any scale differs from 1."""
        return bool((self._known.scale != 1).any())

    @functools.cached_property
    def is_positive(self) -> bool:
        """True if every scale is 0 or above: the map keeps order."""
        return bool((self._known.scale >= 0).all())

    @functools.cached_property
    def depends_on(self) -> tuple[int, ...]:
        """The dimensions along which scale or shift change."""
        known = self._known
        return tuple(
            dim
            for dim in range(self.rank)
            if known.scale.shape[dim] > 1 or known.shift.shape[dim] > 1
        )

    @functools.cached_property
    def _spread(self) -> dict[tuple[int, ...], tuple[Spread | None, Spread | None]]:
        return {}

    def spread(self, shape: tuple[int, ...]) -> tuple[Spread | None, Spread | None]:
        """Return both directions as (scale, shift) of each element in a row.

        Short ones are kept: a search joins one tensor with many others.
        """
        known = self._spread.get(shape)
        if known is None:
            known = _in_a_row(self.to_stored, shape), _in_a_row(self.to_true, shape)
            if math.prod(shape) <= _MAX_KEPT:
                self._spread[shape] = known
        return known

    def then(self, other: Gauge) -> Gauge:
        """Return both changes, this one first; it may know neither direction."""
        stored = true = None
        if self.to_stored is not None and other.to_stored is not None:
            stored = self.to_stored.then(other.to_stored)
        if self.to_true is not None and other.to_true is not None:
            true = other.to_true.then(self.to_true)
        return Gauge(stored, true)

    def map(self, change: Callable[[Tensor], Tensor]) -> Gauge:
        """Return the gauge with `change` applied to the scales and shifts."""

        def changed(affine: Affine | None) -> Affine | None:
            if affine is None:
                return None
            return Affine(change(affine.scale), change(affine.shift))

        return Gauge(changed(self.to_stored), changed(self.to_true))

    def agrees_with(self, other: Gauge) -> bool:
        """Return True if both are the same relation, to 1e-11 of its size."""
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


Spread = tuple[Tensor, Tensor]


def _in_a_row(affine: Affine | None, shape: tuple[int, ...]) -> Spread | None:
    if affine is None:
        return None
    return (
        affine.scale.expand(shape).reshape(-1),
        affine.shift.expand(shape).reshape(-1),
    )


def compact(values: Tensor) -> Tensor:
    """Return `values` with size 1 along each dimension on which they do not depend.

    NaN marks a place that is free to take any value; it stays where all are free.

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


def storing(scale: Tensor, shift: Tensor | None = None) -> Gauge:
    """Return `Gauge.storing` with scale and shift (0 by default) in their least shapes.

    Example:
        >>> storing(torch.ones(1, 3, 2)).to_stored.scale.shape
        torch.Size([1, 1, 1])
    """
    shift = torch.zeros((), dtype=torch.float64) if shift is None else shift
    rank = max(scale.dim(), shift.dim())
    return Gauge.storing(
        Affine(with_rank(compact(scale), rank), with_rank(compact(shift), rank))
    )


def fit(gauge: Gauge, shape: tuple[int, ...]) -> Gauge | None:
    """Return `gauge` for a tensor of `shape` that is broadcast to the gauge's own.

    None where the gauge changes along a dimension that the tensor does not have.
    """
    extra = gauge.rank - len(shape)
    for dim in gauge.depends_on:
        if dim < extra or shape[dim - extra] == 1:
            return None
    if extra <= 0:
        return gauge
    return gauge.map(lambda t: t.reshape(t.shape[extra:]))


def with_rank(values: Tensor, rank: int) -> Tensor:
    """Return `values` with leading dimensions of size 1 up to `rank`."""
    return values.reshape((1,) * (rank - values.dim()) + tuple(values.shape))


def close(left: Tensor, right: Tensor) -> bool:
    """Return True if two scales are the same, to 1e-11."""
    left, right = torch.broadcast_tensors(left, right)
    return torch.allclose(left, right, rtol=1e-11, atol=0.0)


def per_channel(affine: Affine, dim: int, channels: int) -> Affine:
    """Return the two `(channels,)` vectors of an affine that depends on `dim` alone."""

    def vector(values: Tensor) -> Tensor:
        return values.movedim(dim, 0).reshape(-1).expand(channels)

    return Affine(vector(affine.scale), vector(affine.shift))


def _inverse(affine: Affine) -> Affine | None:
    return affine.inverse() if bool((affine.scale != 0).all()) else None


def _same(left: Affine, right: Affine) -> bool:
    if not left.shift.numel() or not right.shift.numel():
        return left.shift.shape == right.shift.shape
    size = left.shift.abs().amax() + right.shift.abs().amax()
    scales = torch.broadcast_tensors(left.scale, right.scale)
    shifts = torch.broadcast_tensors(left.shift, right.shift)
    return torch.allclose(*scales, rtol=1e-11, atol=0.0) and torch.allclose(
        *shifts, rtol=1e-11, atol=1e-11 * float(size)
    )
