"""A sweep over the numbers of `kernels/gpu/config.py` that await a GPU.

Each candidate is measured against the number of today, interleaved: "today ÷ ours"
above 1 says that the candidate is faster. One number is changed at a time.
"""

import functools
from collections.abc import Iterator

from benchmarks.gpu import layers
from benchmarks.gpu.stages import Case, Row
from benchmarks.gpu.timing import Bench

__all__ = ["CANDIDATES", "cases"]

# Names in `config`, and values to try beside that of today.
CANDIDATES: list[dict[str, int]] = [
    {"PROGRAMS_PER_MULTIPROCESSOR": 1, "REDUCTION_REGISTERS": 255},
    {"PROGRAMS_PER_MULTIPROCESSOR": 3, "REDUCTION_REGISTERS": 80},
    {"PROGRAMS_PER_MULTIPROCESSOR": 4},
    {"REDUCTION_TILE_BYTES": 4096},
    {"REDUCTION_TILE_BYTES": 16384},
    {"REDUCTION_WARPS": 4},
    {"MATRIX_TILE_BYTES": 4096},
    {"MATRIX_TILE_BYTES": 16384},
    {"MATRIX_WARPS": 8},
    {"ROW_PROGRAMS_PER_MULTIPROCESSOR": 1},
    {"ROW_PROGRAMS_PER_MULTIPROCESSOR": 4},
]
IMAGES = [(64, 256, 56, 56), (64, 64, 112, 112), (64, 2048, 7, 7)]
ROWS = [(16384, 4096), (16384, 8192)]


def cases(bench: Bench) -> list[Case]:
    """Return every candidate at the first shape, then at the others."""
    images = [(2, 16, 4, 4)] if bench.is_dry else IMAGES
    rows = [(8, 64)] if bench.is_dry else ROWS
    found = []
    for position in range(max(len(images), len(rows))):
        for numbers in CANDIDATES:
            is_rows = "ROW_PROGRAMS_PER_MULTIPROCESSOR" in numbers
            shapes = rows if is_rows else images
            if position < len(shapes):
                shape = shapes[position]
                run = functools.partial(_against_today, bench, shape, numbers)
                found.append(Case(f"{numbers} {shape}", run))
    return found


def _against_today(
    bench: Bench, shape: tuple[int, ...], numbers: dict[str, int]
) -> Iterator[Row]:
    measure, form = layers.batch_norm, "BN+ReLU"
    if len(shape) == 2:
        measure, form = layers.row_norm, "LayerNorm"
    named = ", ".join(f"{name.lower()}={value}" for name, value in numbers.items())
    named = named.replace("_per_multiprocessor", "")
    for row in measure(bench, shape, form, "today", numbers=numbers):
        yield {**row, "what": named, "layer": form, "numbers": numbers}
