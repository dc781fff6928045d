"""Each kernel as a function of tensors: one launch each, nothing read back.

The functions take geometry and flat vectors; `GpuBackend` brings the contract's
broadcast vectors to that form, `normkit.kernels.gpu.fused` composes whole layers.
"""

# A kernel's type is its list of untyped arguments.
# pyright: reportUnknownVariableType=false, reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.kernels.gpu import launch, table
from normkit.kernels.gpu.elementwise import apply_grads_kernel, apply_kernel
from normkit.kernels.gpu.geometry import Matrix, Placement, Reduction, Runs
from normkit.kernels.gpu.reduce import statistics_kernel, sums_kernel
from normkit.kernels.gpu.rows import rows_backward_kernel, rows_forward_kernel

__all__ = [
    "Gate",
    "Running",
    "Statistics",
    "apply",
    "apply_grads",
    "bits_like",
    "rows_backward",
    "rows_forward",
    "statistics",
    "sums",
    "sums_of_batch_norm",
]


@dataclass(frozen=True)
class Running:
    """Buffers that the statistics pass moves in place.

    Attributes:
        mean: Running mean, shape `(C,)`.
        var: Running unbiased variance, shape `(C,)`.
        tracked: Int64 scalar that counts batches, or None.
        momentum: Share of the batch; None gives every batch the same share.
        skips_nonfinite: Whether a batch with a NaN or Inf changes nothing.
    """

    mean: Tensor
    var: Tensor
    tracked: Tensor | None
    momentum: float | None
    skips_nonfinite: bool


@dataclass(frozen=True)
class Statistics:
    """Flat vectors, one element per statistic.

    Attributes:
        mean: float64.
        m2: float64.
        inv_std: 1/√(var + eps), float64; of the mean square when not centred. None
            unless asked for.
        scale: inv_std·weight, float32; None unless asked for.
    """

    mean: Tensor
    m2: Tensor
    inv_std: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Gate:
    """The activation that dy passes through on its way back.

    Attributes:
        activation: Its name.
        slope: Of leaky_relu.
        bits: For relu, one bit per element: open or not.
        output: For relu, what it gave, laid out as x: open where positive.
        shift: The bias, flat, or None. With neither `bits` nor `output`, what went in
            is recomputed from x, `shift` and `residual`.
        residual: What was added before the activation, laid out as x, or None.
    """

    activation: str = "none"
    slope: float = 0.01
    bits: Tensor | None = None
    output: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None

    @property
    def beside(self) -> Tensor | None:
        """The tensor as large as x that is read beside it, if any."""
        return self.residual if self.output is None else self.output

    @property
    def kind(self) -> str:
        """One of "none", "bits", "output" and "recompute"."""
        if self.bits is not None:
            return "bits"
        if self.output is not None:
            return "output"
        return "none" if self.activation == "none" else "recompute"


_OPEN = Gate()


def statistics(
    x: Tensor,
    reduction: Reduction,
    *,
    eps: float | None = None,
    weight: Tensor | None = None,
    centered: bool = True,
    running: Running | None = None,
) -> Statistics:
    """Mean and m2 of each statistic; with `eps`, what `apply` needs of them."""
    r = reduction
    tile, grid = _reduction(x, r)
    splits, count = grid.splits, r.statistics
    part_mean = _vectors(x, (splits, count), torch.float64)
    part_rest = _vectors(x, (2, splits, count), torch.float32)
    # Results of an operator must not share memory, so each has its own.
    mean, m2, inv_std = (_vectors(x, (count,), torch.float64) for _ in range(3))
    scale = _vectors(x, (count,), torch.float32)
    runs = "no"
    if running is not None:
        runs = "cumulative" if running.momentum is None else "ema"
    tracked = None if running is None else running.tracked
    launch.submit(
        statistics_kernel,
        (grid.blocks, splits),
        tile.warps,
        table.REDUCTION_REGISTERS,
        x_ptr=x,
        part_mean_ptr=part_mean,
        part_m2_ptr=part_rest[0],
        part_count_ptr=part_rest[1],
        ticket_ptr=launch.tickets(x.device, grid.blocks + 1),
        mean_ptr=mean,
        m2_ptr=m2,
        inv_std_ptr=inv_std,
        scale_ptr=scale,
        weight_ptr=scale if weight is None else weight,
        running_mean_ptr=mean if running is None else running.mean,
        running_var_ptr=mean if running is None else running.var,
        tracked_ptr=mean if tracked is None else tracked,
        steps=r.steps,
        statistics=count,
        pieces=r.pieces,
        count=x.numel() // count,
        eps=0.0 if eps is None else eps,
        momentum=0.0 if running is None else running.momentum or 0.0,
        KIND=r.kind,
        **_width(r.width),
        CENTERED=centered,
        WRITES_SCALE=eps is not None,
        HAS_WEIGHT=weight is not None,
        RUNNING=runs,
        SKIPS_NONFINITE=running is not None and running.skips_nonfinite,
        COUNTS_BATCHES=tracked is not None,
        **_tile(tile),
        BLOCK_PARTS=_parts_at_once(splits, r),
        BLOCK_RUNNING=1024,
    )
    if eps is None:
        return Statistics(mean, m2)
    return Statistics(mean, m2, inv_std, scale)


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
    """act((x − center)·scale·weight + shift + residual), laid out as x."""
    y = torch.empty_like(x)
    affine = along if affine_along is None else affine_along
    tile = table.matrix_tile_for(matrix.rows, matrix.width, x.element_size())
    tiles = _tiles(matrix, tile)
    launch.submit(
        apply_kernel,
        (tiles,),
        tile.warps,
        x_ptr=x,
        y_ptr=y,
        center_ptr=center,
        scale_ptr=scale,
        weight_ptr=scale if weight is None else weight,
        shift_ptr=scale if shift is None else shift,
        residual_ptr=x if residual is None else residual,
        bits_ptr=x if bits is None else bits,
        rows=matrix.rows,
        tiles=tiles,
        repeat=along.repeat,
        period=along.period,
        affine_repeat=affine.repeat,
        affine_period=affine.period,
        slope=slope,
        **_width(matrix.width),
        ALONG=along.along,
        AFFINE_ALONG=affine.along,
        HAS_WEIGHT=weight is not None,
        HAS_SHIFT=shift is not None,
        HAS_RESIDUAL=residual is not None,
        SAVES_BITS=bits is not None,
        ACTIVATION=activation,
        **_tile(tile),
    )
    return y


