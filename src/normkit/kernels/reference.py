"""The four primitives in plain torch: any device, dtype and strides.

Every other backend is tested against it. Nothing is made contiguous: reductions and
broadcasts run on x in its own layout. Half-precision inputs are computed in
float32; sums are torch's cascade sums, taken around a pilot mean, so their error is
relative to the spread of the values and not to their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.deterministic import is_deterministic, pairwise_sum
from normkit.kernels.epilogue import Epilogue, activate
from normkit.kernels.primitives import absorbed, split, vector_dtype
from normkit.moments import Moments, deviations, plain_sum, statistics_dtype

__all__ = ["ReferenceBackend"]

_NONE = Epilogue()


class ReferenceBackend:
    """Plain torch, everywhere torch runs."""

    name = "reference"

    def reasons_against(self, x: Tensor, dims: tuple[int, ...]) -> list[str]:
        """Return no reasons: this backend runs wherever torch does."""
        return []

    def moments(
        self, x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
    ) -> Moments:
        """See `Backend.moments`."""
        add = pairwise_sum if is_deterministic() else plain_sum
        found = deviations(x, dims, mask, add=add)
        return found.to_moments(vector_dtype(x.device))

    def apply(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        epilogue: Epilogue = _NONE,
    ) -> Tensor:
        """See `Backend.apply`."""
        compute = statistics_dtype(x.dtype)
        scale, weight = absorbed(scale, weight)
        y = _centered(x, center, compute).mul_(scale.to(compute))
        if weight is not None:
            y.mul_(weight.to(compute))
        if shift is not None:
            y.add_(shift.to(compute))
        if epilogue.residual is not None:
            y.add_(epilogue.residual.to(compute))
        return activate(epilogue.activation, y, epilogue.slope).to(x.dtype)

    def reduce_grads(
        self,
        dy: Tensor,
        x: Tensor,
        center: Tensor,
        dims: tuple[int, ...],
        *,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.reduce_grads`."""
        compute = statistics_dtype(x.dtype)
        dy = dy.to(compute)
        if weight is not None:
            dy = dy * weight.to(compute)
        product = _centered(x, center, compute).mul_(dy)
        if scale is not None:
            product.mul_(scale.to(compute))
        wide = vector_dtype(x.device)
        return _sum(dy, dims).to(wide), _sum(product, dims).to(wide)

    def apply_grads(
        self,
        dy: Tensor,
        x: Tensor,
        center: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.apply_grads`."""
        compute = statistics_dtype(x.dtype)
        dx = _centered(x, center, compute).mul_(b.to(compute)).add_(c.to(compute))
        dy = dy.to(compute)
        if weight is not None:
            dy = dy * weight.to(compute)
        return dx.addcmul_(dy, a.to(compute).expand_as(dy)).to(x.dtype)


def _centered(x: Tensor, center: Tensor, compute: torch.dtype) -> Tensor:
    """Return (x − hi) − lo in the compute dtype, in new memory, laid out as x."""
    hi, lo = split(center, compute)
    rest = x.to(compute) - hi
    return rest if lo is None else rest.sub_(lo)


def _sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    # torch reads an empty tuple of dims as "all of them".
    return x.sum(dims, keepdim=True) if dims else x
