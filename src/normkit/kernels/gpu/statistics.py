"""Statistics of a whole tensor in one launch, shared as `partials` says.

    n = Σ nᵢ,   mean = Σ nᵢ·meanᵢ/n,   m2 = Σ m2ᵢ + nᵢ·(meanᵢ − mean)²

The last program of all updates the running statistics: a batch norm is two launches.
"""
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
from normkit.kernels.gpu.tile import reduced_tile

__all__ = ["statistics_kernel"]


@triton.jit
def statistics_kernel(
    x_ptr, parts_ptr, ticket_ptr, mean_ptr, m2_ptr, inv_std_ptr, scale_ptr, weight_ptr,
    running_mean_ptr, running_var_ptr, tracked_ptr, skipped_ptr,
    steps, statistics, width_units, pieces, count, eps, momentum,
    KIND: tl.constexpr, ALIGN: tl.constexpr, CENTERED: tl.constexpr,
    WRITES_SCALE: tl.constexpr, HAS_WEIGHT: tl.constexpr, RUNNING: tl.constexpr,
    SKIPS_NONFINITE: tl.constexpr, COUNTS_BATCHES: tl.constexpr,
    COUNTS_SKIPPED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_RUNNING: tl.constexpr,
):  # fmt: skip
    """Write mean and m2 of each statistic in float64, 1/√(var + eps) and the scale.

    RUNNING is "no", "ema" or "cumulative". Grid: (blocks of statistics, splits).
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    width = width_units * ALIGN
    first = split * BLOCK_ROWS
    stride = splits * BLOCK_ROWS
    # Σ(x − p)² − (Σ(x − p))²/n keeps its digits when p lies near the mean of the chunk.
    # The middle one of eight values spread over it is; if not, the chunk is read once
    # more around the mean that was found.
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
        shift = over_tile(sum1, KIND).to(tl.float64) / count_here
        lost = shift * shift * count_here
        m2 = over_tile(sum2, KIND).to(tl.float64) - lost
        mean = pilot.to(tl.float64) + shift
        # At √2 standard deviations the difference errs 3 times as much as its terms.
        is_far = (lost > 2.0 * m2) & (tl.abs(mean) < float("inf"))
        pilot = tl.where(is_far, mean.to(tl.float32), pilot)
        reads += tl.where(tl.sum(is_far.to(tl.int32), axis=0) > 0, 1, 2)

    index, is_real = statistic_index(block, statistics, KIND, BLOCK_COLUMNS)
    part = split.to(tl.int64) * statistics + index
    part_m2_ptr = parts_ptr + splits.to(tl.int64) * statistics
    part_count_ptr = part_m2_ptr + splits.to(tl.int64) * statistics
    tl.store(parts_ptr + part, mean, mask=is_real)
    tl.store(part_m2_ptr + part, tl.where(m2 < 0, 0.0, m2), mask=is_real)
    tl.store(part_count_ptr + part, count_here, mask=is_real)
    if is_last(ticket_ptr + block, splits):
        mean = tl.zeros_like(mean)
        m2 = tl.zeros_like(mean)
        for start in range(0, splits, BLOCK_PARTS):
            parts, valid = part_offsets(start, splits, index, statistics, BLOCK_PARTS)
            share = read_part(part_count_ptr + parts, valid) / count
            mean += tl.sum(read_part(parts_ptr + parts, valid) * share, axis=0)
        for start in range(0, splits, BLOCK_PARTS):
            parts, valid = part_offsets(start, splits, index, statistics, BLOCK_PARTS)
            part_count = read_part(part_count_ptr + parts, valid)
            apart = read_part(parts_ptr + parts, valid) - mean[None, :]
            between = tl.where(valid, part_count * apart * apart, 0.0)
            m2 += tl.sum(read_part(part_m2_ptr + parts, valid) + between, axis=0)
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
            if is_last(ticket_ptr + blocks, blocks):
                _update_running(
                    mean_ptr, m2_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
                    skipped_ptr, statistics, count, momentum, RUNNING,
                    SKIPS_NONFINITE, COUNTS_BATCHES, COUNTS_SKIPPED, BLOCK_RUNNING,
                )  # fmt: skip


@triton.jit
def _pilot(
    x_ptr, first, stride, steps, block, statistics, width, pieces,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the value, of eight samples per statistic, that is nearest their mean.

    They are spread over the tiles that the program reads next, so they cost no traffic;
    0 if none is finite. With a value of x as pilot p, x − p is exact for halves.
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
def _terms(
    start, steps, width, pieces,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the number of values of one statistic in the tile at `start`."""
    end = tl.minimum(start + BLOCK_ROWS, steps)
    if KIND == "columns":
        terms = end - start
    else:
        # The last piece of a run may be short.
        short = (end // pieces - start // pieces) * (pieces * BLOCK_COLUMNS - width)
        terms = (end - start) * BLOCK_COLUMNS - short
    return terms


@triton.jit
def _update_running(
    mean_ptr, m2_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
    skipped_ptr, statistics, count, momentum,
    RUNNING: tl.constexpr, SKIPS_NONFINITE: tl.constexpr,
    COUNTS_BATCHES: tl.constexpr, COUNTS_SKIPPED: tl.constexpr,
    BLOCK_RUNNING: tl.constexpr,
):  # fmt: skip
    """Update all running statistics, or none: (1 − rate)·old + rate·batch.

    A batch with a NaN or Inf in any statistic is only counted if SKIPS_NONFINITE.
    """
    bad = 0
    if SKIPS_NONFINITE:
        for start in range(0, statistics, BLOCK_RUNNING):
            index = start + tl.arange(0, BLOCK_RUNNING)
            valid = index < statistics
            mean = read_part(mean_ptr + index, valid)
            m2 = read_part(m2_ptr + index, valid)
            finite = (tl.abs(mean) < float("inf")) & (tl.abs(m2) < float("inf"))
            bad += tl.sum((valid & ~finite).to(tl.int32), axis=0)
    if bad == 0:
        rate = tl.zeros([1], tl.float64) + momentum
        if RUNNING == "cumulative":
            rate = 1.0 / (tl.load(tracked_ptr + tl.arange(0, 1)) + 1).to(tl.float64)
        for start in range(0, statistics, BLOCK_RUNNING):
            index = start + tl.arange(0, BLOCK_RUNNING)
            valid = index < statistics
            mean = read_part(mean_ptr + index, valid)
            old = tl.load(running_mean_ptr + index, mask=valid, other=0.0)
            new = (1.0 - rate) * old.to(tl.float64) + rate * mean
            new = new.to(running_mean_ptr.dtype.element_ty)
            tl.store(running_mean_ptr + index, new, mask=valid)
            if count > 1:
                var = read_part(m2_ptr + index, valid) / (count - 1)
                old = tl.load(running_var_ptr + index, mask=valid, other=0.0)
                new = (1.0 - rate) * old.to(tl.float64) + rate * var
                new = new.to(running_var_ptr.dtype.element_ty)
                tl.store(running_var_ptr + index, new, mask=valid)
        if COUNTS_BATCHES:
            # Every thread has read the old count before one writes the new.
            tl.debug_barrier()
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
    elif COUNTS_SKIPPED:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + 1)
