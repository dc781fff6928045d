"""Which value a tensor is: identity by object and version, parameters by holder."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from normkit.fold.ir.graph import Graph, Node, Slot, Value
from normkit.fold.ir.nodes import Opaque, Parameter
from normkit.modeling.pytree import tensors_in

__all__ = ["TensorTable", "share_memory"]


class TensorTable:
    """The tensors of one forward and their values.

    Args:
        model: The model, whose parameters and buffers are slots.
        graph: Its graph.
        caller: Returns the module whose forward is running.
        append: Appends a node to the graph.

    Attributes:
        slots: The slot of each parameter and buffer, by (module, attribute).
        seen: (the tensor, its value, its version) of each tensor, by its id.
        keep: Called with each value and its tensor when it is registered, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        caller: Callable[[], nn.Module],
        append: Callable[[Node], None],
    ) -> None:
        self.graph, self.caller, self.append = graph, caller, append
        self.slots: dict[tuple[nn.Module, str], Slot] = {}
        self.seen: dict[int, tuple[weakref.ref[Tensor], Value, int]] = {}
        self.holders: dict[int, list[tuple[nn.Module, str]]] = {}
        self.held: dict[tuple[nn.Module, str], Value] = {}
        self.groups = 0
        self.keep: Callable[[Value, Tensor], None] | None = None
        self.shown: list[tuple[weakref.ref[Tensor], Value, str]] = []
        for path, module in model.named_modules():
            for name, tensor in _stored_tensors(module):
                slot = Slot(f"{path}.{name}" if path else name, tensor.detach())
                self.slots[module, name] = slot
                self.holders.setdefault(id(tensor), []).append((module, name))

    def register_inputs(self, tree: Any) -> None:
        """Register the tensors of the arguments."""
        for tensor in tensors_in(tree):
            value = self.register(tensor, Value(tuple(tensor.shape)))
            value.pinned = "is given by the caller"
            self.graph.inputs.append(value)

    def register_outputs(self, tree: Any, paths: dict[nn.Module, str]) -> None:
        """Pin the tensors that are returned or kept: by a hook, by a module."""
        for tensor in tensors_in(tree):
            value = self.read(tensor)
            value.pinned = value.pinned or "is returned by the model"
            picked = value.picked_from
            for slot in (*value.roots, *(() if picked is None else picked.roots)):
                slot.locked = "is returned by the model"
            self.graph.outputs.append(value)
        for kept, value, reason in self.shown:
            if kept() is not None:
                value.pinned = value.pinned or reason
        for module, path in paths.items():
            for name, kept in list(vars(module).items()):
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                for tensor in tensors_in(kept):
                    if id(tensor) in self.seen and id(tensor) not in self.holders:
                        value = self.read(tensor)
                        value.pinned = f"is kept by '{path}' as {name}"

    def tied(self) -> dict[Slot, tuple[Slot, ...]]:
        """Return the other slots of each parameter that has several."""
        tied: dict[Slot, tuple[Slot, ...]] = {}
        for holders in self.holders.values():
            slots = [self.slots[holder] for holder in holders]
            for slot in slots if len(slots) > 1 else ():
                tied[slot] = tuple(other for other in slots if other is not slot)
        return tied

    def pin_if_kept(self, tensor: Tensor, reason: str) -> None:
        """Pin the value of `tensor` for `reason` if it outlives the forward."""
        value = self.read(tensor)
        if id(tensor) in self.seen:
            self.shown.append((weakref.ref(tensor), value, reason))

    def read(self, tensor: Tensor) -> Value:
        """Return the value of `tensor` in its present version."""
        known = self.seen.get(id(tensor))
        if known is not None and known[0]() is tensor:
            _, value, version = known
            if tensor._version == version:
                return value
            written = Opaque("an in-place write through an alias", [value])
            fresh = self.register(tensor, Value(tuple(tensor.shape), written))
            written.outputs = [fresh]
            self.append(written)
            return fresh
        holder = self._holder(tensor)
        if holder is not None:
            if holder not in self.held:
                slot = self.slots[holder]
                node = Parameter(f"'{slot.name}'", slot=slot)
                value = Value(tuple(tensor.shape), node, roots=(slot,))
                node.outputs = [value]
                self.held[holder] = value
            return self.held[holder]
        value = Value(tuple(tensor.shape), constant=tensor.detach())
        return self.register(tensor, value)

    def _holder(self, tensor: Tensor) -> tuple[nn.Module, str] | None:
        holders = self.holders.get(id(tensor))
        if not holders:
            return None
        own = [holder for holder in holders if holder[0] is self.caller()]
        if own:
            return own[0]
        if len(holders) > 1:
            # It is unknown which of the names this code used.
            for holder in holders:
                self.slots[holder].locked = "is shared with another module"
        return holders[0]

    def register(self, tensor: Tensor, value: Value) -> Value:
        """Record that `tensor` holds `value` now."""
        if value.alias_group < 0:
            value.alias_group = self.groups = self.groups + 1
        self.seen[id(tensor)] = (weakref.ref(tensor), value, tensor._version)
        if self.keep is not None:
            self.keep(value, tensor)
        return value


def _stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                yield name, tensor


def share_memory(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors lie in one storage, or True where none tells."""
    try:
        return (
            left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
            and left.untyped_storage().nbytes() > 0
        )
    except (RuntimeError, NotImplementedError):
        return True
