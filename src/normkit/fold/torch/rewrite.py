"""Edits of a torch module, by name: they apply to every copy and can be undone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.fold.ir.nodes import Add, BatchNorm
from normkit.fold.torch.trace import ModuleCall, Trace

__all__ = [
    "Copied",
    "NormModule",
    "Replace",
    "SetParameter",
    "Shift",
    "Sum",
    "norm_modules",
]


@dataclass(frozen=True)
class Rest:
    """Operations of a batch norm's module after the normalization.

    Attributes:
        children: Its children that it calls with the normalized values, in that order.
        activation: The activation that it applies in the same pass, before them.
        slope: Of a leaky_relu.
        adds: Whether it adds a `residual` before that.
    """

    children: tuple[str, ...] = ()
    activation: str = "none"
    slope: float = 0.01
    adds: bool = False

    def of(self, old: nn.Module, first: OrderedDict[str, nn.Module]) -> nn.Module:
        """Return a module of `first` and these operations; `old` has the children."""
        parts, activation = OrderedDict(first), self._activation()
        if self.adds:
            return Sum(nn.Sequential(parts), activation or nn.Identity())
        if activation is not None:
            parts["activation"] = activation
        parts.update((name, old.get_submodule(name)) for name in self.children)
        if not parts:
            return nn.Identity()
        if len(parts) == 1 and not self.children:
            return next(iter(parts.values()))
        return nn.Sequential(parts)

    def _activation(self) -> nn.Module | None:
        if self.activation == "leaky_relu":
            return nn.LeakyReLU(self.slope)
        made: dict[str, type[nn.Module]] = {
            "relu": nn.ReLU,
            "silu": nn.SiLU,
            "gelu": nn.GELU,
            "sigmoid": nn.Sigmoid,
            "tanh": nn.Tanh,
        }
        return made[self.activation]() if self.activation in made else None


class Sum(nn.Module):
    """act(before(x) + residual), with the signature of the batch norm it replaces.

    Args:
        before: The rest of the batch norm before the sum.
        activation: The activation after it.
    """

    def __init__(self, before: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.before, self.activation = before, activation

    def forward(self, x: Tensor, *, mask: None = None, residual: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        return self.activation(self.before(x) + residual)


@dataclass(eq=False)
class NormModule:
    """A module of the model that is a batch norm at inference.

    Attributes:
        path: Its name in the model.
        module: The module of the traced copy.
        nodes: Its calls; none if it did not run.
        refusal: Reason why it must stay; empty if it may go.
        rest: Its operations that stay.
        places: Each (path of the parent, name) under which the model holds it.
    """

    path: str
    module: nn.Module
    nodes: list[BatchNorm]
    refusal: str = ""
    rest: Rest = Rest()
    places: tuple[tuple[str, str], ...] = ()

    @property
    def kind(self) -> str:
        """The name of its class."""
        return type(self.module).__name__

    def replacement(
        self, old: nn.Module, *, needs_copy: bool, shift: Tensor | None
    ) -> nn.Module:
        """Return the replacement of `old`, this module in one of the copies."""
        first: dict[str, nn.Module] = {}
        if shift is not None:
            like = _like(old, "bias")
            dim = self.nodes[0].channel_dim - len(self.nodes[0].inputs[0].shape)
            first["shift"] = Shift(shift.to(like.device, like.dtype), dim)
        elif needs_copy:
            first["copied"] = Copied()
        return self.rest.of(old, OrderedDict(first))


class Copied(nn.Module):
    """A copy of the input.

    It replaces a batch norm whose output is written to in place while its input is
    still needed.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of `x`."""
        return x.clone()


class Shift(nn.Module):
    """X + bias per channel: the rest of a batch norm of which the scale was folded.

    Args:
        bias: Summand per channel, shape `(C,)`.
        dim: The dimension of the channels, counted from the end.
    """

    def __init__(self, bias: Tensor, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum, of the shape of `x`."""
        return x + self.bias.reshape(-1, *(1,) * (-self.dim - 1))


