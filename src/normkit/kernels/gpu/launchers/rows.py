"""Launch the kernels that hold whole rows: one forward, one backward."""

# A kernel's type is its list of untyped arguments.
# pyright: reportUnknownVariableType=false, reportMissingImports=false

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.gpu import config, launch
from normkit.kernels.gpu.geometry import Matrix, Runs
from normkit.kernels.gpu.launchers.operands import (
    Statistics,
    empty,
    tile_arguments,
    width_arguments,
)
from normkit.kernels.gpu.rows import rows_backward_kernel, rows_forward_kernel

__all__ = ["rows_backward", "rows_forward"]


def rows_forward(
    x: Tensor,
    matrix: Matrix,
    *,
    eps: float | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    runs: Runs | None = None,
    centered: bool = True,
) -> tuple[Tensor | None, Statistics]:
    """Return y and the statistics of rows, inv_std in float32; without `eps` no y.

    When not centred the mean is 0 and m2 the sum of squares.
    """
    y = None if eps is None else torch.empty_like(x)
    mean, m2 = (empty(x, (matrix.rows,), torch.float64) for _ in range(2))
    inv_std = empty(x, (matrix.rows,), torch.float32)
    tile = config.forward_rows(matrix.rows, matrix.width)
    launch.submit(
        rows_forward_kernel,
        (-(-matrix.rows // tile.rows),),
        tile.warps,
        x_ptr=x,
        y_ptr=x if y is None else y,
        mean_ptr=mean,
        m2_ptr=m2,
        inv_std_ptr=inv_std,
        weight_ptr=x if weight is None else weight,
        bias_ptr=x if bias is None else bias,
        rows=matrix.rows,
        run=1 if runs is None else runs.length,
        groups=1 if runs is None else runs.groups,
        eps=0.0 if eps is None else eps,
        **width_arguments(matrix.width),
        AFFINE="elements" if runs is None else "runs",
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        CENTERED=centered,
        WRITES_Y=eps is not None,
        **tile_arguments(tile),
    )
    return y, Statistics(mean, m2, inv_std)


def rows_backward(
    dy: Tensor,
    x: Tensor,
    matrix: Matrix,
    mean: Tensor,
    inv_std: Tensor,
    *,
    weight: Tensor | None,
    runs: Runs | None = None,
    centered: bool = True,
    wants_dweight: bool = False,
    wants_dbias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradient of rows, and dweight and dbias in float32 where wanted."""
    dx = torch.empty_like(x)
    tile, each = config.backward_rows(matrix.rows, matrix.width, x.device)
    programs = -(-matrix.rows // each)
    wanted = wants_dweight + wants_dbias
    parts = empty(x, (wanted, programs, matrix.width), torch.float32)
    dweight = parts[0] if wants_dweight else None
    dbias = parts[-1] if wants_dbias else None
    launch.submit(
        rows_backward_kernel,
        (programs,),
        tile.warps,
        dy_ptr=dy,
        x_ptr=x,
        dx_ptr=dx,
        mean_ptr=mean,
        inv_std_ptr=inv_std,
        weight_ptr=x if weight is None else weight,
        dweight_part_ptr=x if dweight is None else dweight,
        dbias_part_ptr=x if dbias is None else dbias,
        rows=matrix.rows,
        rows_per_program=each,
        run=1 if runs is None else runs.length,
        groups=1 if runs is None else runs.groups,
        **width_arguments(matrix.width),
        AFFINE="elements" if runs is None else "runs",
        HAS_WEIGHT=weight is not None,
        CENTERED=centered,
        WRITES_DWEIGHT=wants_dweight,
        WRITES_DBIAS=wants_dbias,
        READS_TWICE=not config.keeps_row(matrix.width),
        **tile_arguments(tile),
    )
    sums = parts.sum(1) if wanted else parts
    return dx, sums[0] if wants_dweight else None, sums[-1] if wants_dbias else None
