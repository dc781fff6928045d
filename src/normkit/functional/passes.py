"""Forward and backward on any backend, as a sequence of its primitives.

    forward     statistics → merge over ranks, if any → apply → epilogue
    backward    epilogue back → sums → sum over ranks, if any → apply_grads

With g = dy·act′·weight, n values per statistic and r = x − mean,

    dx = inv_std·g − inv_std·Σg/n − r·inv_std³·Σg·r/n
    dweight = Σ dy·act′·r·inv_std,   dbias = Σ dy·act′

because d(mean)/dx = 1/n, d(var)/dx = 2r/n and d(var)/d(mean) = 0. Root mean square is
the same with mean = 0. Over ranks Σg and Σg·r are sums of all ranks, because every
rank's x is in the statistics; dweight and dbias stay sums over this rank's values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.functional.differentiable import constants_of
from normkit.functional.ema import update
from normkit.kernels.choose import choose
from normkit.kernels.epilogue import gate
from normkit.kernels.primitives import Backend, Grads, absorbed, shared_dims
from normkit.kernels.spec import Operands, Running, Saved, Spec
from normkit.masks import zero_where
from normkit.moments import Moments, statistics_dtype
from normkit.sync import merge_over, sum_over

__all__ = ["Passes"]


class Passes:
    """Call without a signature, for any tensors that torch operations can read."""

    __slots__ = ("spec",)

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def forward(
        self,
        operands: Operands,
        running: Running | None,
        keeps: str,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `NativeCall.forward`; a residual and a mask of any layout."""
        x, weight, bias, residual, mask = operands
        spec, shape = self.spec, x.shape
        x, weight, bias = spec.seen(x), spec.along(weight), spec.along(bias)
        residual = None if residual is None else spec.seen(residual)
        mask = None if mask is None else spec.seen(mask)
        kernels = choose(x, spec.dims)
        measured = None
        if spec.given:
            assert running is not None
            center, inv_std = constants_of(spec, x.view(shape), running)
            if mask is not None:
                # In dweight a NaN of the padding would be multiplied by dy = 0.
                x = zero_where(~mask, x)
            kept = (center, inv_std)
        else:
            measured = kernels.moments(x, spec.dims, mask)
            if spec.group is not None:
                measured = merge_over(measured, spec.group, eps=spec.eps)
            center, spread = measured.mean, measured.var
            if not spec.centered:
                center, spread = torch.zeros_like(center), measured.mean_square
            # No values at all have a variance of nan; 0·nan would poison dweight.
            inv_std = torch.rsqrt(spread + spec.eps).where(measured.count > 0, 0.0)
            kept = (measured.mean, inv_std, measured.count, measured.m2)
        y = kernels.apply(
            x, center, inv_std, bias, weight=weight, epilogue=spec.epilogue(residual)
        )
        if measured is not None and running is not None:
            update(running, measured)
        if mask is not None:
            y = y.masked_fill_(~mask, 0)
        # Not a view: what follows may change an output in place.
        return torch.ops.aten._unsafe_view(y, shape), kept

    def backward(
        self,
        dy: Tensor,
        saved: Saved,
        wanted: tuple[bool, ...],
    ) -> Grads:
        """See `NativeCall.backward`."""
        x, weight, bias, residual, mask, gated, kept = saved
        spec, shape = self.spec, x.shape
        learned = weight, bias
        center, inv_std, count = self.statistics(kept)
        x, dy, weight, bias = (
            *(spec.seen(x), spec.seen(dy)),
            *(spec.along(weight), spec.along(bias)),
        )
        residual = None if residual is None else spec.seen(residual)
        gated = None if gated is None else spec.seen(gated)
        mask = None if mask is None else spec.seen(mask)
        if not spec.centered:
            center = torch.zeros_like(center)
        kernels = choose(x, spec.dims)
        grads: Grads | None = None
        whole = getattr(kernels, "gradients", None)
        if whole is not None and mask is None and spec.group is None:
            seen = x, weight, bias, residual, None, gated, (center, inv_std)
            grads = whole(spec, dy, seen, wanted)
        if grads is None:
            if mask is not None:
                # A NaN of x at a masked place times a gradient of 0 would be NaN.
                x = zero_where(~mask, x)
            own = x.dtype
            if spec.activation != "none":
                # Halves are rounded once, at the end: the slope of the activation is
                # taken where its input was, not where that would be rounded to.
                compute = statistics_dtype(own)
                x, dy = x.to(compute), dy.to(compute)
                z = None if gated is None else gated.to(compute)
                if z is None or spec.activation != "relu":
                    added = None if residual is None else residual.to(compute)
                    plain = Spec(spec.dims, spec.eps).epilogue(added)
                    z = kernels.apply(
                        x, center, inv_std, bias, weight=weight, epilogue=plain
                    )
                dy = gate(spec.activation, dy, z, spec.slope)
            if mask is not None:
                dy = zero_where(~mask, dy)
            dx, dweight, dbias = self._sums_and_dx(
                kernels, dy, x, weight, bias, center, inv_std, count, wanted
            )
            if mask is not None and dx is not None:
                dx = dx.masked_fill_(~mask, 0)
            dx = None if dx is None else dx.to(own)
            grads = dx, dweight, dbias, dy.to(own) if wanted[3] else None
        dx, dweight, dbias, dresidual = grads
        return (
            None if dx is None else dx.view(shape),
            _like(dweight, learned[0]),
            _like(dbias, learned[1]),
            None if dresidual is None else dresidual.reshape(shape),
        )

    def _sums_and_dx(
        self,
        kernels: Backend,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        center: Tensor,
        inv_std: Tensor,
        count: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        spec, (wants_x, wants_weight, wants_bias) = self.spec, wanted[:3]
        dims = tuple(d for d in range(x.dim()) if center.shape[d] == 1)
        affine = weight if weight is not None else bias
        needs_sums = (wants_x and count is not None) or wants_weight or wants_bias
        dweight = dbias = sum_g = sum_gr = None
        shared = dims if affine is None else shared_dims(affine, dims)
        if needs_sums and shared:
            # One reduction serves both: the remaining sums are over small vectors.
            sum_dy, sum_dyr = kernels.reduce_grads(dy, x, center, shared)
            if wants_weight and weight is not None:
                dweight = (sum_dyr * inv_std).sum_to_size(weight.shape)
            if wants_bias and bias is not None:
                dbias = sum_dy.sum_to_size(bias.shape)
            left = tuple(d for d in dims if d not in shared)
            wide_weight = 1 if weight is None else weight.to(sum_dy.dtype)
            sum_g, sum_gr = sum_dy * wide_weight, sum_dyr * wide_weight
            if left:
                sum_g = sum_g.sum(left, keepdim=True)
                sum_gr = sum_gr.sum(left, keepdim=True)
        elif needs_sums and affine is not None:
            if wants_x and count is not None:
                sum_g, sum_gr = kernels.reduce_grads(dy, x, center, dims, weight=weight)
            if wants_weight or wants_bias:
                over = tuple(d for d in range(x.dim()) if affine.shape[d] == 1)
                dbias, dweight = kernels.reduce_grads(
                    dy, x, center, over, scale=inv_std
                )
        dx = None
        if wants_x:
            a, factor = absorbed(inv_std, weight)
            b = c = torch.zeros_like(inv_std)
            if count is not None and sum_g is not None and sum_gr is not None:
                if spec.group is not None:
                    sum_g, sum_gr = (
                        total.to(inv_std.dtype)
                        for total in sum_over(
                            [sum_g, sum_gr], spec.group, action="backward"
                        )
                    )
                n = count.to(inv_std.dtype).clamp(min=1)
                b = inv_std.pow(3) * sum_gr / -n
                if spec.centered:
                    c = inv_std * sum_g / -n
            dx = kernels.apply_grads(dy, x, center, a, b, c, weight=factor)
        return (
            dx,
            dweight if wants_weight else None,
            dbias if wants_bias else None,
        )

    def again(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        center: Tensor,
        inv_std: Tensor,
    ) -> Tensor:
        """Return the output of a forward with these statistics, bit by bit."""
        spec, seen = self.spec, self.spec.seen(x)
        center = center if spec.centered else torch.zeros_like(center)
        epilogue = spec.epilogue(None if residual is None else spec.seen(residual))
        y = choose(seen, spec.dims).apply(
            *(seen, center, inv_std, spec.along(bias)),
            weight=spec.along(weight),
            epilogue=epilogue,
        )
        return y.view(x.shape)

    def statistics(
        self, kept: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return mean, 1/√(var + eps) and count; no count where they are given."""
        return kept[0], kept[1], None if self.spec.given else kept[2]

    def around_zero(self, kept: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the kept statistics as those of x − mean."""
        return (torch.zeros_like(kept[0]), *kept[1:])

    def moments(self, kept: tuple[Tensor, ...]) -> Moments:
        """Return the Moments of the batch that a forward measured."""
        mean, _, count, m2 = kept
        return Moments(count, mean, m2)


def _like(gradient: Tensor | None, learned: Tensor | None) -> Tensor | None:
    if gradient is None or learned is None:
        return None
    return gradient.to(learned.dtype).view(learned.shape)
