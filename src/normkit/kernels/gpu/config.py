"""Tile sizes and grids, by shape: a static table, no tuning at run time.

Every number marked [awaiting a GPU] was chosen by arithmetic (bytes in flight,
registers of the compiled code) and is not yet measured; the tile sweep of `make gpu`
sets each to its neighbours, by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

__all__ = [
    "FORWARD_ROW",
    "REDUCTION_REGISTERS",
    "Grid",
    "Tile",
    "alignment",
    "backward_rows",
    "cached",
    "forget",
    "forward_rows",
    "keeps_row",
    "keeps_shares",
    "matrix_tile_for",
    "multiprocessors",
    "piece_of",
    "reduction_grid",
    "reduction_tile_for",
]

# A lane of a reduction adds at most this many terms; more, and a sum of equal terms
# drifts by more than 1e-6 (a quarter of the number of terms, in units of 6e-8).
_TERMS_PER_LANE = 64
# CUDA's limit for the second axis of a grid.
_MAX_SPLITS = 65535
# Programs of a reduction per multiprocessor: 2 of 8 warps fill half of its threads at
# 128 registers. [awaiting a GPU]
PROGRAMS_PER_MULTIPROCESSOR = 2
# So a thread of the statistics may use 128. Without the limit, ptxas 13 fits a third
# program of 80 registers that the grid never starts, and on sm_100 spills for it.
REDUCTION_REGISTERS = 128
# One step of a reduction, per operand: with 8 warps 32 bytes a thread, so two 16-byte
# loads of each operand in flight and 32 registers of sums for a half. [awaiting a GPU]
REDUCTION_TILE_BYTES = 8192
REDUCTION_WARPS = 8
# One program of an elementwise pass, per operand: with 4 warps 64 bytes a thread.
# [awaiting a GPU]
MATRIX_TILE_BYTES = 8192
MATRIX_WARPS = 4
# Programs of a backward over rows per multiprocessor: each writes a share of dweight,
# so few is cheap; the registers of one row leave room for 1 or 2. [awaiting a GPU]
ROW_PROGRAMS_PER_MULTIPROCESSOR = 2

# The longest rows that stay in registers: 16 warps have 128 registers a thread. A row
# of 16384 takes 32 of them. A backward holds x, dy, dweight and dbias: 8192 halves
# compile to 114 registers, 8192 floats spill, 4096 take 94.
FORWARD_ROW = 16384
_BACKWARD_ROW_BYTES = 16384


Found = TypeVar("Found", bound=Callable[..., Any])
_caches: list[Any] = []


def cached(function: Found) -> Found:
    """Cache the results of a function of shapes, which each call asks for."""
    found: Any = functools.lru_cache(maxsize=4096)(function)
    _caches.append(found)
    return found


@dataclass(frozen=True)
class Tile:
    """Rows and columns of one program's tile, and the warps that share it."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Grid:
    """Grid of a reduction: blocks of statistics, and splits of each block."""

    blocks: int
    splits: int


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors; 132 (an H200) where there is no device."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]


def alignment(width: int) -> int:
    """Return the largest power of 2, at most 16, that divides every row's start."""
    return math.gcd(width, 16)


@cached
def piece_of(width: int) -> int:
    """Return the longest power of 2 from 8 to 512 that wastes at most 1/16 of a row."""

    def waste(piece: int) -> float:
        return -(-width // piece) * piece / width - 1

    pieces = [512, 256, 128, 64, 32, 16, 8]
    for piece in pieces:
        if waste(piece) <= 1 / 16:
            return piece
    return min(pieces, key=waste)


@cached
def matrix_tile_for(rows: int, width: int, itemsize: int) -> Tile:
    """Return the tile of an elementwise pass.

    Rows that start at odd places are loaded value by value; a quarter of the tile keeps
    their registers below 128.
    """
    columns = piece_of(width)
    elements = MATRIX_TILE_BYTES // itemsize
    if alignment(width) * itemsize < 16:
        elements //= 4
    return _tile(rows, columns, elements, MATRIX_WARPS)


@cached
def reduction_tile_for(steps: int, columns: int, itemsize: int) -> Tile:
    """Return the tile of one reduction step; two sums per element stay in registers."""
    elements = REDUCTION_TILE_BYTES // itemsize
    return _tile(steps, columns, elements, REDUCTION_WARPS)


def _tile(rows: int, columns: int, elements: int, warps: int) -> Tile:
    most = _power_of_two(rows)
    block = max(1, min(elements // columns, most))
    while warps > 1 and block * columns < 32 * warps * 4:
        warps //= 2
    return Tile(block, columns, warps)


@cached
def reduction_grid(
    steps: int, statistics: int, columns: int, kind: str, tile: Tile, programs: int
) -> Grid:
    """Return enough splits to fill `programs` and to keep the sums of a lane short."""
    blocks = -(-statistics // columns) if kind == "columns" else statistics
    tiles = -(-steps // tile.rows)
    wanted = max(-(-programs // blocks), -(-tiles // _TERMS_PER_LANE))
    wanted = min(wanted, _MAX_SPLITS)
    # The same number of tiles for each, but for the last.
    each = -(-tiles // max(1, min(wanted, tiles)))
    return Grid(blocks, -(-tiles // each))


def reduction_programs(device: torch.device) -> int:
    """Return the number of programs of a reduction that fill the device."""
    return multiprocessors(device) * PROGRAMS_PER_MULTIPROCESSOR


@cached
def forward_rows(rows: int, width: int) -> Tile:
    """Return the tile of whole rows in a forward: 4096 elements, or one row."""
    columns = _power_of_two(width)
    block = max(1, min(4096 // columns, _power_of_two(rows)))
    return Tile(block, columns, _warps(block * columns, 16))


@cached
def backward_rows(rows: int, width: int, device: torch.device) -> tuple[Tile, int]:
    """Return the tile of whole rows in a backward, and the rows of one program."""
    columns = _power_of_two(width)
    block = max(1, min(2048 // columns, _power_of_two(rows)))
    programs = multiprocessors(device) * ROW_PROGRAMS_PER_MULTIPROCESSOR
    each = -(-rows // programs)
    each = -(-each // block) * block
    return Tile(block, columns, _warps(block * columns, 8)), each


def forget() -> None:
    """Find every tile and grid again, after a number above has changed."""
    for found in _caches:
        found.cache_clear()


def keeps_shares(width: int, itemsize: int) -> bool:
    """Return whether a backward over rows can keep dweight and dbias in registers."""
    return width * itemsize <= _BACKWARD_ROW_BYTES


def keeps_row(width: int) -> bool:
    """Return whether a backward over rows keeps x and dy in registers over their sums.

    At 16384 halves that spilled 58 times.
    """
    return width <= 8192


def _warps(elements: int, per_thread: int) -> int:
    return max(1, min(16, _power_of_two(elements // (32 * per_thread))))


def _power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()
