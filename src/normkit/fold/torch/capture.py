"""Trace one forward of a torch model: which operation reads which tensor.

Every torch function that the model calls passes through a `TorchFunctionMode`;
operations below it (scripted modules, custom autograd functions) pass through a
`TorchDispatchMode`. Tensors are identified by object and version, parameters by the
module attribute that holds them, module calls by hooks. So any module that runs can be
traced: subclasses, functional calls, control flow, unusual containers.

A trace does not contain the branch not taken. It marks each module call whose code
read the values of a tensor (`if x.sum() > 0`) or made a tensor whose size depends on
values (`x[x > 0]`, `nonzero`), and `module` refuses to fold around such a call.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.fold.ir.decomposed import as_batch_norm
from normkit.fold.ir.graph import Graph, Node, Slot, Value
from normkit.fold.ir.nodes import Move, Opaque, Parameter
from normkit.fold.torch.lowering import TorchCall, lower, unfused
from normkit.fold.torch.op_names import METADATA, RANDOM, SIZES, op_name
from normkit.fold.torch.trace import ModuleCall, Trace
from normkit.modeling.pytree import map_tensors, tensors_in

__all__ = ["capture"]


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keep: Callable[[Value, Tensor], None] | None = None,
) -> Trace:
    """Run `model` once without gradients and return its trace.

    The model's hooks, parameters and flags are as before afterwards. What its forward
    itself changes, such as the running statistics of a layer in training mode, stays
    changed.

    Args:
        model: Any module that runs.
        args: Its positional arguments.
        kwargs: Its named arguments.
        keep: Called with each value and its tensor at the moment it is computed.
    """
    reader = _Reader(model, keep)
    with torch.no_grad():
        reader.register_inputs((args, kwargs))
        with reader.watching(), _Underneath(reader), reader:
            result = model(*args, **kwargs)
        reader.register_outputs(result)
    return Trace(reader.graph, reader.root, reader.call_of, reader.slots, result)


class _Reader(TorchFunctionMode):
    """Turn each torch call into a node while it is active."""

    def __init__(
        self, model: nn.Module, keep: Callable[[Value, Tensor], None] | None
    ) -> None:
        super().__init__()
        self.model, self.keep = model, keep
        self.graph = Graph()
        self.root = ModuleCall(model, "", None)
        self.call = self.root
        self.call_of: dict[Node, ModuleCall] = {}
        self.is_inside = False
        self.depth = 0
        self.paths: dict[nn.Module, str] = {}
        self.slots: dict[tuple[nn.Module, str], Slot] = {}
        self.holders: dict[int, list[tuple[nn.Module, str]]] = {}
        self.held: dict[tuple[nn.Module, str], Value] = {}
        self.seen: dict[int, tuple[weakref.ref[Tensor], Value, int]] = {}
        self.groups = 0
        self.sized_by_values: set[Value] = set()
        self.made_by_values = False
        for path, module in model.named_modules():
            self.paths[module] = path
            for name, tensor in _stored_tensors(module):
                slot = Slot(f"{path}.{name}" if path else name, tensor.detach())
                self.slots[module, name] = slot
                self.holders.setdefault(id(tensor), []).append((module, name))

    # Modules ---------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside it: the computation is the reader's own."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the calls of modules by hooks, which are removed at the end."""
        handles = []
        try:
            for module in self.paths:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                is_seen = bool(module._forward_hooks)
                is_seen_before = bool(module._forward_pre_hooks)
                handles.append(
                    module.register_forward_pre_hook(self._enter, with_kwargs=True)
                )
                handles.append(
                    module.register_forward_hook(
                        lambda module, args, result, a=is_seen, b=is_seen_before: (
                            self._leave(module, result, a, b)
                        ),
                        always_call=False,
                    )
                )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        with self.paused():
            self._begin(module, args, kwargs)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self.model and not self.is_inside:
            call, self.is_inside = self.root, True
        else:
            call = ModuleCall(module, self.paths[module], self.call)
            self.call.children.append(call)
        call.inputs = [self.read(t) for t in tensors_in((args, kwargs))]
        self.call = call

    def _leave(
        self, module: nn.Module, result: Any, is_seen: bool, is_seen_before: bool
    ) -> None:
        with self.paused():
            self._end(module, result, is_seen, is_seen_before)

    def _end(
        self, module: nn.Module, result: Any, is_seen: bool, is_seen_before: bool
    ) -> None:
        # After an exception that the model caught, the calls above never returned.
        while self.call.module is not module and self.call.parent is not None:
            self.call = self.call.parent
        call = self.call
        call.outputs = [self.read(t) for t in tensors_in(result)]
        for values, seen in ((call.outputs, is_seen), (call.inputs, is_seen_before)):
            for value in values if seen else ():
                value.pinned = f"is read by a hook of '{call.path}'"
        self._join_decomposed(call)
        if call.parent is not None:
            self.call = call.parent

    def _join_decomposed(self, call: ModuleCall) -> None:
        """Replace the nodes of a frozen batch norm (product and sum) by one."""
        if len(call.inputs) != 1 or len(call.outputs) != 1 or call.children:
            return
        held = {**call.module._parameters, **call.module._buffers}
        if not {"running_mean", "running_var"} <= set(held) or not call.nodes:
            return
        (x,), (y,) = call.inputs, call.outputs
        node = as_batch_norm(f"'{call.path}'", call.nodes, x, y)
        if node is None:
            return
        for old in call.nodes:
            self.graph.nodes.remove(old)
            for value in old.inputs:
                value.readers.remove(old)
        call.nodes.clear()
        y.producer = node
        self._append(node)

    # Tensors ---------------------------------------------------------------

    def register_inputs(self, nest: Any) -> None:
        """Register the tensors of the arguments."""
        for tensor in tensors_in(nest):
            value = self._register(tensor, Value(tuple(tensor.shape)))
            value.pinned = "is given by the caller"
            self.graph.inputs.append(value)

    def register_outputs(self, nest: Any) -> None:
        """Pin the tensors that are returned or kept as attributes of a module."""
        for tensor in tensors_in(nest):
            value = self.read(tensor)
            value.pinned = value.pinned or "is returned by the model"
            for slot in value.roots:
                slot.locked = "is returned by the model"
            self.graph.outputs.append(value)
        for module, path in self.paths.items():
            for name, kept in list(vars(module).items()):
                if name in ("_parameters", "_buffers", "_modules"):
                    continue
                for tensor in tensors_in(kept):
                    if id(tensor) in self.seen and id(tensor) not in self.holders:
                        value = self.read(tensor)
                        value.pinned = f"is kept by '{path}' as {name}"

    def read(self, tensor: Tensor) -> Value:
        """Return the value of `tensor` in its present version."""
        known = self.seen.get(id(tensor))
        if known is not None and known[0]() is tensor:
            _, value, version = known
            if tensor._version == version:
                return value
            written = Opaque("an in-place write through an alias", [value])
            fresh = self._register(tensor, Value(tuple(tensor.shape), written))
            written.outputs = [fresh]
            self._append(written)
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
        return self._register(tensor, value)

    def _holder(self, tensor: Tensor) -> tuple[nn.Module, str] | None:
        holders = self.holders.get(id(tensor))
        if not holders:
            return None
        own = [holder for holder in holders if holder[0] is self.call.module]
        if own:
            return own[0]
        if len(holders) > 1:
            # It is unknown which of the names this code used.
            for holder in holders:
                self.slots[holder].locked = "is shared with another module"
        return holders[0]

    def _register(self, tensor: Tensor, value: Value) -> Value:
        if value.alias_group < 0:
            value.alias_group = self.groups = self.groups + 1
        self.seen[id(tensor)] = (weakref.ref(tensor), value, tensor._version)
        if self.keep is not None:
            with self.paused():
                self.keep(value, tensor)
        return value

    # Calls -----------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function and record its inputs and outputs."""
        kwargs = kwargs or {}
        name = op_name(func)
        if self.depth or name in METADATA:
            if name in SIZES and args and id(args[0]) in self.seen:
                self._check_size(self.seen[id(args[0])][1])
            return func(*args, **kwargs)
        parts = unfused(func, args, kwargs)
        if parts is not None:
            start = len(self.graph.nodes)
            with self:
                result = parts.run()
            parts.annotate(self.graph.nodes[start:])
            return result
        tensors = list(tensors_in((args, kwargs)))
        versions = [tensor._version for tensor in tensors]
        with self.paused():
            values = [self.read(tensor) for tensor in tensors]
            template = map_tensors((args, kwargs), self.read)
            self.made_by_values = _sized_by_values(func, args)
            result = func(*args, **kwargs)
            written = [
                tensor
                for tensor, version in zip(tensors, versions, strict=True)
                if tensor._version != version
            ]
            self._note(func, name, template, tensors, values, written, result)
        return result

    def _note(
        self,
        func: Any,
        name: str,
        template: Any,
        tensors: list[Tensor],
        values: list[Value],
        written: list[Tensor],
        result: Any,
    ) -> None:
        made = list(tensors_in(result))
        if not made and not written:
            if tensors and not isinstance(result, torch.Size):
                # Values went to Python, where the code may branch on them.
                if not all(v.is_fixed for v in values):
                    self.call.branches_on = "values of tensors"
                self._append(Opaque(self._label(name), values))
            return
        made += [t for t in written if all(t is not other for other in made)]
        fixed = all(v.is_fixed for v in values) and name not in RANDOM
        has_size_of_values = not fixed and (
            self.made_by_values or any(v in self.sized_by_values for v in values)
        )
        outputs = []
        for tensor in made:
            value = Value(tuple(tensor.shape))
            for other, other_value in zip(tensors, values, strict=True):
                if _share_memory(tensor, other):
                    value.alias_group = other_value.alias_group
            outputs.append(self._register(tensor, value))
        if has_size_of_values and made:
            self.sized_by_values.update(outputs)
            if self.made_by_values:
                self._check_size(outputs[0])
        call = TorchCall(
            func,
            name,
            self._label(name),
            template[0],
            template[1],
            self.call.module,
            self.call.path,
            self.slots,
            outputs,
            made,
        )
        node = Opaque(call.label, values)
        if not written or any(made[0] is t for t in written):
            node = lower(call, values)
        node.outputs = outputs
        if fixed and not (isinstance(node, Move) and len(node.inputs) == 1):
            for tensor, value in zip(made, outputs, strict=True):
                value.constant = tensor.detach()
            node = Opaque(call.label, values)
            self._claim_roots(node)
            return
        for value in outputs:
            value.producer = node
            if fixed:
                value.roots = node.inputs[0].roots
                value.constant = None if value.roots else made[0].detach()
        if fixed:
            return
        for tensor in written:
            group = self.seen[id(tensor)][1].alias_group
            self.graph.writes.append((len(self.graph.nodes), group))
        self._append(node)

    def _check_size(self, value: Value) -> None:
        """Mark the running call if the size of `value` depends on values."""
        if value in self.sized_by_values:
            self.call.branches_on = "sizes that depend on values of tensors"

    def _append(self, node: Node) -> None:
        node.position = len(self.graph.nodes)
        self.graph.nodes.append(node)
        self.call.nodes.append(node)
        self.call_of[node] = self.call
        for value in dict.fromkeys(node.inputs):
            value.readers.append(node)
        self._claim_roots(node)

    def _claim_roots(self, node: Node) -> None:
        fields = vars(node).values()
        values = [*node.inputs, *(v for v in fields if isinstance(v, Value))]
        slots = [slot for value in values for slot in value.roots]
        # An empty slot that an edit may fill is read, too, by every call.
        slots += [slot for slot in fields if isinstance(slot, Slot)]
        for slot in dict.fromkeys(slots):
            slot.readers.append(node)

    def _label(self, name: str) -> str:
        path, module = self.call.path, self.call.module
        if not path:
            return f"{name} in the model's forward"
        if not module._modules and name.startswith(_NAMED_BY_PATH):
            return f"'{path}'"
        return f"{name} in '{path}'"


class _Underneath(TorchDispatchMode):
    """Pass operations to the reader that no torch function announced."""

    def __init__(self, reader: _Reader) -> None:
        super().__init__()
        self.reader = reader

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.reader.depth:
            self.reader.made_by_values |= _sized_by_values(func, args)
            return func(*args, **(kwargs or {}))
        return self.reader.__torch_function__(func, types, args, kwargs)


# A module without children that calls one of these is known by its path alone.
_NAMED_BY_PATH = ("conv", "linear", "batch_norm", "layer_norm", "group_norm", "embed")


def _sized_by_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Return True for an operator such as nonzero, or an index by a mask."""
    if not isinstance(func, torch._ops.OpOverload):
        return False
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    indices = args[1] if len(args) > 1 else None
    return not isinstance(indices, list | tuple) or any(
        t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices
    )


def _stored_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                yield name, tensor


def _share_memory(left: Tensor, right: Tensor) -> bool:
    try:
        return (
            left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
            and left.untyped_storage().nbytes() > 0
        )
    except (RuntimeError, NotImplementedError):
        return True
