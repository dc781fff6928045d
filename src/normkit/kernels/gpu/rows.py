"""Rows that fit on the chip: one read and one write, forward and backward.

    forward    mean and m2 of a row in registers, then y
    backward   dx = inv_std·(g − Σg/K − x̂·Σg·x̂/K)
               with g = dy·weight, x̂ = (x − mean)·inv_std

A program of the backward walks over neighbouring rows and keeps its share of
dweight = Σ dy·x̂ and dbias = Σ dy in registers; the shares are summed afterwards,
always in the same order.
"""
# Triton's language has no types that a checker could follow.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.gpu.tile import centered

__all__ = ["rows_backward_kernel", "rows_forward_kernel"]


@triton.jit
def rows_forward_kernel(
    x_ptr, y_ptr, mean_ptr, m2_ptr, inv_std_ptr, weight_ptr, bias_ptr,
    rows, width_units, run, groups, eps,
    ALIGN: tl.constexpr, AFFINE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, CENTERED: tl.constexpr, WRITES_Y: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Standardize whole rows; BLOCK_COLUMNS covers the row.

    AFFINE "elements": one weight per column. "runs": one per run of `run` columns,
    another set for each of `groups` neighbouring rows. Grid: blocks of rows.
    """
    width = width_units * ALIGN
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    valid = (row < rows)[:, None] & (column < width)
    offsets = row.to(tl.int64)[:, None] * width + column
    x = tl.load(x_ptr + offsets, mask=valid, other=0.0, eviction_policy="evict_first")
    x = x.to(tl.float32)
    if CENTERED:
        hi = tl.sum(x, axis=1) / width
        # A mean that overflowed or met a NaN must not turn its neighbours to NaN.
        hi = tl.where(tl.abs(hi) < float("inf"), hi, 0.0)
        x = tl.where(valid, x - hi[:, None], 0.0)
        lo = tl.sum(x, axis=1) / width
        x = tl.where(valid, x - lo[:, None], 0.0)
        mean = hi.to(tl.float64) + lo.to(tl.float64)
        tl.store(mean_ptr + row, mean, mask=row < rows)
    else:
        tl.store(mean_ptr + row, tl.zeros_like(row).to(tl.float64), mask=row < rows)
    m2 = tl.sum(x * x, axis=1)
    tl.store(m2_ptr + row, m2.to(tl.float64), mask=row < rows)
    if WRITES_Y:
        inv_std = 1.0 / tl.sqrt(m2 / width + eps)
        tl.store(inv_std_ptr + row, inv_std, mask=row < rows)
        y = x * inv_std[:, None]
        index, loads = _affine_index(
            row, column, rows, width, run, groups, AFFINE, BLOCK_COLUMNS
        )
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + index, mask=loads, other=0.0)
            y = y * weight.to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + index, mask=loads, other=0.0)
            y = y + bias.to(tl.float32)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def rows_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, mean_ptr, inv_std_ptr, weight_ptr, dweight_part_ptr,
    dbias_part_ptr,
    rows, rows_per_program, width_units, run, groups,
    ALIGN: tl.constexpr, AFFINE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    CENTERED: tl.constexpr, WRITES_DWEIGHT: tl.constexpr, WRITES_DBIAS: tl.constexpr,
    READS_TWICE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of whole rows, and the program's share of dweight and dbias.

    READS_TWICE: rows too long to stay in registers over their sums are read again.

    Grid: one program per `rows_per_program` neighbouring rows.
    """
    width = width_units * ALIGN
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_COLUMNS)[None, :]
    first = program * rows_per_program
    end = tl.minimum(first + rows_per_program, rows)
    if WRITES_DWEIGHT:
        dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    if WRITES_DBIAS:
        dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(first, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        valid = (row < end)[:, None] & (column < width)
        offsets = row.to(tl.int64)[:, None] * width + column
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0)
        dy = tl.load(dy_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        inv_std = tl.load(inv_std_ptr + row, mask=row < end, other=0.0)[:, None]
        if CENTERED:
            mean = tl.load(mean_ptr + row, mask=row < end, other=0.0)[:, None]
            normal = centered(x.to(tl.float32), mean) * inv_std
            normal = tl.where(valid, normal, 0.0)
        else:
            normal = x.to(tl.float32) * inv_std
        g = dy
        if HAS_WEIGHT:
            index, loads = _affine_index(
                row, column, end, width, run, groups, AFFINE, BLOCK_COLUMNS
            )
            weight = tl.load(weight_ptr + index, mask=loads, other=0.0)
            g = dy * weight.to(tl.float32)
        along = tl.sum(g * normal, axis=1) / width
        if CENTERED:
            level = tl.sum(g, axis=1) / width
        if READS_TWICE:
            # From the first-level cache; the modifier keeps it a load of its own.
            x = tl.load(x_ptr + offsets, mask=valid, other=0.0, cache_modifier=".ca")
            g = tl.load(dy_ptr + offsets, mask=valid, other=0.0, cache_modifier=".ca")
            g = g.to(tl.float32)
            if HAS_WEIGHT:
                weight = tl.load(
                    weight_ptr + index, mask=loads, other=0.0, cache_modifier=".ca"
                )
                g = g * weight.to(tl.float32)
            normal = x.to(tl.float32) * inv_std
            if CENTERED:
                normal = centered(x.to(tl.float32), mean) * inv_std
        dx = g - normal * along[:, None]
        if CENTERED:
            dx = dx - level[:, None]
        dx = dx * inv_std
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        if WRITES_DWEIGHT:
            dweight += dy * normal
        if WRITES_DBIAS:
            dbias += dy
    share = program.to(tl.int64) * width + tl.arange(0, BLOCK_COLUMNS)
    real = tl.arange(0, BLOCK_COLUMNS) < width
    if WRITES_DWEIGHT:
        tl.store(dweight_part_ptr + share, tl.sum(dweight, axis=0), mask=real)
    if WRITES_DBIAS:
        tl.store(dbias_part_ptr + share, tl.sum(dbias, axis=0), mask=real)


@triton.jit
def _affine_index(
    row, column, rows, width, run, groups,
    AFFINE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the affine's index for each element, and where there is one."""
    if AFFINE == "elements":
        index = column
        loads = column < width
    else:
        index = (row % groups)[:, None] * (width // run) + column // run
        loads = (row < rows)[:, None] & (column < width)
    return index, loads
