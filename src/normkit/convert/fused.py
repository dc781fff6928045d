"""Give batch norms the activation that follows them, where nothing else reads between.

    batch norm → y → relu → z   becomes   batch norm with activation="relu" → z

One trace of the model says who reads y. The module of the activation steps aside, see
`stand_ins`. A sum with a residual
and an activation that is a call in a forward stay where they are written: the layer's
output waits for them (`normkit.nn.pending`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normkit.convert.kinds import norm_act_of
from normkit.convert.report import FusionReport
from normkit.convert.stand_ins import Places, step_aside
from normkit.errors import ArgumentError
from normkit.fold.capture import capture
from normkit.fold.nest import tensors_in
from normkit.fold.nodes import Add, Node
from normkit.fold.trace import ModuleCall, Trace
from normkit.nn.batch_norm_layer import BatchNormLayer

__all__ = ["fuse"]


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
        ArgumentError: The model does not run on the inputs, or is on the meta device;
            the fused model gave other outputs on the example, by more than
            1e-4 of the largest; the model is then as it was.

    Example:
        >>> import normkit
        >>> block = nn.Sequential(normkit.nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
        >>> print(fuse(block, torch.randn(2, 3, 4, 4)))
        1 of 1 fused
          0: relu
    """
    _check_has_values(model)
    with _evaluating(model):
        trace = _captured(model, args, kwargs)
        fused, left = _plan(model, trace)
        waiting = _waiting(model, trace, left)
        before = Places(
            model,
            [activation for _, activation, _ in fused.values()],
            [
                *(layer for layer, _, _ in fused.values()),
                *(model.get_submodule(path) for path in waiting),
            ],
        )
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


def _check_has_values(model: nn.Module) -> None:
    tensors = (*model.named_parameters(), *model.named_buffers())
    without = [name for name, t in tensors if t.is_meta]
    if without:
        raise ArgumentError(
            f"{len(without)} parameters and buffers are on the meta device and have "
            f"no values, e.g. {without[0]!r}; what is fused is compared on the example "
            "inputs: load the weights first (to_empty, load_state_dict), or convert "
            "without example_inputs=, which fuses nothing"
        )


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    try:
        return capture(model, args, kwargs)
    except Exception as error:
        given = [_described(value) for value in args]
        given += [f"{name}={_described(value)}" for name, value in kwargs.items()]
        lines = str(error).strip().splitlines() or [""]
        raise ArgumentError(
            "the model does not run on the example inputs, nothing was changed: "
            f"model({', '.join(given)}) gave {type(error).__name__}: {lines[0]}. They "
            "must be what the model is called with: a tuple of positional arguments, "
            "a dict of named ones, or the single argument, of its dtype, on its device"
        ) from error


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)} on {value.device}"


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
        ):
            continue
        (call,) = calls[layer]
        follows = _sum_or_call(call, trace, claimed)
        if isinstance(follows, str):
            if not left[path].endswith("has hooks"):
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
    if _has_hooks(reader.module):
        return f"'{reader.path}' has hooks"
    return reader


def _own_activation(
    call: ModuleCall, drop: nn.Module, act: nn.Module
) -> ModuleCall | str:
    """The call of the activation that the layer itself applies, or why it stays."""
    name = type(act).__name__
    if _name_of(act) is None or type(drop) is not nn.Identity:
        return f"its {name} or {type(drop).__name__} has no fused form"
    if _has_hooks(act) or call.module._forward_hooks:
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
    if layer._backward_hooks or layer._backward_pre_hooks:
        return "it has backward hooks, which would see other gradients"
    if len(calls) != 1:
        return f"it is called {len(calls)} times"
    (call,) = calls
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        return "it is called with a mask or a residual"
    if call.parent is not None and call.parent.looked_at_values:
        return f"'{call.parent.path}' decides by the values of tensors"
    return ""


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


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
        step_aside(
            model,
            activation,
            [layer for layer, other, _ in fused.values() if other is activation],
            is_used_elsewhere=any(id(c) not in taken for c in every),
        )


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
