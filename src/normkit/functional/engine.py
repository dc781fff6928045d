"""Measure, standardize, and the backward of both.

    y = act((x − mean)·inv_std·weight + bias + residual)

over the values that share a statistic: on the kernels (`derivative`), or in torch
operations where a transform of torch is watching (`composed`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.errors import ShapeError
from normkit.functional.composed import by_constants, composed, is_transformed
from normkit.functional.derivative import Job, run
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.primitives import vector_dtype
from normkit.moments import Moments, broadcast_mask, statistics_dtype

__all__ = ["normalize", "standardize"]

_NONE = Epilogue()


def normalize(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    centered: bool = True,
    epilogue: Epilogue = _NONE,
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
        epilogue: A residual to add and an activation to apply, in the same pass.

    Returns:
        The standardized values, in the dtype of `x`, and the Moments they were
        standardized by: detached, `dims` kept with size 1, float64.

    Raises:
        DtypeError: `x` is not floating point.
        ShapeError: `weight` or `bias` does not broadcast to `x`, or the residual has
            another shape.
    """
    _check_shapes(x, weight, bias, epilogue.residual)
    is_weighted = mask is not None and mask.dtype != torch.bool
    if is_weighted or is_transformed():
        return composed(
            *(x, dims, weight, bias, eps),
            mask=mask,
            centered=centered,
            epilogue=epilogue,
        )
    valid = None if mask is None else broadcast_mask(mask, x)
    job = Job(dims, eps, centered, epilogue)
    return run(x, weight, bias, epilogue.residual, valid, job), job.measured


def standardize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    epilogue: Epilogue = _NONE,
) -> Tensor:
    """Standardize `x` by given statistics, as batch norm does in eval mode.

    Args:
        x: Values, any shape, any floating dtype.
        mean: Subtracted from `x`; as many dimensions as `x`, broadcastable to it.
        var: Population or running variance, of the shape of `mean`.
        weight: Factor after standardizing, broadcastable to `x`.
        bias: Summand after that, of the shape of `weight`.
        eps: Added to the variance, inside the root.
        epilogue: A residual to add and an activation to apply, in the same pass.

    Returns:
        act((x − mean)/√(var + eps)·weight + bias + residual), in the dtype of `x`. The
        statistics are constants: no gradient goes to them, as in torch.
    """
    _check_shapes(x, weight, bias, epilogue.residual)
    wide = vector_dtype(x.device)
    inv_std = torch.rsqrt(var.detach().to(wide) + eps)
    # A copy: running statistics may move before this forward's backward.
    center = mean.detach().to(wide, copy=True)
    if is_transformed():
        return by_constants(x, center, inv_std, weight, bias, epilogue)
    dims = tuple(d for d in range(x.dim()) if mean.shape[d] == 1)
    job = Job(dims, eps, True, epilogue)
    job.center, job.inv_std = center, inv_std
    return run(x, weight, bias, epilogue.residual, None, job)


def _check_shapes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> None:
    statistics_dtype(x.dtype)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and not _fits(t.shape, x.shape):
            raise ShapeError(
                f"{name} of shape {tuple(t.shape)} must have the dimensions of x, "
                f"{tuple(x.shape)}, each of the same size or 1; use view()"
            )
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ShapeError(
            f"weight of shape {tuple(weight.shape)} and bias of shape "
            f"{tuple(bias.shape)} must have one shape"
        )
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(
            f"residual of shape {tuple(residual.shape)} must have the shape of x, "
            f"{tuple(x.shape)}; use expand()"
        )


def _fits(vector: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    if len(vector) != len(shape):
        return False
    for a, b in zip(vector, shape, strict=True):  # noqa: SIM110  half the time of all()
        if a != 1 and a != b:
            return False
    return True
