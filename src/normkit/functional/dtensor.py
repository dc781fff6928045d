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
from typing import Any

import torch.distributed as dist
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.kernels.spec import Running, Spec
from normkit.sync.groups import process_group_of
from normkit.torch_state import PLAIN, local_part

__all__ = [
    "as_cut",
    "is_dtensor",
    "is_reduced",
    "is_sharded",
    "learned_part",
    "lie_as_placed",
    "local_running",
    "placements_of",
    "plan_of",
    "shard_of",
    "waited",
]


def is_dtensor(x: Tensor) -> bool:
    """Return whether `x` is a DTensor; loads nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


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
            value = shard_of(value.detach())
        found.append(value)
    return Running(*found)


def shard_of(x: Any, grad_placements: tuple[Any, ...] | None = None) -> Tensor:
    """Return this rank's part of a DTensor, as autograd records it."""
    return waited(x.to_local(grad_placements=grad_placements))


def waited(shard: Any) -> Tensor:
    """Return a tensor that a collective may not have filled yet, when it has."""
    return shard.wait() if hasattr(shard, "wait") else shard


def plan_of(
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
            if is_reduced(spec, placement.dim):
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
        is_whole = of is None or not is_reduced(spec, of)
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
        return _of_shard(spec, group, shape, vector, spec.statistic), cut
    kept = spec.vector
    if kept is not None:
        kept = tuple(1 if v == 1 else n for v, n in zip(kept, local, strict=True))
    statistic = spec.statistic
    if statistic is not None:
        statistic = tuple(
            1 if v == 1 else n for v, n in zip(statistic, local, strict=True)
        )
    return _of_shard(spec, group, shape, kept, statistic), cut


def _of_shard(
    spec: Spec,
    group: Any,
    shape: tuple[int, ...] | None,
    vector: tuple[int, ...] | None,
    statistic: tuple[int, ...] | None,
) -> Spec:
    # Not by dataclasses.replace, which torch 2.6 cannot compile.
    options = (spec.dims, spec.eps, spec.centered, spec.given)
    epilogue = (spec.activation, spec.slope)
    return Spec(*options, *epilogue, group, shape, vector, statistic)


def is_sharded(t: Any) -> bool:
    """Return whether ranks hold different parts of a tensor."""
    if t is None or not is_dtensor(t):
        return False
    return any(placement.is_shard() for placement in t.placements)


def _is_same(group: Any, mesh: Any, dimension: int) -> bool:
    ranks = dist.get_process_group_ranks
    return ranks(process_group_of(group)) == ranks(mesh.get_group(dimension))


def is_reduced(spec: Spec, dimension: int) -> bool:
    """Return whether statistics run over a dimension of x."""
    if spec.shape is None:
        return dimension in spec.dims
    return dimension > 1


def placements_of(
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


def lie_as_placed(x: Any, vectors: tuple[Any, ...], placed: list[Any]) -> bool:
    """Return whether every tensor lies where it is needed, and in plain memory."""
    tensors = [x]
    for vector, places in zip(vectors, placed, strict=True):
        if vector is not None:
            if not is_dtensor(vector) or tuple(vector.placements) != places[0]:
                return False
            tensors.append(vector)
    return all(type(local_part(t)) in PLAIN for t in tensors)


def learned_part(
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
    return shard_of(vector, gradients)


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


def as_cut(t: Any, x: Any) -> Tensor:
    """Return this rank's part of a residual or mask."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh
    if not is_dtensor(t):
        whole = [Replicate()] * mesh.ndim
        t = DTensor.from_local(t.expand(x.shape), mesh, whole, run_check=False)
    if tuple(t.placements) != tuple(x.placements):
        t = t.redistribute(mesh, x.placements)
    return shard_of(t)
