"""Give batch norms the activation that follows them, where nothing else reads between.

    batch norm → y → relu → z   becomes   batch norm with activation="relu" → z

One trace of the model says who reads y. The module of the activation steps aside: an
`Identity` if all its calls are fused, else, for a relu that one block uses in several
places, `RectifiedOnce`, which knows what is rectified already. A sum with a residual
and an activation that is a call in a forward stay where they are written: the layer's
output waits for them (`normkit.nn.pending`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from normkit.convert.kinds import norm_act_of
from normkit.errors import ArgumentError
from normkit.fold.capture import capture
from normkit.fold.nest import tensors_in
from normkit.fold.nodes import Add, Node
from normkit.fold.trace import ModuleCall, Trace
from normkit.nn.batch_norm_layer import BatchNormLayer

__all__ = ["FusionReport", "RectifiedOnce", "fuse"]


@dataclass(frozen=True)
class FusionReport:
    """What was fused, and why the rest was not.

    Attributes:
        model: The model.
        fused: What each batch norm took over, by the layer's name: "relu", or
            "add+relu" with the sum before it.
        left: The reason for each other batch norm.
    """

    model: nn.Module = field(repr=False)
    fused: dict[str, str]
    left: dict[str, str]

    def to_text(self) -> str:
        """One line per layer."""
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} fused"]
        lines += [f"  {name}: {act}" for name, act in self.fused.items()]
        lines += [f"  {name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {"fused": dict(self.fused), "left": dict(self.left)}

    def __str__(self) -> str:
        return self.to_text()


class RectifiedOnce(nn.Module):
    """A relu that lets pass what a fused batch norm has rectified already.

    Rectifying twice would change nothing but the time, so a tensor that lost its mark
    on the way is no harm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself where it is marked and unchanged since, else max(x, 0)."""
        is_done = getattr(x, "_normkit_rectified", None) == x._version
        return x if is_done else torch.relu(x)


def fuse(model: nn.Module, *args: Any, **kwargs: Any) -> FusionReport:
    """Fuse activations into the batch norms of normkit before them, in place.

    Args:
        model: Any module that runs; its batch norms those of normkit, as
            `normkit.convert(model, to="normkit")` makes them.
        *args: Example inputs, to trace the model with, in eval mode.
        **kwargs: Example inputs by name.

    Returns:
        The report. Parameters, buffers and the names of the state stay.

    Raises:
        ArgumentError: The fused model gave other outputs on the example, by more than
            1e-4 of the largest; the model is then as it was.

    Example:
        >>> import normkit
        >>> block = nn.Sequential(normkit.nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
        >>> print(fuse(block, torch.randn(2, 3, 4, 4)))
        1 of 1 fused
          0: relu
    """
    with _evaluating(model):
        trace = capture(model, args, kwargs)
        fused, left = _plan(model, trace)
        waiting = _waiting(model, trace, left)
        before = _Before(model, fused, waiting)
        try:
            for layer, activation, _ in fused.values():
                _take_over(layer, activation)
            for path in waiting:
                model.get_submodule(path).defers = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
            _step_aside(model, trace, fused)
            with torch.no_grad():
                after = model(*args, **kwargs)
            _compare(trace.result, after)
        except BaseException:
            before.restore()
            raise
    named = {path: _name_of(activation) for path, (_, activation, _) in fused.items()}
    named |= waiting
    left = {path: why for path, why in left.items() if path not in waiting}
    order = [path for path, _ in model.named_modules()]
    taken = {path: named[path] or "" for path in order if path in named}
    return FusionReport(model, taken, left)


_Plan = dict[str, tuple[BatchNormLayer, nn.Module, ModuleCall]]


def _plan(model: nn.Module, trace: Trace) -> tuple[_Plan, dict[str, str]]:
    calls: dict[nn.Module, list[ModuleCall]] = {}
    for call in _calls(trace.root):
        calls.setdefault(call.module, []).append(call)
    fused: _Plan = {}
    left: dict[str, str] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        found = _follower(layer, calls.get(layer, []), trace)
        if isinstance(found, str):
            left[path] = found
        else:
            assert isinstance(layer, BatchNormLayer)
            fused[path] = (layer, found.module, found)
    # An activation used elsewhere, too, can only stay if doing it twice does no harm.
    taken = {id(call) for _, _, call in fused.values()}
    for path, (_, activation, _) in list(fused.items()):
        others = [c for c in calls[activation] if id(c) not in taken]
        if others and type(activation) is not nn.ReLU:
            del fused[path]
            left[path] = f"'{others[0].path}' is used in other places, too"
    return fused, left


def _waiting(model: nn.Module, trace: Trace, left: dict[str, str]) -> dict[str, str]:
    """Layers whose output can wait for a sum or a call that follows, and for which.

    What cannot is given its reason in `left`.
    """
    calls: dict[nn.Module, list[ModuleCall]] = {}
    for call in _calls(trace.root):
        calls.setdefault(call.module, []).append(call)
    found: dict[str, str] = {}
    claimed: set[Node] = set()
    for path in left:
        layer = model.get_submodule(path)
        own = norm_act_of(layer) or ()
        if (
            _reason_against(layer, calls.get(layer, []))
            or any(type(child) is not nn.Identity for child in own)
            or layer._forward_hooks
            or layer._backward_hooks
        ):
            continue
        (call,) = calls[layer]
        follows = _sum_or_call(call, trace, claimed)
        if isinstance(follows, str):
            left[path] = follows
        else:
            claimed.update(follows)
            act = _called(follows[-1])
            found[path] = f"add+{act}" if len(follows) == 2 else str(act)
    return found


def _sum_or_call(
    call: ModuleCall, trace: Trace, claimed: set[Node]
) -> list[Node] | str:
    """`[activation]` or `[sum, activation]` that alone read the layer's output."""
    (y,), (x,) = call.outputs, call.inputs
    kept = {x.alias_group}
    path: list[Node] = []
    for _ in range(2):
        if y.pinned:
            return f"its output {y.pinned}" if not path else f"the sum {y.pinned}"
        readers = list(dict.fromkeys(y.readers))
        if len(readers) != 1:
            return f"{y.name} has {len(readers)} readers"
        (node,) = readers
        if node in claimed:
            return f"{node.label} is fused into the other batch norm that it adds"
        path.append(node)
        if _called(node) is not None:
            break
        if (
            len(path) == 2
            or not isinstance(node, Add)
            or len(node.inputs) != 2
            or node.factors != [1.0, 1.0]
            or node.constant is not None
            or node.inputs[0] is node.inputs[1]
            or any(v.shape != y.shape for v in node.inputs)
        ):
            return f"{node.label} follows, which is no activation and no plain sum"
        kept |= {v.alias_group for v in node.inputs if v is not y}
        (y,) = node.outputs
    first = call.nodes[0].position if call.nodes else -1
    for position, group in trace.graph.writes:
        if first < position <= path[-1].position and group in kept:
            return "what it reads is changed in place before the activation"
    runs = {trace.call_of[node] for node in path}
    if any(run.looked_at_values for run in runs):
        return "the forward around it decides by the values of tensors"
    return path


def _called(node: Node) -> str | None:
    """The activation that a node is, by its label."""
    if len(node.inputs) != 1:
        return None
    name = node.label.split(" in ")[0]
    return name if name in ("relu", "silu", "sigmoid", "tanh") else None


def _follower(
    layer: nn.Module, calls: list[ModuleCall], trace: Trace
) -> ModuleCall | str:
    """The call of the activation that alone reads the layer, or why there is none."""
    reason = _reason_against(layer, calls)
    if reason:
        return reason
    (call,) = calls
    own = norm_act_of(layer)
    if own is not None and type(own[1]) is not nn.Identity:
        return _own_activation(call, *own)
    (y,) = call.outputs
    if y.pinned:
        return f"its output {y.pinned}"
    readers = list(dict.fromkeys(y.readers))
    if len(readers) != 1:
        return f"its output has {len(readers)} readers"
    reader = trace.call_of[readers[0]]
    name = _name_of(reader.module)
    if name is None or reader.inputs != [y] or len(reader.nodes) != 1:
        return f"{readers[0].label} follows, which is no module of an activation"
    if reader.module._forward_hooks or reader.module._forward_pre_hooks:
        return f"'{reader.path}' has hooks"
    return reader


def _own_activation(
    call: ModuleCall, drop: nn.Module, act: nn.Module
) -> ModuleCall | str:
    """The call of the activation that the layer itself applies, or why it stays."""
    name = type(act).__name__
    if _name_of(act) is None or type(drop) is not nn.Identity:
        return f"its {name} or {type(drop).__name__} has no fused form"
    if act._forward_hooks or act._forward_pre_hooks or call.module._forward_hooks:
        return f"'{call.path}' or its activation has hooks"
    return next(child for child in call.children if child.module is act)


def _reason_against(layer: nn.Module, calls: list[ModuleCall]) -> str:
    if not isinstance(layer, BatchNormLayer) or (
        type(layer).forward is not BatchNormLayer.forward and norm_act_of(layer) is None
    ):
        return f"{type(layer).__name__} is not a batch norm of normkit with its forward"
    if layer.activation != "none":
        return f"it has activation={layer.activation!r} already"
    if layer.defers:
        return "it waits for what follows already"
    if len(calls) != 1:
        return f"it is called {len(calls)} times"
    (call,) = calls
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        return "it is called with a mask or a residual"
    if call.parent is not None and call.parent.looked_at_values:
        return f"'{call.parent.path}' decides by the values of tensors"
    return ""


def _name_of(module: nn.Module) -> str | None:
    """What the activation is called in a fused layer; None for any other module."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    names: dict[type[nn.Module], str] = {
        nn.ReLU: "relu",
        nn.LeakyReLU: "leaky_relu",
        nn.SiLU: "silu",
        nn.Sigmoid: "sigmoid",
        nn.Tanh: "tanh",
    }
    return names.get(type(module))


def _take_over(layer: BatchNormLayer, activation: nn.Module) -> None:
    name = _name_of(activation)
    assert name is not None
    layer.activation = name
    if isinstance(activation, nn.LeakyReLU):
        layer.negative_slope = activation.negative_slope


def _step_aside(model: nn.Module, trace: Trace, fused: _Plan) -> None:
    taken = {id(call) for _, _, call in fused.values()}
    for activation in dict.fromkeys(a for _, a, _ in fused.values()):
        every = [c for c in _calls(trace.root) if c.module is activation]
        stand_in: nn.Module = nn.Identity()
        if any(id(c) not in taken for c in every):
            stand_in = RectifiedOnce()
            for layer, other, _ in fused.values():
                if other is activation:
                    layer.register_forward_hook(_mark)
        for parent, name in _places(model, activation):
            parent._modules[name] = stand_in


def _mark(module: nn.Module, args: Any, y: Tensor) -> None:
    y._normkit_rectified = y._version  # pyright: ignore[reportAttributeAccessIssue]


def _places(model: nn.Module, wanted: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is wanted
    ]


def _calls(call: ModuleCall) -> Iterator[ModuleCall]:
    yield call
    for child in call.children:
        yield from _calls(child)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    is_root_training = model.training
    model.eval()
    try:
        yield
    finally:
        # What was put into the model meanwhile is in the mode of its surroundings.
        model.train(is_root_training)
        for module, is_training in modes:
            module.training = is_training


class _Before:
    """Where the activations were, and what the layers were."""

    def __init__(
        self, model: nn.Module, fused: _Plan, waiting: Iterable[str] = ()
    ) -> None:
        self.places = [
            (parent, name, activation)
            for activation in dict.fromkeys(a for _, a, _ in fused.values())
            for parent, name in _places(model, activation)
        ]
        self.layers = [
            (layer, dict(layer.__dict__), dict(layer._forward_hooks))
            for layer in (
                *(layer for layer, _, _ in fused.values()),
                *(model.get_submodule(path) for path in waiting),
            )
        ]

    def restore(self) -> None:
        for parent, name, activation in self.places:
            parent._modules[name] = activation
        for layer, attributes, hooks in self.layers:
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
            layer._forward_hooks.clear()
            layer._forward_hooks.update(hooks)


def _compare(before: Any, after: Any) -> None:
    for old, new in zip(tensors_in(before), tensors_in(after), strict=True):
        if not old.is_floating_point() or not old.numel():
            continue
        largest = float(old.abs().max())
        distance = float((new - old).abs().max())
        if not distance <= 1e-4 * max(largest, 1e-30) and largest == largest:
            raise ArgumentError(
                f"fusing changed the outputs on the example by {distance:.1e}, the "
                f"largest is {largest:.1e}; nothing was changed. The model may be "
                "random in eval mode: fuse its blocks one by one"
            )
