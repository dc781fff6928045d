"""DTensors: local kernels, and as few collectives as the statistics need.

    dimension of x that is sharded      what it takes
    one that keeps its statistics       nothing: each rank has its own rows or channels
    one that statistics run over        the sums of a group: `Spec.group`, 1 + 1

Weight and bias are cut as x is where they vary, and replicated elsewhere; their
gradients are then Partial, as those of torch's own layers, which add them up when they
are used. Whatever fits no rule (a Partial x, groups cut in the middle, two mesh
dimensions that statistics run over) runs as operations of DTensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.kernels.spec import Running, Spec
from normkit.sync.groups import process_group_of
from normkit.torch_state import (
    PLAIN,
    dtensor_like,
    is_compiling,
    is_observed,
    keeps_graph,
    local_part,
)

__all__ = ["is_dtensor", "local_running", "on_shards"]

Execute = Callable[..., Tensor]


def is_dtensor(x: Tensor) -> bool:
    """Return whether `x` is a DTensor; loads nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def on_shards(
    execute: Execute,
    spec: Spec,
    x: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running | None,
    **options: Any,
) -> Tensor | None:
    """Run `execute` on the shards of this rank; None where no rule fits.

    Args:
        execute: `engine.execute`.
        spec: Options of the forward, for the whole x.
        x: A DTensor.
        weight: A DTensor, or a tensor that is the same on every rank; or None.
        bias: Likewise.
        residual: A DTensor, or None.
        mask: Likewise.
        running: Statistics, plain or DTensors.
        options: More arguments of `execute`.
    """
    sizes = tuple((_local(x) if is_compiling() else local_part(x)).shape)
    plan = _plan(spec, x, sizes)
    if plan is None:
        return None
    local_spec, cut = plan
    statistics = local_running(running)
    if running is not None and statistics is None:
        return None
    is_cut = any(d is not None and not _is_reduced(spec, d) for d in cut)
    if is_cut and running is not None and not _is_sharded(running.mean):
        return None  # a rank holds the running statistics of all channels
    if spec.shape is not None:
        options["aten"] = None  # it names the sizes of the whole

    def run(
        shard: Tensor, w: Tensor | None, b: Tensor | None, *others: Tensor | None
    ) -> Tensor:
        given = others or (None, None)
        return execute(local_spec, shard, w, b, *given, statistics, **options)

    placed = [_placements(v, x, cut, spec) for v in (weight, bias)]

    def by_parts(*tensors: Any) -> Any:
        source, *vectors = tensors
        parts = [
            None if v is None or p is None else _learned(v, x, *p)
            for v, p in zip(vectors, placed, strict=True)
        ]
        others = [None if t is None else _as_cut(t, x) for t in (residual, mask)]
        y = run(_local(source), *parts, *others)
        return type(x).from_local(
            y,
            x.device_mesh,
            x.placements,
            run_check=False,
            shape=x.shape,
            stride=x.stride(),
        )

    is_short = residual is None and mask is None and not is_observed()
    if is_short and _lie_as_placed(x, (weight, bias), placed):
        return _OnShards.apply(x, weight, bias, run, by_parts, placed)
    return by_parts(x, weight, bias)


class _OnShards(torch.autograd.Function):
    """One node of autograd for a call on shards, where `to_local` makes one a tensor.

    The second derivative runs `by_parts`, which is made of DTensor's own functions.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Any,
        weight: Any,
        bias: Any,
        run: Callable[..., Tensor],
        by_parts: Callable[..., Any],
        placed: list[Any],
    ) -> Any:
        tensors, wanted = (x, weight, bias), ctx.needs_input_grad[:3]
        parts = [
            None if t is None else local_part(t).detach().requires_grad_(wants)
            for t, wants in zip(tensors, wanted, strict=True)
        ]
        with torch.set_grad_enabled(any(wanted)):
            y = run(*parts)
        ctx.save_for_backward(*tensors)
        ctx.parts, ctx.y, ctx.by_parts = parts, y, by_parts
        ctx.gradients = [None if p is None else p[1] for p in placed]
        return dtensor_like(y.detach(), x, x.placements)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (dy,) = grad_outputs
        x, *vectors = ctx.saved_tensors
        asked = [k for k in range(3) if ctx.needs_input_grad[k]]
        if torch.is_grad_enabled():
            tensors = [x, *vectors]
            y = ctx.by_parts(*tensors)
            found = torch.autograd.grad(
                y, [tensors[k] for k in asked], dy, create_graph=True
            )
        else:
            if dy.placements != x.placements:
                dy = dy.redistribute(x.device_mesh, x.placements)
            keeps = keeps_graph()
            found = torch.autograd.grad(
                ctx.y,
                [ctx.parts[k] for k in asked],
                local_part(dy),
                retain_graph=keeps,
            )
            if not keeps:
                ctx.y = ctx.parts = None
            places = [x.placements, *ctx.gradients]
            found = [
                dtensor_like(g, (x, *vectors)[k], places[k])
                for k, g in zip(asked, found, strict=True)
            ]
        grads: list[Any] = [None] * 6
        for k, g in zip(asked, found, strict=True):
            grads[k] = g
        return tuple(grads)


def local_running(running: Running | None) -> Running | None:
    """Return running statistics in this rank's memory."""
    if running is None or not any(
        isinstance(t, Tensor) and is_dtensor(t) for t in running
    ):
        return running
    from torch.distributed.tensor import Partial

    found: list[Any] = []
    for value in running:
        if isinstance(value, Tensor) and is_dtensor(value):
            if any(isinstance(p, Partial) for p in value.placements):  # type: ignore[attr-defined]
                return None
            value = _local(value.detach())
        found.append(value)
    return Running(*found)


