"""Common parts of the healthy programs of candid_runs.py: register, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from calm_base import Data
from gentle_base import area_under_curve, outputs
from quiet_base import Training, split
from torch import Tensor

__all__ = [
    "PROGRAMS",
    "area_under_curve",
    "outputs",
    "pets",
    "program",
    "standard",
    "strokes",
]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def standard(x: Tensor, n: int) -> Tensor:
    """Return pictures `(N, C, H, W)` with channels standardized by the first n."""
    mean, std = x[:n].mean((0, 2, 3)), x[:n].std((0, 2, 3))
    return (x - mean[:, None, None]) / std[:, None, None]


def _curves(kind: Tensor, points: int = 40) -> Tensor:
    """Return points `(n, points, 2)` of a line, arc, zigzag, spiral or eight."""
    t = torch.linspace(0, 1, points)
    turn, wide = 2 * math.pi * t, 2 * t - 1
    bend, coil = 1.2 * math.pi * wide / 2, 1.8 * turn
    zigzag = 0.8 * (2 * (3 * t % 1) - 1).abs() - 0.4
    curves = torch.stack((
        torch.stack((0 * t, wide), 1),
        torch.stack((bend.cos() - 0.4, bend.sin()), 1),
        torch.stack((zigzag, wide), 1),
        torch.stack((t * coil.cos(), t * coil.sin()), 1),
        torch.stack((0.5 * (2 * turn).sin(), turn.sin()), 1),
    ))  # fmt: skip
    return curves[kind]


def strokes(n: int, side: int, train: int) -> tuple[Data, Data]:
    """Return colour pictures `(n, 3, side, side)` of five curves, standardized.

    Place, size, turn, the colours of stroke and ground, and the noise are random.
    """
    kind, angle = torch.randint(5, (n,)), 2 * math.pi * torch.rand(n)
    c, s = angle.cos(), angle.sin()
    rotate = torch.stack((torch.stack((c, -s), 1), torch.stack((s, c), 1)), 1)
    size = side * (0.32 + 0.1 * torch.rand(n, 1, 1))
    middle = side / 2 - 0.5 + 0.06 * side * (2 * torch.rand(n, 1, 2) - 1)
    at = middle + size * _curves(kind) @ rotate.mT
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack((u, v), 2).flatten(0, 1).float()
    away = torch.cdist(place.expand(n, -1, -1), at).amin(2)
    mask = (-away.square() / 1.2).exp().reshape(n, 1, side, side)
    ground, colour = 0.4 * torch.rand(n, 3, 1, 1), 0.5 + 0.5 * torch.rand(n, 3, 1, 1)
    x = mask * colour + (1 - mask) * ground + 0.08 * torch.randn(n, 3, side, side)
    return split(standard(x, train), kind, train)


def pets(n: int, side: int, train: int) -> tuple[Data, Data]:
    """Return pictures of heads with ears that stand (0) or hang (1), standardized."""
    kind = torch.randint(2, (n,))
    r = side * (0.22 + 0.06 * torch.rand(n, 1, 1))
    at = side / 2 + 0.08 * side * (2 * torch.rand(2, n, 1, 1) - 1)
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    p, q = (u - at[0]) / r, (v - at[1]).abs() / r
    head = p.square() + q.square() < 1
    up = (p < -0.4) & (p > -1.6) & ((q - 0.65).abs() < 0.4 * (p + 1.6))
    down = ((p - 0.2) / 0.8).square() + ((q - 1.15) / 0.35).square() < 1
    ears = torch.where(kind[:, None, None] == 0, up, down)
    eyes = (p + 0.2).square() + (q - 0.4).square() < 0.03
    fur, ground = torch.rand(2, n, 3, 1, 1)
    shade = 0.6 + 0.4 * torch.rand(n, 1, 1, 1)
    x = torch.where(head[:, None], fur, torch.where(ears[:, None], shade * fur, ground))
    x = torch.where(eyes[:, None], 0.1, x) + 0.06 * torch.randn(n, 3, side, side)
    return split(standard(x, train), kind, train)
