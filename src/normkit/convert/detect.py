"""Detection of normalizations by what they compute.

`LlamaRMSNorm` or `LayerNorm2d` write their formula out, each library its own. Such a
forward is run in float64 on random values, with random weights, beside the formulas
that normkit has; it is taken for one of them if outputs and gradients are equal on
every shape that it accepts, in training and in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import normkit.nn as ours
from normkit.fold.torch.float64 import InFloat64
from normkit.functional import rms_norm

__all__ = ["Detected", "detect", "looks_like_a_norm"]

_TOLERANCE = 1e-9
# Tried for a layer that names no eps.
_USUAL_EPS = (1e-5, 1e-6, 1e-12)


@dataclass(frozen=True)
class Detected:
    """The formula that a layer computes.

    Attributes:
        target: The layer of normkit that has it.
        formula: Which of its forms, a key of `_FORMULAS`.
        settings: What the target reads from its instance and this layer lacks.
        then_acts: The layer's children `drop` and `act` follow.
    """

    target: type[nn.Module]
    formula: str
    settings: tuple[tuple[str, Any], ...]
    then_acts: bool = False

    def attributes(self, custom: type[nn.Module]) -> dict[str, Any]:
        """Return the body of a class derived from `custom` and the target."""
        formula, then_acts = _FORMULAS[self.formula], self.then_acts
        own: Callable[..., Any] = custom.forward

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            # Other arguments, or a weight of another dtype, follow the layer's rules.
            if kwargs or len(args) != 1 or not _is_plain(self, args[0]):
                return own(self, *args, **kwargs)
            y = formula(self, args[0])
            return self.act(self.drop(y)) if then_acts else y

        return {"forward": forward, **dict(self.settings)}


def looks_like_a_norm(module: nn.Module) -> bool:
    """Return whether `module` is named a norm and holds a weight and bias at most."""
    return (
        "norm" in type(module).__name__.lower()
        and "forward" not in module.__dict__
        and set(module._parameters) <= {"weight", "bias"}
        and not module._buffers
        and _then_acts(module) is not None
        and _sizes(module) is not None
    )


def detect(module: nn.Module) -> Detected | None:
    """Return the formula of `module`, or None if normkit has none that is equal.

    Args:
        module: Any; it is neither called nor changed, but a copy is.
    """
    if not looks_like_a_norm(module):
        return None
    known = _KNOWN.setdefault(type(module), {})
    try:
        key = _settings_of(module)
        if key not in known:
            known[key] = _tried(module)
        return known[key]
    except TypeError:  # a setting that cannot be compared
        return _tried(module)


# By class and settings: a network has many of one kind.
_KNOWN: WeakKeyDictionary[type, dict[Any, Detected | None]] = WeakKeyDictionary()


def _settings_of(module: nn.Module) -> Any:
    internal = vars(nn.Module()).keys()
    own = {k: v for k, v in vars(module).items() if k not in internal}
    shapes = {k: p if p is None else p.shape for k, p in module._parameters.items()}
    act = module._modules.get("act")
    acts = {} if act is None else {"class": type(act), "repr": repr(act)}
    found = tuple(tuple(sorted(part.items())) for part in (own, shapes, acts))
    hash(found)
    return found


def _tried(module: nn.Module) -> Detected | None:
    sizes, then_acts = _sizes(module), _then_acts(module)
    assert sizes is not None
    probe = copy.copy(module)
    probe._parameters = _random_parameters(module)
    probe._forward_hooks, probe._forward_pre_hooks = {}, {}  # pyright: ignore[reportAttributeAccessIssue]
    with InFloat64(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        answers = list(_answers(probe, sizes))
        if not answers:
            return None
        for found in _candidates(module, sizes, bool(then_acts)):
            if _is_equal(found, probe, answers):
                return found
    return None


def _is_plain(layer: Any, x: Any) -> bool:
    weight = layer.weight
    return isinstance(x, Tensor) and (weight is None or weight.dtype == x.dtype)


def _sizes(module: nn.Module) -> tuple[int, ...] | None:
    weight = module._parameters.get("weight")
    found = weight.shape if weight is not None else None
    if found is None:
        found = getattr(module, "normalized_shape", None)
    if isinstance(found, int):
        found = (found,)
    return tuple(found) if found else None


def _then_acts(module: nn.Module) -> bool | None:
    """Return whether `drop` and `act` follow; None for any other children."""
    children = module._modules
    if not children:
        return False
    if set(children) != {"drop", "act"} or type(children["drop"]) is not nn.Identity:
        return None
    act = children["act"]
    if act is None:
        return None
    has_state = any(True for _ in act.parameters()) or any(act.children())
    return None if has_state or act._forward_hooks or act._forward_pre_hooks else True


def _random_parameters(module: nn.Module) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(11)
    return {
        name: None
        if p is None
        else nn.Parameter(torch.randn(p.shape, generator=draw, dtype=torch.float64))
        for name, p in module._parameters.items()
    }


_Answer = tuple[Tensor, list[Tensor]]


def _answers(probe: nn.Module, sizes: tuple[int, ...]) -> Iterator[_Answer]:
    """Yield inputs and what the layer returns for them; skip shapes it refuses."""
    for x in _inputs(sizes):
        for training in (True, False):
            probe.training = training
            try:
                yield x, _outcome(probe, type(probe).forward, x)
            except Exception:
                continue


def _inputs(sizes: tuple[int, ...]) -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(13)
    a, b = [n for n in (3, 5, 7) if n not in sizes][:2]
    shapes = [(4, *sizes), (4, a, *sizes), (4, a, b, *sizes)]
    if len(sizes) == 1:
        shapes += [(4, *sizes, a), (4, *sizes, a, b)]
    for shape in shapes:
        x = torch.randn(shape, generator=draw, dtype=torch.float64) + 0.5
        # Small samples tell one eps from another.
        scale = torch.tensor([1.0, 1e-1, 1e-3, 1e2], dtype=torch.float64)
        yield x * scale.view(4, *(1,) * (x.dim() - 1))


def _outcome(
    layer: nn.Module, forward: Callable[[Any, Tensor], Any], x: Tensor
) -> list[Tensor]:
    """Return the output, and the gradients of a random cotangent.

    Nothing at all for a layer that writes to its input: its readers may count upon it.
    """
    given = x.detach().requires_grad_()
    shown = given + 0
    y = forward(layer, shown)
    if not torch.equal(shown, x):
        return []
    if type(y) is not Tensor or y.dtype != torch.float64 or y.shape != x.shape:
        raise TypeError("it does not return a tensor of its input's kind")
    draw = torch.Generator().manual_seed(17)
    dy = torch.randn(y.shape, generator=draw, dtype=torch.float64)
    parameters = [p for p in layer._parameters.values() if p is not None]
    return [y.detach(), *torch.autograd.grad(y, [given, *parameters], dy)]


def _is_equal(found: Detected, probe: nn.Module, answers: list[_Answer]) -> bool:
    custom = type(probe)
    body = found.attributes(custom)
    placeholder = copy.copy(probe)
    try:
        placeholder.__class__ = type(custom.__name__, (custom, found.target), body)
    except TypeError:  # no order of bases: a layer of torch itself
        return False
    for x, wanted in answers:
        try:
            got = _outcome(placeholder, body["forward"], x)
        except Exception:
            return False
        if len(got) != len(wanted):
            return False
        for mine, its in zip(got, wanted, strict=True):
            if mine.shape != its.shape:
                return False
            largest = float(its.abs().max()) if its.numel() else 0.0
            if not float((mine - its).abs().max()) <= _TOLERANCE * largest:
                return False
    return True


def _candidates(
    module: nn.Module, sizes: tuple[int, ...], then_acts: bool
) -> Iterator[Detected]:
    names = vars(module)
    named = [v for k, v in names.items() if "eps" in k and isinstance(v, float)]
    absent: dict[str, Any] = {
        name: None for name in ("weight", "bias") if name not in module._parameters
    }
    for eps in dict.fromkeys(named or _USUAL_EPS):
        for formula, (target, settings) in _targets(module, sizes).items():
            if target is ours.RMSNorm and module._parameters.get("bias") is not None:
                continue
            lacking = {k: v for k, v in settings.items() if k not in names}
            kept = tuple({"eps": eps, **absent, **lacking}.items())
            yield Detected(target, formula, kept, then_acts)


def _targets(
    module: nn.Module, sizes: tuple[int, ...]
) -> dict[str, tuple[type[nn.Module], dict[str, Any]]]:
    has_weight = module._parameters.get("weight") is not None
    last = {"normalized_shape": sizes, "elementwise_affine": has_weight}
    found: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
        "layer": (ours.LayerNorm, {**last, "channel_dim": -1}),
        "rms": (ours.RMSNorm, last),
    }
    if has_weight:
        found["rms, 1 + weight"] = (ours.RMSNorm, last)
    if len(sizes) == 1:
        found["layer over channels"] = (ours.LayerNorm, {**last, "channel_dim": 1})
        found["rms over channels"] = (ours.RMSNorm, last)
        groups: int = getattr(module, "num_groups", 1)
        grouped = {"num_groups": groups, "num_channels": sizes[0], "affine": has_weight}
        found["group"] = (ours.GroupNorm, grouped)
    return found


def _rms_one_more(layer: Any, x: Tensor) -> Tensor:
    weight = 1 + layer.weight.to(torch.promote_types(x.dtype, torch.float32))
    return rms_norm(x, layer.normalized_shape, weight, layer.eps)


def _rms_over_channels(layer: Any, x: Tensor) -> Tensor:
    return ours.RMSNorm.forward(layer, x.movedim(1, -1)).movedim(-1, 1)


_FORMULAS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer": ours.LayerNorm.forward,
    "layer over channels": ours.LayerNorm.forward,
    "group": ours.GroupNorm.forward,
    "rms": ours.RMSNorm.forward,
    "rms, 1 + weight": _rms_one_more,
    "rms over channels": _rms_over_channels,
}
