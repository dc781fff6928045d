"""Batch statistics of all ranks, and their backward.

    forward     measure → merge over ranks → standardize          one collective
    backward    Σg and Σg·(x − mean), g = dy·weight, over ranks   one collective

dx depends on every rank's loss, because every rank's x is in the statistics. The
gradients of weight and bias stay sums over this rank's values, as in torch: whoever
averages gradients over ranks averages those, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.functional.composed import is_transformed
from normkit.kernels.choose import choose, choose_fused
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.primitives import split, vector_dtype
from normkit.moments import (
    Moments,
    broadcast_mask,
    deviations,
    statistics_dtype,
    zero_where,
)
from normkit.sync import merge_over, sum_over

__all__ = ["normalize_over_ranks"]

_NONE = Epilogue()


def normalize_over_ranks(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    process_group: Any = None,
) -> tuple[Tensor, Moments]:
    """Standardize `x` by the statistics that all ranks' values have together.

    Args:
        x: This rank's values; none at all are allowed, and every rank has to call.
        dims: Distinct, non-negative dimensions that share a statistic.
        weight: Factor after standardizing, of size 1 along `dims`.
        bias: Summand after that, of the shape of `weight`.
        eps: Added to the variance, inside the root.
        mask: Which values count, broadcastable to `x`; on all ranks or on none.
            Outputs and gradients are 0 elsewhere.
        process_group: As in `normkit.sync.merge_over`.

    Returns:
        The standardized values, in the dtype of `x`, and the Moments of all ranks:
        detached, `dims` kept with size 1, float64, the same bytes on every rank.

    Raises:
        DtypeError: `x` is not floating point.

    Numerics:
        The collective is a sum of float64 around 0: the variance is good to
        1e-16·(mean/std)² relative. Differentiable to any order; every rank has to
        take part in each backward.
    """
    is_weighted = mask is not None and mask.dtype != torch.bool
    if is_weighted or is_transformed():
        return _composed(x, dims, weight, bias, eps, mask, process_group)
    valid = None if mask is None else broadcast_mask(mask, x)
    job = _Job(dims, eps, process_group)
    y = _OverRanks.apply(x, weight, bias, valid, job)
    assert job.measured is not None
    return y, job.measured


class _Job:
    """What one call is asked for, and the statistics that it found."""

    __slots__ = ("dims", "eps", "measured", "process_group")

    def __init__(
        self, dims: tuple[int, ...], eps: float, process_group: Any = None
    ) -> None:
        self.dims, self.eps, self.process_group = dims, eps, process_group
        self.measured: Moments | None = None


class _OverRanks(torch.autograd.Function):
    """y from x and the statistics of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        valid: Tensor | None,
        job: _Job,
    ) -> Tensor:
        local = choose(x, job.dims).moments(x, job.dims, valid)
        merged = merge_over(local, job.process_group)
        # No value on any rank: 0·nan would poison the gradient of weight.
        inv_std = torch.rsqrt(merged.var + job.eps).where(merged.count > 0, 0.0)
        kernels = choose_fused(x, job.dims, weight, bias)
        y = kernels.apply_given(x, merged.mean, inv_std, weight, bias, _NONE)
        if valid is not None:
            y = y.masked_fill_(~valid, 0)
        job.measured = merged
        ctx.save_for_backward(
            x, weight, bias, valid, merged.mean, inv_std, merged.count
        )
        ctx.job = job
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, bias, valid, center, inv_std, count = ctx.saved_tensors
        job: _Job = ctx.job
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or is_transformed():
            grads = _differentiable_grads(dy, x, weight, bias, valid, job, wanted)
            return (*grads, None, None)
        if valid is not None:
            # What x holds at masked places must not meet a gradient of 0.
            dy, x = zero_where(~valid, dy), zero_where(~valid, x)
        kernels = choose(x, job.dims)
        sum_dy, sum_dy_rest = kernels.reduce_grads(dy, x, center, job.dims)
        dx = dweight = dbias = None
        if wanted[1] and weight is not None:
            dweight = (sum_dy_rest * inv_std).to(weight.dtype)
        if wanted[2] and bias is not None:
            dbias = sum_dy.to(bias.dtype)
        if wanted[0]:
            scale = inv_std if weight is None else inv_std * weight
            factor = 1.0 if weight is None else weight.to(sum_dy.dtype)
            sum_g, sum_g_rest = (
                total.to(inv_std.dtype)
                for total in sum_over(
                    [sum_dy * factor, sum_dy_rest * factor], job.process_group
                )
            )
            n = count.to(inv_std.dtype).clamp(min=1)
            b, c = inv_std.pow(3) * sum_g_rest / -n, inv_std * sum_g / -n
            dx = kernels.apply_grads(dy, x, center, scale, b, c)
            if valid is not None:
                dx = dx.masked_fill_(~valid, 0)
        return dx, dweight, dbias, None, None


def _differentiable_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    job: _Job,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The same gradients as a graph of their own, for create_graph=True."""
    if valid is not None:
        dy = zero_where(~valid, dy)
    named = tuple(zip((x, weight, bias), wanted, strict=True))
    inputs = [t for t, is_wanted in named if is_wanted and t is not None]
    with torch.enable_grad():
        y, _ = _composed(
            *(x, job.dims, weight, bias, job.eps, valid, job.process_group)
        )
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    return tuple(
        next(found) if is_wanted and t is not None else None for t, is_wanted in named
    )


def _composed(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: Tensor | None,
    process_group: Any,
) -> tuple[Tensor, Moments]:
    """The same in torch operations that every transform of torch understands."""
    compute, wide = statistics_dtype(x.dtype), vector_dtype(x.device)
    local = deviations(x, dims, mask)
    merged = merge_over(local.to_moments(wide), process_group)
    values = x.to(compute)
    if mask is not None:
        valid = broadcast_mask(mask, x)
        valid = valid if valid.dtype == torch.bool else valid > 0
        values = torch.where(valid, values, torch.zeros_like(values))
    else:
        valid = None
    hi, _ = split(merged.mean.detach(), compute)
    hi = torch.where(hi.isfinite(), hi, torch.zeros_like(hi))
    lo = (merged.mean - hi.to(wide)).to(compute)
    count = merged.count.to(wide).clamp(min=1e-30)
    y = ((values - hi) - lo) * torch.rsqrt(merged.m2 / count + eps).to(compute)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    if valid is not None:
        y = torch.where(valid, y, torch.zeros_like(y))
    return y.to(x.dtype), merged.detach()
