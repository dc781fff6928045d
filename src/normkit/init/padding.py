"""Padding: the part of a convolution's products that meet values and not zeros.

A fan counts every position of the kernel. On small maps many of them lie outside: of a
3x3 kernel on a map of 3x3 values with one zero around it 49 of 81, so that output and
gradient have 0.60 of the mean square that the fans give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.init.fans import Fans

__all__ = ["inside"]


def inside(
    function: Callable[..., Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    value: Tensor,
    weight: Tensor,
    fans: Fans,
) -> tuple[float, float]:
    """Return the share of the products that a call sums, of those its fans count.

    Args:
        function: A convolution, transposed or not, as called.
        args: Its arguments.
        kwargs: Its keyword arguments.
        value: The one among them that is its input.
        weight: The one among them that is its weight.
        fans: Fans of the weight.

    Returns:
        The shares for the mean square of the output and of the input's gradient.
    """
    # A batch of ones, of one sample, through weights of one counts the products.
    has_batch = value.dim() == weight.dim()
    ones = torch.ones_like(value[:1] if has_batch else value, dtype=torch.float32)
    weights = torch.ones_like(weight, dtype=torch.float32)

    def counted(argument: Any) -> Any:
        if argument is value:
            return ones
        if argument is weight:
            return weights
        return None if isinstance(argument, Tensor) else argument

    with torch.no_grad():
        y = function(
            *map(counted, args), **{key: counted(v) for key, v in kwargs.items()}
        )
    products = float(y.sum(dtype=torch.float64))
    forward = products / (y.numel() * fans.fan_in)
    return forward, products / (ones.numel() * fans.fan_out)
