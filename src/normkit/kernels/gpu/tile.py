"""Tiles of a matrix, vectors along its rows or columns, and activations.

Every kernel sees x as a dense matrix of rows × WIDTH:

    channels_last, 2-D   (O, C)      statistics along "column"
    NCHW                 (O·C, I)    statistics along "row", index = row % C
    rows                 (R, K)      statistics along "row", the affine along "column"

A vector along "row" holds its element for row r at (r // repeat) % period, so that a
vector per group or per channel needs no expanding.
"""
# Triton's language has no types that a checker could follow.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "activated",
    "centered",
    "gate_bits",
    "matrix_tile",
    "open_gates",
    "reduced_tile",
    "through",
    "vector",
]


@triton.jit
def matrix_tile(
    index, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Return rows, columns and validity of tile number `index`, columns fastest."""
    across = tl.cdiv(width, BLOCK_COLUMNS)
    down = index // across
    row = down * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (index - down * across) * BLOCK_COLUMNS
    column = column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    return row, column, (row < rows) & (column < width)


@triton.jit
def reduced_tile(
    start,
    steps,
    block,
    statistics,
    width,
    pieces,
    KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return rows, columns and validity of the tile at `start` of one reduction.

    "columns": a step is a row, `block` a block of columns. "runs": a step is a piece
    of BLOCK_COLUMNS of one run, `block` the statistic; each run has `pieces`.
    """
    step = start + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    if KIND == "columns":
        row = step[:, None]
        column = block * BLOCK_COLUMNS + lane
    else:
        outer = step // pieces
        row = (outer * statistics + block)[:, None]
        column = ((step - outer * pieces) * BLOCK_COLUMNS)[:, None] + lane
    return row, column, (step < steps)[:, None] & (column < width)


@triton.jit
def vector(ptr, row, column, rows, width, repeat, period, ALONG: tl.constexpr):
    """Return the elements of a vector that belong to a tile, as float32 or float64."""
    if ALONG == "row":
        found = tl.load(ptr + (row // repeat) % period, mask=row < rows, other=0.0)
    else:
        found = tl.load(ptr + column, mask=column < width, other=0.0)
    return found


@triton.jit
def centered(x, center):
    """Return (x − hi) − lo: float32 keeps the digits of x for any centre."""
    hi = center.to(tl.float32)
    lo = (center - hi.to(center.dtype)).to(tl.float32)
    # inf − inf must not turn an infinite centre into NaN.
    lo = tl.where(tl.abs(hi) < float("inf"), lo, 0.0)
    return (x - hi) - lo


@triton.jit
def activated(z, slope, ACTIVATION: tl.constexpr):
    """Return act(z); NaN stays NaN."""
    if ACTIVATION == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "sigmoid":
        z = _sigmoid(z)
    elif ACTIVATION == "silu":
        z = z * _sigmoid(z)
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    elif ACTIVATION == "gelu":
        z = z * _normal_cdf(z)
    else:
        tl.static_assert(ACTIVATION == "none", "an activation without a kernel")
    return z


@triton.jit
def through(dy, z, slope, ACTIVATION: tl.constexpr):
    """Return dy·act'(z); at the kink of relu 0, and dy where z is NaN, as in torch."""
    if ACTIVATION == "relu":
        dy = tl.where(z <= 0, 0.0, dy)
    elif ACTIVATION == "leaky_relu":
        dy = tl.where(z > 0, dy, dy * slope)
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(z)
        dy = dy * (s * (1.0 - s))
    elif ACTIVATION == "silu":
        s = _sigmoid(z)
        dy = dy * (s * (1.0 + z * (1.0 - s)))
    elif ACTIVATION == "tanh":
        t = _tanh(z)
        dy = dy * (1.0 - t * t)
    elif ACTIVATION == "gelu":
        # φ(z) = exp(−z²/2)/√(2π)
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        dy = dy * (_normal_cdf(z) + z * density)
    else:
        tl.static_assert(ACTIVATION == "none", "an activation without a kernel")
    return dy


@triton.jit
def _sigmoid(z):
    # exp of a negative number cannot overflow.
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(z):
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(z < 0, -far, far)
    # Near 0 the difference cancels; the series errs by less than 2e-9 below 0.15.
    q = z * z
    near = z * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(q < 0.0225, near, far)


@triton.jit
def _normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gate_bits(is_open, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Pack eight neighbouring gates of a row into a byte, the first in the low bit."""
    grouped = tl.reshape(is_open.to(tl.int32), [BLOCK_ROWS, BLOCK_COLUMNS // 8, 8])
    place = tl.arange(0, 8)[None, None, :]
    return tl.sum(grouped << place, axis=2).to(tl.uint8)


@triton.jit
def open_gates(bits, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Unpack the gates of a tile from its bytes: 1 where open, 0 where closed."""
    place = tl.arange(0, 8)[None, None, :]
    grouped = (bits.to(tl.int32)[:, :, None] >> place) & 1
    return tl.reshape(grouped, [BLOCK_ROWS, BLOCK_COLUMNS])
