"""The input of a backward as one int8 per value: `less_memory("int8")`.

x − center  ≈  step·k,  k from −127 to 127          a step for each statistic
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.errors import DerivativeError
from normkit.kernels.primitives import split
from normkit.moments import statistics_dtype

__all__ = ["from_bytes", "to_bytes"]


def to_bytes(
    x: Tensor, center: Tensor, dims: tuple[int, ...], *, centered: bool
) -> tuple[Tensor, Tensor]:
    """Quantize x − center in 255 steps for each statistic; return it and the step."""
    compute = statistics_dtype(x.dtype)
    rest = x.to(compute)
    if centered:
        hi, lo = split(center, compute)
        rest = rest - hi if lo is None else (rest - hi).sub_(lo)
    # amax takes no empty dimension.
    sizes = rest if rest.numel() else rest.new_zeros([max(n, 1) for n in rest.shape])
    largest = sizes.abs().amax(dims, keepdim=True)
    step = (largest / 127).clamp(min=torch.finfo(compute).tiny)
    # int8 has no NaN; it is restored through the step.
    whole = (rest / step).round_().nan_to_num_(0.0, 127.0, -127.0)
    return whole.to(torch.int8), step


def from_bytes(stored: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x − center from the result of `to_bytes`."""
    if torch.is_grad_enabled():
        raise DerivativeError(
            "a forward under less_memory('int8') kept its input as bytes, which has no "
            "exact second derivative; run it under less_memory('recompute')"
        )
    return (stored.to(step.dtype) * step).to(dtype)
