"""Weights that are stored as integers: a fold changes their scale, never a value.

A weight is (q − z)·s, with one s or one per index of an axis. Factors that differ along
that axis alone go into s, and the integers stay as they were trained; a channel with a
negative factor gets 2z − q, which changes their sign. Anything else would have to be
rounded to integers again, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.fold.ir.graph import Refusal, Slot, Value
from normkit.fold.ir.nodes.parameters import Parameter, editable

__all__ = ["Quantized", "Rescaled", "along", "rescaled"]

_ROUNDING = 1e-11


@dataclass(frozen=True)
class Rescaled:
    """Another scale for the same integers.

    Attributes:
        factor: By which the scale is multiplied: one, or one per index of `axis`.
            Negative where the integers become 2z − q.
        axis: The axis of the scale; None if there is one scale.
    """

    factor: Tensor
    axis: int | None


@dataclass(eq=False, repr=False)
class Quantized(Parameter):
    """A weight (q − z)·s.

    Attributes:
        integers: q, in their own type.
        zero: z, which broadcasts to q.
        scale: s, float64: a number, or a vector along `axis`.
        axis: The axis of s; None if it is a number.
    """

    integers: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int8))
    zero: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    scale: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    axis: int | None = None

    def original(self) -> Tensor:
        """Return the weight as it is in the file, float64."""
        scale = along(self.scale, self.axis, self.integers.dim())
        return (self.integers.long() - self.zero) * scale

    def mirrored(self) -> Tensor:
        """Return 2z − q, int64; it may be out of the range of the type of q."""
        return 2 * self.zero - self.integers.long()

    def rescaled(self, new: Tensor) -> Rescaled:
        """Return the factors of the scale that make the weight `new`.

        Raises:
            Refusal: there are none.
        """
        found = rescaled(self.original(), new, self.axis)
        if found is None:
            scales = "one scale"
            if self.axis is not None:
                scales = f"scales along dimension {self.axis} alone"
            raise Refusal(
                f"{self.label} has integers with {scales}, and no other scale gives "
                "what it would have to be"
            )
        return found

    def edit_for(self, value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
        """Return the edit of the weight, if another scale gives it."""
        found = self.rescaled(new)
        if bool((found.factor == 0).any()):
            raise Refusal(f"{self.label} has integers, whose scale would be 0")
        factor = along(found.factor, found.axis, new.dim())
        kind = torch.iinfo(self.integers.dtype)
        fits = (self.mirrored() >= kind.min) & (self.mirrored() <= kind.max)
        if bool(((factor < 0) & ~fits).any()):
            raise Refusal(
                f"{self.label} has integers that would change their sign, and one has "
                "no negative in its type"
            )
        return {editable(self.slot, label): new}


def rescaled(old: Tensor, new: Tensor, axis: int | None) -> Rescaled | None:
    """Return the factors that make `new` of `old`; None if there are none.

    Args:
        old: The weight.
        new: Another, of the same shape.
        axis: The axis of its scales; None for one scale, which may become one per
            index of any axis.

    Example:
        >>> old = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
        >>> rescaled(old, old * torch.tensor([[2.0], [-1.0]]), None)
        Rescaled(factor=tensor([ 2., -1.], dtype=torch.float64), axis=0)
        >>> rescaled(old, old + 1, None) is None
        True
    """
    axes = [axis] if axis is not None else [None, *range(old.dim())]
    for each in axes:
        others = [dim for dim in range(old.dim()) if dim != each]
        energy = (old * old).sum(others) if others else old * old
        dot = (new * old).sum(others) if others else new * old
        factor = torch.where(energy > 0, dot / energy.clamp(min=1e-300), 1.0)
        made = old * along(factor, each, old.dim())
        size = old.abs() * along(factor.abs(), each, old.dim())
        if bool(((made - new).abs() <= _ROUNDING * size).all()):
            return Rescaled(factor, each)
    return None


def along(factor: Tensor, axis: int | None, rank: int) -> Tensor:
    """Return `factor` shaped to multiply a tensor of that rank."""
    if axis is None:
        return factor
    return factor.reshape([-1 if dim == axis else 1 for dim in range(rank)])
