"""`convert`: all layers or none, in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

import normkit.nn as ours
from normkit.convert.class_swap import (
    layer_state,
    swap_back,
    swap_class,
    swap_to_group_norm,
)
from normkit.convert.fused import fuse
from normkit.convert.graph_freezing import freeze_graph
from normkit.convert.group_norm_fit import Match, match_outputs
from normkit.convert.report import Conversion, ConversionReport
from normkit.convert.targets import (
    TARGETS,
    RefusalError,
    base_of,
    class_for,
    is_current,
    is_meant,
    of_its_own,
    scripted_norm,
)
from normkit.errors import ArgumentError
from normkit.functional.memory.block import Mode
from normkit.modeling.batch import Forward, check_model
from normkit.modeling.graph_norms import has_graph_norms
from normkit.modeling.norm_types import NORMS
from normkit.modeling.unwrap import unwrapped
from normkit.nn.batch_norm_layer import BatchNormLayer

__all__ = ["convert"]


_MAX_GROUPS = 32


def convert(
    model: nn.Module,
    *,
    to: str,
    process_group: Any = None,
    ghost_size: int | None = None,
    num_groups: int = _MAX_GROUPS,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    strict: bool = True,
    example_inputs: Any = None,
    memory: Mode | None = None,
) -> ConversionReport:
    """Replace the normalizations of `model` by others, in place.

    Each layer stays the same object: parameters, buffers, hooks, modes, shared places
    in the model and the optimizer's state are kept. A user's subclass keeps its
    behaviour if its forward calls `super().forward()`. `to="normkit"` also replaces
    layer, RMS and group norms whose forward is written out, in any class whose name
    says that it is a norm: each is run on random values, and recognized by what it
    computes. Others are refused.

    Args:
        model: The model, or one layer.
        to: `"sync"`: every batch norm becomes `SyncBatchNorm`. `"frozen"`:
            `FrozenBatchNorm`, until it is converted to another; a call in a graph of
            torch.fx or torch.export is set to eval mode. `"ghost"`: batch norm
            with `ghost_size`. `"normkit"`, `"torch"`: the layer of the same name in
            that library, also for layer, group, instance and RMS norm; a layer that was
            synchronized or frozen becomes what it was before. `"group"`: every batch
            norm becomes `GroupNorm`.
        process_group: For `"sync"`; as in `SyncBatchNorm`.
        ghost_size: For `"ghost"`; as in `BatchNorm1d`.
        num_groups: For `"group"`: the most groups; a layer takes the largest divisor
            of its channels that is not above it.
        batches: For `"group"`: batches `(inputs, …)`, or inputs alone. Weight and bias
            are then the least squares fit of the new layer's outputs to those of batch
            norm in eval mode. Without, they are kept as they are, and the outputs
            differ more.
        forward: `forward(model, batch)`, for any other batch or example inputs.
        strict: Raise if a layer cannot be converted; otherwise leave it, and say so.
        example_inputs: For `"normkit"`: what to call the model with: a tuple of
            positional arguments, a dict of named ones, or the single argument. The
            model is run twice in eval mode; each batch norm whose output is read only
            by an activation, or by a sum and an activation, is then computed together
            with them: one pass over memory instead of two or three. No other module
            changes. Without, layers are exchanged and nothing is fused.
        memory: For `"normkit"`: `memory=` of every batch norm, see `BatchNorm1d`.
        call: The former name of `forward`; deprecated.

    Returns:
        The report; `report.model` is `model`.

    Raises:
        ArgumentError: Another `to`; an option that does not belong to it; with
            `strict`, layers that cannot be carried over, by name. The model is then as
            it was.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> print(convert(model, to="sync"))
        to sync: 1 layer
          1: BatchNorm2d -> SyncBatchNorm
        >>> _ = convert(model, to="torch")
        >>> type(model[1]) is nn.BatchNorm2d
        True

        Exchanged and fused with what follows:

        >>> _ = model.append(nn.ReLU())
        >>> print(convert(model, to="normkit", example_inputs=torch.randn(2, 3, 8, 8)))
        to normkit: 1 layer
          1: BatchNorm2d -> BatchNorm2d
        1 of 1 fused
          1: relu
    """
    check_model("convert", model, () if batches is None else batches)
    options = {"process_group": process_group, "ghost_size": ghost_size}
    _check_arguments(to, process_group, ghost_size, num_groups, batches)
    for name, value in (("example_inputs", example_inputs), ("memory", memory)):
        if value is not None and to != "normkit":
            raise ArgumentError(f"{name}= belongs to to='normkit', got to={to!r}")
    if memory not in (None, "recompute", "int8"):
        raise ArgumentError(f"memory={memory!r} must be 'recompute' or 'int8'")
    given, model = model, unwrapped(model)
    if to == "frozen" and has_graph_norms(model):
        return freeze_graph(given, model)
    planned: list[tuple[str, nn.Module, type[nn.Module]]] = []
    untouched: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if reason := scripted_norm(module):
            refused[name] = reason
            continue
        if not is_meant(module, to):
            if reason := of_its_own(module):
                untouched[name] = reason
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
        matches = match_outputs(model, matched, num_groups, batches, forward)
    done: list[Conversion] = []
    before = [(module, type(module), layer_state(module)) for _, module, _ in planned]
    try:
        for name, module, cls in planned:
            old = type(module).__name__
            match = matches.get(id(module))
            if cls is ours.GroupNorm and to == "group":
                swap_to_group_norm(module, num_groups, match)
            else:
                swap_class(module, cls, to, options)
            explained = None if match is None else match.explained
            base = base_of(module) if isinstance(module, NORMS) else type(module)
            done.append(Conversion(name, old, base.__name__, explained))
        fused, unfused = _fuse(model, example_inputs, forward)
    except BaseException:
        for module, cls, state in before:
            module.__class__ = cls
            swap_back(module, state)
        raise
    if memory is not None:
        for module in model.modules():
            if isinstance(module, BatchNormLayer):
                module.memory = memory
    left = {**untouched, **refused}
    return ConversionReport(given, to, tuple(done), left, fused, unfused)


def _fuse(
    model: nn.Module, example_inputs: Any, forward: Forward | None
) -> tuple[dict[str, str], ...]:
    if example_inputs is None:
        return {}, {}
    found = fuse(model, example_inputs, forward=forward)
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
    if batches is not None and to != "group":
        raise ArgumentError(f"batches= belongs to to='group', got to={to!r}")
    if num_groups != _MAX_GROUPS and to != "group":
        raise ArgumentError(
            f"num_groups={num_groups} belongs to to='group', got to={to!r}"
        )
    for name, value in (("num_groups", num_groups), ("ghost_size", ghost_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ArgumentError(f"{name}={value!r} must be an integer of at least 1")
