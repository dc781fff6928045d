"""Sums whose order depends on nothing but how many values they have.

A library's sum takes an order that suits the whole tensor: its layout, its other
dimensions, the threads. Here values are added pairwise, the first half to the second,
by elementwise additions alone: what shares a tensor with a row cannot reach it.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from normkit.torch_state import is_compiling

__all__ = ["fixed_order", "is_order_fixed", "sum_in_fixed_order"]

_is_fixed: ContextVar[bool] = ContextVar("normkit_fixed_order", default=False)


def is_order_fixed() -> bool:
    """Whether the enclosing block asks for sums in a fixed order.

    Never while torch.compile traces: its kernels choose an order of their own.
    """
    return not is_compiling() and _is_fixed.get()


@contextmanager
def fixed_order() -> Generator[None]:
    """Take all sums in a fixed order within the block."""
    token = _is_fixed.set(True)
    try:
        yield
    finally:
        _is_fixed.reset(token)


def sum_in_fixed_order(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum over non-negative `dims`, kept with size 1, pairwise.

    Its error grows with the logarithm of the count, as a good sum's does.
    """
    shape = [1 if d in dims else size for d, size in enumerate(x.shape)]
    kept = [d for d in range(x.dim()) if d not in dims]
    rows = x.permute(*kept, *sorted(dims)).reshape(*(x.shape[d] for d in kept), -1)
    if not rows.shape[-1]:
        return x.new_zeros(shape)
    while (length := rows.shape[-1]) > 1:
        half = length // 2
        summed = rows[..., :half] + rows[..., half : 2 * half]
        if length % 2:
            summed = torch.cat([summed, rows[..., -1:]], -1)
        rows = summed
    return rows.reshape(shape)
