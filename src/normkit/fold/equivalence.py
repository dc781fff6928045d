"""Distance of two results, and of two tensors from a gauge.

In float64 a right fold differs by 1e-16 to 1e-9 and a wrong one by 1e-3 and more, so
one threshold between them decides. In float32 rounding alone can reach 1e-2.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from normkit.fold.ir.gauge import Gauge
from normkit.modeling.pytree import tensors_in

__all__ = ["TOLERANCE", "difference", "gap_under", "sampled"]

TOLERANCE = 1e-7
# Number of elements of a module's output that are compared.
_MAX_SAMPLES = 4096


def difference(expected: Any, found: Any) -> float:
    """Return the largest difference of two results, relative to the largest value.

    inf where their structure, shapes or integers differ, or one has a NaN or an
    infinity where the other has not the same.

    Example:
        >>> difference([torch.tensor([0.5, 100.0])], [torch.tensor([0.5, 101.0])])
        0.01
    """
    left, right = list(tensors_in(expected)), list(tensors_in(found))
    if len(left) != len(right):
        return float("inf")
    largest = 0.0
    for one, other in zip(left, right, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf")
        if one.numel() == 0 or one is other:
            continue
        if not (one.is_floating_point() or one.is_complex()):
            if not torch.equal(one, other):
                return float("inf")
            continue
        finite = one.isfinite()
        if not _are_alike(one[~finite], other[~finite]):
            return float("inf")
        if bool(finite.any()):
            size = max(1.0, float(one[finite].abs().max()))
            gap = float((one[finite] - other[finite]).abs().max())
            if not math.isfinite(gap):
                return float("inf")
            largest = max(largest, gap / size)
    return largest


def _are_alike(one: Tensor, other: Tensor) -> bool:
    """Return whether both hold the same infinities, and NaN at the same places."""
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def gap_under(
    gauge: Gauge, shape: tuple[int, ...], true: Tensor, stored: Tensor
) -> float:
    """Return how far the samples `stored` and `true` deviate from `gauge`.

    Args:
        gauge: The relation of two tensors of `shape`.
        shape: Their shape.
        true: A sample of the original tensor.
        stored: The same elements of the folded one.
    """
    at = _coordinates(shape)

    def along(values: Tensor) -> Tensor:
        index = tuple(
            place if size > 1 else torch.zeros_like(place)
            for place, size in zip(at, values.shape, strict=True)
        )
        return (values[index] if index else values).to(true.device)

    if gauge.to_stored is not None:
        affine = gauge.to_stored
        true = along(affine.scale) * true + along(affine.shift)
    elif gauge.to_true is not None:
        affine = gauge.to_true
        stored = along(affine.scale) * stored + along(affine.shift)
    else:
        return 0.0  # No such relation; values after it are compared.
    return difference(true, stored)


@functools.lru_cache(maxsize=256)
def _coordinates(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.unravel_index(_places(shape), shape)


def sampled(result: Any) -> Tensor | None:
    """Return 4096 elements of a float tensor or fewer, always the same; else None."""
    if not isinstance(result, Tensor) or not result.is_floating_point():
        return None
    if result.dim() == 0:
        return result.clone()
    return result.reshape(-1)[_places(tuple(result.shape)).to(result.device)]


@functools.lru_cache(maxsize=256)
def _places(shape: tuple[int, ...]) -> Tensor:
    """Return 4096 flat indices into a tensor of `shape` or fewer, always the same."""
    count = math.prod(shape)
    if count <= _MAX_SAMPLES:
        return torch.arange(count)
    draw = torch.Generator().manual_seed(count)
    return torch.randint(count, (_MAX_SAMPLES,), generator=draw)
