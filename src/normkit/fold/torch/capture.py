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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import multi_head_attention_forward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from normkit.fold.ir.graph import Graph, Node, Value, slots_of
from normkit.fold.ir.nodes import Add, Move, Opaque
from normkit.fold.torch.joined import joined
from normkit.fold.torch.lowering import TorchCall, lower, unfused
from normkit.fold.torch.op_names import (
    LIKE,
    METADATA,
    RANDOM,
    SIZES,
    op_name,
    sized_by_values,
)
from normkit.fold.torch.tensors import TensorTable, share_memory
from normkit.fold.torch.trace import ModuleCall, TorchFunction, Trace, identities
from normkit.modeling.pytree import map_tensors, tensors_in

__all__ = ["capture"]


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    norms: str = "batch",
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
        norms: Which norms written out in Python become one node: "batch" or "all".
        keep: Called with each value and its tensor at the moment it is computed.
    """
    reader = _Reader(model, norms)
    if keep is not None:
        reader.tensors.keep = reader.unseen(keep)
    with torch.no_grad():
        reader.tensors.register_inputs((args, kwargs))
        with reader.watching(), _Underneath(reader), reader:
            result = model(*args, **kwargs)
        reader.tensors.register_outputs(result, reader.paths)
    return Trace(
        *(reader.graph, reader.root, reader.call_of, reader.tensors.slots, result),
        functions=reader.functions,
        tied=reader.tensors.tied(),
    )


class _Reader(TorchFunctionMode):
    """Turn each torch call into a node while it is active."""

    def __init__(self, model: nn.Module, norms: str) -> None:
        super().__init__()
        self.model, self.norms = model, norms
        self.graph = Graph()
        self.root = ModuleCall(model, "", None)
        self.call = self.root
        self.call_of: dict[Node, ModuleCall] = {}
        self.functions: dict[Node, TorchFunction] = {}
        self.is_inside = False
        self.depth = 0
        self.arrived_at = 0
        self.hooked: set[nn.Module] = set()
        self.sized_by_values: set[Value] = set()
        self.made_by_values = False
        # Integers chosen by the model's floats (topk), and what is true of those.
        self.numbers: set[Value] = set()
        self.paths = {module: path for path, module in model.named_modules()}
        self.held = {each: identities(each) for each in self.paths}
        self.tensors = TensorTable(
            model, self.graph, lambda: self.call.module, self._append
        )

    # Modules ---------------------------------------------------------------

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside it: the computation is the reader's own."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1

    def unseen(
        self, keep: Callable[[Value, Tensor], None]
    ) -> Callable[[Value, Tensor], None]:
        """Return `keep` as computation of the reader's own."""

        def quietly(value: Value, tensor: Tensor) -> None:
            with self.paused():
                keep(value, tensor)

        return quietly

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the calls of modules by hooks, which are removed at the end."""
        handles = []
        try:
            for module in self.paths:
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                if module._forward_hooks or module._forward_pre_hooks:
                    self.hooked.add(module)
                    handles += [
                        module.register_forward_pre_hook(self._arrive, prepend=True),
                        module.register_forward_hook(self._return, prepend=True),
                    ]
                handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True),
                    module.register_forward_hook(self._leave),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _arrive(self, module: nn.Module, args: Any) -> None:
        self.arrived_at = len(self.call.nodes)

    def _return(self, module: nn.Module, args: Any, result: Any) -> None:
        self.call.returned_at = len(self.call.nodes)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        with self.paused():
            self._begin(module, args, kwargs)

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is self.model and not self.is_inside:
            call, self.is_inside = self.root, True
        else:
            call = ModuleCall(module, self.paths[module], self.call)
            self.call.children.append(call)
            call.is_lent = identities(module) != self.held[module]
        call.inputs = [self.tensors.read(t) for t in tensors_in((args, kwargs))]
        is_hooked = module in self.hooked and self.call is not call
        if is_hooked and len(self.call.nodes) > self.arrived_at:
            for value in call.inputs:
                value.pinned = f"is read by a hook of '{call.path}'"
        self.call = call

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        with self.paused():
            self._end(module, args, result)

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        # After an exception that the model caught, the calls above never returned.
        while self.call.module is not module and self.call.parent is not None:
            self.call = self.call.parent
        call = self.call
        call.outputs = [self.tensors.read(t) for t in tensors_in(result)]
        if module in self.hooked:
            self._note_hooks(call, [*tensors_in(args), *tensors_in(result)])
        for old, node in joined(call, self.norms):
            self.replace(old, node)
        if call.parent is not None:
            self.call = call.parent

    def _note_hooks(self, call: ModuleCall, shown: list[Tensor]) -> None:
        """Pin what the hooks of a call compute with; remember what they were shown."""
        reason = f"is read by a hook of '{call.path}'"
        for tensor in shown:
            if len(call.nodes) > call.returned_at:
                self.tensors.read(tensor).pinned = reason
            else:
                self.tensors.pin_if_kept(tensor, reason)

    def replace(self, old: list[Node], node: Node) -> None:
        """Put `node` in the place of the nodes `old`, all of the running call."""
        nodes = self.graph.nodes
        node.position = old[0].position
        for held in (nodes, self.call.nodes):
            # The running call's nodes are among the last.
            at = len(held) - 1 - held[::-1].index(old[0])
            held[at] = node
            gone = set(old[1:])
            held[at + 1 :] = [other for other in held[at + 1 :] if other not in gone]
        for each in old:
            for value in dict.fromkeys(each.inputs):
                value.readers.remove(each)
            for slot in slots_of(each):
                slot.readers.remove(each)
        for value in node.outputs:
            value.producer = node
        self._connect(node)

    # Calls -----------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run one torch function and record its inputs and outputs."""
        kwargs = kwargs or {}
        name = op_name(func)
        if self.depth or name in METADATA:
            if name in SIZES and args and id(args[0]) in self.tensors.seen:
                self._check_size(self.tensors.seen[id(args[0])][1])
            return func(*args, **kwargs)
        if func is multi_head_attention_forward:
            # Its parts pass through `_Underneath`, with the mode switched off here.
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
            values = [self.tensors.read(tensor) for tensor in tensors]
            template = map_tensors((args, kwargs), self.tensors.read)
            self.made_by_values = sized_by_values(func, args)
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
                    self._looks_at("values of tensors", values)
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
                if share_memory(tensor, other):
                    value.alias_group = other_value.alias_group
            outputs.append(self.tensors.register(tensor, value))
        moving = [v for v in values if not v.is_fixed]
        is_number = bool(moving) and all(v in self.numbers for v in moving)
        is_chosen = any(
            t.is_floating_point() and not v.is_fixed
            for t, v in zip(tensors, values, strict=True)
        )
        for tensor, value in zip(made, outputs, strict=True):
            is_integer = not (tensor.is_floating_point() or tensor.is_complex())
            if is_integer and (is_number or (is_chosen and tensor.dtype != torch.bool)):
                self.numbers.add(value)
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
            self.tensors.slots,
            outputs,
            made,
        )
        is_like = name in LIKE and len(values) == 1
        node = Opaque(call.label, [] if is_like else values)
        if not is_like and (not written or any(made[0] is t for t in written)):
            node = lower(call, values)
        self.functions[node] = (func, template[0], template[1])
        node.outputs = outputs
        if fixed and not _is_edited_through(node):
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
            group = self.tensors.seen[id(tensor)][1].alias_group
            self.graph.writes.append((self._next_position(), group))
        self._append(node)

    def _check_size(self, value: Value) -> None:
        """Mark the running call if the size of `value` depends on values."""
        if value in self.sized_by_values:
            self._looks_at("sizes that depend on values of tensors", [value])

    def _looks_at(self, what: str, values: list[Value]) -> None:
        """Mark the running call, whose code may branch on `values`."""
        if all(value.is_fixed or value in self.numbers for value in values):
            self.call.routes_on = what
        else:
            self.call.branches_on = what

    def _append(self, node: Node) -> None:
        node.position = self._next_position()
        self.graph.nodes.append(node)
        self.call.nodes.append(node)
        self._connect(node)

    def _next_position(self) -> int:
        return self.graph.nodes[-1].position + 1 if self.graph.nodes else 0

    def _connect(self, node: Node) -> None:
        self.call_of[node] = self.call
        for value in dict.fromkeys(node.inputs):
            value.readers.append(node)
        self._claim_roots(node)

    def _claim_roots(self, node: Node) -> None:
        for slot in slots_of(node):
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
            self.reader.made_by_values |= sized_by_values(func, args)
            return func(*args, **(kwargs or {}))
        return self.reader.__torch_function__(func, types, args, kwargs)


# A module without children that calls one of these is known by its path alone.
_NAMED_BY_PATH = ("conv", "linear", "batch_norm", "layer_norm", "group_norm", "embed")


def _is_edited_through(node: Node) -> bool:
    """Return True if an edit of its fixed output is one of its input."""
    if isinstance(node, Add):
        return node.shifts_a_parameter
    return isinstance(node, Move) and len(node.inputs) == 1
