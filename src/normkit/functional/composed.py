"""A normalization in torch operations that every transform of torch understands.

    composed        by its own statistics, as `engine.normalize`
    by_constants    by given ones, as `engine.standardize`

`torch.func`, forward mode, torch.compile and higher derivatives run these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.epilogue import Epilogue, activate
from normkit.kernels.primitives import split, vector_dtype
from normkit.moments import Moments, broadcast_mask, deviations, statistics_dtype

__all__ = ["aliases", "by_constants", "composed", "is_transformed"]

_NONE = Epilogue()


def composed(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mask: Tensor | None = None,
    centered: bool = True,
    epilogue: Epilogue = _NONE,
) -> tuple[Tensor, Moments]:
    """`normalize`, differentiable in every way: the same arguments and results."""
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
    y = _finished(_affine(y, weight, bias), epilogue)
    if valid is not None:
        y = torch.where(valid, y, torch.zeros_like(y))
    moments = measured.to_moments(vector_dtype(x.device)).detach()
    return y.to(x.dtype), moments


def by_constants(
    x: Tensor,
    center: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    """Act((x − center)·inv_std·weight + bias + residual), statistics as constants."""
    compute = statistics_dtype(x.dtype)
    hi, lo = split(center, compute)
    rest = x.to(compute) - hi
    rest = rest if lo is None else rest - lo
    y = _affine(rest * inv_std.to(compute), weight, bias)
    return _finished(y, epilogue).to(x.dtype)


def aliases(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same tensors as nodes of the graph of their own.

    A derivative that runs one of the above again on what a forward was given asks for
    the gradients of these: where a residual or a weight was computed from x, x itself
    would get that share, too, here and once more where autograd goes on.
    """
    with torch.enable_grad():
        return tuple(None if t is None else t.view_as(t) for t in tensors)


def _finished(z: Tensor, epilogue: Epilogue) -> Tensor:
    if epilogue.residual is not None:
        z = z + epilogue.residual.to(z.dtype)
    return activate(epilogue.activation, z, epilogue.slope)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y


def is_transformed(*gradients: Tensor) -> bool:
    """Whether torch.compile, export, torch.func or forward mode is watching."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        # autograd.grad(is_grads_batched=True) maps over the backward alone.
        or any(
            torch._C._functorch.is_legacy_batchedtensor(g)  # pyright: ignore[reportAttributeAccessIssue]
            for g in gradients
        )
    )
