"""Moments across the ranks of a process group, in one collective.

    [n,  n·(mean − pivot),  m2 + n·(mean − pivot)²]      summed over ranks, in float64

The Moments of the group follow from its sums. The message is 2C + 1 numbers
whatever the number of ranks (3C when each channel has its own count); ranks with
different counts, masked values or no values at all need no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.moments import Moments

__all__ = ["is_group", "merge_all_over", "merge_over", "sum_over"]

# A ProcessGroup or its name, a one-dimensional DeviceMesh, or (DeviceMesh, dimension).
Group = Any


def merge_over(
    moments: Moments, process_group: Group = None, *, pivot: Tensor | None = None
) -> Moments:
    """Merge the Moments that every rank holds of its own values.

    Args:
        moments: This rank's statistics; `Moments.empty(shape)` when it has no values.
            On all ranks of one shape, and all with a scalar count or none.
        process_group: The ranks to merge over; None is the default group. A
            ProcessGroup or its name, a one-dimensional DeviceMesh, or
            (DeviceMesh, dimension).
        pivot: A value near the mean, of the shape of `mean` and the same on every
            rank, around which the sums are taken.

    Returns:
        The Moments of all values of all ranks, the same bytes on every rank, in the
        dtype of `moments`. `moments` itself when torch.distributed is not running.

    Numerics:
        Sums are float64. Around 0 the variance is good to 1e-16·(mean/std)²: 1e-8
        relative at mean/std = 1e4. Pass a pivot for more. NaN and Inf propagate.
        Differentiable to any order: the backward is one collective of the same size.

    Example:
        Without a process group there is one rank:

        >>> from normkit import moments
        >>> alone = moments(torch.tensor([1.0, 3.0]), dim=0)
        >>> merge_over(alone) is alone
        True
    """
    pivots = None if pivot is None else [pivot]
    return merge_all_over([moments], process_group, pivots=pivots)[0]


def merge_all_over(
    parts: Sequence[Moments],
    process_group: Group = None,
    *,
    pivots: Sequence[Tensor] | None = None,
) -> list[Moments]:
    """Merge many Moments at once, as `merge_over` does, in one collective.

    Args:
        parts: This rank's statistics, in the same order and shapes on every rank.
        process_group: As in `merge_over`.
        pivots: One pivot per part, the same on every rank.

    Raises:
        ArgumentError: There are not as many pivots as parts.
    """
    parts = list(parts)
    if not _is_running() or not parts:
        return parts
    if pivots is None:
        pivots = [torch.zeros_like(part.mean) for part in parts]
    if len(pivots) != len(parts):
        raise ArgumentError(
            f"merge_all_over got {len(pivots)} pivots for {len(parts)} Moments; "
            "pass one for each"
        )
    sums: list[Tensor] = []
    for part, pivot in zip(parts, pivots, strict=True):
        count = part.count.to(torch.float64)
        offset = part.mean.to(torch.float64) - pivot.to(torch.float64)
        sums += [count, count * offset, part.m2.to(torch.float64) + count * offset**2]
    sums = sum_over(sums, process_group)
    merged: list[Moments] = []
    for i, (part, pivot) in enumerate(zip(parts, pivots, strict=True)):
        count, first, second = sums[3 * i : 3 * i + 3]
        total = count.clamp(min=1e-30)
        # Rounding may make m2 of a constant channel negative; NaN stays.
        m2 = second - first * (first / total)
        m2 = torch.where(m2 < 0, torch.zeros_like(m2), m2)
        mean = torch.where(count > 0, pivot.to(torch.float64) + first / total, 0.0)
        merged.append(
            Moments(
                count.to(part.count.dtype),
                mean.to(part.mean.dtype),
                m2.to(part.m2.dtype),
            )
        )
    return merged


def sum_over(tensors: Sequence[Tensor], process_group: Group = None) -> list[Tensor]:
    """Sum `tensors` over ranks in float64, in one collective.

    Differentiable; a list of float64 copies when torch.distributed is not running.
    """
    wide = [tensor.to(torch.float64) for tensor in tensors]
    if not _is_running() or not wide:
        return wide
    group = dist.group.WORLD if process_group is None else process_group
    flat = _SumOverRanks.apply(torch.cat([t.reshape(-1) for t in wide]), group)
    sizes = [t.numel() for t in wide]
    pieces = flat.split(sizes)
    return [piece.view(t.shape) for piece, t in zip(pieces, wide, strict=True)]


def is_group(process_group: Group = None) -> bool:
    """Return whether the group has other ranks; False without torch.distributed.

    Args:
        process_group: As in `merge_over`.
    """
    if not _is_running():
        return False
    if isinstance(process_group, tuple):
        mesh, dim = process_group
        return mesh.size(dim) > 1
    if isinstance(process_group, dist.device_mesh.DeviceMesh):
        return process_group.size() > 1
    if isinstance(process_group, str):
        # Functional collectives resolve names there, too.
        resolve: Any = vars(dist.distributed_c10d)["_resolve_process_group"]
        process_group = resolve(process_group)
    return dist.get_world_size(process_group) > 1


class _SumOverRanks(torch.autograd.Function):
    """y = Σ over ranks of x; each rank's dx is the sum of every rank's dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (dy,) = grad_outputs
        return _SumOverRanks.apply(dy.contiguous(), ctx.group), None


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    # Functional: out of place, traced whole by torch.compile, no wait on the host.
    from torch.distributed._functional_collectives import all_reduce, wait_tensor

    return wait_tensor(all_reduce(x.detach(), "sum", group))


def _is_running() -> bool:
    return dist.is_available() and dist.is_initialized()
