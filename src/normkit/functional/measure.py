"""Statistics of a batch without a gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit.kernels.choose import choose
from normkit.kernels.primitives import vector_dtype
from normkit.masks import broadcast_mask
from normkit.moments import Moments, deviations
from normkit.torch_state import has_transforms, is_compiling

__all__ = ["measure"]


def measure(x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None) -> Moments:
    """Return the moments of `x` over `dims`, constant for every kind of derivative.

    Args:
        x: Values, any shape, any floating dtype.
        dims: Distinct, non-negative dimensions that share a statistic.
        mask: Which values count: bool or weights ≥ 0, broadcastable to `x`.

    Returns:
        Moments in float64 (float32 where the device has no more), `dims` kept with
        size 1.

    Raises:
        DtypeError: `x` is not floating point.
    """
    is_weighted = mask is not None and mask.dtype != torch.bool
    if is_weighted or is_compiling() or has_transforms():
        found = deviations(x.detach(), dims, mask)
        return found.to_moments(vector_dtype(x.device)).detach()
    valid = None if mask is None else broadcast_mask(mask, x)
    # detach() keeps the tangent of forward mode.
    with torch.no_grad():
        primal = forward_ad.unpack_dual(x).primal
        return choose(primal, dims).moments(primal, dims, valid)
