"""Partial results of a reduction, merged by the last program to finish.

Each program reduces every `splits`-th tile of one block of statistics, so that all
programs together read x once from front to back. The last one to finish a block (it
draws the last ticket) merges the parts, always in the same order, in float64. A lane
adds at most 64 terms before they are merged: sums of equal terms drift by a quarter of
their number in units of the last place.
"""
# Triton's language has no types that a checker could follow.
# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false
# pyright: reportUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["is_last", "over_tile", "part_offsets", "read_part", "statistic_index"]


@triton.jit
def statistic_index(block, statistics, KIND: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Return the indices of a block's statistics, and which of them exist."""
    if KIND == "columns":
        index = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    else:
        index = block + tl.arange(0, 1)
    return index, index < statistics


@triton.jit
def over_tile(values, KIND: tl.constexpr):
    """Sum a tile over its rows, and over its columns where KIND is "runs"."""
    total = tl.sum(values, axis=0)
    if KIND == "runs":
        total = tl.sum(total, axis=0, keep_dims=True)
    return total


@triton.jit
def is_last(ticket_ptr, arrivals):
    """Return whether all other programs have written; reset the ticket if so.

    The barrier orders this program's writes before the release, and the acquire
    orders the writes of the others before the reads that follow.
    """
    tl.debug_barrier()
    drawn = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if drawn == arrivals - 1:
        tl.store(ticket_ptr, 0)
    return drawn == arrivals - 1


@triton.jit
def part_offsets(start, splits, index, stride, BLOCK_PARTS: tl.constexpr):
    """Return the offsets of BLOCK_PARTS parts from `start`, and which exist."""
    part = start + tl.arange(0, BLOCK_PARTS)[:, None]
    return part.to(tl.int64) * stride + index[None, :], part < splits


@triton.jit
def read_part(ptr, valid):
    """Load what other programs of this launch wrote, past the first-level cache."""
    return tl.load(ptr, mask=valid, other=0.0, cache_modifier=".cg")
