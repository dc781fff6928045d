"""From a torch call to the kind of node it is.

One function per family of operations, found by the operation's bare name; what has
no entry is opaque. An entry may give up (answer None) on arguments it does not know:
the call is opaque then, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkit.fold.algebra import (
    LINEAR,
    MATMUL,
    conv_layout,
    conv_transpose_layout,
)
from normkit.fold.graph import Slot, Value
from normkit.fold.nest import tensors_in
from normkit.fold.ops import (
    BatchNorm,
    Linear,
    Move,
    Node,
    Opaque,
)

__all__ = ["TorchCall", "lower"]


@dataclass(frozen=True)
class TorchCall:
    """One call of a torch function, with values in place of tensors.

    Attributes:
        func: The function.
        name: Its bare name.
        label: What a person calls this call.
        args: Positional arguments.
        kwargs: Named arguments.
        caller: The module call whose forward made it.
        slots: Every place that holds a parameter, by (module, attribute).
        outputs: The values it made.
    """

    func: Callable[..., Any]
    name: str
    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    caller: Any
    slots: dict[tuple[nn.Module, str], Slot]
    outputs: list[Value]

    def get(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def empty_slot(self, name: str, beside: Value | None) -> Slot | None:
        """The place `name` of the calling module, if it is there and holds None.

        A layer keeps weight and bias side by side and passes both, so a bias can be
        created where the weight beside it is the module's own.
        """
        module = self.caller.module
        held = module._parameters
        if held.get(name, 0) is not None:
            return None
        if beside is not None and not any(
            slot is self.slots.get((module, "weight")) for slot in beside.roots
        ):
            return None
        key = (module, name)
        if key not in self.slots:
            path = self.caller.path
            self.slots[key] = Slot(f"{path}.{name}" if path else name, None)
        return self.slots[key]


def lower(call: TorchCall, values: list[Value]) -> Node:
    """The node that `call` is; opaque if nothing better is known."""
    rule = _RULES.get(call.name)
    node = rule(call) if rule is not None else None
    return node or Opaque(call.label, values)


def _convolution(call: TorchCall) -> Node | None:
    spatial = int(call.name[-2])
    is_transposed = "transpose" in call.name
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    if not _is_held(weight, bias):
        return None
    if is_transposed:
        groups = call.get(6, "groups", 1)
        # Each output position sees another subset of the taps, padded or not.
        sees_all_taps = False
        layout = conv_transpose_layout(groups)
    else:
        groups = call.get(6, "groups", 1)
        kernel = weight.shape[2:]
        sees_all_taps = not _pads(call.get(4, "padding", 0), kernel)
        layout = conv_layout(groups)
    channel_dim = len(x.shape) - spatial - 1
    return Linear(
        call.label,
        [x],
        weight=weight,
        bias=bias,
        bias_slot=None if bias is not None else call.empty_slot("bias", weight),
        layout=layout,
        input_dim=channel_dim,
        output_dim=channel_dim,
        sees_all_taps=sees_all_taps,
    )


def _pads(padding: Any, kernel: tuple[int, ...]) -> bool:
    if padding == "valid":
        return False
    if padding == "same":
        return any(size > 1 for size in kernel)
    return any(
        p != 0 for p in (padding if isinstance(padding, tuple | list) else [padding])
    )


def _linear(call: TorchCall) -> Node | None:
    x, weight, bias = call.get(0, "input"), call.get(1, "weight"), call.get(2, "bias")
    if not _is_held(weight, bias) or len(weight.shape) != 2:
        return None
    return Linear(
        call.label,
        [x],
        weight=weight,
        bias=bias,
        bias_slot=None if bias is not None else call.empty_slot("bias", weight),
        layout=LINEAR,
    )


def _addmm(call: TorchCall) -> Node | None:
    bias, x, weight = call.get(0, "input"), call.get(1, "mat1"), call.get(2, "mat2")
    if not _is_held(weight, bias) or len(bias.shape) != 1:
        return None
    return Linear(
        call.label,
        [x],
        weight=weight,
        bias=bias,
        layout=MATMUL,
        alpha=float(call.kwargs.get("alpha", 1)),
        beta=float(call.kwargs.get("beta", 1)),
    )


def _matmul(call: TorchCall) -> Node | None:
    x, weight = call.get(0, "input"), call.get(1, "other")
    if not isinstance(x, Value) or not _is_held(weight, None):
        return None
    if x.is_fixed or len(weight.shape) != 2 or len(x.shape) < 2:
        return None
    return Linear(call.label, [x], weight=weight, layout=MATMUL)


def _batch_norm(call: TorchCall) -> Node | None:
    if isinstance(call.func, torch._ops.OpOverload) or call.func is torch.batch_norm:
        order = ("input", "weight", "bias", "running_mean", "running_var")
    else:
        order = ("input", "running_mean", "running_var", "weight", "bias")
    at = {name: call.get(position, name) for position, name in enumerate(order)}
    if "no_training" in call.name:
        is_training, eps = False, call.get(6, "eps")
    else:
        is_training = bool(call.get(5, "training", False))
        eps = call.get(7, "eps", 1e-5)
    x = at["input"]
    if x.is_fixed:
        return None
    channel_dim = int(call.kwargs.get("channel_dim", 1)) % max(len(x.shape), 1)
    node = BatchNorm(
        call.label,
        [x],
        mean=at["running_mean"],
        var=at["running_var"],
        weight=at["weight"],
        bias=at["bias"],
        eps=float(eps),
        channel_dim=channel_dim,
    )
    if node.weight is None:
        node.weight_slot = call.empty_slot("weight", None)
    if node.bias is None:
        node.bias_slot = call.empty_slot("bias", None)
    if call.kwargs.get("mask") is not None:
        node.locked = "normalizes under a mask, and writes zeros elsewhere"
    held = [v for v in (node.mean, node.var, node.weight, node.bias) if v is not None]
    if is_training:
        node.locked = "normalizes by the statistics of each batch (training mode)"
    elif not all(value.is_fixed for value in held):
        node.locked = "takes its statistics or weights from the input"
    return node


def _is_held(weight: Any, bias: Any) -> bool:
    return all(
        value is None or (isinstance(value, Value) and value.is_fixed)
        for value in (weight, bias)
    ) and isinstance(weight, Value)


def _move(call: TorchCall) -> Node | None:
    """Replayed on other tensors in place of all that depend on the input."""
    read = list(dict.fromkeys(_values_in((call.args, call.kwargs))))
    moved = [v for v in read if not v.is_fixed]
    if not moved:
        moved = [v for v in read if v.roots] or read
    return Move(call.label, moved, replay=_replayed(call, moved))


def _first_moved(call: TorchCall) -> Node | None:
    """Only the first argument is moved; the others say where to."""
    x = call.get(0, "input")
    if not isinstance(x, Value):
        return None
    others = [v for v in _values_in((call.args[1:], call.kwargs)) if not v.is_fixed]
    if others:
        return None
    return Move(call.label, [x], replay=_replayed(call, [x]))


def _replayed(
    call: TorchCall, moved: list[Value]
) -> Callable[[list[Tensor]], list[Tensor]]:
    position = {value: i for i, value in enumerate(moved)}

    def replay(tensors: list[Tensor]) -> list[Tensor]:
        def fill(nest: Any) -> Any:
            if isinstance(nest, Value):
                if nest in position:
                    return tensors[position[nest]]
                assert nest.constant is not None
                return nest.constant.cpu()
            if isinstance(nest, tuple | list):
                filled = [fill(part) for part in nest]
                return filled if isinstance(nest, list) else tuple(filled)
            if isinstance(nest, dict):
                return {key: fill(part) for key, part in nest.items()}
            return nest

        result = call.func(*fill(call.args), **fill(call.kwargs))
        return list(tensors_in(result))

    return replay


def _same(call: TorchCall) -> Node | None:
    """Every element stays where it is: a copy, a cast, a dropout at inference."""
    x = call.get(0, "input")
    if not isinstance(x, Value) or x.shape != call.outputs[0].shape:
        return None
    return Move(call.label, [x])


def _cast(call: TorchCall) -> Node | None:
    """A change of dtype or device; not to integers, which would round."""
    return _same(call)


def _values_in(nest: Any) -> list[Value]:
    if isinstance(nest, Value):
        return [nest]
    if isinstance(nest, tuple | list):
        return [value for part in nest for value in _values_in(part)]
    if isinstance(nest, dict):
        return [value for part in nest.values() for value in _values_in(part)]
    return []


_Rule = Callable[[TorchCall], "Node | None"]


def _rules() -> dict[str, _Rule]:
    families: list[tuple[str, _Rule]] = [
        (
            "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
            _convolution,
        ),
        ("linear", _linear),
        ("addmm", _addmm),
        ("matmul mm", _matmul),
        ("batch_norm _native_batch_norm_legit_no_training", _batch_norm),
        ("contiguous clone detach data alias", _same),
        (
            "view reshape flatten unflatten permute transpose t T mT swapaxes "
            "swapdims movedim moveaxis squeeze unsqueeze view_as reshape_as",
            _first_moved,
        ),
    ]
    return {name: rule for names, rule in families for name in names.split()}


_RULES = _rules()
