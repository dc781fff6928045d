"""The two sums of a backward in one launch, shared as `partials` says."""

# Triton's language has no types that a checker could follow.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.gpu.partials import (
    is_last,
    over_tile,
    part_offsets,
    read_part,
    statistic_index,
)
from normkit.kernels.gpu.tile import (
    centered,
    open_gates,
    reduced_tile,
    through,
    vector,
)

__all__ = ["sums_kernel"]


@triton.jit
def sums_kernel(
    dy_ptr, x_ptr, part_ptr, ticket_ptr, sum_ptr, sum_rest_ptr, center_ptr, scale_ptr,
    inv_std_ptr, shift_ptr, residual_ptr, bits_ptr, weight_ptr, dweight_ptr, dbias_ptr,
    b_ptr, c_ptr,
    steps, statistics, width_units, pieces, repeat, period, weight_repeat,
    weight_period, count, slope,
    KIND: tl.constexpr, ALIGN: tl.constexpr, ALONG: tl.constexpr,
    WEIGHT_ALONG: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATE: tl.constexpr,
    ACTIVATION: tl.constexpr, FINISH: tl.constexpr, WRITES_DWEIGHT: tl.constexpr,
    WRITES_DBIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Write Σg and Σg·(x − center) of each statistic, g = dy·act'(…)·weight.

    FINISH "sums" writes both in float64, the second times `scale` of each row when
    HAS_SCALE. FINISH "batch_norm" writes what the second pass needs: dweight, dbias
    and, with a = scale, b = −a·inv_std²·Σg(x − center)/n, c = −a·Σg/n.
    Grid: (blocks of statistics, splits).
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    width = width_units * ALIGN
    rows = steps if KIND == "columns" else steps // pieces * statistics
    index, is_real = statistic_index(block, statistics, KIND, BLOCK_COLUMNS)
    # A vector of the statistics themselves is read once for all tiles.
    if ALONG == "statistic":
        own = tl.load(center_ptr + index, mask=is_real, other=0.0)[None, :]
        if GATE == "recompute":
            scale = tl.load(scale_ptr + index, mask=is_real, other=0.0)[None, :]
            if HAS_SHIFT:
                shift = tl.load(shift_ptr + index, mask=is_real, other=0.0)[None, :]
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    sum_rest = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(split * BLOCK_ROWS, steps, splits * BLOCK_ROWS):
        row, column, valid = reduced_tile(
            start, steps, block, statistics, width, pieces,
            KIND, BLOCK_ROWS, BLOCK_COLUMNS,
        )  # fmt: skip
        offsets = row.to(tl.int64) * width + column
        x = tl.load(x_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        if ALONG == "statistic":
            rest = centered(x, own)
        else:
            center = vector(center_ptr, row, column, rows, width, repeat, period, ALONG)
            rest = centered(x, center)
            if HAS_SCALE:
                factor = vector(
                    scale_ptr, row, column, rows, width, repeat, period, ALONG
                )
                rest = rest * factor.to(tl.float32)
        if GATE == "bits":
            bits = _load_bits(
                bits_ptr, row, start, steps, block, width, pieces,
                KIND, BLOCK_ROWS, BLOCK_COLUMNS,
            )  # fmt: skip
            g = tl.where(open_gates(bits, BLOCK_ROWS, BLOCK_COLUMNS) != 0, g, 0.0)
        if GATE == "output":
            y = tl.load(residual_ptr + offsets, mask=valid, other=0.0)
            g = tl.where(y.to(tl.float32) <= 0, 0.0, g)
        if GATE == "recompute":
            z = rest * scale.to(tl.float32)
            if HAS_SHIFT:
                z = z + shift.to(tl.float32)
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + offsets, mask=valid, other=0.0)
                z = z + residual.to(tl.float32)
            g = through(g, z, slope, ACTIVATION)
        if HAS_WEIGHT:
            weight = vector(
                weight_ptr, row, column, rows, width,
                weight_repeat, weight_period, WEIGHT_ALONG,
            )  # fmt: skip
            g = g * weight.to(tl.float32)
        # Where x is not real it is 0 and x − center is not; there g = 0.
        sum_g += g
        sum_rest += tl.where(valid, g * rest, 0.0)

    part = split.to(tl.int64) * (2 * statistics) + index
    tl.store(part_ptr + part, over_tile(sum_g, KIND), mask=is_real)
    tl.store(part_ptr + part + statistics, over_tile(sum_rest, KIND), mask=is_real)
    if is_last(ticket_ptr + block, splits):
        total_g = tl.zeros_like(index.to(tl.float64))
        total_rest = tl.zeros_like(total_g)
        for start in range(0, splits, BLOCK_PARTS):
            parts, valid = part_offsets(
                start, splits, index, 2 * statistics, BLOCK_PARTS
            )
            valid = valid & is_real[None, :]
            total_g += tl.sum(read_part(part_ptr + parts, valid).to(tl.float64), axis=0)
            more = read_part(part_ptr + parts + statistics, valid)
            total_rest += tl.sum(more.to(tl.float64), axis=0)
        if FINISH == "sums":
            tl.store(sum_ptr + index, total_g, mask=is_real)
            tl.store(sum_rest_ptr + index, total_rest, mask=is_real)
        else:
            inv_std = tl.load(inv_std_ptr + index, mask=is_real, other=0.0)
            if WRITES_DBIAS:
                dbias = total_g.to(dbias_ptr.dtype.element_ty)
                tl.store(dbias_ptr + index, dbias, mask=is_real)
            if WRITES_DWEIGHT:
                dweight = (total_rest * inv_std).to(dweight_ptr.dtype.element_ty)
                tl.store(dweight_ptr + index, dweight, mask=is_real)
            a = tl.load(scale_ptr + index, mask=is_real, other=0.0).to(tl.float64)
            b = -a * inv_std * inv_std * total_rest / count
            c = -a * total_g / count
            tl.store(b_ptr + index, b.to(tl.float32), mask=is_real)
            tl.store(c_ptr + index, c.to(tl.float32), mask=is_real)


@triton.jit
def _load_bits(
    bits_ptr, row, start, steps, block, width, pieces,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Load the bytes of a tile's gates: each row of gates fills whole bytes."""
    step = start + tl.arange(0, BLOCK_ROWS)
    byte = tl.arange(0, BLOCK_COLUMNS // 8)[None, :]
    if KIND == "columns":
        byte = block * (BLOCK_COLUMNS // 8) + byte
    else:
        piece = step - step // pieces * pieces
        byte = (piece * (BLOCK_COLUMNS // 8))[:, None] + byte
    bytes_per_row = tl.cdiv(width, 8)
    valid = (step < steps)[:, None] & (byte < bytes_per_row)
    return tl.load(bits_ptr + row.to(tl.int64) * bytes_per_row + byte, valid, other=0)
