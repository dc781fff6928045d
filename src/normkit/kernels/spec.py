"""Specification of one forward of a normalization, without its tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from normkit.kernels.epilogue import Epilogue

__all__ = ["Operands", "Running", "Saved", "Spec"]

_NONE = Epilogue()

Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Tensors that a forward reads: x, weight, bias, residual, mask."""
Saved = tuple[
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    tuple[Tensor, ...],
]
"""Tensors that a backward reads besides dy.

The operands of the forward; the gate, which is the output of a relu, positive where it
was open; the statistics that the forward kept.
"""


@dataclass(frozen=True)
class Spec:
    """Options of one forward; hashable, so that it can be part of a cache key.

    Attributes:
        dims: Distinct, non-negative dimensions that share a statistic.
        eps: Added to the variance (or mean square), inside the root.
        centered: Subtract the mean; False divides by the root mean square.
        given: Statistics are given, and constants.
        activation: Applied last, one of `ACTIVATIONS`.
        slope: Slope of leaky_relu below 0.
        group: Ranks over which statistics are merged, as in `sync.merge_over`.
        shape: The shape that `dims` refer to; None is that of x. Group norm splits the
            channels.
        vector: The shape of the learned vectors against it; None as they are.
        statistic: The shape of given statistics against it; None as they are.
    """

    dims: tuple[int, ...]
    eps: float
    centered: bool = True
    given: bool = False
    activation: str = "none"
    slope: float = 0.01
    group: Any = None
    shape: tuple[int, ...] | None = None
    vector: tuple[int, ...] | None = None
    statistic: tuple[int, ...] | None = None

    def seen(self, x: Tensor) -> Tensor:
        """Return `x` in the shape that `dims` refer to."""
        return x if self.shape is None else x.view(self.shape)

    def along(self, vector: Tensor | None) -> Tensor | None:
        """Return a learned vector with the dimensions of the seen x."""
        if vector is None or self.vector is None:
            return vector
        return vector.view(self.vector)

    def kept(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the statistics of an x of that shape."""
        shape = shape if self.shape is None else self.shape
        return tuple(1 if d in self.dims else size for d, size in enumerate(shape))

    def without_activation(self) -> Spec:
        """Return the same spec without its activation."""
        return replace(self, activation="none")

    def epilogue(self, residual: Tensor | None = None) -> Epilogue:
        """Return the epilogue after the affine."""
        if residual is None and self.activation == "none":
            return _NONE
        return Epilogue(self.activation, self.slope, residual)


class Running(NamedTuple):
    """Running statistics to normalize by or to update.

    Attributes:
        mean: Shape `(C,)`, or None.
        var: Shape `(C,)`, or None.
        rate: Share of the batch in the new value; None gives every batch the same.
        batches: Count of the batches that updated them, int64 scalar, or None.
        skipped: Count of batches with a NaN or Inf, int64 scalar, or None.
        skips_nonfinite: Keep such batches out.
    """

    mean: Tensor | None
    var: Tensor | None
    rate: float | Tensor | None = None
    batches: Tensor | None = None
    skipped: Tensor | None = None
    skips_nonfinite: bool = True
