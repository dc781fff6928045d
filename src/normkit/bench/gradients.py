"""Errors of gradients where input and gradient lie in different layouts.

    error = max |dx − dx64| / max(1, |dx64|)

over pairs of layouts: the dimensions of x in six orders of memory, those of dy in all.
Where a size is 1, strides do not tell a layout, and torch's CPU kernels read one of the
two in the other's order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import permutations, product

import torch
from torch import Tensor, nn

import normkit

__all__ = ["LAYERS", "SHAPES", "gradient_errors", "layouts"]

SHAPES = ((4, 8, 6, 5), (4, 8, 6, 1), (4, 8, 1, 5), (1, 8, 6, 5), (4, 8, 1, 1))
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "batch norm, training": lambda m: m.BatchNorm2d(8),
    "batch norm, eval": lambda m: m.BatchNorm2d(8).eval(),
    "instance norm": lambda m: m.InstanceNorm2d(8, affine=True),
    "group norm": lambda m: m.GroupNorm(2, 8),
}


def layouts(x: Tensor) -> list[Tensor]:
    """Return `x` with its dimensions in every order of memory."""
    found = []
    for order in permutations(range(x.dim())):
        back = [order.index(d) for d in range(x.dim())]
        found.append(x.permute(order).contiguous().permute(back))
    return found


def gradient_errors(
    layer: str, shape: tuple[int, ...], seed: int = 0
) -> tuple[float, float]:
    """Return the largest error of normkit and of torch.nn; nan where both refuse."""
    generator = torch.Generator().manual_seed(seed)
    x, dy, weight = (torch.randn(s, generator=generator) for s in (shape, shape, (8,)))
    found = []
    for module in (normkit.nn, nn):
        built = LAYERS[layer](module)
        with torch.no_grad():
            built.get_parameter("weight").copy_(weight)
        try:
            found.append(_largest(built, x, dy))
        except ValueError:  # one value per channel
            found.append(float("nan"))
    return found[0], found[1]


def _largest(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    exact = copy.deepcopy(layer).double()
    wide = x.double().requires_grad_()
    # One layout for both, where torch's kernels are right.
    (wanted,) = torch.autograd.grad(exact(wide), wide, dy.double())
    scale, largest = wanted.abs().clamp(min=1), 0.0
    for of_x, of_dy in product(layouts(x)[::4], layouts(dy)):
        given = of_x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(layer(given), given, of_dy)
        error = ((dx.double() - wanted).abs() / scale).max()
        largest = max(largest, float(error))
    return largest
