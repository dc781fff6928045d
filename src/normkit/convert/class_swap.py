"""Exchange of one layer: the same object gets another class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import normkit.nn as ours
from normkit.convert.group_norm_fit import Match, fitting_groups
from normkit.convert.targets import base_of, extras_of

__all__ = ["layer_state", "swap_back", "swap_class", "swap_to_group_norm"]


def swap_class(
    module: Any, cls: type[nn.Module], to: str, options: dict[str, Any]
) -> None:
    """Give `module` the class `cls`, and the state that `to` of `convert` asks for."""
    was_frozen = isinstance(module, ours.FrozenBatchNorm)
    name = "" if to in ("normkit", "torch") else base_of(module).__name__
    group = module.__dict__.get("process_group")
    if to in ("torch", "normkit"):
        for extra in extras_of(module):
            if to == "torch" or extra == "process_group":
                del module.__dict__[extra]
    returning = module.__dict__.pop("_origin", None)
    module.__class__ = cls
    if to in ("sync", "frozen"):
        origin = returning or name
        if origin != base_of(module).__name__:
            module.__dict__["_origin"] = origin
    if was_frozen and to != "frozen":
        module.training = module.__dict__.pop("_mode_to_return_to", True)
        for key in module.__dict__.pop("_trained", ()):
            getattr(module, key).requires_grad_(True)
    if to == "sync":
        module.process_group = options["process_group"] or group
    elif to == "ghost":
        module.ghost_size = options["ghost_size"]
    elif to == "frozen":
        module.__dict__["_mode_to_return_to"] = module.training
        module.training = False
        module.__dict__["_trained"] = [
            key
            for key, p in module._parameters.items()
            if p is not None and p.requires_grad
        ]
        for p in module.parameters(recurse=False):
            p.requires_grad_(False)
            p.grad = None  # a step of an optimizer would still follow it
    elif to == "torch":
        _forget_ours(module)
        if isinstance(module, nn.SyncBatchNorm):
            module.process_group = group


def _forget_ours(module: nn.Module) -> None:
    for key in (
        *("is_frozen", "_mode_to_return_to", "estimator", "_observer"),
        *("memory", "defers", "_skipped"),
    ):
        module.__dict__.pop(key, None)


def swap_to_group_norm(module: Any, num_groups: int, match: Match | None) -> None:
    """Make a batch norm a group norm, with the weight and bias of `match` if any."""
    channels: int = module.num_features
    affine = module.affine or match is not None
    was_frozen = isinstance(module, ours.FrozenBatchNorm)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        module._buffers.pop(name, None)
    like = match.weight if match is not None else None
    module.__class__ = ours.GroupNorm
    for name in (
        *("num_features", "momentum", "track_running_stats", "_origin"),
        *("process_group", "ghost_size", "debias", "on_small_batch", "estimator"),
        *("is_frozen", "_mode_to_return_to", "_trained", "_observer"),
        *("memory", "defers", "_skipped"),
    ):
        value = module.__dict__.pop(name, None)
        if was_frozen and name == "_mode_to_return_to" and value is not None:
            module.training = value
    module.num_groups = fitting_groups(channels, num_groups)
    module.num_channels, module.affine = channels, affine
    if match is None or like is None:
        return
    for name, value in (("weight", match.weight), ("bias", match.bias)):
        known = module._parameters.get(name)
        if known is None:
            module.register_parameter(name, nn.Parameter(value.float()))
        else:
            with torch.no_grad():
                known.copy_(value)


def layer_state(module: nn.Module) -> dict[str, Any]:
    """Return everything that an exchange of `module` may change, for `swap_back`."""
    state = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        state[name] = state[name].copy()
    state["_needed"] = {
        key: (p.requires_grad, p.detach().clone(), p.grad)
        for key, p in module._parameters.items()
        if p is not None
    }
    return state


def swap_back(module: nn.Module, before: dict[str, Any]) -> None:
    """Restore `module` from its `layer_state`."""
    needed = before.pop("_needed")
    module.__dict__.clear()
    module.__dict__.update(before)
    for key, (requires_grad, value, grad) in needed.items():
        parameter = module._parameters[key]
        assert parameter is not None
        with torch.no_grad():
            parameter.copy_(value)
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad
