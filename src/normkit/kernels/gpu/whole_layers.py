"""Whole layers on the GPU: fewer launches than the primitives one after the other.

`call_for` finds the geometry of a signature once, `gradients` at each call: for given
statistics, and for kept outputs that are computed again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from normkit.errors import KernelError
from normkit.kernels.gpu.call import ChannelCall, GpuCall, RowCall
from normkit.kernels.gpu.config import FORWARD_ROW
from normkit.kernels.gpu.geometry import (
    Matrix,
    Runs,
    flat,
    is_in_order,
    laid_out_as,
    matrix_of,
    place,
    runs_of,
)
from normkit.kernels.primitives import Grads
from normkit.kernels.spec import Operands, Running, Saved, Spec
from normkit.moments import Moments
from normkit.views import keepdim_shape, view_of

__all__ = ["WholeLayers", "is_plain", "kernels", "moments_of", "of_one_shape"]


class WholeLayers:
    """Layers of `GpuBackend`; `functional.passes` runs the primitives elsewhere."""

    def call_for(
        self, spec: Spec, operands: Operands, running: Running | None
    ) -> GpuCall | None:
        """Return the call of this signature; None where no kernel runs it as a whole.

        Without a mask or ranks. Every tensor has to be plain, vectors contiguous.
        """
        x, weight, bias, residual, mask = operands
        statistics = running[:2] if running is not None else (None, None)
        vectors = [v for v in (weight, bias, *statistics) if v is not None]
        if (
            mask is not None
            or spec.given
            or spec.group is not None
            or len({t.device for t in (x, *vectors)}) > 1
        ):
            return None
        if any(not is_plain(v) or not v.is_contiguous() for v in vectors):
            return None
        if running is not None and isinstance(running.rate, Tensor):
            return None
        seen, w, b = spec.seen(x), spec.along(weight), spec.along(bias)
        added = None if residual is None else spec.seen(residual)
        if not self._fuses(seen, spec.dims, w, b, added):
            return None
        view = view_of(seen, spec.dims)
        if view.kind == "channels" and spec.centered:
            return ChannelCall(kernels(), spec, x, view)
        is_alone = residual is None and running is None and spec.activation == "none"
        if view.kind != "rows" or not is_alone or not is_in_order(seen):
            return None
        matrix = matrix_of(view)
        return RowCall(kernels(), spec, x, matrix, _runs(w, b, seen, matrix))

    def _fuses(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """Return whether kernels have the layout: per channel, or rows short enough."""
        given = [t for t in (weight, *others) if t is not None]
        if any(not is_plain(t) or t.dtype == torch.bool for t in given):
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

    def gradients(
        self, spec: Spec, dy: Tensor, saved: Saved, wanted: tuple[bool, ...]
    ) -> Grads | None:
        """Return the gradients that are wanted; None where no kernel makes them all.

        Tensors are in the shape of `spec.dims`, without a mask; what was kept begins
        with mean and 1/√(var + eps). Of a relu after a sum the output replaces the
        residual: it is positive where the relu was open.
        """
        x, weight, bias, residual, _, y, (center, inv_std, *_) = saved
        if not self._fuses(x, spec.dims, weight, bias, residual, dy):
            return None
        layers = kernels()
        view = view_of(x, spec.dims)
        mean, inverse = flat(center, x), flat(inv_std, x)
        w, b = (None if v is None else flat(v, x) for v in (weight, bias))
        if view.kind == "channels" and spec.centered:
            scale = inverse if w is None else inverse * w
            gate = layers.launchers.Gate(
                activation=spec.activation,
                slope=spec.slope,
                output=None if y is None else laid_out_as(x, y),
                shift=b,
                residual=None if residual is None else laid_out_as(x, residual),
            )
            dx, dweight, dbias, dresidual = layers.channels_backward(
                *(dy, x, layers.channels_of(view), w, b, mean, inverse, scale),
                *(gate, wanted),
                is_constant=spec.given,
            )
        elif view.kind == "rows" and not spec.given and not spec.epilogue(residual):
            matrix = matrix_of(view)
            dx, dweight, dbias = layers.rows_backward(
                *(dy, x, matrix, w, b, mean, inverse),
                *(_runs(weight, bias, x, matrix), wanted[:3]),
                centered=spec.centered,
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


def moments_of(x: Tensor, mean: Tensor, m2: Tensor) -> Moments:
    """Return the Moments of all values of x that share a statistic."""
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


def is_plain(t: Tensor) -> bool:
    """Return whether a tensor holds its own values, by strides, with no lazy minus."""
    is_strided = type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided
    return is_strided and not t.is_neg()


def of_one_shape(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Expand vectors to the largest of each of their sizes."""
    shapes = {v.shape for v in vectors}
    if len(shapes) == 1:
        return vectors
    sizes = [max(size) for size in zip(*shapes, strict=True)]
    return tuple(v.expand(sizes) for v in vectors)


@functools.cache
def kernels() -> Any:
    """Import the kernels, and with them Triton, at the first use."""
    try:
        from normkit.kernels.gpu import layers
    except ImportError as error:
        raise KernelError(
            f"the gpu backend could not load its kernels ({error}); install triton, "
            "or choose another backend"
        ) from error
    return layers