@dataclass(frozen=True)
class SetParameter:
    """Set the parameter or buffer `name` of the module at `path` to `tensor`."""

    path: str
    name: str
    tensor: Tensor

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Apply it, rounding once to the dtype there; return a function to undo it."""
        module = model.get_submodule(self.path)
        held: dict[str, Any] = module._parameters
        if self.name in module._buffers:
            held = module._buffers
        old = held[self.name]
        like = _like(module, self.name)
        new = self.tensor.to(like.device, like.dtype)
        if self.name in module._parameters:
            new = nn.Parameter(new, requires_grad=like.requires_grad)
        held[self.name] = new

        def undo() -> None:
            held[self.name] = old

        return undo

    def overflows_in(self, model: nn.Module) -> bool:
        """Return True if rounding to the dtype there makes a finite number infinite."""
        module = model.get_submodule(self.path)
        like = _like(module, self.name)
        return float(self.tensor.abs().amax()) > torch.finfo(like.dtype).max


def _like(module: nn.Module, name: str) -> Tensor:
    """Return `name`, or a tensor to model it on: the weight, a statistic."""
    held = {**module._parameters, **module._buffers}
    ranked = [held.get(name), held.get("weight"), *held.values()]
    return next(t for t in ranked if t is not None and t.is_floating_point())


@dataclass(frozen=True)
class Replace:
    """Replace the batch norm `norm` in every place where the model holds it.

    With `shift`, a sum per channel stays.
    """

    norm: NormModule
    needs_copy: bool = False
    shift: Tensor | None = None

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Apply it; return a function to undo it."""
        old = model.get_submodule(self.norm.path)
        new = self.norm.replacement(old, needs_copy=self.needs_copy, shift=self.shift)
        new.training = old.training
        places = [
            (model.get_submodule(parent)._modules, name)
            for parent, name in self.norm.places
        ]
        for held, name in places:
            held[name] = new

        def undo() -> None:
            for held, name in places:
                held[name] = old

        return undo


def norm_modules(trace: Trace) -> list[NormModule]:
    """Return every batch norm of a traced model, in the order of its modules.

    A batch norm is a module whose own forward normalizes an activation by fixed
    statistics, or one of torch's classes that did not run.
    """
    calls: dict[nn.Module, list[tuple[BatchNorm, ModuleCall]]] = {}
    for node in trace.graph.nodes:
        if isinstance(node, BatchNorm):
            call = trace.call_of[node]
            calls.setdefault(call.module, []).append((node, call))
    found = []
    places: dict[nn.Module, list[tuple[str, str]]] = {}
    for path, module in trace.root.module.named_modules():
        for name, child in module._modules.items():
            if child is not None:
                places.setdefault(child, []).append((path, name))
    for path, module in trace.root.module.named_modules():
        if module in calls:
            nodes = [node for node, _ in calls[module]]
            norm = NormModule(path, module, nodes)
            norm.places = tuple(places.get(module, ()))
            bodies = {_body(node, call) for node, call in calls[module]}
            body = bodies.pop() if len(bodies) == 1 else "is called in several ways"
            if isinstance(body, str):
                norm.refusal = body
            else:
                norm.rest = body
            norm.refusal = _reason_against(norm) or norm.refusal
            found.append(norm)
        elif isinstance(module, _BatchNorm):
            why = "it did not run on the example inputs"
            found.append(NormModule(path, module, [], refusal=why))
    return found


def _body(node: BatchNorm, call: ModuleCall) -> str | Rest:
    """Return the operations after the normalization, or why the module must stay."""
    name = type(call.module).__name__
    if call.nodes != [node, *node.epilogue]:
        return (
            f"the forward of {name} calls batch_norm as a function among other things, "
            "and would still call it; make it a module of its own"
        )
    if not call.inputs or call.inputs[0] is not node.inputs[0]:
        return f"{name} changes its input before it normalizes"
    value, rest = call.nodes[-1].outputs[0], []
    names = {child: key for key, child in call.module._modules.items()}
    for child in call.children:
        if child.inputs != [value] or len(child.outputs) != 1:
            return f"{name} does more than normalize and activate"
        if child.module not in names:
            return f"{name} calls a module that is not its own"
        value = child.outputs[0]
        rest.append(names[child.module])
    if call.outputs != [value]:
        return f"{name} returns something else than what it normalized"
    adds = any(isinstance(other, Add) for other in node.epilogue)
    if adds and rest:
        return f"{name} adds a residual and calls modules of its own"
    return Rest(tuple(rest), node.activation, node.slope, adds)


def _reason_against(norm: NormModule) -> str:
    module = norm.module
    locked = [node.locked for node in norm.nodes if node.locked]
    if locked:
        return f"it {locked[0]}"
    if not norm.path:
        return "it is the model itself"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has a forward hook, which would be lost"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized"
    mine = set(norm.nodes)
    for node in norm.nodes:
        for value in (node.weight, node.bias, node.mean, node.var):
            for slot in () if value is None else value.roots:
                others = [r for r in slot.readers if r not in mine]
                if others:
                    return f"{slot.name} is also used by {others[0].label}"
    return ""
