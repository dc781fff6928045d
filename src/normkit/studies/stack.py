"""One pass forward and one back through a plain stack of layers, every tensor kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["StackPass", "propagate"]


@dataclass(frozen=True)
class StackPass:
    """Values and gradients of each layer of a stack, first layer first.

    Attributes:
        outputs: Output of the activation, `(batch, units)`.
        weight_grads: Norm of the gradient of the layer's matrix.
        input_grads: Gradient of the layer's input, `(batch, units)`.
    """

    outputs: list[Tensor]
    weight_grads: list[float]
    input_grads: list[Tensor]


def propagate(
    x: Tensor,
    weights: Sequence[Tensor],
    activation: Callable[[Tensor], Tensor],
    cotangent: Tensor,
    *,
    gain: float = 1.0,
) -> StackPass:
    """Run h → activation(gain · h·W) through all layers, and a gradient back.

    Args:
        x: Input, `(batch, units)`.
        weights: One matrix per layer, `(units, units)`.
        activation: Elementwise function after each matrix.
        cotangent: Gradient of the last output, of its shape.
        gain: Factor on every matrix.
    """
    inputs: list[tuple[Tensor, Tensor]] = []
    outputs: list[Tensor] = []
    h = x
    for weight in weights:
        z = (h @ weight).mul_(gain).requires_grad_()
        inputs.append((h, z))
        h = activation(z).detach()
        outputs.append(h)
    g = cotangent
    weight_grads: list[float] = []
    input_grads: list[Tensor] = []
    for (before, z), weight in zip(reversed(inputs), reversed(weights), strict=True):
        (dz,) = torch.autograd.grad(activation(z), z, g)
        weight_grads.append((before.T @ dz).norm().item())
        g = (dz @ weight.T).mul_(gain)
        input_grads.append(g)
    return StackPass(outputs, weight_grads[::-1], input_grads[::-1])
