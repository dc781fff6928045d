"""Each kernel as a function of tensors: one launch each, nothing read back.

operands      values the launchers share        reductions    statistics, sums
elementwise   apply, apply_grads                rows          whole rows, both ways

The functions take geometry and flat vectors; `GpuBackend` brings the contract's
broadcast vectors to that form, `gpu/layers.py` composes whole layers.
"""

from normkit.kernels.gpu.launchers.elementwise import apply, apply_grads, bits_like
from normkit.kernels.gpu.launchers.operands import Gate, Statistics
from normkit.kernels.gpu.launchers.reductions import (
    statistics,
    sums,
    sums_of_batch_norm,
)
from normkit.kernels.gpu.launchers.rows import rows_backward, rows_forward

__all__ = [
    "Gate",
    "Statistics",
    "apply",
    "apply_grads",
    "bits_like",
    "rows_backward",
    "rows_forward",
    "statistics",
    "sums",
    "sums_of_batch_norm",
]
