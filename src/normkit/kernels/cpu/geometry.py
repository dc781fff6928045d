"""Geometry of a statistic in memory, as the native kernels loop over it.

The memory of x, outermost dimension first, is read as (b, o, g, m, i): one statistic
for each (b, g), over all o, m and i. The learned affine has an entry for each (g mod P,
m), or for each (g mod P, i):

                  b   o    g    m    i        affine
    BN   NCHW     1   N    C    1    H·W      per run, P = C
    BN   NHWC     1   NHW  C    1    1        per run, P = C
    LN            1   1    R    1    K        per element, P = 1
    IN   NCHW     1   1    N·C  1    H·W      per run, P = C
    IN   NHWC     N   H·W  C    1    1        per run, P = C
    GN   NCHW     1   1    N·G  C/G  H·W      per run, P = G
    GN   NHWC     N   H·W  G    1    C/G      per element, P = G
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Geometry", "geometry_of"]

_PER_RUN, _PER_ELEMENT = 0, 1


@dataclass(frozen=True)
class Geometry:
    """A geometry, or the reason why there is none.

    Attributes:
        sizes: `(B, O, G, M, I, P, affine)`, the first fields of the native struct.
        reason: Reason why the kernels cannot run; empty when they can.
    """

    sizes: tuple[int, ...]
    reason: str = ""


@lru_cache(maxsize=4096)
def geometry_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    statistic: tuple[int, ...],
    affine: tuple[int, ...] | None,
) -> Geometry:
    """Read the memory of a tensor as (b, o, g, m, i).

    `statistic` and `affine` are shapes of as many dimensions as x, with size 1 where
    the statistics or learned vectors are constant.
    """
    axes = [d for d in range(len(shape)) if shape[d] != 1]
    axes.sort(key=lambda d: -strides[d])
    dense = 1
    for d in reversed(axes):
        if strides[d] != dense:
            return Geometry((), "x has gaps, overlaps or no values")
        dense *= shape[d]
    if not dense:
        return Geometry((), "x has gaps, overlaps or no values")
    # Learned vectors and statistics are flattened in logical order.
    kept = [d for d in axes if statistic[d] != 1]
    varying = [d for d in axes if affine is not None and affine[d] != 1]
    if kept != sorted(kept) or varying != sorted(varying):
        return Geometry((), "dimensions lie in another order than their vectors")
    parts: list[tuple[bool, bool, int]] = []
    for d in axes:
        is_kept, is_varying = statistic[d] != 1, d in varying
        if parts and parts[-1][:2] == (is_kept, is_varying):
            is_kept, is_varying, size = parts.pop()
            parts.append((is_kept, is_varying, size * shape[d]))
        else:
            parts.append((is_kept, is_varying, shape[d]))
    return _parse(parts)


def _parse(parts: list[tuple[bool, bool, int]]) -> Geometry:
    unsupported = Geometry(
        (), "dimensions interleave in a way no kernel is written for"
    )
    outer, parts = _take(parts, kept=True)
    first, parts = _take(parts, kept=False)
    inner, parts = _take(parts, kept=True)
    last, parts = _take(parts, kept=False)
    if parts:
        return unsupported
    if not inner and [v for v, _ in first] == [False, True]:
        first, last = first[:1], first[1:]
        inner = [(False, 1)]
    if inner:
        # No learned vector may vary along reduced dimensions outside of kept ones.
        if any(varies for varies, _ in outer + first) or len(last) > 1:
            return unsupported
        batch, over, groups = _size(outer), _size(first), inner
    else:
        batch, over, groups, last = 1, 1, outer, first
    varies = [v for v, _ in groups]
    if varies not in ([], [False], [True], [False, True]):
        return unsupported
    period = groups[-1][1] if varies and varies[-1] else 1
    count = _size(groups)
    pattern = [v for v, _ in last]
    if pattern == [] or pattern == [False]:
        return Geometry((batch, over, count, 1, _size(last), period, _PER_RUN))
    if pattern == [True]:
        return Geometry((batch, over, count, 1, _size(last), period, _PER_ELEMENT))
    if pattern == [True, False] and over == 1:
        return Geometry((batch, 1, count, last[0][1], last[1][1], period, _PER_RUN))
    return unsupported


def _take(
    parts: list[tuple[bool, bool, int]], *, kept: bool
) -> tuple[list[tuple[bool, int]], list[tuple[bool, bool, int]]]:
    """Split off the leading parts that are kept (or not), as (varies, size)."""
    n = 0
    while n < len(parts) and parts[n][0] == kept:
        n += 1
    return [part[1:] for part in parts[:n]], parts[n:]


def _size(parts: list[tuple[bool, int]]) -> int:
    return math.prod(size for _, size in parts)
