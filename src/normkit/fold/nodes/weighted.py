"""Nodes that hold weights, into which a map can be folded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.algebra import (
    WeightLayout,
    fold_input_affine,
    fold_output_affine,
    identity_kernel,
)
from normkit.fold.gauge import Gauge, per_channel
from normkit.fold.graph import Gauges, Refusal, Slot, Value
from normkit.fold.nodes.node import (
    NOTHING_MORE,
    Alternative,
    Node,
    carry_one,
    current,
    held,
    needs_channels_only,
    put,
    store,
    stored_direction,
    true_direction,
)

__all__ = ["BatchNorm", "Linear", "Table", "Tail"]


@dataclass(eq=False, repr=False)
class Linear(Node):
    """y = alpha·W·x + beta·b with a parameter W, over one channel dimension.

    Attributes:
        weight: W; a slot, or moved elements of one.
        bias: b, or None.
        bias_slot: Where a bias can be created if there is none.
        layout: The order of the axes of W.
        input_dim: The dimension of x that W contracts.
        output_dim: The dimension of y that it makes.
        sees_all_taps: Whether every output position sees the whole kernel, which
            zero padding forbids.
        own_tap: Which tap stands on the output position itself, if y has the
            positions of x; None if it has others.
    """

    weight: Value | None = None
    bias: Value | None = None
    bias_slot: Slot | None = None
    layout: WeightLayout = field(default_factory=lambda: WeightLayout(("O", "I")))
    input_dim: int = -1
    output_dim: int = -1
    sees_all_taps: bool = True
    own_tap: int | None = None
    alpha: float = 1.0
    beta: float = 1.0

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map of its output channels; of its input channels if all taps count."""
        if self.is_touched(gauges):
            self._maps(gauges)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """W and b with both maps folded in."""
        if not self.is_touched(gauges):
            return {}
        before, after = self._maps(gauges)
        assert self.weight is not None
        weight = current(self.weight)
        weight = weight if self.alpha == 1 else self.alpha * weight
        bias = held(self.bias, self.bias_slot)
        bias = None if bias is None else self.beta * bias
        new_bias = torch.zeros_like(after.shift) if bias is None else bias
        if gauges.moved(self.inputs[0]):
            weight, new_bias = fold_input_affine(weight, bias, before, self.layout)
        if gauges.moved(self.outputs[0]):
            weight, new_bias = fold_output_affine(weight, new_bias, after, self.layout)
        weight = weight if self.alpha == 1 else weight / self.alpha
        edits: dict[Slot, Tensor] = {}
        if any(gauges.of(v).has_scale for v in (self.inputs[0], self.outputs[0])):
            edits = store(self.weight, weight, self.label)
        # Created even where it comes out 0, so that which parameters a folded model
        # has does not hang on the numbers in it.
        is_needed = self.bias_slot is not None and gauges.moved(self.outputs[0])
        if is_needed or bool((new_bias != (0 if bias is None else bias)).any()):
            if self.beta == 0:
                raise Refusal(f"{self.label} multiplies its bias by 0")
            new_bias = new_bias / self.beta
            edits |= put(self.bias, self.bias_slot, new_bias, self.label, "bias")
        return edits

    def with_diagonal(self, added: Affine) -> dict[Slot, Tensor]:
        """The edits after which it also adds scale·x + shift to its output.

        Args:
            added: Two vectors over its channels.
        """
        if self.weight is None or self.own_tap is None:
            raise Refusal(f"{self.label} has no weight for its own position")
        shape = self.weight.shape
        if self.layout.input_channels(shape) != self.layout.output_channels(shape):
            raise Refusal(f"{self.label} changes the number of channels")
        eye = identity_kernel(shape, self.layout, self.own_tap, scale=added.scale)
        weight = current(self.weight) + eye / self.alpha
        bias = held(self.bias, self.bias_slot)
        bias = torch.zeros_like(added.shift) if bias is None else bias
        if self.beta == 0:
            raise Refusal(f"{self.label} multiplies its bias by 0")
        bias = bias + added.shift / self.beta
        return store(self.weight, weight, self.label) | put(
            self.bias, self.bias_slot, bias, self.label, "bias"
        )

    def _maps(self, gauges: Gauges) -> tuple[Affine, Affine]:
        assert self.weight is not None
        x, y = self.inputs[0], self.outputs[0]
        before, after = gauges.of(x), gauges.of(y)
        shape = self.weight.shape
        input_dim = self.input_dim % len(x.shape)
        output_dim = self.output_dim % len(y.shape)
        needs_channels_only(after, output_dim, self.label, "maps its output")
        needs_channels_only(before, input_dim, self.label, "contracts")
        if before.has_shift and not self.sees_all_taps:
            raise Refusal(
                f"{self.label} pads with zeros, where a shift of its input would "
                "have to be padded too"
            )
        return (
            per_channel(
                true_direction(before, self.label),
                input_dim,
                self.layout.input_channels(shape),
            ),
            per_channel(
                stored_direction(after, self.label),
                output_dim,
                self.layout.output_channels(shape),
            ),
        )


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
        locked: Why it is no fixed map; empty if it is one.
        is_gone: Whether it was folded: the node is then the identity.
        is_reduced: Whether only a sum per channel was left of it.
        followers: The sum and the activation that run in the same pass.
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
    is_gone: bool = False
    is_reduced: bool = False
    followers: list[Node] = field(default_factory=list)
    activation: str = "none"
    slope: float = 0.01

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.inputs[0].shape[self.channel_dim]

    def affine(self) -> Affine:
        """The map it is at inference, two `(C,)` vectors in float64."""
        ones = torch.ones(self.channels, dtype=torch.float64)
        var = ones if self.var is None else current(self.var)
        mean = torch.zeros_like(var) if self.mean is None else current(self.mean)
        inv_std = torch.rsqrt(var + self.eps)
        weight = held(self.weight, self.weight_slot)
        bias = held(self.bias, self.bias_slot)
        scale = inv_std if weight is None else weight * inv_std
        shift = -mean * scale
        return Affine(scale, shift if bias is None else shift + bias)

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map per channel on either side, composed into weight and bias."""
        if self.is_gone:
            return carry_one(self, gauges)
        if self.is_touched(gauges):
            if self.locked:
                raise Refusal(f"{self.label} {self.locked}")
            if self.is_reduced:
                raise Refusal(f"of {self.label} only a sum is left")
            self.edits(gauges)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """The weight and bias that make the composed map with the same statistics."""
        if self.is_gone or not self.is_touched(gauges):
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
        var = torch.ones_like(composed.scale)
        var = var if self.var is None else current(self.var)
        mean = torch.zeros_like(var) if self.mean is None else current(self.mean)
        weight = composed.scale * (var + self.eps).sqrt()
        bias = composed.shift + mean * composed.scale
        return {
            **put(self.weight, self.weight_slot, weight, self.label, "weight"),
            **put(self.bias, self.bias_slot, bias, self.label, "bias"),
        }


@dataclass(eq=False, repr=False)
class Tail(Node):
    """A normalization by its own statistics that ends in ·weight + bias.

    Layer, group, instance and RMS norm: what follows folds into the learned affine,
    what precedes does not.

    Attributes:
        weight: The learned factor, or None.
        bias: The learned summand, or None.
        weight_slot: Where a weight can be created.
        bias_slot: Where a bias can be created; None for RMS norm.
        dims: The dimensions of the output that weight and bias run along, in order.
    """

    weight: Value | None = None
    bias: Value | None = None
    weight_slot: Slot | None = None
    bias_slot: Slot | None = None
    dims: tuple[int, ...] = ()

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map of its output over the dimensions of its weight."""
        x, y = self.inputs[0], self.outputs[0]
        if gauges.moved(x):
            raise Refusal(f"{self.label} measures {x.name}, which must not change")
        if gauges.moved(y):
            self.edits(gauges)
        return [{x: Gauge.identity(len(x.shape))}] if x not in gauges else NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Weight and bias with the map of the output folded in."""
        y = self.outputs[0]
        if not gauges.moved(y):
            return {}
        after = stored_direction(gauges.of(y), self.label)
        dims = tuple(dim % len(y.shape) for dim in self.dims)
        if not set(gauges.of(y).depends_on) <= set(dims):
            raise Refusal(
                f"{self.label} has no weight along the dimension to be mapped"
            )
        sizes = tuple(y.shape[dim] for dim in dims)

        def along(values: Tensor) -> Tensor:
            shape = [y.shape[d] if d in dims else 1 for d in range(len(y.shape))]
            return values.expand(shape).reshape(sizes)

        scale, shift = along(after.scale), along(after.shift)
        old_weight = held(self.weight, self.weight_slot)
        old_bias = held(self.bias, self.bias_slot)
        weight = scale if old_weight is None else scale * old_weight
        bias = shift if old_bias is None else scale * old_bias + shift
        edits: dict[Slot, Tensor] = {}
        if old_weight is not None or bool((weight != 1).any()):
            edits |= put(self.weight, self.weight_slot, weight, self.label, "weight")
        if old_bias is not None or bool((bias != 0).any()):
            edits |= put(self.bias, self.bias_slot, bias, self.label, "bias")
        return edits


@dataclass(eq=False, repr=False)
class Table(Node):
    """Rows of a parameter picked by number: an embedding."""

    weight: Value | None = None

    def bear(self, gauges: Gauges) -> list[Alternative]:
        """Any map of the features."""
        if self.is_touched(gauges):
            self.edits(gauges)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """The mapped rows."""
        y = self.outputs[0]
        if not gauges.moved(y):
            return {}
        gauge = gauges.of(y)
        needs_channels_only(gauge, len(y.shape) - 1, self.label, "fills")
        assert self.weight is not None
        after = per_channel(
            stored_direction(gauge, self.label), len(y.shape) - 1, y.shape[-1]
        )
        return store(self.weight, after(current(self.weight)), self.label)
