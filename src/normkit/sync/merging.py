"""Moments across the ranks of a process group, in one collective.

    [n,  n·(mean − pivot),  m2 + n·(mean − pivot)²]      summed over ranks, in float64

The Moments of the group follow from its sums. The message is 2C + 1 numbers
whatever the number of ranks (3C when each channel has its own count); ranks with
different counts, masked values or no values at all need no special case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.moments import Moments
from normkit.sync.collective import sum_over
from normkit.sync.groups import Group, is_running
from normkit.torch_state import is_observed

__all__ = ["merge_all_over", "merge_over"]

# d² of this many variances costs the variance 2^26·2^-53 of its digits, 7e-9, for each
# rank's rounding; as in kernels/cpu/native/ranks.cpp.
_FAR = 2.0**26


def merge_over(
    moments: Moments,
    process_group: Group = None,
    *,
    pivot: Tensor | None = None,
    eps: float | None = None,
) -> Moments:
    """Merge the Moments that every rank holds of its own values.

    Args:
        moments: This rank's statistics; `Moments.empty(shape)` when it has no values.
            On all ranks of one shape, and all with a scalar count or none.
        process_group: The ranks to merge over; None is the default group. A
            ProcessGroup or its name, a DeviceMesh of which one dimension has several
            ranks, or (DeviceMesh, dimension).
        pivot: A value near the mean, of the shape of `mean` and the same on every
            rank, around which the sums are taken.
        eps: Takes the sums again, around the means that the first ones gave, where one
            of these lies so far from the pivot that var + eps has lost digits; on a
            CPU, where the host reads the sums anyway. The same on every rank.

    Returns:
        The Moments of all values of all ranks, the same bytes on every rank, in the
        dtype of `moments`. `moments` itself when torch.distributed is not running.

    Numerics:
        Sums are float64. Around 0 the variance is good to 1e-16·(mean/std)²: 1e-8
        relative at mean/std = 1e4. Pass a pivot or eps for more. NaN and Inf propagate.
        Differentiable to any order: the backward is one collective of the same size.

    Example:
        Without a process group there is one rank:

        >>> from normkit import moments
        >>> alone = moments(torch.tensor([1.0, 3.0]), dim=0)
        >>> merge_over(alone) is alone
        True
    """
    pivots = None if pivot is None else [pivot]
    precise = None if eps is None else [eps]
    return merge_all_over([moments], process_group, pivots=pivots, eps=precise)[0]


def merge_all_over(
    parts: Sequence[Moments],
    process_group: Group = None,
    *,
    pivots: Sequence[Tensor] | None = None,
    eps: Sequence[float] | None = None,
) -> list[Moments]:
    """Merge many Moments at once, as `merge_over` does, in one collective.

    Args:
        parts: This rank's statistics, in the same order and shapes on every rank.
        process_group: As in `merge_over`.
        pivots: One pivot per part, the same on every rank.
        eps: One for each part, as in `merge_over`; where any mean lies too far, the
            sums of all parts are taken again.

    Raises:
        ArgumentError: There are not as many pivots as parts.
    """
    parts = list(parts)
    if not is_running() or not parts:
        return parts
    if pivots is None:
        pivots = [torch.zeros_like(part.mean) for part in parts]
    if len(pivots) != len(parts):
        raise ArgumentError(
            f"merge_all_over got {len(pivots)} pivots for {len(parts)} Moments; "
            "pass one for each"
        )
    merged = _merged(parts, pivots, process_group)
    if eps is None or is_observed() or not all(m.mean.is_cpu for m in merged):
        return merged
    # Every rank holds the same bytes, so that all of them take this branch or none.
    found = list(zip(merged, pivots, eps, strict=True))
    if not any(_lies_far(*each) for each in found):
        return merged
    around = [torch.nan_to_num(m.mean.detach(), posinf=0.0, neginf=0.0) for m in merged]
    return _merged(parts, around, process_group)


def _lies_far(merged: Moments, pivot: Tensor, eps: float) -> bool:
    """Return whether var + eps has lost digits around the pivot."""
    offset = merged.mean.detach() - pivot
    var = merged.m2.detach() / merged.count.to(merged.m2.dtype).clamp(min=1e-30)
    is_far = (offset.square() > _FAR * (var + eps)) & offset.isfinite()
    return bool(is_far.any())


def _merged(
    parts: Sequence[Moments], pivots: Sequence[Tensor], process_group: Group
) -> list[Moments]:
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
