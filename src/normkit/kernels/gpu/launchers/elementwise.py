"""Launch the elementwise kernels: apply, and apply_grads."""

# A kernel's type is its list of untyped arguments.
# pyright: reportUnknownVariableType=false, reportMissingImports=false

from __future__ import annotations

import torch
from torch import Tensor

from normkit.kernels.gpu import config, launch
from normkit.kernels.gpu.elementwise import apply_grads_kernel, apply_kernel
from normkit.kernels.gpu.geometry import Matrix, Placement
from normkit.kernels.gpu.launchers.operands import (
    NO_GATE,
    Gate,
    tile_arguments,
    width_arguments,
)

__all__ = ["apply", "apply_grads", "bits_like"]


def apply(
    x: Tensor,
    matrix: Matrix,
    center: Tensor,
    scale: Tensor,
    along: Placement,
    *,
    weight: Tensor | None = None,
    shift: Tensor | None = None,
    affine_along: Placement | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.01,
    bits: Tensor | None = None,
) -> Tensor:
    """Return act((x − center)·scale·weight + shift + residual), laid out as x."""
    y = torch.empty_like(x)
    affine = along if affine_along is None else affine_along
    grid, warps, sizes = _plan(matrix, x.element_size())
    launch.submit(
        apply_kernel,
        grid,
        warps,
        x_ptr=x,
        y_ptr=y,
        center_ptr=center,
        scale_ptr=scale,
        weight_ptr=scale if weight is None else weight,
        shift_ptr=scale if shift is None else shift,
        residual_ptr=x if residual is None else residual,
        bits_ptr=x if bits is None else bits,
        repeat=along.repeat,
        period=along.period,
        affine_repeat=affine.repeat,
        affine_period=affine.period,
        slope=slope,
        ALONG=along.along,
        AFFINE_ALONG=affine.along,
        HAS_WEIGHT=weight is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        SAVES_BITS=bits is not None,
        ACTIVATION=activation,
        **sizes,
    )
    return y


def bits_like(x: Tensor, matrix: Matrix) -> Tensor:
    """Allocate one bit per element; every row starts with a byte of its own."""
    shape = (matrix.rows, -(-matrix.width // 8))
    return torch.empty(shape, dtype=torch.uint8, device=x.device)


def apply_grads(
    dy: Tensor,
    x: Tensor,
    matrix: Matrix,
    center: Tensor,
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    along: Placement,
    *,
    weight: Tensor | None = None,
    affine_along: Placement | None = None,
    gate: Gate = NO_GATE,
    wants_dx: bool = True,
    wants_dresidual: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient a·g·weight + b·(x − center) + c, and the residual's, g."""
    dx = torch.empty_like(x) if wants_dx else None
    dresidual = torch.empty_like(x) if wants_dresidual else None
    affine = along if affine_along is None else affine_along
    grid, warps, sizes = _plan(matrix, x.element_size())
    launch.submit(
        apply_grads_kernel,
        grid,
        warps,
        dy_ptr=dy,
        x_ptr=x,
        dx_ptr=x if dx is None else dx,
        dresidual_ptr=x if dresidual is None else dresidual,
        center_ptr=center,
        a_ptr=a,
        b_ptr=a if b is None else b,
        c_ptr=a if c is None else c,
        weight_ptr=a if weight is None else weight,
        shift_ptr=a if gate.shift is None else gate.shift,
        residual_ptr=x if gate.operand is None else gate.operand,
        bits_ptr=x if gate.bits is None else gate.bits,
        repeat=along.repeat,
        period=along.period,
        affine_repeat=affine.repeat,
        affine_period=affine.period,
        slope=gate.slope,
        ALONG=along.along,
        AFFINE_ALONG=affine.along,
        HAS_WEIGHT=weight is not None,
        HAS_SUMS=b is not None,
        HAS_SHIFT=gate.shift is not None,
        HAS_RESIDUAL=gate.residual is not None,
        WRITES_DX=wants_dx,
        WRITES_DRESIDUAL=wants_dresidual,
        GATE=gate.kind,
        ACTIVATION=gate.activation,
        **sizes,
    )
    return dx, dresidual


@config.cached
def _plan(matrix: Matrix, itemsize: int) -> tuple[tuple[int], int, dict[str, int]]:
    """Return the grid, the warps, and the arguments that the sizes decide."""
    tile = config.matrix_tile_for(matrix.rows, matrix.width, itemsize)
    tiles = -(-matrix.rows // tile.rows) * -(-matrix.width // tile.columns)
    sizes = {"rows": matrix.rows, "tiles": tiles}
    sizes |= width_arguments(matrix.width) | tile_arguments(tile)
    return (tiles,), tile.warps, sizes
