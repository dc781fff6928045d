"""Batch norm at inference: a fixed map per channel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.ir.gauge import per_channel
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
    read,
    read_parameter,
)
from normkit.fold.ir.nodes.rules import (
    copy_gauge,
    needs_channels_only,
    stored_direction,
    true_direction,
)

__all__ = ["BatchNorm"]


@dataclass(eq=False, repr=False)
class BatchNorm(Node):
    """(x − mean)/√(var + eps)·weight + bias per channel, with fixed statistics.

    Attributes:
        mean: The statistics, fixed values; None is 0.
        var: None is 1.
        weight: The learned affine, or None.
        bias: The learned affine, or None.
        weight_slot: Where a weight can be created if there is none.
        bias_slot: Where a bias can be created if there is none.
        eps: Added to `var`.
        channel_dim: The dimension of x that the channels lie along.
        locked: Reason why it is no fixed map; empty if it is one.
        is_removed: Whether it was folded: the node is then the identity.
        is_reduced: Whether only a sum per channel is left of it.
        epilogue: The sum and the activation that run in the same pass.
        activation: The name of that activation, or `"none"`.
        slope: Of a leaky_relu.
    """

    mean: Value | None = None
    var: Value | None = None
    weight: Value | None = None
    bias: Value | None = None
    weight_slot: Slot | None = None
    bias_slot: Slot | None = None
    eps: float = 0.0
    channel_dim: int = 1
    locked: str = ""
    is_removed: bool = False
    is_reduced: bool = False
    epilogue: list[Node] = field(default_factory=list)
    activation: str = "none"
    slope: float = 0.01

    def __post_init__(self) -> None:
        parts = (self.mean, self.var, self.weight, self.bias)
        if not self.locked and not all(v is None or v.is_fixed for v in parts):
            self.locked = "takes its statistics or weights from an input of the model"

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.inputs[0].shape[self.channel_dim]

    def affine(self) -> Affine:
        """Return the map it is at inference, two `(C,)` vectors in float64."""
        mean, var = self._statistics()
        inv_std = torch.rsqrt(var + self.eps)
        weight = read_parameter(self.weight, self.weight_slot)
        bias = read_parameter(self.bias, self.bias_slot)
        scale = inv_std if weight is None else weight * inv_std
        shift = -mean * scale
        return Affine(scale, shift if bias is None else shift + bias)

    def finite_affine(self) -> Affine:
        """Return `affine()`; raise `Refusal` if any number in it is not finite."""
        affine = self.affine()
        if not bool(affine.scale.isfinite().all() and affine.shift.isfinite().all()):
            raise Refusal("its own scale or shift is not finite")
        return affine

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Permit any map per channel on either side, composed into weight and bias."""
        if self.is_removed:
            return copy_gauge(self, gauges)
        if self.is_touched(gauges):
            if self.locked:
                raise Refusal(f"{self.label} {self.locked}")
            if self.is_reduced:
                raise Refusal(f"only a sum is left of {self.label}")
            self.edits(gauges)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Return the weight and bias that make the composed map."""
        if self.is_removed or not self.is_touched(gauges):
            return {}
        before = gauges.of(self.inputs[0])
        after = gauges.of(self.outputs[0])
        needs_channels_only(before, self.channel_dim, self.label, "normalizes")
        needs_channels_only(after, self.channel_dim, self.label, "normalizes")

        def vectors(affine: Affine) -> Affine:
            return per_channel(affine, self.channel_dim, self.channels)

        composed = (
            vectors(true_direction(before, self.label))
            .then(self.affine())
            .then(vectors(stored_direction(after, self.label)))
        )
        mean, var = self._statistics()
        weight = composed.scale * (var + self.eps).sqrt()
        bias = composed.shift + mean * composed.scale
        return {
            **edit_parameter(
                self.weight, self.weight_slot, weight, self.label, "weight"
            ),
            **edit_parameter(self.bias, self.bias_slot, bias, self.label, "bias"),
        }

    def neutral(self, shift: Tensor | None) -> dict[Slot, Tensor]:
        """Return the edits of all its parameters after which it only adds `shift`."""
        ones = torch.ones(self.channels, dtype=torch.float64)
        wanted = (
            (self.mean, ones * 0),
            (self.var, ones - self.eps),
            (self.weight, ones),
            (self.bias, ones * 0 if shift is None else shift),
        )
        edits: dict[Slot, Tensor] = {}
        for value, content in wanted:
            if value is not None:
                edits |= edit_value(value, content, self.label)
        if shift is not None and self.bias is None:
            raise Refusal(f"{self.label} has no bias to change")
        return edits

    def _statistics(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones(self.channels, dtype=torch.float64)
        var = ones if self.var is None else read(self.var)
        return torch.zeros_like(var) if self.mean is None else read(self.mean), var
