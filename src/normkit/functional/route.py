"""Routes of a normalization, and their choice; see README.md in this folder."""

from __future__ import annotations

from enum import Enum

import torch

from normkit.functional import gpu_operators
from normkit.kernels.spec import Operands, Running, Spec
from normkit.torch_state import (
    has_forward_mode,
    has_transforms,
    is_compiling,
    is_jit_tracing,
)

__all__ = ["Route", "route_of"]


class Route(Enum):
    """Route of a normalization."""

    KERNELS = "kernels"
    """The autograd function over the kernels of a backend."""
    OPERATOR = "operator"
    """GPU kernels as operators of torch, which a compiler does not trace into."""
    DIFFERENTIABLE = "differentiable"
    """The formula in torch operations."""


def route_of(spec: Spec, operands: Operands, running: Running | None) -> Route:
    """Return the route of a call; `aten` and `recorded` are tried before it."""
    mask = operands[4]
    if mask is not None and mask.dtype != torch.bool:
        return Route.DIFFERENTIABLE
    if gpu_operators.serves(spec, operands, running):
        return Route.OPERATOR
    # torch.jit.trace records tensor operations, and no function of autograd.
    if is_compiling() or has_transforms() or has_forward_mode() or is_jit_tracing():
        return Route.DIFFERENTIABLE
    return Route.KERNELS
