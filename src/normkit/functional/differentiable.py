"""The formula in torch operations, which every transform of torch understands.

    y = act((x − mean)/√(var + eps)·weight + bias + residual)

`torch.func`, forward mode, torch.compile, weighted masks and higher derivatives run it;
the kernels agree with it. The centre is kept as hi + lo, so that x − mean loses nothing
where the mean is far from 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.epilogue import activate
from normkit.kernels.primitives import split, vector_dtype
from normkit.kernels.spec import Operands, Running, Spec
from normkit.masks import broadcast_mask, zero_where
from normkit.moments import Moments, deviations, statistics_dtype
from normkit.sync import merge_over

__all__ = [
    "aliases",
    "constants_of",
    "finish",
    "gradients",
    "normalize",
    "normalize_by_constants",
]


def normalize(spec: Spec, operands: Operands) -> tuple[Tensor, Moments]:
    """Return y by the statistics of x (of all ranks in a group), and its Moments.

    The mask is in the shape of `spec.dims`.
    """
    x, weight, bias, residual, mask = operands
    compute, wide = statistics_dtype(x.dtype), vector_dtype(x.device)
    # One cast: with two, the gradients of values and statistics would be rounded to a
    # half each before they cancel.
    values, valid = spec.seen(x).to(compute), None
    local = deviations(values, spec.dims, mask)
    if mask is not None:
        valid = broadcast_mask(mask, values)
        valid = valid if valid.dtype == torch.bool else valid > 0
        values = torch.where(valid, values, torch.zeros_like(values))
    measured = local.to_moments(wide)
    if spec.group is None:
        hi, lo, m2, count = local.hi, local.lo, local.m2, local.count
    else:
        measured = merge_over(measured, spec.group, eps=spec.eps)
        hi, _ = split(measured.mean.detach(), compute)
        hi = torch.where(hi.isfinite(), hi, torch.zeros_like(hi))
        lo = (measured.mean - hi.to(wide)).to(compute)
        m2, count = measured.m2.to(compute), measured.count
    spread = m2 / count.to(compute).clamp(min=1e-30)
    if spec.centered:
        rest = (values - hi) - lo
    else:
        rest, spread = values, spread + (hi + lo).square()
    inv_std = torch.rsqrt(spread + spec.eps)
    y = finish(spec, rest * inv_std, weight, bias, residual, valid)
    return y.to(x.dtype).view(x.shape), measured.detach()


def normalize_by_constants(
    spec: Spec, operands: Operands, center: Tensor, inv_std: Tensor
) -> Tensor:
    """Return y by given statistics, which get no gradient; the mask as above."""
    x, weight, bias, residual, mask = operands
    seen = spec.seen(x)
    compute = statistics_dtype(x.dtype)
    values, valid = seen.to(compute), None
    if mask is not None:
        valid = broadcast_mask(mask, seen)
        valid = valid if valid.dtype == torch.bool else valid > 0
        values = torch.where(valid, values, torch.zeros_like(values))
    hi, lo = split(center, compute)
    rest = values - hi
    rest = rest if lo is None else rest - lo
    y = finish(spec, rest * inv_std.to(compute), weight, bias, residual, valid)
    return y.to(x.dtype).view(x.shape)


def finish(
    spec: Spec,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """Apply what follows standardizing: affine, residual, activation, mask."""
    weight, bias = spec.along(weight), spec.along(bias)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    if residual is not None:
        y = y + spec.seen(residual).to(y.dtype)
    y = activate(spec.activation, y, spec.slope)
    return y if valid is None else torch.where(valid, y, torch.zeros_like(y))


def constants_of(spec: Spec, x: Tensor, running: Running) -> tuple[Tensor, Tensor]:
    """Return the centre and 1/√(var + eps) of running statistics, in float64.

    Copies: the statistics may be updated before the backward of this forward.
    """
    assert running.mean is not None
    assert running.var is not None
    wide = vector_dtype(x.device)
    place = spec.kept(x.shape) if spec.statistic is None else spec.statistic
    center = running.mean.detach().view(place).to(wide, copy=True)
    var = running.var.detach().view(place).to(wide)
    return center, torch.rsqrt(var + spec.eps)


def aliases(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the same tensors as nodes of a graph of their own.

    A derivative that reruns the formula on the inputs of a forward takes gradients with
    respect to these. With the inputs themselves, a residual or weight that was computed
    from x would add its share to x's gradient here, and autograd adds it once more.
    """
    with torch.enable_grad():
        return tuple(None if t is None else t.view_as(t) for t in tensors)


def gradients(
    spec: Spec,
    dy: Tensor,
    learned: tuple[Tensor | None, ...],
    statistics: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    gated: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual as a graph of their own.

    `learned` are x, weight, bias and residual (None where it is a plain sum or `gated`
    replaces it); `statistics` the centre and 1/√(var + eps) where these are constants;
    `gated` the output of a relu, positive where it was open.
    """
    with_graph = torch.is_grad_enabled()
    x, weight, bias, residual = aliases(*learned)
    assert x is not None
    if gated is not None:
        # The gate of a relu is constant: its second derivative is 0.
        dy = zero_where(gated <= 0, dy)
        spec = spec.without_activation()
    if mask is not None:
        dy = zero_where(~mask, dy)
        mask = spec.seen(mask)
    dresidual = dy if wanted[3] and residual is None else None
    given = (x, weight, bias, residual)
    with torch.enable_grad():
        if statistics is None:
            y, _ = normalize(spec, (*given, mask))
        else:
            y = normalize_by_constants(spec, (*given, mask), *statistics)
    asked = [w and t is not None for w, t in zip(wanted, given, strict=True)]
    inputs = [t for t, a in zip(given, asked, strict=True) if a and t is not None]
    found = iter(
        torch.autograd.grad(y, inputs, dy, create_graph=with_graph) if inputs else ()
    )
    dx, dweight, dbias, through = (next(found) if a else None for a in asked)
    return dx, dweight, dbias, through if dresidual is None else dresidual