def bits_like(x: Tensor, matrix: Matrix) -> Tensor:
    """Room for one bit per element; every row starts with a byte of its own."""
    shape = (matrix.rows, -(-matrix.width // 8))
    return torch.empty(shape, dtype=torch.uint8, device=x.device)


def sums(
    dy: Tensor,
    x: Tensor,
    reduction: Reduction,
    center: Tensor,
    along: Placement,
    *,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    weight_along: Placement | None = None,
) -> tuple[Tensor, Tensor]:
    """Σ dy·weight and Σ dy·weight·(x − center)·scale, flat, in float64."""
    total, total_rest = _vectors(x, (2, reduction.statistics), torch.float64).unbind(0)
    _submit_sums(
        *(dy, x, reduction, center, along, _OPEN),
        scale=scale,
        weight=weight,
        weight_along=weight_along,
        finish="sums",
        sum_ptr=total,
        sum_rest_ptr=total_rest,
    )
    return total, total_rest


def sums_of_batch_norm(
    dy: Tensor,
    x: Tensor,
    reduction: Reduction,
    center: Tensor,
    inv_std: Tensor,
    scale: Tensor,
    gate: Gate,
    *,
    weight: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The b and c of `apply_grads`, and dweight and dbias where there is such."""
    b, c = _vectors(x, (2, reduction.statistics), torch.float32).unbind(0)
    dweight = None if weight is None else torch.empty_like(weight)
    dbias = None if bias is None else torch.empty_like(bias)
    own = Placement("statistic")
    _submit_sums(
        *(dy, x, reduction, center, own, gate),
        scale=scale,
        finish="batch_norm",
        inv_std_ptr=inv_std,
        b_ptr=b,
        c_ptr=c,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
    )
    return b, c, dweight, dbias


def _submit_sums(
    dy: Tensor,
    x: Tensor,
    reduction: Reduction,
    center: Tensor,
    along: Placement,
    gate: Gate,
    *,
    scale: Tensor | None,
    finish: str,
    weight: Tensor | None = None,
    weight_along: Placement | None = None,
    **outputs: Tensor | None,
) -> None:
    r = reduction
    tile, grid = _reduction(x, r)
    part = _vectors(x, (grid.splits, 2, r.statistics), torch.float32)
    names = ("sum", "sum_rest", "inv_std", "dweight", "dbias", "b", "c")
    written = {f"{name}_ptr": outputs.get(f"{name}_ptr") for name in names}
    weights = Placement("row") if weight_along is None else weight_along
    launch.submit(
        sums_kernel,
        (grid.blocks, grid.splits),
        tile.warps,
        dy_ptr=dy,
        x_ptr=x,
        part_ptr=part,
        ticket_ptr=launch.tickets(x.device, grid.blocks + 1),
        center_ptr=center,
        scale_ptr=center if scale is None else scale,
        shift_ptr=center if gate.shift is None else gate.shift,
        residual_ptr=x if gate.beside is None else gate.beside,
        bits_ptr=x if gate.bits is None else gate.bits,
        weight_ptr=center if weight is None else weight,
        **{name: part if t is None else t for name, t in written.items()},
        steps=r.steps,
        statistics=r.statistics,
        pieces=r.pieces,
        repeat=along.repeat,
        period=along.period,
        weight_repeat=weights.repeat,
        weight_period=weights.period,
        count=x.numel() // r.statistics,
        slope=gate.slope,
        KIND=r.kind,
        **_width(r.width),
        ALONG=along.along,
        WEIGHT_ALONG=weights.along,
        HAS_WEIGHT=weight is not None,
        HAS_SCALE=scale is not None and along.along != "statistic",
        HAS_SHIFT=gate.shift is not None,
        HAS_RESIDUAL=gate.residual is not None,
        GATE=gate.kind,
        ACTIVATION=gate.activation,
        FINISH=finish,
        WRITES_DWEIGHT=outputs.get("dweight_ptr") is not None,
        WRITES_DBIAS=outputs.get("dbias_ptr") is not None,
        **_tile(tile),
        BLOCK_PARTS=_parts_at_once(grid.splits, r),
    )


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
    gate: Gate = _OPEN,
    wants_dx: bool = True,
    wants_dresidual: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient a·g·weight + b·(x − center) + c, and the residual's, g."""
    dx = torch.empty_like(x) if wants_dx else None
    dresidual = torch.empty_like(x) if wants_dresidual else None
    affine = along if affine_along is None else affine_along
    tile = table.matrix_tile_for(matrix.rows, matrix.width, x.element_size())
    tiles = _tiles(matrix, tile)
    launch.submit(
        apply_grads_kernel,
        (tiles,),
        tile.warps,
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
        residual_ptr=x if gate.beside is None else gate.beside,
        bits_ptr=x if gate.bits is None else gate.bits,
        rows=matrix.rows,
        tiles=tiles,
        repeat=along.repeat,
        period=along.period,
        affine_repeat=affine.repeat,
        affine_period=affine.period,
        slope=gate.slope,
        **_width(matrix.width),
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
        **_tile(tile),
    )
    return dx, dresidual


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
    """Y and the statistics of rows, inv_std in float32; without `eps` no y.

    When not centred the mean is 0 and m2 the sum of squares.
    """
    y = None if eps is None else torch.empty_like(x)
    vectors = torch.empty if centered else torch.zeros
    mean = vectors(matrix.rows, dtype=torch.float64, device=x.device)
    m2 = _vectors(x, (matrix.rows,), torch.float64)
    inv_std = _vectors(x, (matrix.rows,), torch.float32)
    tile = table.forward_rows(matrix.rows, matrix.width)
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
        **_width(matrix.width),
        AFFINE="elements" if runs is None else "runs",
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        CENTERED=centered,
        WRITES_Y=eps is not None,
        **_tile(tile),
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
    """The gradient of rows, and dweight and dbias in float32 where wanted."""
    dx = torch.empty_like(x)
    tile, each = table.backward_rows(matrix.rows, matrix.width, x.device)
    programs = -(-matrix.rows // each)
    shape = (programs, matrix.width)
    dweight = _vectors(x, shape, torch.float32) if wants_dweight else None
    dbias = _vectors(x, shape, torch.float32) if wants_dbias else None
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
        **_width(matrix.width),
        AFFINE="elements" if runs is None else "runs",
        HAS_WEIGHT=weight is not None,
        CENTERED=centered,
        WRITES_DWEIGHT=wants_dweight,
        WRITES_DBIAS=wants_dbias,
        READS_TWICE=not table.keeps_row(matrix.width),
        **_tile(tile),
    )
    return (
        dx,
        None if dweight is None else dweight.sum(0),
        None if dbias is None else dbias.sum(0),
    )


def _reduction(x: Tensor, r: Reduction) -> tuple[table.Tile, table.Grid]:
    tile = table.reduction_tile_for(r.steps, r.block, x.element_size())
    programs = table.reduction_programs(x.device)
    grid = table.reduction_grid(
        *(r.steps, r.statistics, r.block, r.kind, tile, programs)
    )
    return tile, grid


def _parts_at_once(splits: int, r: Reduction) -> int:
    """Parts that the last program of a block merges at a time: 1024 numbers or all."""
    width = r.block if r.kind == "columns" else 1
    return max(1, min(1024 // width, 1 << max(0, splits - 1).bit_length()))


def _vectors(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def _width(width: int) -> dict[str, int]:
    """The width as units of its alignment, so that the compiler sees the divisor."""
    align = table.alignment(width)
    return {"width_units": width // align, "ALIGN": align}


def _tile(tile: table.Tile) -> dict[str, int]:
    return {"BLOCK_ROWS": tile.rows, "BLOCK_COLUMNS": tile.columns}


def _tiles(matrix: Matrix, tile: table.Tile) -> int:
    return -(-matrix.rows // tile.rows) * -(-matrix.width // tile.columns)
