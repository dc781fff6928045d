"""The GPU backend: Triton kernels behind the contract's four primitives.

    tile         tiles, activations                   elementwise   apply, apply_grads
    statistics   mean and m2, running statistics      sums          sums of the backward
    partials     partial results of both              rows          whole rows on chip
    config       tile sizes and grids                 geometry      tensors → matrices
    launch       start of a kernel                    launchers/    kernels on tensors
    layers       whole layers from launchers          ops           operators of torch
    call         a signature's two directions         whole_layers  layers of a backend

Importing this package does not import Triton; choosing the backend does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from normkit.kernels.epilogue import Epilogue
from normkit.kernels.gpu.config import FORWARD_ROW
from normkit.kernels.gpu.geometry import (
    Placement,
    arrange,
    flat,
    laid_out_as,
    matrix_of,
    place,
    reduction_of,
)
from normkit.kernels.gpu.whole_layers import (
    WholeLayers,
    is_plain,
    kernels,
    moments_of,
    of_one_shape,
)
from normkit.kernels.reference import ReferenceBackend
from normkit.moments import Moments
from normkit.views import keepdim_shape, view_of

__all__ = ["GpuBackend"]

_NONE = Epilogue()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GpuBackend(WholeLayers):
    """Triton kernels on CUDA tensors of float32, bfloat16 and float16.

    Deterministic: no sum depends on the order in which programs run. CUDA-graph safe:
    nothing is read back and no shape depends on data.
    """

    name = "gpu"

    def __init__(self, device_types: Sequence[str] = ("cuda",)) -> None:
        self.device_types = tuple(device_types)

    def reasons_against(self, x: Tensor, dims: tuple[int, ...]) -> list[str]:
        """Return why the kernels cannot reduce `x` over `dims`; empty when they can."""
        reasons = self.device_reasons(x.device)
        if x.dtype not in _DTYPES:
            reasons.append(f"x is {x.dtype}, it runs float32, bfloat16 and float16")
        if x.is_neg():
            reasons.append(
                "x is a lazily negated view: resolve_neg() writes its values"
            )
        elif not is_plain(x):
            reasons.append(
                f"x is a {type(x).__name__} of {x.layout}, not a plain tensor"
            )
        else:
            view = view_of(x, dims)
            if view.kind == "strided":
                reasons.append("x has gaps, no values, or interleaved dimensions")
            elif max(view.sizes) >= 2**31 or x.numel() // max(view.sizes) >= 2**31:
                reasons.append("a dimension has 2³¹ values or more")
        return reasons

    def device_reasons(self, device: torch.device) -> list[str]:
        """Return why these kernels cannot run on `device`; empty when they can."""
        if device.type not in self.device_types:
            return [f"x is on {device.type}, it needs a CUDA device"]
        return list(_device_reasons(device))

    def moments(
        self, x: Tensor, dims: tuple[int, ...], mask: Tensor | None = None
    ) -> Moments:
        """See `Backend.moments`. Under a mask it runs as torch operations on `x`."""
        if mask is not None:
            return ReferenceBackend().moments(x, dims, mask)
        launchers = kernels().launchers
        view = view_of(x, dims)
        shape = keepdim_shape(x, dims)
        if view.kind == "rows" and view.sizes[1] <= FORWARD_ROW:
            _, found = launchers.rows_forward(x, matrix_of(view), eps=None)
        else:
            found = launchers.statistics(x, reduction_of(view))
        return moments_of(x, found.mean.view(shape), found.m2.view(shape))

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
        if weight is not None and (product := scale * weight).shape != x.shape:
            scale, weight = product, None
        center, scale = of_one_shape(center, scale)
        if weight is not None and shift is not None:
            weight, shift = of_one_shape(weight, shift)
        affine = weight if weight is not None else shift
        arranged = arrange(x, (center, affine))
        if arranged is None:
            return ReferenceBackend().apply(
                x, center, scale, shift, weight=weight, epilogue=epilogue
            )
        matrix, (along, affine_along) = arranged
        assert along is not None
        residual = epilogue.residual
        return kernels().launchers.apply(
            *(x, matrix, flat(center, x), flat(scale, x), along),
            weight=None if weight is None else flat(weight, x),
            shift=None if shift is None else flat(shift, x),
            affine_along=affine_along,
            residual=None if residual is None else laid_out_as(x, residual),
            activation=epilogue.activation,
            slope=epilogue.slope,
        )

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
        view = view_of(x, dims)
        shape = keepdim_shape(x, dims)
        along = weight_along = None
        if view.kind != "strided":
            matrix = matrix_of(view)
            along = place(center, x, matrix)
            weight_along = None if weight is None else place(weight, x, matrix)
            if scale is not None:
                scale = scale.expand(center.shape)
        if along is None or (weight is None) != (weight_along is None):
            return ReferenceBackend().reduce_grads(
                dy, x, center, dims, weight=weight, scale=scale
            )
        if center.shape == shape and scale is None:
            along = Placement("statistic")
        total, total_rest = kernels().launchers.sums(
            *(laid_out_as(x, dy), x, reduction_of(view), flat(center, x), along),
            scale=None if scale is None else flat(scale, x),
            weight=None if weight is None else flat(weight, x),
            weight_along=weight_along,
        )
        return total.view(shape), total_rest.view(shape)

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
        center, a, b, c = of_one_shape(center, a, b, c)
        arranged = arrange(x, (center, weight))
        if arranged is None:
            return ReferenceBackend().apply_grads(dy, x, center, a, b, c, weight=weight)
        matrix, (along, affine_along) = arranged
        assert along is not None
        dx, _ = kernels().launchers.apply_grads(
            *(laid_out_as(x, dy), x, matrix),
            *(flat(center, x), flat(a, x), flat(b, x), flat(c, x), along),
            weight=None if weight is None else flat(weight, x),
            affine_along=affine_along,
        )
        assert dx is not None
        return dx


@functools.cache
def _device_reasons(device: torch.device) -> list[str]:
    reasons: list[str] = []
    if find_spec("triton") is None:
        reasons.append("triton is not installed: pip install triton")
    if device.type == "cuda":
        if torch.version.hip is not None:
            reasons.append("ROCm has not been tried: the kernels are for CUDA")
        elif torch.cuda.get_device_capability(device) < (8, 0):
            capability = torch.cuda.get_device_capability(device)
            reasons.append(
                f"the device has compute capability {capability[0]}.{capability[1]}, "
                "it needs 8.0 (Ampere) or later"
            )
    return reasons
