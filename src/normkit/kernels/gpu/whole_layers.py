"""Whole layers on the GPU: fewer launches than the primitives one after the other.

`call_for` finds the geometry of a signature once; `normalize` and its gradients find it
at each call, for given statistics and for kept outputs that are computed again.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from normkit.errors import KernelError
from normkit.kernels.epilogue import Epilogue
from normkit.kernels.fused import apply_given
from normkit.kernels.gpu.call import ChannelCall, GpuCall, RowCall
from normkit.kernels.gpu.config import FORWARD_ROW
from normkit.kernels.gpu.geometry import (
    Matrix,
    Runs,
    arrange,
    flat,
    is_in_order,
    laid_out_as,
    matrix_of,
    place,
    runs_of,
)
from normkit.kernels.primitives import Backend, Grads
from normkit.kernels.spec import Running, Spec
from normkit.moments import Moments
from normkit.views import keepdim_shape, view_of

__all__ = ["WholeLayers", "is_plain", "kernels", "moments_of", "of_one_shape"]

_NONE = Epilogue()


class WholeLayers:
    """Layers of `GpuBackend`; see `kernels.fused.Fused`."""

    def call_for(
        self,
        spec: Spec,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: Running | None,
    ) -> GpuCall | None:
        """Return the call of this signature; None where no kernel runs it as a whole.

        Without a mask or ranks. Every tensor has to be plain, vectors contiguous.
        """
        statistics = running[:2] if running is not None else (None, None)
        vectors = [v for v in (weight, bias, *statistics) if v is not None]
        if (
            spec.given
            or spec.group is not None
            or len(set(map(_device, (x, *vectors)))) > 1
        ):
            return None
        if any(not is_plain(v) or not v.is_contiguous() for v in vectors):
            return None
        if running is not None and isinstance(running.rate, Tensor):
            return None
        seen, w, b = spec.seen(x), spec.along(weight), spec.along(bias)
        added = None if residual is None else spec.seen(residual)
        if not self.fuses(seen, spec.dims, w, b, added):
            return None
        view = view_of(seen, spec.dims)
        if view.kind == "channels" and spec.centered:
            return ChannelCall(kernels(), spec, x, view)
        is_alone = residual is None and running is None and spec.activation == "none"
        if view.kind != "rows" or not is_alone or not is_in_order(seen):
            return None
        matrix = matrix_of(view)
        return RowCall(kernels(), spec, x, matrix, _runs(w, b, seen, matrix))

    def fuses(
        self,
        x: Tensor,
        dims: tuple[int, ...],
        weight: Tensor | None,
        *others: Tensor | None,
    ) -> bool:
        """See `Fused.fuses`: vectors per channel, or rows short enough, and no mask."""
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
        center, scale = of_one_shape(center, scale)
        arranged = arrange(x, (center, bias))
        if arranged is None or center.shape == x.shape:
            return apply_given(
                cast("Backend", self), x, center, scale, None, bias, epilogue
            )
        matrix, (along, affine_along) = arranged
        assert along is not None
        residual = epilogue.residual
        return kernels().launchers.apply(
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
        residual = epilogue.residual
        spec = Spec(
            *(dims, eps, centered), activation=epilogue.activation, slope=epilogue.slope
        )
        vectors = (None if v is None else v.contiguous() for v in (weight, bias))
        weight, bias = vectors
        call = self.call_for(spec, x, weight, bias, residual, None)
        if call is None:
            return None
        y, kept = call.forward((x, weight, bias, residual, None), None, "nothing")
        return y, call.moments(kept), call.statistics(kept)[1]

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
        layers = kernels()
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
    """Return whether a tensor holds its own values, by strides."""
    return type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided


def of_one_shape(*vectors: Tensor) -> tuple[Tensor, ...]:
    """Expand vectors to the largest of each of their sizes."""
    shapes = {v.shape for v in vectors}
    if len(shapes) == 1:
        return vectors
    sizes = [max(size) for size in zip(*shapes, strict=True)]
    return tuple(v.expand(sizes) for v in vectors)


def _device(t: Tensor) -> torch.device:
    return t.device


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
