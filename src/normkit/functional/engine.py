"""Measure, standardize, and the backward of both.

    y = (x − mean)·inv_std·weight + bias          over the values that share a statistic

With g = dy·weight and n values per statistic,

    dx = inv_std·g − inv_std·Σg/n − (x − mean)·inv_std³·Σg(x − mean)/n
    dweight = Σ dy·(x − mean)·inv_std,   dbias = Σ dy

because d(mean)/dx = 1/n, d(var)/dx = 2(x − mean)/n and d(var)/d(mean) = 0. Root mean
square is the same with mean = 0. The first derivative runs on the four primitives;
higher derivatives, forward mode, `torch.func` and `torch.compile` run `composed`, the
same map in differentiable torch operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit.errors import ShapeError
from normkit.kernels.choose import choose
from normkit.kernels.primitives import vector_dtype
from normkit.moments import (
    Moments,
    broadcast_mask,
    deviations,
    statistics_dtype,
)

__all__ = ["composed", "normalize", "standardize"]


def normalize(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    centered: bool = True,
) -> tuple[Tensor, Moments]:
    """Standardize `x` by its own statistics over `dims`.

    Args:
        x: Values, any shape, any floating dtype.
        dims: Distinct, non-negative dimensions that share a statistic.
        weight: Factor after standardizing, broadcastable to `x` and of as many
            dimensions.
        bias: Summand after that, of the shape of `weight`.
        eps: Added to the variance (or mean square), inside the root.
        mask: Which values count: bool or weights ≥ 0, broadcastable to `x`. Outputs
            and gradients are 0 where it is False or 0.
        centered: Subtract the mean; False divides by the root mean square.

    Returns:
        The standardized values, in the dtype of `x`, and the Moments they were
        standardized by: detached, `dims` kept with size 1, float64.

    Raises:
        DtypeError: `x` is not floating point.
        ShapeError: `weight` or `bias` does not broadcast to `x`.
    """
    _check_affine(x, weight, bias)
    is_weighted = mask is not None and mask.dtype != torch.bool
    if _is_transformed() or is_weighted:
        return composed(x, dims, weight, bias, eps, mask=mask, centered=centered)
    with torch.no_grad():
        valid = None if mask is None else broadcast_mask(mask, x)
        measured = choose(x, dims).moments(x, dims, valid)
        if centered:
            center, spread = measured.mean, measured.var
        else:
            center, spread = torch.zeros_like(measured.mean), measured.mean_square
        inv_std = torch.rsqrt(spread + eps)
    y = _Standardize.apply(
        x, weight, bias, valid, center, inv_std, measured.count, dims, eps, centered
    )
    return y, measured


def standardize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Standardize `x` by given statistics, as batch norm does in eval mode.

    Args:
        x: Values, any shape, any floating dtype.
        mean: Subtracted from `x`; as many dimensions as `x`, broadcastable to it.
        var: Population or running variance, of the shape of `mean`.
        weight: Factor after standardizing, broadcastable to `x`.
        bias: Summand after that, of the shape of `weight`.
        eps: Added to the variance, inside the root.

    Returns:
        (x − mean)/√(var + eps)·weight + bias, in the dtype of `x`. The statistics
        are constants: no gradient goes to them, as in torch.
    """
    _check_affine(x, weight, bias)
    with torch.no_grad():
        inv_std = torch.rsqrt(var.to(vector_dtype(x.device)) + eps)
    mean = mean.detach()
    if _is_transformed():
        compute = statistics_dtype(x.dtype)
        y = (x.to(compute) - mean.to(compute)) * inv_std.to(compute)
        return _affine(y, weight, bias).to(x.dtype)
    dims = tuple(d for d in range(x.dim()) if mean.shape[d] == 1)
    return _Standardize.apply(
        x, weight, bias, None, mean, inv_std, None, dims, eps, True
    )


def composed(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    centered: bool = True,
) -> tuple[Tensor, Moments]:
    """`normalize` in torch operations that every transform of torch understands."""
    compute = statistics_dtype(x.dtype)
    measured = deviations(x, dims, mask)
    values = x.to(compute)
    valid = None
    if mask is not None:
        valid = broadcast_mask(mask, x)
        valid = valid if valid.dtype == torch.bool else valid > 0
        values = torch.where(valid, values, torch.zeros_like(values))
    count = measured.count.to(compute).clamp(min=1e-30)
    var = measured.m2 / count
    if centered:
        y = ((values - measured.hi) - measured.lo) * torch.rsqrt(var + eps)
    else:
        mean = measured.hi + measured.lo
        y = values * torch.rsqrt(var + mean.square() + eps)
    y = _affine(y, weight, bias)
    if valid is not None:
        y = torch.where(valid, y, torch.zeros_like(y))
    moments = measured.to_moments(vector_dtype(x.device)).detach()
    return y.to(x.dtype), moments


