"""Epilogue of a normalization in the same pass over memory: residual, activation.

    y = act(z + residual),   z the normalized values

`activate` and `gate` are the definitions, in plain torch; a fused kernel agrees with
them. At a NaN, gradients pass as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from normkit.errors import ArgumentError
from normkit.masks import zero_where

__all__ = ["ACTIVATIONS", "Epilogue", "activate", "gate"]

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh")


@dataclass(frozen=True)
class Epilogue:
    """An activation after the sum with a residual.

    Attributes:
        activation: One of `ACTIVATIONS`; gelu is the exact one, by erf.
        slope: Slope of leaky_relu below 0.
        residual: Added before the activation; of the shape of the values.
    """

    activation: str = "none"
    slope: float = 0.01
    residual: Tensor | None = None

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ArgumentError(
                f"activation={self.activation!r} must be one of "
                f"{', '.join(map(repr, ACTIVATIONS))}; apply any other to the output"
            )

    def __bool__(self) -> bool:
        return self.activation != "none" or self.residual is not None


def activate(name: str, z: Tensor, slope: float = 0.01) -> Tensor:
    """Return act(z)."""
    if name == "relu":
        return F.relu(z)
    if name == "leaky_relu":
        return F.leaky_relu(z, slope)
    if name == "silu":
        return F.silu(z)
    if name == "gelu":
        return F.gelu(z)
    if name == "sigmoid":
        return z.sigmoid()
    if name == "tanh":
        return z.tanh()
    return z


def gate(name: str, dy: Tensor, z: Tensor, slope: float = 0.01) -> Tensor:
    """Return dy·act′(z)."""
    if name == "relu":
        return zero_where(z <= 0, dy)
    if name == "leaky_relu":
        return torch.where(z > 0, dy, dy * slope)
    if name == "silu":
        s = z.sigmoid()
        return dy * (s * (1 + z * (1 - s)))
    if name == "gelu":
        cdf = 0.5 * torch.erfc(z * -(0.5**0.5))
        pdf = (z * z * -0.5).exp() * (2 * torch.pi) ** -0.5
        return dy * (cdf + z * pdf)
    if name == "sigmoid":
        s = z.sigmoid()
        return dy * (s * (1 - s))
    if name == "tanh":
        return dy * (1 - z.tanh().square())
    return dy
