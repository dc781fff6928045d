"""Geometry of tensors for the kernels: matrix, reduction, placement of vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.kernels.gpu.config import piece_of
from normkit.views import View

__all__ = [
    "Matrix",
    "Placement",
    "Reduction",
    "Runs",
    "arrange",
    "flat",
    "is_in_order",
    "laid_out_as",
    "matrix_of",
    "place",
    "reduction_of",
    "runs_of",
]

_LARGEST = 2**31 - 1


class Matrix(NamedTuple):
    """A dense tensor as rows × width, both below 2³¹."""

    rows: int
    width: int


class Reduction(NamedTuple):
    """A reduction of a matrix, step by step, to `statistics` results.

    Attributes:
        kind: "columns": over the rows of the matrix. "runs": over the pieces of each
            run of `width` values, and over the rows that share a statistic.
        steps: Rows, or pieces of all runs of one statistic.
        statistics: Number of results.
        width: Columns of the matrix.
        pieces: Pieces of one run; 1 for columns.
        block: Columns of a tile.
    """

    kind: str
    steps: int
    statistics: int
    width: int
    pieces: int
    block: int


class Placement(NamedTuple):
    """Placement of a vector on a matrix: along its columns, or along its rows.

    Along "row", row r has element (r // repeat) % period.
    """

    along: str
    repeat: int = 1
    period: int = 1


class Runs(NamedTuple):
    """An affine with one weight for each run of a row, as in group and instance norm.

    Attributes:
        length: Values that share a weight.
        groups: Neighbouring rows, each with weights of its own, before they repeat.
    """

    length: int
    groups: int


def matrix_of(view: View) -> Matrix:
    """Return the matrix of a canonical view."""
    if view.kind == "rows":
        return Matrix(*view.sizes)
    outer, channels, inner = view.sizes
    return Matrix(outer, channels) if inner == 1 else Matrix(outer * channels, inner)


def reduction_of(view: View) -> Reduction:
    """Return the reduction of a canonical view."""
    if view.kind == "rows":
        outer, (statistics, inner) = 1, view.sizes
    else:
        outer, statistics, inner = view.sizes
        if inner == 1:
            block = min(64, piece_of(statistics))
            return Reduction("columns", outer, statistics, statistics, 1, block)
    block = min(256, piece_of(inner))
    pieces = -(-inner // block)
    return Reduction("runs", outer * pieces, statistics, inner, pieces, block)


def arrange(
    x: Tensor, vectors: Sequence[Tensor | None]
) -> tuple[Matrix, list[Placement | None]] | None:
    """Return a matrix of dense `x` on which every vector lies along rows or columns.

    The widest such matrix, because wide rows make full tiles; None when there is none.
    """
    sizes = [x.shape[d] for d in _memory_order(x)]
    for split in range(len(sizes) + 1):
        matrix = Matrix(math.prod(sizes[:split]), math.prod(sizes[split:]))
        if max(matrix.rows, matrix.width) > _LARGEST:
            continue
        placed = [None if v is None else place(v, x, matrix) for v in vectors]
        if all(
            (v is None) == (p is None) for v, p in zip(vectors, placed, strict=True)
        ):
            return matrix, placed
    return None


def place(vector: Tensor, x: Tensor, matrix: Matrix) -> Placement | None:
    """Return the placement of `vector`, of the dimensions of x, or None."""
    order = _memory_order(x)
    sizes = [x.shape[d] for d in order]
    split = next(s for s in range(len(sizes) + 1) if _is_split(sizes, s, matrix))
    varying = [i for i, d in enumerate(order) if vector.shape[d] != 1]
    if not varying:
        return Placement("row")
    first, last = varying[0], varying[-1]
    if varying != list(range(first, last + 1)):
        return None
    if last < split:
        repeat = math.prod(sizes[last + 1 : split])
        return Placement("row", repeat, math.prod(sizes[first : last + 1]))
    if first == split and last == len(sizes) - 1:
        return Placement("column")
    return None


def runs_of(affine: Tensor, x: Tensor, matrix: Matrix) -> Runs | None:
    """Return how `affine` lies on the rows of `matrix` in constant runs, or None.

    It varies along neighbouring dimensions, the last of the rows or the first within
    them.
    """
    order = _memory_order(x)
    sizes = [x.shape[d] for d in order]
    split = next(s for s in range(len(sizes) + 1) if _is_split(sizes, s, matrix))
    varying = [i for i, d in enumerate(order) if affine.shape[d] != 1]
    if not varying:
        return Runs(matrix.width, 1)
    first, last = varying[0], varying[-1]
    is_one_stretch = varying == list(range(first, last + 1))
    if not is_one_stretch or not first <= split <= last + 1:
        return None
    length = math.prod(sizes[last + 1 :])
    return Runs(min(length, matrix.width), math.prod(sizes[first:split]))


def _is_split(sizes: list[int], split: int, matrix: Matrix) -> bool:
    return math.prod(sizes[split:]) == matrix.width


def flat(vector: Tensor, x: Tensor) -> Tensor:
    """Return the elements of `vector` in the memory order of x."""
    if not is_in_order(x):
        order = _memory_order(x)
        rest = [d for d in range(x.dim()) if d not in order]
        vector = vector.permute(order + rest)
    # A lazily negated tensor keeps its minus outside its memory.
    return vector.reshape(-1).contiguous().resolve_neg()


def is_in_order(x: Tensor) -> bool:
    """Return whether the dimensions of dense x lie in memory one inside the other."""
    order = _memory_order(x)
    return order == sorted(order)


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return `y` with the strides of dense `x`: itself if it has them, else a copy."""
    same = y.dtype == x.dtype and not y.is_neg()
    same = same and all(
        y.stride(d) == x.stride(d) for d in range(x.dim()) if x.shape[d] != 1
    )
    return y if same else torch.empty_like(x).copy_(y)


def _memory_order(x: Tensor) -> list[int]:
    order = [d for d in range(x.dim()) if x.shape[d] != 1]
    return sorted(order, key=lambda d: -x.stride(d))
