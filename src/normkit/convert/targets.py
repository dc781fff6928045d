"""The class that each layer is converted to, or the reason why it cannot be.

A layer is converted by changing its class: it stays the same object, with the same
parameters, buffers, hooks and places in the model. A subclass that a user derived from
torch's layer keeps its own behaviour, since the new class derives from both:

    Activated(nn.BatchNorm2d)   →   Activated(Activated, SyncBatchNorm)

so that `super().forward` in it reaches the new layer. A forward that does not call
`super().forward` computes batch norm by itself; that cannot be carried, and is refused.
One such class is known by name: timm's `BatchNormAct2d`, batch norm, then its children
`drop` and `act`. Layer, RMS and group norms are known by what they compute, see
`detect`.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

import normkit.nn as ours
from normkit.convert.detect import Detected, detect, looks_like_a_norm
from normkit.modeling.norm_types import (
    NORMS,
    holds_constant_statistics,
    is_batch_norm,
)
from normkit.nn.batch_norm_layer import BatchNormLayer
from normkit.nn.tracked_layer import TrackedLayer

__all__ = [
    "TARGETS",
    "RefusalError",
    "base_of",
    "class_for",
    "is_current",
    "is_meant",
    "of_its_own",
    "scripted_norm",
]

TARGETS = ("sync", "frozen", "ghost", "normkit", "torch", "group")

_RANKED = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
_BATCH = (*_RANKED, "SyncBatchNorm", "FrozenBatchNorm")
_OTHERS = (
    *("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
    *("LayerNorm", "GroupNorm", "RMSNorm"),
)


class RefusalError(Exception):
    """A layer that cannot be carried over; the message is the reason."""


def base_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of torch.nn or normkit that `module` is built on."""
    for cls in (getattr(type(module), "_made_on", object), *type(module).__mro__):
        if _is_library(cls) and issubclass(cls, NORMS):
            return cls
    raise RefusalError("it is built on no layer that is known")


def is_meant(module: nn.Module, to: str) -> bool:
    """Return whether a conversion to `to` concerns `module` at all."""
    if to in ("normkit", "torch"):
        is_alike = to == "normkit" and looks_like_a_norm(module)
        return isinstance(module, NORMS) or is_alike
    return isinstance(module, _BatchNorm)


def of_its_own(module: nn.Module) -> str:
    """Return the reason against a norm that derives from none of torch's.

    As whitening, the frozen batch norm of torchvision, or in-place ABN; empty for any
    other module.
    """
    name = type(module).__name__
    if isinstance(module, TrackedLayer | ours.FilterResponseNorm):
        return f"{name} has no namesake in torch.nn"
    if isinstance(module, NORMS) or not is_batch_norm(module):
        return ""
    if holds_constant_statistics(module):
        return f"{name} is frozen by its class, which is no torch.nn.BatchNorm"
    return f"{name} is a batch norm by its buffers, and no torch.nn.BatchNorm"


def is_current(module: nn.Module, to: str, options: dict[str, Any]) -> bool:
    """Return whether the layer is the target already, and no option changes it."""
    if to == "sync":
        is_same_group = options.get("process_group") is None
        return isinstance(module, ours.SyncBatchNorm) and is_same_group
    if to == "frozen":
        return isinstance(module, ours.FrozenBatchNorm)
    libraries = [c.__module__.partition(".")[0] for c in type(module).__mro__]
    if to == "normkit":
        return "normkit" in libraries and "_origin" not in module.__dict__
    return to == "torch" and "normkit" not in libraries


def scripted_norm(module: nn.Module) -> str:
    """Return the reason against a scripted norm; empty for any other module."""
    if not isinstance(module, torch.jit.ScriptModule):
        return ""
    kind = str(getattr(module, "original_name", ""))
    if kind not in (*_BATCH, *_OTHERS):
        return ""
    return f"{kind} is scripted; convert the model before torch.jit.script"


