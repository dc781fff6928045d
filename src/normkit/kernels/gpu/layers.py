"""Whole layers: two launches forward and two backward per channel, one per row.

channels   statistics (and running statistics, scale) → apply with its epilogue
           sums (dweight, dbias, and what the gradient needs) → apply_grads
rows       one launch each way; beyond what registers hold, the four primitives
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from normkit.kernels.gpu import config, launchers
from normkit.kernels.gpu.geometry import (
    Matrix,
    Placement,
    Reduction,
    Runs,
    laid_out_as,
    matrix_of,
    reduction_of,
)
from normkit.kernels.spec import Running
from normkit.views import View

__all__ = [
    "Channels",
    "channels_backward",
    "channels_forward",
    "channels_of",
    "rows_backward",
    "saves_bits",
]


class Channels(NamedTuple):
    """Geometry of statistics per channel: reduction, matrix, placement of vectors."""

    reduction: Reduction
    matrix: Matrix
    along: Placement


def channels_of(view: View) -> Channels:
    """Return the geometry of a view of channels."""
    reduction = reduction_of(view)
    along = Placement("row", 1, reduction.statistics)
    if reduction.kind == "columns":
        along = Placement("column")
    return Channels(reduction, matrix_of(view), along)


def saves_bits(activation: str, residual: Tensor | None) -> bool:
    """Return whether the backward reads one bit per element: relu after a sum.

    Any other gate is recomputed from x; a relu after a sum would need the residual,
    and this way frees it.
    """
    return activation == "relu" and residual is not None


def channels_forward(
    x: Tensor,
    geometry: Channels,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
    *,
    running: Running | None,
    keeps: bool = True,
) -> tuple[Tensor, launchers.Statistics, Tensor | None]:
    """Return y, its statistics, and the bits that a backward reads, if it `keeps`."""
    found = launchers.statistics(
        x, geometry.reduction, eps=eps, weight=weight, running=running
    )
    assert found.scale is not None
    bits = None
    if keeps and saves_bits(activation, residual):
        bits = launchers.bits_like(x, geometry.matrix)
    y = launchers.apply(
        *(x, geometry.matrix, found.mean, found.scale, geometry.along),
        shift=bias,
        residual=None if residual is None else laid_out_as(x, residual),
        activation=activation,
        slope=slope,
        bits=bits,
    )
    return y, found, bits


def channels_backward(
    dy: Tensor,
    x: Tensor,
    geometry: Channels,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    scale: Tensor,
    gate: launchers.Gate,
    wanted: tuple[bool, bool, bool, bool],
    *,
    is_constant: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, bias and residual that are wanted.

    Vectors are flat, mean in float64; mean and inv_std do not depend on x when
    `is_constant`.
    """
    wants_x, wants_weight, wants_bias, wants_residual = wanted
    dy = laid_out_as(x, dy)
    b = c = dweight = dbias = dx = dresidual = None
    if (wants_x and not is_constant) or wants_weight or wants_bias:
        b, c, dweight, dbias = launchers.sums_of_batch_norm(
            *(dy, x, geometry.reduction, mean, inv_std, scale, gate),
            weight=weight if wants_weight else None,
            bias=bias if wants_bias else None,
        )
    if wants_x or wants_residual:
        if is_constant:
            b = c = None
        dx, dresidual = launchers.apply_grads(
            *(dy, x, geometry.matrix, mean, scale, b, c, geometry.along),
            gate=gate,
            wants_dx=wants_x,
            wants_dresidual=wants_residual,
        )
    return dx, dweight, dbias, dresidual


def rows_backward(
    dy: Tensor,
    x: Tensor,
    matrix: Matrix,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    runs: Runs | None,
    wanted: tuple[bool, bool, bool],
    *,
    centered: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias that are wanted.

    `runs` is None when there is one weight per column.
    """
    wants_x, wants_weight, wants_bias = wanted
    dy = laid_out_as(x, dy)
    has_sums = wants_weight or wants_bias
    fits = runs is None and config.keeps_shares(matrix.width, x.element_size())
    dx = dweight = dbias = None
    if wants_x or (has_sums and fits):
        dx, dweight, dbias = launchers.rows_backward(
            *(dy, x, matrix, mean, inv_std),
            weight=weight,
            runs=runs,
            centered=centered,
            wants_dweight=fits and wants_weight,
            wants_dbias=fits and wants_bias,
        )
    if has_sums and not fits:
        dbias, dweight = _sums_over_rows(dy, x, matrix, mean, inv_std, runs)
    return (
        dx if wants_x else None,
        _learned(dweight, weight) if wants_weight else None,
        _learned(dbias, bias) if wants_bias else None,
    )


def _learned(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    return None if gradient is None or of is None else gradient.to(of.dtype)


def _sums_over_rows(
    dy: Tensor,
    x: Tensor,
    matrix: Matrix,
    mean: Tensor,
    inv_std: Tensor,
    runs: Runs | None,
) -> tuple[Tensor, Tensor]:
    """Return Σ dy and Σ dy·x̂ per weight; each row has its own mean and inv_std."""
    if runs is None:
        reduction = reduction_of(View("channels", (matrix.rows, matrix.width, 1)))
        along = Placement("row", 1, matrix.rows)
    else:
        per_row = matrix.width // runs.length
        sizes = (matrix.rows // runs.groups, runs.groups * per_row, runs.length)
        reduction = reduction_of(View("channels", sizes))
        along = Placement("row", per_row, matrix.rows)
    return launchers.sums(dy, x, reduction, mean, along, scale=inv_std)
