"""The ways through a normalization, and the one place that chooses among them.

README.md in this folder says when each is taken and where it lives.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from normkit.functional import gpu_operators
from normkit.kernels.spec import Running, Spec
from normkit.torch_state import has_forward_mode, has_transforms, is_compiling

__all__ = ["Route", "route_of"]


class Route(Enum):
    """A way through a normalization."""

    KERNELS = "kernels"
    """One function of autograd over the kernels of a backend."""
    OPERATOR = "operator"
    """The GPU kernels as operators of torch, which a compiler leaves whole."""
    DIFFERENTIABLE = "differentiable"
    """The formula in torch operations."""
    RECORDED = "recorded"
    """A call of torch.nn's layer, for torch.fx, torch.jit.trace and their exports."""


def route_of(
    spec: Spec,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running: Running | None,
) -> Route:
    """Return the way of a call; `aten` and `recorded` are tried before it.

    Args:
        spec: What is asked for.
        x: The values.
        weight: Learned factor, or None.
        bias: Learned summand, or None.
        residual: Added before the activation, or None.
        mask: Which values count; weights have no kernel.
        running: Statistics to normalize by, or to move.
    """
    if mask is not None and mask.dtype != torch.bool:
        return Route.DIFFERENTIABLE
    if mask is None and gpu_operators.serves(spec, x, weight, bias, residual, running):
        return Route.OPERATOR
    if is_compiling() or has_transforms() or has_forward_mode():
        return Route.DIFFERENTIABLE
    return Route.KERNELS
