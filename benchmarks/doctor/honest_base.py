"""Common parts of the healthy programs of honest_runs.py: register, flowers, scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from calm_base import Data
from gentle_base import area_under_curve, outputs
from quiet_base import Training, split
from torch import Tensor, nn

__all__ = [
    "PROGRAMS",
    "area",
    "conv_group",
    "flower_masks",
    "flowers",
    "outputs",
    "program",
]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def flower_masks(kind: Tensor, at: Tensor, size: Tensor, side: int) -> Tensor:
    """Return soft masks `(n, side, side)` of flowers of two to six petals.

    Args:
        kind: Petals of each flower, less two.
        at: Row and column of each middle, `(n, 2)`.
        size: Reach of the petals of each, `(n,)`.
        side: Of the picture.
    """
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    p, q = u - at[:, 0, None, None], v - at[:, 1, None, None]
    turn = (2 * math.pi * torch.rand(len(kind)))[:, None, None]
    petals = (kind + 2)[:, None, None]
    edge = 0.62 + 0.38 * (petals * torch.atan2(p, q) + turn).cos()
    away = (p * p + q * q).sqrt()
    return (3 * (size[:, None, None] * edge - away)).sigmoid()


def flowers(n: int, side: int, train: int) -> tuple[Data, Data]:
    """Return colour pictures `(n, 3, side, side)` of five flowers, standardized.

    Place, size, turn, the colours of flower and ground, and the noise are random.
    """
    kind = torch.randint(5, (n,))
    size = side * (0.36 + 0.1 * torch.rand(n))
    at = side / 2 - 0.5 + 0.08 * side * (2 * torch.rand(n, 2) - 1)
    mask = flower_masks(kind, at, size, side)[:, None]
    ground, colour = 0.4 * torch.rand(n, 3, 1, 1), 0.5 + 0.5 * torch.rand(n, 3, 1, 1)
    x = mask * colour + (1 - mask) * ground + 0.08 * torch.randn(n, 3, side, side)
    mean, std = x[:train].mean((0, 2, 3)), x[:train].std((0, 2, 3))
    return split((x - mean[:, None, None]) / std[:, None, None], kind, train)


def conv_group(i: int, o: int, stride: int = 1, groups: int = 4) -> nn.Sequential:
    """Return convolution, group norm, ReLU."""
    conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(groups, o), nn.ReLU())


def area(model: nn.Module, data: Data) -> float:
    """Return the area under the curve of one logit a row, in eval mode."""
    return area_under_curve(outputs(model, data).flatten(), data[1].flatten())