class _Standardize(torch.autograd.Function):
    """y from x and its statistics; the statistics' dependence on x is in backward.

    `count` is None when the statistics are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        valid: Tensor | None,
        center: Tensor,
        inv_std: Tensor,
        count: Tensor | None,
        dims: tuple[int, ...],
        eps: float,
        centered: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, valid, center, inv_std, count)
        ctx.dims, ctx.eps, ctx.centered = dims, eps, centered
        kernels = choose(x, dims)
        if weight is None or _shared_dims(weight, dims):
            scale = inv_std if weight is None else inv_std * weight
            y = kernels.apply(x, center, scale, bias)
        else:
            y = kernels.apply(x, center, inv_std, bias, weight=weight)
        return y if valid is None else y.masked_fill_(~valid, 0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, weight, bias, valid, center, inv_std, count = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or _is_transformed(dy):
            grads = _differentiable_grads(
                dy, x, weight, bias, valid, center, inv_std, count, ctx, wanted
            )
        else:
            if valid is not None:
                # What x holds at masked places must not meet a gradient of 0.
                dy, x = dy.masked_fill(~valid, 0), x.masked_fill(~valid, 0)
            grads = _grads(
                *(dy, x, weight, bias, center, inv_std, count),
                *(ctx.dims, ctx.centered, wanted),
            )
            if valid is not None and grads[0] is not None:
                grads = (grads[0].masked_fill_(~valid, 0), *grads[1:])
        return (*grads, None, None, None, None, None, None, None)


def _grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    center: Tensor,
    inv_std: Tensor,
    count: Tensor | None,
    dims: tuple[int, ...],
    centered: bool,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    kernels = choose(x, dims)
    wants_x, wants_weight, wants_bias = wanted
    affine = weight if weight is not None else bias
    needs_sums = (wants_x and count is not None) or wants_weight or wants_bias
    dweight = dbias = sum_g = sum_g_rest = None
    shared = dims if affine is None else _shared_dims(affine, dims)
    if needs_sums and shared:
        # One reduction serves both: what is left to sum lies on small vectors.
        sum_dy, sum_dy_rest = kernels.reduce_grads(dy, x, center, shared)
        if wants_weight and weight is not None:
            dweight = (sum_dy_rest * inv_std).sum_to_size(weight.shape)
        if wants_bias and bias is not None:
            dbias = sum_dy.sum_to_size(bias.shape)
        left = tuple(d for d in dims if d not in shared)
        wide_weight = 1 if weight is None else weight.to(sum_dy.dtype)
        sum_g, sum_g_rest = sum_dy * wide_weight, sum_dy_rest * wide_weight
        if left:
            sum_g = sum_g.sum(left, keepdim=True)
            sum_g_rest = sum_g_rest.sum(left, keepdim=True)
    elif needs_sums and affine is not None:
        if wants_x and count is not None:
            sum_g, sum_g_rest = kernels.reduce_grads(dy, x, center, dims, weight=weight)
        if wants_weight or wants_bias:
            spread_over = tuple(d for d in range(x.dim()) if affine.shape[d] == 1)
            dbias, dweight = kernels.reduce_grads(
                dy, x, center, spread_over, scale=inv_std
            )
    dx = None
    if wants_x:
        a, factor = inv_std, weight
        if weight is not None and _shared_dims(weight, dims):
            a, factor = inv_std * weight, None
        b = c = torch.zeros_like(inv_std)
        if count is not None and sum_g is not None and sum_g_rest is not None:
            n = count.to(inv_std.dtype).clamp(min=1)
            b = inv_std.pow(3) * sum_g_rest / -n
            if centered:
                c = inv_std * sum_g / -n
        dx = kernels.apply_grads(dy, x, center, a, b, c, weight=factor)
    return (
        dx,
        dweight.to(weight.dtype)
        if weight is not None and dweight is not None
        else None,
        dbias.to(bias.dtype) if bias is not None and dbias is not None else None,
    )


def _differentiable_grads(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    center: Tensor,
    inv_std: Tensor,
    count: Tensor | None,
    ctx: Any,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same gradients as a graph of their own, for create_graph=True."""
    with torch.enable_grad():
        if count is None:
            compute = statistics_dtype(x.dtype)
            y = (x.to(compute) - center.to(compute)) * inv_std.to(compute)
            y = _affine(y, weight, bias).to(x.dtype)
        else:
            y, _ = composed(
                x, ctx.dims, weight, bias, ctx.eps, mask=valid, centered=ctx.centered
            )
    named = zip((x, weight, bias), wanted, strict=True)
    inputs = [t for t, is_wanted in named if is_wanted and t is not None]
    with_graph = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=with_graph))
    dx, dweight, dbias = (next(found) if w else None for w in wanted)
    return dx, dweight, dbias


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y


def _shared_dims(affine: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The reduced dimensions along which the learned affine is constant, too."""
    return tuple(d for d in dims if affine.shape[d] == 1)


def _check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    statistics_dtype(x.dtype)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        fits = t.dim() == x.dim() and all(
            a in (1, b) for a, b in zip(t.shape, x.shape, strict=True)
        )
        if not fits:
            raise ShapeError(
                f"{name} of shape {tuple(t.shape)} must have the dimensions of x, "
                f"{tuple(x.shape)}, each of the same size or 1; use view()"
            )
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ShapeError(
            f"weight of shape {tuple(weight.shape)} and bias of shape "
            f"{tuple(bias.shape)} must have one shape"
        )


def _is_transformed(*gradients: Tensor) -> bool:
    """Whether torch.compile, export, torch.func or forward mode is watching."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        # autograd.grad(is_grads_batched=True) maps over the backward alone.
        or any(torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)
    )
