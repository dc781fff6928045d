"""`convert`: all layers or none, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

import normkit.nn as ours
from normkit.convert.fused import fuse
from normkit.convert.kinds import (
    NORMS,
    TARGETS,
    RefusalError,
    base_of,
    class_for,
    extras_of,
    is_current,
    is_meant,
)
from normkit.convert.matching import Match, fitting_groups, match_outputs
from normkit.convert.report import Conversion, ConversionReport
from normkit.errors import ArgumentError
from normkit.functional.memory import Mode
from normkit.nn.batch_norm_layer import BatchNormLayer

__all__ = ["convert"]


def convert(
    model: nn.Module,
    *,
    to: str,
    process_group: Any = None,
    ghost_size: int | None = None,
    num_groups: int = 32,
    batches: Iterable[Any] | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
    strict: bool = True,
    example_inputs: Any = None,
    memory: Mode | None = None,
) -> ConversionReport:
    """Change the normalizations of `model` for others, in place.

    Each layer stays the same object: parameters, buffers, hooks, modes, shared places
    in the model and the optimizer's state are kept. A user's subclass keeps its
    behaviour if its forward calls `super().forward()`. To `"normkit"` also go layer,
    RMS and group norms whose forward is written out, in any class named a norm: each
    is tried on random values, and known by what it computes. Others are refused.

    Args:
        model: The model, or one layer.
        to: `"sync"`: every batch norm becomes `SyncBatchNorm`. `"frozen"`:
            `FrozenBatchNorm`, until it is converted to another. `"ghost"`: batch norm
            with `ghost_size`. `"normkit"`, `"torch"`: the namesake in that library,
            for layer, group, instance and RMS norm, too; a layer that was
            synchronized or frozen becomes what it was before. `"group"` (or
            `"group_norm"`): every batch norm becomes `GroupNorm`.
        process_group: For `"sync"`; as in `SyncBatchNorm`.
        ghost_size: For `"ghost"`; as in `BatchNorm1d`.
        num_groups: For `"group"`: the most groups; a layer takes the largest divisor
            of its channels that is not above it.
        batches: For `"group"`: inputs of the model. Weight and bias are then the least
            squares fit of the new layer's outputs to those of batch norm in eval mode.
            Without, they are kept as they are, and the outputs differ more.
        call: Runs the model on a batch; by default `model(batch)`, or `model(*batch)`
            for a tuple.
        strict: Raise if a layer cannot be converted; otherwise leave it, and say so.
        example_inputs: For `"normkit"`: what to call the model with: a tuple of
            positional arguments, a dict of named ones, or the single argument. The
            model is read by running it once in eval mode, and each batch norm takes
            over the activation that alone reads it, and the sum with a residual before
            that: one pass over memory instead of two or three. Without, layers are
            exchanged and nothing is fused.
        memory: For `"normkit"`: `memory=` of every batch norm, see `BatchNorm1d`.

    Returns:
        The report; `report.model` is `model`.

    Raises:
        ArgumentError: Another `to`; an option that does not belong to it; with
            `strict`, layers that cannot be carried over, by name. The model is then as
            it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> print(convert(model, to="sync"))
        to sync: 1 layers
          1: BatchNorm2d -> SyncBatchNorm
        >>> _ = convert(model, to="torch")
        >>> type(model[1]) is nn.BatchNorm2d
        True

        Exchanged and fused with what follows:

        >>> _ = model.append(nn.ReLU())
        >>> print(convert(model, to="normkit", example_inputs=torch.randn(2, 3, 8, 8)))
        to normkit: 1 layers
          1: BatchNorm2d -> BatchNorm2d
        1 of 1 fused
          1: relu
    """
    options = {"process_group": process_group, "ghost_size": ghost_size}
    _check_arguments(to, process_group, ghost_size, num_groups, batches)
    for name, value in (("example_inputs", example_inputs), ("memory", memory)):
        if value is not None and to != "normkit":
            raise ArgumentError(f"{name}= belongs to to='normkit', got to={to!r}")
    if memory not in (None, "recompute", "int8"):
        raise ArgumentError(f"memory={memory!r} must be 'recompute' or 'int8'")
    planned: list[tuple[str, nn.Module, type[nn.Module]]] = []
    untouched: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_meant(module, to):
            continue
        if is_current(module, to, options):
            untouched[name] = f"it is {base_of(module).__name__} already"
            continue
        try:
            planned.append((name, module, class_for(module, to)))
        except RefusalError as reason:
            # What is only called a norm was not asked for.
            into = refused if isinstance(module, NORMS) else untouched
            into[name] = str(reason)
    if refused and strict:
        listed = "; ".join(f"{name!r}: {why}" for name, why in refused.items())
        raise ArgumentError(
            f"cannot convert to={to!r}, nothing was changed. {listed}. Change these "
            "layers, or pass strict=False to leave them"
        )
    matches: dict[int, Match] = {}
    if batches is not None:
        matched = [module for _, module, _ in planned]
        matches = match_outputs(model, matched, num_groups, batches, call)
    done: list[Conversion] = []
    before = [(module, type(module), _snapshot(module)) for _, module, _ in planned]
    try:
        for name, module, cls in planned:
            old = type(module).__name__
            match = matches.get(id(module))
            if cls is ours.GroupNorm and to.startswith("group"):
                _become_group_norm(module, num_groups, match)
            else:
                _become(module, cls, to, options)
            explained = None if match is None else match.explained
            base = base_of(module) if isinstance(module, NORMS) else type(module)
            done.append(Conversion(name, old, base.__name__, explained))
        fused, unfused = _fuse(model, example_inputs)
    except BaseException:
        for module, cls, snapshot in before:
            module.__class__ = cls
            _return_to(module, snapshot)
        raise
    if memory is not None:
        for module in model.modules():
            if isinstance(module, BatchNormLayer):
                module.memory = memory
    left = {**untouched, **refused}
    return ConversionReport(model, to, tuple(done), left, fused, unfused)


def _fuse(model: nn.Module, example_inputs: Any) -> tuple[dict[str, str], ...]:
    if example_inputs is None:
        return {}, {}
    if isinstance(example_inputs, dict):
        found = fuse(model, **example_inputs)
    elif isinstance(example_inputs, tuple):
        found = fuse(model, *example_inputs)
    else:
        found = fuse(model, example_inputs)
    return found.fused, found.left


def _check_arguments(
    to: str, process_group: Any, ghost_size: int | None, num_groups: int, batches: Any
) -> None:
    if to not in TARGETS:
        raise ArgumentError(
            f"convert got to={to!r}; it must be one of {', '.join(map(repr, TARGETS))}"
        )
    if process_group is not None and to != "sync":
        raise ArgumentError(f"process_group= belongs to to='sync', got to={to!r}")
    if (ghost_size is not None) != (to == "ghost"):
        raise ArgumentError(
            f"ghost_size={ghost_size} with to={to!r}: ghost_size= belongs to "
            "to='ghost', which needs it"
        )
    if batches is not None and not to.startswith("group"):
        raise ArgumentError(f"batches= belongs to to='group', got to={to!r}")
    if num_groups < 1:
        raise ArgumentError(f"num_groups={num_groups} must be at least 1")


def _become(
    module: Any, cls: type[nn.Module], to: str, options: dict[str, Any]
) -> None:
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
    elif to == "torch":
        _forget_ours(module)
        if isinstance(module, nn.SyncBatchNorm):
            module.process_group = group
    if isinstance(module, BatchNormLayer) and module.running_mean is not None:
        _count_skipped(module)


def _forget_ours(module: nn.Module) -> None:
    module._buffers.pop("num_batches_skipped", None)
    module._non_persistent_buffers_set.discard("num_batches_skipped")
    for key in (
        *("is_frozen", "_mode_to_return_to", "estimator", "_observer"),
        *("memory", "defers"),
    ):
        module.__dict__.pop(key, None)


def _count_skipped(module: BatchNormLayer) -> None:
    if module.skipped is None and module.running_mean is not None:
        skipped = torch.zeros((), dtype=torch.int64, device=module.running_mean.device)
        module.register_buffer("num_batches_skipped", skipped, persistent=False)


def _become_group_norm(module: Any, num_groups: int, match: Match | None) -> None:
    channels: int = module.num_features
    affine = module.affine or match is not None
    was_frozen = isinstance(module, ours.FrozenBatchNorm)
    for name in (
        *("running_mean", "running_var", "num_batches_tracked"),
        "num_batches_skipped",
    ):
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    like = match.weight if match is not None else None
    module.__class__ = ours.GroupNorm
    for name in (
        *("num_features", "momentum", "track_running_stats", "_origin"),
        *("process_group", "ghost_size", "debias", "on_small_batch", "estimator"),
        *("is_frozen", "_mode_to_return_to", "_trained", "_observer"),
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


def _snapshot(module: nn.Module) -> dict[str, Any]:
    state = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        state[name] = state[name].copy()
    state["_needed"] = {
        key: (p.requires_grad, p.detach().clone())
        for key, p in module._parameters.items()
        if p is not None
    }
    return state


def _return_to(module: nn.Module, snapshot: dict[str, Any]) -> None:
    needed = snapshot.pop("_needed")
    module.__dict__.clear()
    module.__dict__.update(snapshot)
    for key, (requires_grad, value) in needed.items():
        parameter = module._parameters[key]
        assert parameter is not None
        with torch.no_grad():
            parameter.copy_(value)
        parameter.requires_grad_(requires_grad)
