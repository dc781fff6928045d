"""Nested tensors: sequences of different lengths without padding, one after another.

Layer and RMS norm treat every position alone, so they run on the packed values. What
takes statistics over positions has no rule for them (`arguments.check_floating`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkit.errors import ArgumentError, ShapeError

__all__ = ["on_values"]


def on_values(
    name: str,
    x: Tensor,
    sizes: tuple[int, ...],
    mask: Tensor | None,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return `norm` of the values of a nested tensor, nested as `x` is.

    Args:
        name: Of the function, for errors.
        x: A nested tensor, jagged or strided.
        sizes: Those of the last dimensions, which share a statistic.
        mask: None; there is no padding to hide.
        norm: Of a plain tensor that ends in `sizes`.

    Raises:
        ArgumentError: There is a mask.
        ShapeError: A dimension of the statistics has a length for each sequence.
    """
    if mask is not None:
        raise ArgumentError(
            f"{name} got a nested tensor and a mask; a nested tensor has no padding, "
            "leave the mask out"
        )
    if x.layout is not torch.jagged:
        return torch.nested.as_nested_tensor([norm(part) for part in x.unbind()])
    # A size that differs is a symbol.
    ragged = next(d for d, size in enumerate(x.shape) if not isinstance(size, int))
    if ragged >= x.dim() - len(sizes):
        raise ShapeError(
            f"{name} got a nested tensor of shape {tuple(x.shape)}, whose dimension "
            f"{ragged} has a length for each sequence; it cannot be one of the last "
            f"{len(sizes)}, which share a statistic"
        )
    packed: Any = x  # torch's stubs know nothing of its parts
    return torch.nested.nested_tensor_from_jagged(
        norm(packed.values()), packed.offsets(), packed.lengths(), jagged_dim=ragged
    )
