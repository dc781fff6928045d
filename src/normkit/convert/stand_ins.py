"""What stands where an activation was that a batch norm took over, and the way back.

An `Identity` if all calls of the activation were taken over, else, for a relu that one
block uses in several places, `RectifiedOnce`. The stand-in knows the activation, and
the layer its stand-in, as plain attributes: no children, no part of the state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, compiler, nn, relu

__all__ = ["Places", "RectifiedOnce", "put_back", "stand_in_of", "step_aside"]


class RectifiedOnce(nn.Module):
    """A relu that lets pass what a fused batch norm has rectified already.

    Rectifying twice would change nothing but the time, so a tensor that lost its mark
    on the way is no harm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself where it is marked and unchanged since, else max(x, 0)."""
        if compiler.is_compiling():
            return relu(x)  # a tensor's version is not known then, and a pass is free
        is_done = getattr(x, "_normkit_rectified", None) == x._version
        return x if is_done else relu(x)


class Places:
    """Where modules stand in a model and what its layers hold, to return to.

    Args:
        model: The model.
        modules: Those whose places may be given to others.
        layers: Those whose attributes and hooks may change.
    """

    def __init__(
        self, model: nn.Module, modules: Iterable[nn.Module], layers: Iterable[Any]
    ) -> None:
        self._places = [
            (parent, name, module)
            for module in dict.fromkeys(modules)
            for parent, name in _places(model, module)
        ]
        self._layers = [
            (layer, dict(layer.__dict__), dict(layer._forward_hooks))
            for layer in dict.fromkeys(layers)
        ]

    def restore(self) -> None:
        """Put all of it back."""
        for parent, name, module in self._places:
            parent._modules[name] = module
        for layer, attributes, hooks in self._layers:
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
            layer._forward_hooks.clear()
            layer._forward_hooks.update(hooks)


def step_aside(
    model: nn.Module,
    activation: nn.Module,
    layers: Iterable[nn.Module],
    *,
    is_used_elsewhere: bool,
) -> None:
    """Let `layers`, which apply `activation` themselves now, do so alone."""
    stand_in = RectifiedOnce() if is_used_elsewhere else nn.Identity()
    stand_in.__dict__["_stands_for"] = activation
    for layer in layers:
        layer.__dict__["_stand_in"] = stand_in
        if is_used_elsewhere:
            layer.register_forward_hook(_mark)
    for parent, name in _places(model, activation):
        parent._modules[name] = stand_in


def stand_in_of(layer: nn.Module) -> nn.Module | None:
    """What stands where the activation was that `layer` took over."""
    return layer.__dict__.get("_stand_in")


def put_back(model: nn.Module, layers: Iterable[nn.Module]) -> Places:
    """Give `layers` no activation any more, and the model its own again.

    Layers that share an activation with one of them are given none either.

    Returns:
        What it was before.
    """
    stand_ins = {
        id(stand_in): stand_in
        for stand_in in map(stand_in_of, layers)
        if stand_in is not None
    }
    sharing = [m for m in model.modules() if id(stand_in_of(m)) in stand_ins]
    before = Places(model, stand_ins.values(), sharing)
    for layer in sharing:
        for name in ("_stand_in", "activation", "negative_slope"):
            layer.__dict__.pop(name, None)
        for key, hook in list(layer._forward_hooks.items()):
            if hook is _mark:
                del layer._forward_hooks[key]
    for stand_in in stand_ins.values():
        for parent, name in _places(model, stand_in):
            parent._modules[name] = stand_in.__dict__["_stands_for"]
    return before


def _mark(module: nn.Module, args: Any, y: Tensor) -> None:
    if not compiler.is_compiling():
        y._normkit_rectified = y._version  # pyright: ignore[reportAttributeAccessIssue]


_mark.only_for_speed = True  # pyright: ignore[reportFunctionMemberAccess]


def _places(model: nn.Module, wanted: nn.Module) -> list[tuple[nn.Module, str]]:
    return [
        (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is wanted
    ]
