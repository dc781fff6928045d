"""Elementwise kernels, one pass over x: apply, and the gradient of x.

    apply        y  = act(((x − center)·scale·weight + shift) + residual)
    apply_grads  g  = dy·act'(…),   dx = a·g·weight + b·(x − center) + c

One tile per program, the last tile first: the statistics' pass read forwards, so the
end of x is what the L2 cache still holds.
"""
# Triton's language has no types that a checker could follow.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.gpu.tile import (
    activated,
    centered,
    gate_bits,
    matrix_tile,
    open_gates,
    through,
    vector,
)

__all__ = ["apply_grads_kernel", "apply_kernel"]


@triton.jit
def apply_kernel(
    x_ptr, y_ptr, center_ptr, scale_ptr, weight_ptr, shift_ptr, residual_ptr, bits_ptr,
    rows, width_units, tiles, repeat, period, affine_repeat, affine_period, slope,
    ALIGN: tl.constexpr, ALONG: tl.constexpr, AFFINE_ALONG: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SAVES_BITS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write act((x − center)·scale·weight + shift + residual), a (rows, width) matrix.

    Grid: one program per tile, in reverse.
    """
    width = width_units * ALIGN
    index = tiles - 1 - tl.program_id(0)
    row, column, valid = matrix_tile(index, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    offsets = row.to(tl.int64) * width + column
    x = tl.load(x_ptr + offsets, mask=valid, other=0.0, eviction_policy="evict_first")
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + offsets, mask=valid, other=0.0, eviction_policy="evict_first"
        )
    center = vector(center_ptr, row, column, rows, width, repeat, period, ALONG)
    scale = vector(scale_ptr, row, column, rows, width, repeat, period, ALONG)
    scale = scale.to(tl.float32)
    y = centered(x.to(tl.float32), center) * scale
    if HAS_WEIGHT:
        weight = vector(
            weight_ptr, row, column, rows, width, affine_repeat, affine_period,
            AFFINE_ALONG,
        )  # fmt: skip
        y = y * weight.to(tl.float32)
    if HAS_SHIFT:
        shift = vector(
            shift_ptr, row, column, rows, width, affine_repeat, affine_period,
            AFFINE_ALONG,
        )  # fmt: skip
        y = y + shift.to(tl.float32)
    if HAS_RESIDUAL:
        y = y + residual.to(tl.float32)
    if SAVES_BITS:
        bits = gate_bits(~(y <= 0) & valid, BLOCK_ROWS, BLOCK_COLUMNS)
        _store_bits(bits_ptr, bits, index, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    y = activated(y, slope, ACTIVATION)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def apply_grads_kernel(
    dy_ptr, x_ptr, dx_ptr, dresidual_ptr, center_ptr, a_ptr, b_ptr, c_ptr, weight_ptr,
    shift_ptr, residual_ptr, bits_ptr,
    rows, width_units, tiles, repeat, period, affine_repeat, affine_period, slope,
    ALIGN: tl.constexpr, ALONG: tl.constexpr, AFFINE_ALONG: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, WRITES_DX: tl.constexpr, WRITES_DRESIDUAL: tl.constexpr,
    GATE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write a·g·weight + b·(x − center) + c, with g the gradient before the activation.

    GATE is "none" (g = dy), "bits" (relu, from 1 bit per element), "output" (relu, from
    its output) or "recompute": z is recomputed from x, with a as the scale.
    Grid: one program per tile, in reverse.
    """
    width = width_units * ALIGN
    index = tiles - 1 - tl.program_id(0)
    row, column, valid = matrix_tile(index, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    offsets = row.to(tl.int64) * width + column
    g = tl.load(dy_ptr + offsets, mask=valid, other=0.0, eviction_policy="evict_first")
    g = g.to(tl.float32)
    a = vector(a_ptr, row, column, rows, width, repeat, period, ALONG).to(tl.float32)
    if HAS_SUMS or GATE == "recompute":
        x = tl.load(
            x_ptr + offsets, mask=valid, other=0.0, eviction_policy="evict_first"
        )
        center = vector(center_ptr, row, column, rows, width, repeat, period, ALONG)
        rest = centered(x.to(tl.float32), center)
    if GATE == "bits":
        bits = _load_bits(bits_ptr, index, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
        g = tl.where(open_gates(bits, BLOCK_ROWS, BLOCK_COLUMNS) != 0, g, 0.0)
    if GATE == "output":
        y = tl.load(residual_ptr + offsets, mask=valid, other=0.0)
        g = tl.where(y.to(tl.float32) <= 0, 0.0, g)
    if GATE == "recompute":
        z = rest * a
        if HAS_SHIFT:
            shift = vector(shift_ptr, row, column, rows, width, repeat, period, ALONG)
            z = z + shift.to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + offsets, mask=valid, other=0.0)
            z = z + residual.to(tl.float32)
        g = through(g, z, slope, ACTIVATION)
    if WRITES_DRESIDUAL:
        tl.store(
            dresidual_ptr + offsets, g.to(dresidual_ptr.dtype.element_ty), mask=valid
        )
    if WRITES_DX:
        if HAS_WEIGHT:
            weight = vector(
                weight_ptr, row, column, rows, width, affine_repeat, affine_period,
                AFFINE_ALONG,
            )  # fmt: skip
            g = g * weight.to(tl.float32)
        dx = g * a
        if HAS_SUMS:
            b = vector(b_ptr, row, column, rows, width, repeat, period, ALONG)
            c = vector(c_ptr, row, column, rows, width, repeat, period, ALONG)
            dx = dx + (rest * b.to(tl.float32) + c.to(tl.float32))
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _bits_tile(
    index, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Return the offsets of the bytes of a tile's gates: rows begin at whole bytes."""
    row, _, _ = matrix_tile(index, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    across = tl.cdiv(width, BLOCK_COLUMNS)
    bytes_per_row = tl.cdiv(width, 8)
    byte = (index % across) * (BLOCK_COLUMNS // 8)
    byte = byte + tl.arange(0, BLOCK_COLUMNS // 8)[None, :]
    valid = (row < rows) & (byte < bytes_per_row)
    return row.to(tl.int64) * bytes_per_row + byte, valid


@triton.jit
def _store_bits(
    ptr, bits, index, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    offsets, valid = _bits_tile(index, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    tl.store(ptr + offsets, bits, mask=valid)


@triton.jit
def _load_bits(
    ptr, index, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    offsets, valid = _bits_tile(index, rows, width, BLOCK_ROWS, BLOCK_COLUMNS)
    return tl.load(ptr + offsets, mask=valid, other=0)
