"""Views: the layout in memory of the values that share a statistic.

Every normalization reduces some dimensions of x and keeps the others. In memory
that is one of two canonical views, or neither:

    channels (O, C, I)   one statistic per c over all o and i      batch norm
    rows     (R, K)      one statistic per r over all k            layer, RMS, group
    strided              gaps, overlaps, interleaving, no values    any other

NCHW is channels with O = N, I = H·W; channels_last is channels with O = N·H·W,
I = 1. Kernels are written for the two; nothing is copied to get there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["View", "keepdim_shape", "view_of"]


@dataclass(frozen=True)
class View:
    """The memory layout of x as seen by a reduction.

    Attributes:
        kind: `"channels"`, `"rows"` or `"strided"`.
        sizes: `(O, C, I)`, `(R, K)`, or `()` when strided.
    """

    kind: Literal["channels", "rows", "strided"]
    sizes: tuple[int, ...]

    def canonical(self, x: Tensor) -> Tensor:
        """Reshape `x` to `sizes`, sharing its memory; return a strided `x` itself."""
        if self.kind == "strided":
            return x
        strides = [math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes))]
        return x.as_strided(self.sizes, strides)


def view_of(x: Tensor, dims: tuple[int, ...]) -> View:
    """Classify the layout of `x` for a reduction over `dims`.

    Args:
        x: Any tensor.
        dims: Distinct, non-negative dimensions that are reduced.

    Returns:
        The view. Kept dimensions of a canonical view lie in their logical order,
        so that statistics flattened in logical order match; so do the reduced
        dimensions of rows, whose learned weights run along them.

    Example:
        >>> import torch
        >>> x = torch.empty(2, 3, 4, 5)
        >>> view_of(x, (0, 2, 3))
        View(kind='channels', sizes=(2, 3, 20))
        >>> view_of(x.contiguous(memory_format=torch.channels_last), (0, 2, 3))
        View(kind='channels', sizes=(40, 3, 1))
        >>> view_of(x, (1, 2, 3))
        View(kind='rows', sizes=(2, 60))
        >>> view_of(x[..., ::2], (1, 2, 3))
        View(kind='strided', sizes=())
    """
    if x.numel() == 0:
        return View("strided", ())
    axes = [d for d in range(x.dim()) if x.shape[d] != 1]
    axes.sort(key=lambda d: -x.stride(d))
    dense = 1
    for d in reversed(axes):
        if x.stride(d) != dense:
            return View("strided", ())
        dense *= x.shape[d]
    kept = [d for d in axes if d not in dims]
    reduced = [d for d in axes if d in dims]
    if kept != sorted(kept):
        return View("strided", ())
    pattern = "".join("r" if d in dims else "k" for d in axes)
    rows, columns = math.prod(x.shape[d] for d in kept), [x.shape[d] for d in reduced]
    # One reduced block after everything kept; no kept dimension at all is one row.
    if pattern.lstrip("k").strip("r") == "" and pattern.endswith("r"):
        if reduced == sorted(reduced):
            return View("rows", (rows, math.prod(columns)))
        return View("strided", ())
    inner = len(pattern) - len(pattern.rstrip("r"))
    if "r" in pattern.strip("r"):
        return View("strided", ())
    outer_size = math.prod(columns[: len(columns) - inner])
    inner_size = math.prod(columns[len(columns) - inner :])
    return View("channels", (outer_size, rows, inner_size))


def keepdim_shape(x: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of `x` with `dims` reduced to size 1."""
    return tuple(1 if d in dims else size for d, size in enumerate(x.shape))
