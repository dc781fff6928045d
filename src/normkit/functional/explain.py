"""Which way a normalization takes: torch's operator on small inputs, or a backend."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from normkit.functional.judging import reasons_against
from normkit.kernels.choose import Explanation
from normkit.kernels.choose import explain as among_backends

__all__ = ["explain"]


def explain(x: Tensor, dims: tuple[int, ...] | None = None) -> Explanation:
    """Say which kernel would run on `x`, and why not another.

    Args:
        x: The input of a normalization, shape `(N, C, *)`.
        dims: The dimensions its statistics run over; by default all but
            dimension 1, as in batch norm.

    Returns:
        What is chosen, and for each other way the reasons against it. On a small input
        torch's own operator is tried first, and what is chosen runs where its result
        would not be exact.

    Example:
        >>> import torch
        >>> explain(torch.zeros(8, 3, 640, 640)).against_torch
        ['x has 9,830,400 values, more than 131,072']
    """
    return replace(among_backends(x, dims), against_torch=reasons_against(x))
