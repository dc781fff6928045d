"""Reductions of a whole tensor in one launch: statistics, and the sums of backward.

Each program reduces every `splits`-th tile of one block of statistics, so that all
programs together read x once from front to back. The last one to finish a block
(it draws the last ticket) merges the parts, always in the same order, in float64:

    n = Σ nᵢ,   mean = Σ nᵢ·meanᵢ/n,   m2 = Σ m2ᵢ + nᵢ·(meanᵢ − mean)²

and the last one of all moves the running statistics. So a batch norm is two launches.
A lane adds at most 64 terms before they are merged: sums of equal terms drift by a
quarter of their number in units of the last place.
"""
# Triton's language has no types that a checker could follow, and writes compile-time
# arguments in capitals.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false
# ruff: noqa: N803

from __future__ import annotations

import triton
import triton.language as tl

from normkit.kernels.gpu.tile import (
    centered,
    open_gates,
    reduced_tile,
    through,
    vector,
)

__all__ = ["statistics_kernel", "sums_kernel"]


@triton.jit
def statistics_kernel(
    x_ptr,
    part_mean_ptr,
    part_m2_ptr,
    part_count_ptr,
    ticket_ptr,
    mean_ptr,
    m2_ptr,
    inv_std_ptr,
    scale_ptr,
    weight_ptr,
    running_mean_ptr,
    running_var_ptr,
    tracked_ptr,
    steps,
    statistics,
    width_units,
    pieces,
    count,
    eps,
    momentum,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    CENTERED: tl.constexpr,
    WRITES_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    RUNNING: tl.constexpr,
    SKIPS_NONFINITE: tl.constexpr,
    COUNTS_BATCHES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_RUNNING: tl.constexpr,
):
    """Mean and m2 of each statistic in float64; then 1/√(var + eps), times weight.

    RUNNING is "no", "ema" or "cumulative". Grid: (blocks of statistics, splits).
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    width = width_units * ALIGN
    first = split * BLOCK_ROWS
    stride = splits * BLOCK_ROWS
    # Σ(x − p)² − (Σ(x − p))²/n keeps its digits when p lies near the mean of the chunk.
    # One of eight values from all over it does, the one in their middle; if not, the
    # chunk is read once more around the mean that was found.
    pilot = _pilot(
        x_ptr, first, stride, steps, block, statistics, width, pieces,
        KIND, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    mean = pilot.to(tl.float64)
    m2 = tl.zeros_like(mean)
    count_here = tl.zeros_like(mean)
    reads = 0
    while reads < 2:
        sum1 = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        sum2 = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        terms = 0
        for start in range(first, steps, stride):
            row, column, valid = reduced_tile(
                start, steps, block, statistics, width, pieces,
                KIND, BLOCK_ROWS, BLOCK_COLUMNS,
            )  # fmt: skip
            x = tl.load(
                x_ptr + (row.to(tl.int64) * width + column), mask=valid, other=0.0
            )
            rest = tl.where(valid, x.to(tl.float32) - pilot[None, :], 0.0)
            sum1 += rest
            sum2 += rest * rest
            terms += _terms(
                start, steps, width, pieces, KIND, BLOCK_ROWS, BLOCK_COLUMNS
            )
        count_here = tl.zeros_like(mean) + terms
        shift = _over_tile(sum1, KIND).to(tl.float64) / count_here
        lost = shift * shift * count_here
        m2 = _over_tile(sum2, KIND).to(tl.float64) - lost
        mean = pilot.to(tl.float64) + shift
        # At √2 standard deviations the difference errs 3 times as much as its terms.
        is_far = (lost > 2.0 * m2) & (tl.abs(mean) < float("inf"))
        pilot = tl.where(is_far, mean.to(tl.float32), pilot)
        reads += tl.where(tl.sum(is_far.to(tl.int32), axis=0) > 0, 1, 2)

    index, is_real = _statistic(block, statistics, KIND, BLOCK_COLUMNS)
    part = split.to(tl.int64) * statistics + index
    tl.store(part_mean_ptr + part, mean, mask=is_real)
    tl.store(part_m2_ptr + part, tl.where(m2 < 0, 0.0, m2), mask=is_real)
    tl.store(part_count_ptr + part, count_here, mask=is_real)
    if _is_last(ticket_ptr + block, splits):
        mean = tl.zeros_like(mean)
        m2 = tl.zeros_like(mean)
        for start in range(0, splits, BLOCK_PARTS):
            parts, valid = _parts(start, splits, index, statistics, BLOCK_PARTS)
            share = _read(part_count_ptr + parts, valid).to(tl.float64) / count
            mean += tl.sum(_read(part_mean_ptr + parts, valid) * share, axis=0)
        for start in range(0, splits, BLOCK_PARTS):
            parts, valid = _parts(start, splits, index, statistics, BLOCK_PARTS)
            part_count = _read(part_count_ptr + parts, valid).to(tl.float64)
            apart = _read(part_mean_ptr + parts, valid) - mean[None, :]
            between = tl.where(valid, part_count * apart * apart, 0.0)
            m2 += tl.sum(_read(part_m2_ptr + parts, valid) + between, axis=0)
        tl.store(mean_ptr + index, mean, mask=is_real)
        tl.store(m2_ptr + index, m2, mask=is_real)
        if WRITES_SCALE:
            spread = m2 / count
            if not CENTERED:
                spread += mean * mean
            inv_std = 1.0 / tl.sqrt(spread + eps)
            tl.store(inv_std_ptr + index, inv_std, mask=is_real)
            scale = inv_std
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + index, mask=is_real, other=0.0)
                scale = inv_std * weight.to(tl.float64)
            tl.store(scale_ptr + index, scale.to(tl.float32), mask=is_real)
        if RUNNING != "no":
            blocks = tl.num_programs(0)
            if _is_last(ticket_ptr + blocks, blocks):
                _move_running(
                    mean_ptr, m2_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
                    statistics, count, momentum,
                    RUNNING, SKIPS_NONFINITE, COUNTS_BATCHES, BLOCK_RUNNING,
                )  # fmt: skip


@triton.jit
def sums_kernel(
    dy_ptr,
    x_ptr,
    part_ptr,
    ticket_ptr,
    sum_ptr,
    sum_rest_ptr,
    center_ptr,
    scale_ptr,
    inv_std_ptr,
    shift_ptr,
    residual_ptr,
    bits_ptr,
    weight_ptr,
    dweight_ptr,
    dbias_ptr,
    b_ptr,
    c_ptr,
    steps,
    statistics,
    width_units,
    pieces,
    repeat,
    period,
    weight_repeat,
    weight_period,
    count,
    slope,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    ALONG: tl.constexpr,
    WEIGHT_ALONG: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FINISH: tl.constexpr,
    WRITES_DWEIGHT: tl.constexpr,
    WRITES_DBIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Σg and Σg·(x − center) of each statistic, g = dy·act'(…)·weight.

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
    index, is_real = _statistic(block, statistics, KIND, BLOCK_COLUMNS)
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
    tl.store(part_ptr + part, _over_tile(sum_g, KIND), mask=is_real)
    tl.store(part_ptr + part + statistics, _over_tile(sum_rest, KIND), mask=is_real)
    if _is_last(ticket_ptr + block, splits):
        total_g = tl.zeros_like(index.to(tl.float64))
        total_rest = tl.zeros_like(total_g)
        for start in range(0, splits, BLOCK_PARTS):
            parts, valid = _parts(start, splits, index, 2 * statistics, BLOCK_PARTS)
            valid = valid & is_real[None, :]
            total_g += tl.sum(_read(part_ptr + parts, valid).to(tl.float64), axis=0)
            more = _read(part_ptr + parts + statistics, valid)
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
def _pilot(
    x_ptr, first, stride, steps, block, statistics, width, pieces,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of eight values of each statistic the one nearest to their mean; 0 if none is.

    They are spread over the tiles that the program reads next, so they cost no
    traffic. A value of x makes x − p exact for halves, whose mean it would not be.
    """
    sample = tl.arange(0, 8)
    tiles = tl.cdiv(steps - first, stride)
    step = first + (tiles * sample // 8) * stride + BLOCK_ROWS * sample // 8
    step = tl.minimum(step, steps - 1)
    if KIND == "columns":
        row = step[:, None]
        column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    else:
        outer = step // pieces
        row = (outer * statistics + block)[:, None]
        column = (step - outer * pieces) * BLOCK_COLUMNS + BLOCK_COLUMNS * sample // 8
        column = tl.minimum(column, width - 1)[:, None]
    offsets = row.to(tl.int64) * width + column
    x = tl.load(x_ptr + offsets, mask=column < width, other=0.0).to(tl.float32)
    apart = tl.abs(x - tl.sum(x * 0.125, axis=0)[None, :])
    is_nearest = apart == tl.min(apart, axis=0)[None, :]
    pilot = tl.max(tl.where(is_nearest, x, float("-inf")), axis=0)
    return tl.where(tl.abs(pilot) < float("inf"), pilot, 0.0)


@triton.jit
def _statistic(block, statistics, KIND: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The statistics of a block, and which of them there are."""
    if KIND == "columns":
        index = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    else:
        index = block + tl.arange(0, 1)
    return index, index < statistics


@triton.jit
def _over_tile(values, KIND: tl.constexpr):
    total = tl.sum(values, axis=0)
    if KIND == "runs":
        total = tl.sum(total, axis=0, keep_dims=True)
    return total


@triton.jit
def _terms(
    start, steps, width, pieces,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """How many values of one statistic lie in the tile at `start`."""
    end = tl.minimum(start + BLOCK_ROWS, steps)
    if KIND == "columns":
        terms = end - start
    else:
        # The last piece of a run may be short.
        short = (end // pieces - start // pieces) * (pieces * BLOCK_COLUMNS - width)
        terms = (end - start) * BLOCK_COLUMNS - short
    return terms


@triton.jit
def _is_last(ticket_ptr, arrivals):
    """Whether all other programs have written; resets the ticket for the next launch.

    The barrier orders this program's writes before the release, and the acquire
    orders the writes of the others before the reads that follow.
    """
    tl.debug_barrier()
    drawn = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if drawn == arrivals - 1:
        tl.store(ticket_ptr, 0)
    return drawn == arrivals - 1


@triton.jit
def _parts(start, splits, index, stride, BLOCK_PARTS: tl.constexpr):
    part = start + tl.arange(0, BLOCK_PARTS)[:, None]
    return part.to(tl.int64) * stride + index[None, :], part < splits


@triton.jit
def _read(ptr, valid):
    # Written by other programs of this launch: past the first-level cache.
    return tl.load(ptr, mask=valid, other=0.0, cache_modifier=".cg")


@triton.jit
def _load_bits(
    bits_ptr, row, start, steps, block, width, pieces,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The bytes of a tile's gates: each row of gates fills whole bytes."""
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


@triton.jit
def _move_running(
    mean_ptr, m2_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
    statistics, count, momentum,
    RUNNING: tl.constexpr, SKIPS_NONFINITE: tl.constexpr,
    COUNTS_BATCHES: tl.constexpr, BLOCK_RUNNING: tl.constexpr,
):  # fmt: skip
    """New = (1 − rate)·old + rate·batch for all statistics, or for none.

    A batch with a NaN or Inf in any statistic changes nothing if SKIPS_NONFINITE.
    """
    bad = 0
    if SKIPS_NONFINITE:
        for start in range(0, statistics, BLOCK_RUNNING):
            index = start + tl.arange(0, BLOCK_RUNNING)
            valid = index < statistics
            mean = _read(mean_ptr + index, valid)
            m2 = _read(m2_ptr + index, valid)
            finite = (tl.abs(mean) < float("inf")) & (tl.abs(m2) < float("inf"))
            bad += tl.sum((valid & ~finite).to(tl.int32), axis=0)
    if bad == 0:
        rate = tl.zeros([1], tl.float64) + momentum
        if RUNNING == "cumulative":
            rate = 1.0 / (tl.load(tracked_ptr + tl.arange(0, 1)) + 1).to(tl.float64)
        for start in range(0, statistics, BLOCK_RUNNING):
            index = start + tl.arange(0, BLOCK_RUNNING)
            valid = index < statistics
            mean = _read(mean_ptr + index, valid)
            old = tl.load(running_mean_ptr + index, mask=valid, other=0.0)
            new = (1.0 - rate) * old.to(tl.float64) + rate * mean
            new = new.to(running_mean_ptr.dtype.element_ty)
            tl.store(running_mean_ptr + index, new, mask=valid)
            if count > 1:
                var = _read(m2_ptr + index, valid) / (count - 1)
                old = tl.load(running_var_ptr + index, mask=valid, other=0.0)
                new = (1.0 - rate) * old.to(tl.float64) + rate * var
                new = new.to(running_var_ptr.dtype.element_ty)
                tl.store(running_var_ptr + index, new, mask=valid)
        if COUNTS_BATCHES:
            # Every thread has read the old count before one writes the new.
            tl.debug_barrier()
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