def _local(x: Any, gradients: tuple[Any, ...] | None = None) -> Tensor:
    shard = x.to_local(grad_placements=gradients)
    return shard.wait() if hasattr(shard, "wait") else shard


def _plan(
    spec: Spec, x: Any, local: tuple[int, ...]
) -> tuple[Spec, list[int | None]] | None:
    """Return the spec of a shard, and the dimension of x each mesh dimension cuts."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, cut, summed = x.device_mesh, [], []
    for dimension, placement in enumerate(x.placements):
        if type(placement) is Shard:
            if placement.dim in (d for d in cut if d is not None):
                return None
            cut.append(placement.dim)
            if _is_reduced(spec, placement.dim):
                summed.append(dimension)
        elif isinstance(placement, Replicate):
            cut.append(None)
        else:
            return None
    if len(summed) > 1:
        return None
    group = spec.group
    for dimension, of in enumerate(cut):
        # Along a dimension that replicates x, or gives each rank channels of its own, a
        # rank has the whole batch.
        is_whole = of is None or not _is_reduced(spec, of)
        if is_whole and group is not None and _is_same(group, mesh, dimension):
            group = None
    if summed and not spec.given:
        if group is not None and not _is_same(group, mesh, summed[0]):
            raise ArgumentError(
                "the input is sharded over dimension "
                f"{summed[0]} of its DeviceMesh, and the statistics are asked for "
                "over another process_group; pass the group of both together"
            )
        group = mesh.get_group(summed[0]) if group is None else group
    shape = spec.shape
    if shape is not None:
        # (N, G, C/G, *positions): groups are whole on a rank, or there is no rule.
        # The same decision on every rank: by sizes of the whole alone.
        groups, size = shape[1], shape[2]
        if 1 in cut:
            ranks = mesh.size(cut.index(1))
            if groups % ranks:
                return None
            groups //= ranks
        shape = (local[0], groups, size, *local[2:])
        vector = (1, groups, size, *(1 for _ in local[2:]))
        return replace(spec, group=group, shape=shape, vector=vector), cut
    kept = spec.vector
    if kept is not None:
        kept = tuple(1 if v == 1 else n for v, n in zip(kept, local, strict=True))
    statistic = spec.statistic
    if statistic is not None:
        statistic = tuple(
            1 if v == 1 else n for v, n in zip(statistic, local, strict=True)
        )
    return replace(spec, group=group, vector=kept, statistic=statistic), cut


def _is_sharded(t: Any) -> bool:
    if t is None or not is_dtensor(t):
        return False
    return any(placement.is_shard() for placement in t.placements)


def _is_same(group: Any, mesh: Any, dimension: int) -> bool:
    ranks = dist.get_process_group_ranks
    return ranks(process_group_of(group)) == ranks(mesh.get_group(dimension))


def _is_reduced(spec: Spec, dimension: int) -> bool:
    if spec.shape is None:
        return dimension in spec.dims
    return dimension > 1


def _placements(
    vector: Tensor | None, x: Any, cut: list[int | None], spec: Spec
) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Return the placements of a learned vector, and those of its gradient."""
    if vector is None:
        return None
    from torch.distributed.tensor import Partial, Replicate, Shard

    placements: list[Any] = []
    gradients: list[Any] = []
    for dimension in cut:
        along = None if dimension is None else _place_in(vector, x, spec, dimension)
        placements.append(Replicate() if along is None else Shard(along))
        is_shared = along is None and dimension is not None
        gradients.append(Partial() if is_shared else placements[-1])
    return tuple(placements), tuple(gradients)


def _lie_as_placed(x: Any, vectors: tuple[Any, ...], placed: list[Any]) -> bool:
    """Return whether every tensor lies where it is needed, and in plain memory."""
    tensors = [x]
    for vector, places in zip(vectors, placed, strict=True):
        if vector is not None:
            if not is_dtensor(vector) or tuple(vector.placements) != places[0]:
                return False
            tensors.append(vector)
    return all(type(local_part(t)) in PLAIN for t in tensors)


def _learned(
    vector: Any, x: Any, placements: tuple[Any, ...], gradients: tuple[Any, ...]
) -> Tensor:
    """Return this rank's part of weight or bias."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh
    if not is_dtensor(vector):
        whole = [Replicate()] * mesh.ndim
        vector = DTensor.from_local(vector, mesh, whole, run_check=False)
    if tuple(vector.placements) != placements:
        vector = vector.redistribute(mesh, placements)
    return _local(vector, gradients)


def _place_in(vector: Any, x: Any, spec: Spec, dimension: int) -> int | None:
    """Return the dimension of a learned vector that lies along one of x."""
    if spec.shape is not None:
        return 0 if dimension == 1 else None
    if spec.vector is None:
        return dimension if vector.shape[dimension] != 1 else None
    if spec.vector[dimension] == 1:
        return None
    # Batch norm's vector has one dimension, layer norm's those at the end of x.
    return 0 if vector.dim() == 1 else dimension - (x.dim() - vector.dim())


def _as_cut(t: Any, x: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh
    if not is_dtensor(t):
        whole = [Replicate()] * mesh.ndim
        t = DTensor.from_local(t.expand(x.shape), mesh, whole, run_check=False)
    if tuple(t.placements) != tuple(x.placements):
        t = t.redistribute(mesh, x.placements)
    return _local(t)
