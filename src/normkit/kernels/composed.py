"""The fused operations of a backend that has the four primitives alone.

    normalize        moments → apply → epilogue
    normalize_grads  epilogue back → reduce_grads → algebra → apply_grads

With g = dy·act′·weight, n values per statistic and r = x − mean,

    dx = inv_std·g − inv_std·Σg/n − r·inv_std³·Σg·r/n
    dweight = Σ dy·act′·r·inv_std,   dbias = Σ dy·act′

because d(mean)/dx = 1/n, d(var)/dx = 2r/n and d(var)/d(mean) = 0. Root mean square is
the same with mean = 0. A backend with kernels of its own for the two agrees with this.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from normkit.kernels.epilogue import Epilogue, activate, gate
from normkit.kernels.fixed_order import is_order_fixed
from normkit.kernels.primitives import Backend
from normkit.moments import Moments, statistics_dtype, zero_where

__all__ = ["Composed", "Fused", "Grads", "fused", "shared_dims"]

# dx, dweight, dbias, dresidual
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_NONE = Epilogue()


class Fused(Protocol):
    """What the layers ask of a backend beyond single primitives."""

    def fuses(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """Whether the operations below run on these tensors."""
        ...

    def apply_given(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        epilogue: Epilogue,
    ) -> Tensor:
        """act((x − center)·scale·weight + bias + residual)."""
        ...

    def normalize(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        mask: Tensor | None = None,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
    ) -> tuple[Tensor, Moments, Tensor]:
        """The values, the moments over `dims` and 1/√(var + eps), dims kept.

        Where the bool `mask` is False the values are 0.
        """
        ...

    def normalize_grads(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center: Tensor,
        inv_std: Tensor,
        count: Tensor | None,
        *,
        mask: Tensor | None = None,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
        y: Tensor | None = None,
        wanted: tuple[bool, bool, bool, bool],
    ) -> Grads:
        """The gradients of x, weight, bias and residual that are wanted.

        `count` is None when the statistics are constants. `y`, where given, stands for
        the residual of a relu: it says where the relu was open.
        """
        ...


class Composed:
    """`Fused`, from the four primitives of a backend."""

    def __init__(self, kernels: Backend) -> None:
        self._kernels = kernels

    def fuses(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """See `Fused.fuses`: always."""
        return True

    def apply_given(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        epilogue: Epilogue,
    ) -> Tensor:
        """See `Fused.apply_given`."""
        scale, weight = _absorbed(scale, weight)
        y = self._kernels.apply(x, center, scale, bias, weight=weight)
        if epilogue.residual is not None:
            y = y.add_(epilogue.residual)
        return activate(epilogue.activation, y, epilogue.slope)

    def normalize(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        mask: Tensor | None = None,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
    ) -> tuple[Tensor, Moments, Tensor]:
        """See `Fused.normalize`."""
        measured = self._kernels.moments(x, dims, mask)
        if centered:
            center, spread = measured.mean, measured.var
        else:
            center, spread = torch.zeros_like(measured.mean), measured.mean_square
        # No values at all have a variance of nan; 0·nan would poison dweight.
        inv_std = torch.rsqrt(spread + eps).where(measured.count > 0, 0.0)
        y = self.apply_given(x, center, inv_std, weight, bias, epilogue)
        if mask is not None:
            y = y.masked_fill_(~mask, 0)
        return y, measured, inv_std

    def normalize_grads(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center: Tensor,
        inv_std: Tensor,
        count: Tensor | None,
        *,
        mask: Tensor | None = None,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
        y: Tensor | None = None,
        wanted: tuple[bool, bool, bool, bool],
    ) -> Grads:
        """See `Fused.normalize_grads`."""
        if not centered:
            center = torch.zeros_like(center)
        if epilogue.activation != "none":
            if y is None or epilogue.activation != "relu":
                plain = Epilogue(residual=epilogue.residual)
                y = self.apply_given(x, center, inv_std, weight, bias, plain)
            compute = statistics_dtype(x.dtype)
            opened = gate(
                epilogue.activation, dy.to(compute), y.to(compute), epilogue.slope
            )
            dy = opened.to(x.dtype)
        if mask is not None:
            # What x holds at masked places must not meet a gradient of 0.
            dy, x = zero_where(~mask, dy), zero_where(~mask, x)
        dx, dweight, dbias = self._grads(
            dy, x, weight, bias, center, inv_std, count, centered, wanted[:3]
        )
        if mask is not None and dx is not None:
            dx = dx.masked_fill_(~mask, 0)
        return dx, dweight, dbias, dy if wanted[3] else None

    def _grads(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center: Tensor,
        inv_std: Tensor,
        count: Tensor | None,
        centered: bool,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        kernels = self._kernels
        wants_x, wants_weight, wants_bias = wanted
        dims = tuple(d for d in range(x.dim()) if center.shape[d] == 1)
        affine = weight if weight is not None else bias
        needs_sums = (wants_x and count is not None) or wants_weight or wants_bias
        dweight = dbias = sum_g = sum_g_rest = None
        shared = dims if affine is None else shared_dims(affine, dims)
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
                sum_g, sum_g_rest = kernels.reduce_grads(
                    dy, x, center, dims, weight=weight
                )
            if wants_weight or wants_bias:
                over = tuple(d for d in range(x.dim()) if affine.shape[d] == 1)
                dbias, dweight = kernels.reduce_grads(
                    dy, x, center, over, scale=inv_std
                )
        dx = None
        if wants_x:
            a, factor = _absorbed(inv_std, weight)
            b = c = torch.zeros_like(inv_std)
            if count is not None and sum_g is not None and sum_g_rest is not None:
                n = count.to(inv_std.dtype).clamp(min=1)
                b = inv_std.pow(3) * sum_g_rest / -n
                if centered:
                    c = inv_std * sum_g / -n
            dx = kernels.apply_grads(dy, x, center, a, b, c, weight=factor)
        return (
            dx,
            _learned(dweight, weight) if wants_weight else None,
            _learned(dbias, bias) if wants_bias else None,
        )


def fused(
    kernels: Backend,
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    *others: Tensor | None,
) -> Fused:
    """The fused operations of `kernels` where it has them, or composed ones."""
    own = cast("Fused", kernels) if hasattr(kernels, "fuses") else None
    if own is not None and own.fuses(x, dims, weight, *others):
        return own
    return Composed(kernels)


def shared_dims(affine: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """The reduced dimensions along which the learned affine is constant, too."""
    return tuple(d for d in dims if affine.shape[d] == 1)


def _absorbed(scale: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`scale·weight` as one vector where that is smaller than x."""
    if is_order_fixed():
        # Whether it is smaller depends on the size of the batch.
        return scale, weight
    dims = tuple(d for d in range(scale.dim()) if scale.shape[d] == 1)
    if weight is None or not shared_dims(weight, dims):
        return scale, weight
    return scale * weight, None


def _learned(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    if gradient is None or of is None:
        return None
    return gradient.to(of.dtype)
