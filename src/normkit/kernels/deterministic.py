"""Sums whose order depends on the number of values alone.

The order of a library's sum depends on the whole tensor: its layout, its other
dimensions, the threads. Here values are added pairwise, the first half to the second,
by elementwise additions alone: the other rows of a tensor do not change a row's sum.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from normkit.torch_state import is_compiling

__all__ = [
    "deterministic",
    "deterministic_asked_for",
    "is_deterministic",
    "pairwise_sum",
]

deterministic_asked_for: ContextVar[bool] = ContextVar(
    "normkit_deterministic", default=False
)


def is_deterministic() -> bool:
    """Return whether the enclosing block asks for deterministic sums.

    Never while torch.compile traces: its kernels choose an order of their own.
    """
    return not is_compiling() and deterministic_asked_for.get()


@contextmanager
def deterministic() -> Generator[None]:
    """Make a sample's output in eval depend on the sample and the model alone.

    Within the block the output is bitwise the same whatever the other samples, the
    place in the batch and the number of threads. The CPU kernels are always
    deterministic, at full speed. Where torch operations run, sums are pairwise and take
    several times as long. The rest of a model (convolutions, matrix products) is
    torch's, and may depend on the batch.

    Example:
        >>> import normkit, torch
        >>> layer, x = normkit.nn.LayerNorm(1001).eval(), torch.randn(8, 1001)
        >>> with deterministic():
        ...     torch.equal(layer(x)[3:4], layer(x[3:4]))
        True
    """
    token = deterministic_asked_for.set(True)
    try:
        yield
    finally:
        deterministic_asked_for.reset(token)


def pairwise_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum over non-negative `dims`, kept with size 1, pairwise.

    Its error grows with the logarithm of the count, as a good sum's does.
    """
    shape = [1 if d in dims else size for d, size in enumerate(x.shape)]
    kept = [d for d in range(x.dim()) if d not in dims]
    # Not -1: of an empty tensor any length would do.
    length = math.prod([x.shape[d] for d in dims])
    rows = x.permute(*kept, *sorted(dims)).reshape(*(x.shape[d] for d in kept), length)
    if not length:
        return x.new_zeros(shape)
    while (length := rows.shape[-1]) > 1:
        half = length // 2
        summed = rows[..., :half] + rows[..., half : 2 * half]
        if length % 2:
            summed = torch.cat([summed, rows[..., -1:]], -1)
        rows = summed
    return rows.reshape(shape)
