"""The GPU backend: Triton kernels behind the contract's four primitives.

    tile         tiles, activations                   elementwise   apply, apply_grads
    statistics   mean and m2, running statistics      sums          sums of the backward
    partials     partial results of both              rows          whole rows on chip
    config       tile sizes and grids                 geometry      tensors → matrices
    launch       start of a kernel                    launchers/    kernels on tensors
    layers       whole layers from launchers          ops           operators of torch

Importing this package does not import Triton; choosing the backend does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from normkit.errors import KernelError
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.fused import apply_given
from normkit.kernels.gpu.config import FORWARD_ROW
from normkit.kernels.gpu.geometry import (
    Matrix,
    Placement,
    Runs,
    arrange,
    flat,
    laid_out_as,
    matrix_of,
    place,
    reduction_of,
    runs_of,
)
from normkit.kernels.primitives import Grads
from normkit.kernels.reference import ReferenceBackend
from normkit.moments import Moments
from normkit.views import keepdim_shape, view_of

__all__ = ["GpuBackend"]

_NONE = Epilogue()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GpuBackend:
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
        if not _is_plain(x):
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
        launchers = _layers().launchers
        view = view_of(x, dims)
        shape = keepdim_shape(x, dims)
        if view.kind == "rows" and view.sizes[1] <= FORWARD_ROW:
            _, found = launchers.rows_forward(x, matrix_of(view), eps=None)
        else:
            found = launchers.statistics(x, reduction_of(view))
        return _moments(x, found.mean.view(shape), found.m2.view(shape))

    def apply(
        self,
        x: Tensor,
        center: Tensor,
        scale: Tensor,
        shift: Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.apply`."""
        center, scale = _of_one_shape(center, scale)
        if weight is not None and shift is not None:
            weight, shift = _of_one_shape(weight, shift)
        affine = weight if weight is not None else shift
        arranged = arrange(x, (center, affine))
        if arranged is None:
            return ReferenceBackend().apply(x, center, scale, shift, weight=weight)
        matrix, (along, affine_along) = arranged
        assert along is not None
        return _layers().launchers.apply(
            *(x, matrix, flat(center, x), flat(scale, x), along),
            weight=None if weight is None else flat(weight, x),
            shift=None if shift is None else flat(shift, x),
            affine_along=affine_along,
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
        total, total_rest = _layers().launchers.sums(
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
        center, a, b, c = _of_one_shape(center, a, b, c)
        arranged = arrange(x, (center, weight))
        if arranged is None:
            return ReferenceBackend().apply_grads(dy, x, center, a, b, c, weight=weight)
        matrix, (along, affine_along) = arranged
        assert along is not None
        dx, _ = _layers().launchers.apply_grads(
            *(laid_out_as(x, dy), x, matrix),
            *(flat(center, x), flat(a, x), flat(b, x), flat(c, x), along),
            weight=None if weight is None else flat(weight, x),
            affine_along=affine_along,
        )
        assert dx is not None
        return dx

    def fuses(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """See `Fused.fuses`: vectors per channel, or rows short enough, and no mask."""
        given = [t for t in (weight, *others) if t is not None]
        if any(not _is_plain(t) or t.dtype == torch.bool for t in given):
            return False
        if any(t.shape == x.shape and t.dtype != x.dtype for t in given):
            return False
        view, shape = view_of(x, dims), keepdim_shape(x, dims)
        vectors = [t for t in given if t.shape != x.shape]
        if view.kind == "channels":
            return all(t.shape == shape for t in vectors)
        if view.kind == "strided" or view.sizes[1] > FORWARD_ROW:
            return False
        return len({t.shape for t in vectors}) <= 1 and all(
            _rows_affine(t, x, matrix_of(view)) is not None for t in vectors
        )

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
        if weight is not None:
            scale = scale * weight
        center, scale = _of_one_shape(center, scale)
        arranged = arrange(x, (center, bias))
        if arranged is None or center.shape == x.shape:
            return apply_given(self, x, center, scale, None, bias, epilogue)
        matrix, (along, affine_along) = arranged
        assert along is not None
        residual = epilogue.residual
        return _layers().launchers.apply(
            *(x, matrix, flat(center, x), flat(scale, x), along),
            shift=None if bias is None else flat(bias, x),
            affine_along=affine_along,
            residual=None if residual is None else laid_out_as(x, residual),
            activation=epilogue.activation,
            slope=epilogue.slope,
        )

    def normalize(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        centered: bool = True,
        epilogue: Epilogue = _NONE,
    ) -> tuple[Tensor, Moments, Tensor] | None:
        """See `Fused.normalize`. Not centred, the moments are those about 0."""
        layers, view, shape = _layers(), view_of(x, dims), keepdim_shape(x, dims)
        flat_weight = None if weight is None else flat(weight, x)
        flat_bias = None if bias is None else flat(bias, x)
        if view.kind == "channels" and centered:
            y, found, _ = layers.channels_forward(
                *(x, layers.channels_of(view), flat_weight, flat_bias, eps, epilogue)
            )
        elif view.kind == "rows" and not epilogue:
            y, found = layers.launchers.rows_forward(
                *(x, matrix_of(view)),
                eps=eps,
                weight=flat_weight,
                bias=flat_bias,
                runs=_runs(weight, bias, x, matrix_of(view)),
                centered=centered,
            )
        else:
            return None
        measured = _moments(x, found.mean.view(shape), found.m2.view(shape))
        return y, measured, found.inv_std.view(shape)

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
        centered: bool = True,
        epilogue: Epilogue = _NONE,
        y: Tensor | None = None,
        wanted: tuple[bool, bool, bool, bool],
    ) -> Grads | None:
        """See `Fused.normalize_grads`."""
        layers = _layers()
        dims = tuple(d for d in range(x.dim()) if center.shape[d] == 1)
        view = view_of(x, dims)
        mean, inverse = flat(center, x), flat(inv_std, x)
        w, b = (None if v is None else flat(v, x) for v in (weight, bias))
        if view.kind == "channels" and centered:
            scale = inverse if w is None else inverse * w
            residual = epilogue.residual
            gate = layers.launchers.Gate(
                activation=epilogue.activation,
                slope=epilogue.slope,
                output=None if y is None else laid_out_as(x, y),
                shift=b,
                residual=None if residual is None else laid_out_as(x, residual),
            )
            dx, dweight, dbias, dresidual = layers.channels_backward(
                *(dy, x, layers.channels_of(view), w, b, mean, inverse, scale),
                *(gate, wanted),
                is_constant=count is None,
            )
        elif view.kind == "rows" and count is not None and not epilogue:
            matrix = matrix_of(view)
            dx, dweight, dbias = layers.rows_backward(
                *(dy, x, matrix, w, b, mean, inverse),
                *(_runs(weight, bias, x, matrix), wanted[:3]),
                centered=centered,
            )
            dresidual = dy if wanted[3] else None
        else:
            return None
        return (
            dx,
            None if dweight is None or weight is None else dweight.view(weight.shape),
            None if dbias is None or bias is None else dbias.view(bias.shape),
            dresidual,
        )


def _moments(x: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    values = x.numel() // mean.numel()
    count = torch.full((), values, dtype=torch.int64, device=x.device)
    return Moments(count, mean, m2)


def _rows_affine(vector: Tensor, x: Tensor, matrix: Matrix) -> Runs | str | None:
    """Return how a vector lies on rows: "columns", runs, or None if it does not."""
    placed = place(vector, x, matrix)
    if placed is not None and placed.along == "column":
        return "columns"
    runs = runs_of(vector, x, matrix)
    # A run of one value gives sums that no reduction over runs can take.
    return None if runs is None or runs.length == 1 else runs


def _runs(
    weight: Tensor | None, bias: Tensor | None, x: Tensor, matrix: Matrix
) -> Runs | None:
    affine = weight if weight is not None else bias
    placed = None if affine is None else _rows_affine(affine, x, matrix)
    return placed if isinstance(placed, Runs) else None


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided


def _of_one_shape(*vectors: Tensor) -> tuple[Tensor, ...]:
    shapes = {v.shape for v in vectors}
    if len(shapes) == 1:
        return vectors
    sizes = [max(size) for size in zip(*shapes, strict=True)]
    return tuple(v.expand(sizes) for v in vectors)


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


@functools.cache
def _layers() -> Any:
    """Import the kernels, and with them Triton, at the first use."""
    try:
        from normkit.kernels.gpu import layers
    except ImportError as error:
        raise KernelError(
            f"the gpu backend could not load its kernels ({error}); install triton, "
            "or choose another backend"
        ) from error
    return layers
