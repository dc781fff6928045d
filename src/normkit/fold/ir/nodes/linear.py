"""Linear maps and embeddings: their weights take in a map per channel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from normkit.affine import Affine
from normkit.fold.algebra import (
    LINEAR,
    WeightLayout,
    fold_input_affine,
    fold_output_affine,
    identity_kernel,
)
from normkit.fold.ir.gauge import per_channel, storing
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
    needs_channels_only,
    stored_direction,
    true_direction,
)

__all__ = ["Embedding", "Linear"]


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
        own_tap: The tap at the output position itself, if y has the positions of x;
            None if it has others.
    """

    weight: Value | None = None
    bias: Value | None = None
    bias_slot: Slot | None = None
    layout: WeightLayout = field(default_factory=lambda: LINEAR)
    input_dim: int = -1
    output_dim: int = -1
    sees_all_taps: bool = True
    own_tap: int | None = None
    alpha: float = 1.0
    beta: float = 1.0

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Permit any map of the outputs; of the inputs if every tap is seen."""
        if not self.is_touched(gauges):
            return NOTHING_MORE
        before, _ = self._maps(gauges)
        y = self.outputs[0]
        if self.bias is None and self.bias_slot is None and y not in gauges:
            assert self.weight is not None
            # Without a bias of its own the sum behind it may take the shift.
            weight = self.alpha * read(self.weight)
            _, lost = fold_input_affine(weight, None, before, self.layout)
            if bool((lost != 0).any()):
                shape = [1] * len(y.shape)
                shape[self.output_dim % len(shape)] = -1
                lost = lost.reshape(shape)
                return [{y: storing(torch.ones_like(lost), -lost)}]
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Return W and b with both maps folded in."""
        if not self.is_touched(gauges):
            return {}
        before, after = self._maps(gauges)
        assert self.weight is not None
        weight = read(self.weight)
        weight = weight if self.alpha == 1 else self.alpha * weight
        bias = read_parameter(self.bias, self.bias_slot)
        bias = None if bias is None else self.beta * bias
        new_bias = torch.zeros_like(after.shift) if bias is None else bias
        if gauges.changed(self.inputs[0]):
            weight, new_bias = fold_input_affine(weight, bias, before, self.layout)
        if gauges.changed(self.outputs[0]):
            weight, new_bias = fold_output_affine(weight, new_bias, after, self.layout)
        weight = weight if self.alpha == 1 else weight / self.alpha
        edits: dict[Slot, Tensor] = {}
        if any(gauges.of(v).has_scale for v in (self.inputs[0], self.outputs[0])):
            edits = edit_value(self.weight, weight, self.label)
        # Created even where it comes out 0, so that which parameters a folded model
        # has does not depend on the numbers in it.
        if self.bias is None and self.bias_slot is None:
            size = float((1.0 + before.shift.abs().amax()) * weight.abs().amax())
            new_bias = torch.where(new_bias.abs() > 1e-11 * size, new_bias, 0.0)
        is_needed = self.bias_slot is not None and gauges.changed(self.outputs[0])
        if is_needed or bool((new_bias != (0 if bias is None else bias)).any()):
            edits |= self._bias_edit(new_bias)
        return edits

    def with_diagonal(self, added: Affine) -> dict[Slot, Tensor]:
        """Return the edits after which it also adds scale·x + shift to its output.

        Args:
            added: Two vectors over its channels.
        """
        if self.weight is None or self.own_tap is None:
            raise Refusal(f"{self.label} has no weight for its own position")
        shape = self.weight.shape
        if self.layout.input_channels(shape) != self.layout.output_channels(shape):
            raise Refusal(f"{self.label} changes the number of channels")
        eye = identity_kernel(shape, self.layout, self.own_tap, scale=added.scale)
        weight = read(self.weight) + eye / self.alpha
        bias = read_parameter(self.bias, self.bias_slot)
        bias = torch.zeros_like(added.shift) if bias is None else self.beta * bias
        return edit_value(self.weight, weight, self.label) | self._bias_edit(
            bias + added.shift
        )

    def _bias_edit(self, bias: Tensor) -> dict[Slot, Tensor]:
        """Return the edit after which beta·b is `bias`."""
        if self.beta == 0:
            raise Refusal(f"{self.label} multiplies its bias by 0")
        new = bias / self.beta
        return edit_parameter(self.bias, self.bias_slot, new, self.label, "bias")

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
class Embedding(Node):
    """Rows of a parameter, picked by number."""

    weight: Value | None = None

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Permit any map of the features."""
        if self.is_touched(gauges):
            self.edits(gauges)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Return the mapped rows."""
        y = self.outputs[0]
        if not gauges.changed(y):
            return {}
        gauge = gauges.of(y)
        needs_channels_only(gauge, len(y.shape) - 1, self.label, "fills")
        assert self.weight is not None
        after = per_channel(
            stored_direction(gauge, self.label), len(y.shape) - 1, y.shape[-1]
        )
        return edit_value(self.weight, after(read(self.weight)), self.label)