def class_for(module: nn.Module, to: str) -> type[nn.Module]:
    """Return the class to give `module`.

    Raises:
        RefusalError: It cannot be carried over.
    """
    if "forward" in module.__dict__:
        raise RefusalError("its forward was replaced on the object itself")
    if parametrize.is_parametrized(module):
        raise RefusalError("it is parametrized; remove the parametrizations first")
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(is_lazy(t) for t in tensors if t is not None):
        raise RefusalError("it is lazy and has seen no input yet; run the model once")
    custom = _custom_class(module)
    if custom is not None and not hasattr(type(module), "_made_as"):
        reason = _reason_against(custom)
        found = detect(module) if reason and to == "normkit" else None
        if found is not None:
            return _combined(custom, found.target, found)
        if reason:
            raise RefusalError(reason)
    name = base_of(module).__name__
    if to != "torch" and to != "normkit" and name not in _BATCH:
        raise RefusalError(f"{name} is no batch norm that to={to!r} is defined for")
    if name not in (*_BATCH, *_OTHERS):
        raise RefusalError(f"torch.nn has no {name}, and it is no plain batch norm")
    if to == "group":
        if custom is not None:
            raise RefusalError(f"{custom.__name__} is a subclass of batch norm")
        _check_activation(module, "GroupNorm")
        return ours.GroupNorm
    if to == "sync":
        return _combined(custom, ours.SyncBatchNorm, None)
    if to == "frozen":
        if module.running_mean is None:
            raise RefusalError("it keeps no running statistics to freeze it at")
        return _combined(custom, ours.FrozenBatchNorm, None)
    origin: str = module.__dict__.get("_origin", name)
    if to == "ghost":
        if origin == "FrozenBatchNorm":
            raise RefusalError("it is frozen, and has no batch")
        return _combined(custom, getattr(ours, origin), None)
    if origin == "FrozenBatchNorm":
        raise RefusalError(
            "it was made as FrozenBatchNorm, with no number of dimensions to return "
            "to; make a BatchNorm2d and load its state"
        )
    if to == "normkit":
        return _combined(custom, getattr(ours, origin), None)
    _check_activation(module, "torch.nn")
    _check_extras_for_torch(module)
    if custom is None:
        return getattr(nn, origin)
    if any(c.__module__.startswith("normkit.") for c in custom.__mro__):
        raise RefusalError(f"{custom.__name__} is a subclass of normkit's layer")
    return custom


def _is_library(cls: type) -> bool:
    return cls.__module__.startswith(("torch.nn.modules.", "normkit.nn."))


def _custom_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a user derived, without what a conversion added."""
    made_for = getattr(type(module), "_made_for", None)
    if made_for is not None:
        return made_for
    return None if _is_library(type(module)) else type(module)


def _reason_against(custom: type[nn.Module]) -> str:
    """Return why the forward of `custom` cannot be carried over; empty if it can."""
    for cls in custom.__mro__:
        if _is_library(cls):
            return ""
        forward = cls.__dict__.get("forward")
        if forward is None:
            continue
        if _is_norm_act(cls):
            return ""
        if not issubclass(custom, NORMS):
            return "it computes no formula that normkit has"
        code = getattr(inspect.unwrap(forward), "__code__", None)
        # A function that says super() closes over the class that it stands in.
        if code is None or "__class__" not in code.co_freevars:
            return (
                f"the forward of {cls.__name__} does not call super().forward(), so "
                "it normalizes by itself; change it to call super().forward()"
            )
    return ""


def _is_norm_act(cls: type) -> bool:
    name = f"{cls.__module__}.{cls.__qualname__}"
    return name == "timm.layers.norm_act.BatchNormAct2d"


def _check_activation(module: nn.Module, target: str) -> None:
    activation = module.__dict__.get("activation", "none")
    if activation != "none":
        raise RefusalError(
            f"{target} has nothing for activation={activation!r}; set it to 'none' and "
            "put the activation after the layer"
        )


def _check_extras_for_torch(module: nn.Module) -> None:
    for name in ("channel_dim", "estimator"):
        value = module.__dict__.get(name)
        if value is not None and value != getattr(type(module), name, None):
            raise RefusalError(f"torch.nn has nothing for {name}={value!r}")


@cache
def _combined(
    custom: type[nn.Module] | None,
    target: type[nn.Module],
    found: Detected | None,
) -> type[nn.Module]:
    if custom is None or issubclass(custom, target):
        return custom or target

    def reduced(self: Any, protocol: Any) -> Any:
        return _remade, (custom, target, found), self.__getstate__()

    def normalize_and_act(self: Any, x: Any) -> Any:
        return self.act(self.drop(target.forward(self, x)))

    own = {"forward": normalize_and_act} if _is_norm_act(custom) else {}
    if found is not None:
        own = {"_made_as": found, **found.attributes(custom)}
    return type(
        custom.__name__,
        (custom, target),
        own
        | {
            "__module__": custom.__module__,
            "__qualname__": custom.__qualname__,
            "__doc__": custom.__doc__,
            "__reduce_ex__": reduced,
            "_made_for": custom,
            "_made_on": target,
        },
    )


def _remade(
    custom: type[nn.Module], target: type[nn.Module], found: Detected | None
) -> nn.Module:
    """Return an empty object of the combined class, for copies and pickles."""
    cls = _combined(custom, target, found)
    return cls.__new__(cls)


def extras_of(module: nn.Module) -> list[str]:
    """Return the attributes of normkit's batch norms that torch's do not have."""
    return [
        name
        for name in ("process_group", "ghost_size", "debias", "on_small_batch")
        if name in module.__dict__ and isinstance(module, BatchNormLayer)
    ]
