"""Normalizations that measure their input, and end in ·weight + bias."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.ir.graph import (
    NOTHING_MORE,
    Alternative,
    Gauges,
    Node,
    Refusal,
    Slot,
    Value,
)
from normkit.fold.ir.nodes.parameters import (
    edit_parameter,
    edit_value,
    read_parameter,
)
from normkit.fold.ir.nodes.rules import stored_direction, unchanged

__all__ = ["NormAffine"]


@dataclass(eq=False, repr=False)
class NormAffine(Node):
    """A normalization by its own statistics that ends in ·weight + bias.

    Layer, group, instance and RMS norm: a map after it folds into the learned affine,
    a map before it does not. All its inputs are measured; outputs after the first (the
    sum of a fused residual) must not change.

    Attributes:
        weight: The learned factor, or None.
        bias: The learned summand, or None.
        weight_slot: Where a weight can be created.
        bias_slot: Where a bias can be created; None for RMS norm.
        dims: The dimensions of the output that weight and bias run along, in order.
        centers: Whether it subtracts the mean over `dims`, as layer norm does.
        is_removed: Whether weight and bias were folded into its readers.
        is_reduced: Whether the weight was.
    """

    weight: Value | None = None
    bias: Value | None = None
    weight_slot: Slot | None = None
    bias_slot: Slot | None = None
    dims: tuple[int, ...] = ()
    centers: bool = False
    is_removed: bool = False
    is_reduced: bool = False

    def affine(self) -> Affine:
        """Return weight and bias as a map of the output, of its rank, in float64."""
        shape = self._broadcast_shape()
        weight = read_parameter(self.weight, self.weight_slot)
        bias = read_parameter(self.bias, self.bias_slot)
        one = torch.ones((1,) * len(shape), dtype=torch.float64)
        scale = one if weight is None else weight.reshape(shape)
        return Affine(scale, one * 0 if bias is None else bias.reshape(shape))

    def finite_affine(self) -> Affine:
        """Return `affine()`; raise `Refusal` if any number in it is not finite."""
        affine = self.affine()
        if not bool(affine.scale.isfinite().all() and affine.shift.isfinite().all()):
            raise Refusal("its own weight or bias is not finite")
        return affine

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Permit any map of its output over the dimensions of its weight."""
        y = self.outputs[0]
        for value in (*self.inputs, *self.outputs[1:]):
            if gauges.changed(value):
                raise Refusal(
                    f"{self.label} measures {value.name}, which must not change"
                )
        if gauges.changed(y):
            self.edits(gauges)
        missing = [value for value in self.inputs if value not in gauges]
        return [unchanged(*missing)] if missing else NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Return weight and bias with the map of the output folded in."""
        y = self.outputs[0]
        if not gauges.changed(y):
            return {}
        if self.is_removed or self.is_reduced:
            raise Refusal(f"the weight of {self.label} went into what comes after it")
        after = stored_direction(gauges.of(y), self.label)
        if not set(gauges.of(y).depends_on) <= set(self._dims()):
            raise Refusal(
                f"{self.label} has no weight along the dimension to be mapped"
            )
        scale, shift = self.along(after.scale), self.along(after.shift)
        old_weight = read_parameter(self.weight, self.weight_slot)
        old_bias = read_parameter(self.bias, self.bias_slot)
        edits: dict[Slot, Tensor] = {}
        weight, bias = scale, shift
        if old_weight is not None:
            weight = scale.reshape(old_weight.shape) * old_weight
        if old_bias is not None:
            bias = (scale * old_bias.reshape(shift.shape) + shift).reshape(
                old_bias.shape
            )
        if old_weight is not None or bool((weight != 1).any()):
            edits |= edit_parameter(
                self.weight, self.weight_slot, weight, self.label, "weight"
            )
        if old_bias is not None or bool((bias != 0).any()):
            edits |= edit_parameter(self.bias, self.bias_slot, bias, self.label, "bias")
        return edits

    def without_affine(self, bias: Tensor | None) -> dict[Slot, Tensor]:
        """Return the edits that make its weight 1 and its bias `bias`, 0 for None."""
        edits: dict[Slot, Tensor] = {}
        for value, new in ((self.weight, 1.0), (self.bias, 0.0)):
            if value is None:
                continue
            content = torch.full(value.shape, new, dtype=torch.float64)
            if value is self.bias and bias is not None:
                content = bias.reshape(value.shape)
            edits |= edit_value(value, content, self.label)
        return edits

    def along(self, values: Tensor) -> Tensor:
        """Return `values`, of the rank of the output, as they lie along `dims`."""
        sizes = [self.outputs[0].shape[dim] for dim in self._dims()]
        return values.expand(self._broadcast_shape()).reshape(sizes)

    def numel(self) -> int:
        """Return the number of elements along `dims`."""
        return math.prod(self.outputs[0].shape[dim] for dim in self._dims())

    def _dims(self) -> tuple[int, ...]:
        return tuple(dim % len(self.outputs[0].shape) for dim in self.dims)

    def _broadcast_shape(self) -> list[int]:
        dims = self._dims()
        return [n if d in dims else 1 for d, n in enumerate(self.outputs[0].shape)]
