"""Parameters as values: read them, and say which slot an edit of one has to change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.fold.ir.graph import (
    NOTHING_MORE,
    Alternative,
    Gauges,
    Node,
    Refusal,
    Slot,
    Value,
)
from normkit.fold.ir.nodes.rules import stored_direction

__all__ = ["Parameter", "edit_parameter", "edit_value", "read", "read_parameter"]


@dataclass(eq=False, repr=False)
class Parameter(Node):
    """A parameter read as a tensor of the network (a position embedding, a token)."""

    slot: Slot | None = None

    def read(self, value: Value) -> Tensor:
        """Return the content of the slot."""
        assert self.slot is not None
        assert self.slot.tensor is not None
        return self.slot.tensor.to("cpu", torch.float64)

    def edit_for(self, value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
        """Return the edit of the slot."""
        return {editable(self.slot, label): new}

    def propagate(self, gauges: Gauges) -> list[Alternative]:
        """Permit any map, by editing the parameter."""
        if self.is_touched(gauges):
            editable(self.slot, self.label)
            stored_direction(gauges.of(self.outputs[0]), self.label)
        return NOTHING_MORE

    def edits(self, gauges: Gauges) -> dict[Slot, Tensor]:
        """Return the parameter in its new gauge."""
        if self.slot is None or not self.is_touched(gauges):
            return {}
        to_stored = stored_direction(gauges.of(self.outputs[0]), self.label)
        return {self.slot: to_stored.scale * read(self.outputs[0]) + to_stored.shift}


def read(value: Value) -> Tensor:
    """Return the content of a fixed value after the edits so far, in float64."""
    if value.constant is not None:
        return value.constant.to("cpu", torch.float64)
    if value.producer is None:
        raise Refusal(f"{value.name} is not the same in every run")
    return value.producer.read(value)


def edit_value(value: Value, new: Tensor, label: str) -> dict[Slot, Tensor]:
    """Return the edit after which `read(value)` is `new`."""
    if value.producer is None:
        raise Refusal(f"the weight of {label} is computed in its forward, not stored")
    return value.producer.edit_for(value, new, label)


def read_parameter(value: Value | None, slot: Slot | None) -> Tensor | None:
    """Return a weight or bias: the one that is read, or the one created in `slot`."""
    if value is not None:
        return read(value)
    if slot is None or slot.tensor is None:
        return None
    return slot.tensor.to("cpu", torch.float64)


def edit_parameter(
    value: Value | None, slot: Slot | None, new: Tensor, label: str, name: str
) -> dict[Slot, Tensor]:
    """Return the edit after which `read_parameter` returns `new`."""
    if value is not None:
        return edit_value(value, new, label)
    return {editable(slot, label, name): new}


def editable(slot: Slot | None, label: str, name: str = "parameter") -> Slot:
    """Return `slot` if it may be edited, else raise `Refusal`."""
    if slot is None:
        raise Refusal(f"{label} has no {name} to change")
    if slot.locked:
        raise Refusal(f"{slot.name} {slot.locked}")
    return slot
