"""Common parts of the healthy programs of gentle_runs.py: register, data, scores."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from calm_base import Data
from quiet_base import Training, feed, split
from torch import Tensor, nn

__all__ = ["PROGRAMS", "area_under_curve", "outputs", "patterns", "program"]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def patterns(n: int, side: int, train: int) -> tuple[Data, Data]:
    """Return colour pictures `(n, 3, side, side)` of six patterns, standardized.

    Rows, columns, diagonals, checks, dots and rings; period, phase, both colours and
    the noise are random.
    """
    kind = torch.randint(6, (n,))
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    rate = (2 * math.pi / (4 + 3 * torch.rand(n)))[:, None, None]
    first, second = 2 * math.pi * torch.rand(2, n, 1, 1)
    p, q = rate * u + first, rate * v + second
    at = side * torch.rand(2, n, 1, 1)
    away = ((u - at[0]).square() + (v - at[1]).square()).sqrt()
    waves = torch.stack((
        p.sin(), q.sin(), ((p + q) / 2**0.5).sin(), p.sin() * q.sin(),
        p.sin() + q.sin() - 0.7, (rate * away).sin(),
    ))[kind, torch.arange(n), None]  # fmt: skip
    dark, light = 0.5 * torch.rand(n, 3, 1, 1), 0.5 + 0.5 * torch.rand(n, 3, 1, 1)
    x = torch.where(waves > 0, light, dark) + 0.1 * torch.randn(n, 3, side, side)
    mean, std = x[:train].mean((0, 2, 3)), x[:train].std((0, 2, 3))
    return split((x - mean[:, None, None]) / std[:, None, None], kind, train)


def outputs(model: nn.Module, data: Data) -> Tensor:
    """Return the outputs in eval mode, without a graph."""
    model.eval()
    with torch.no_grad():
        out: Tensor = feed(model, data)
    return out


def area_under_curve(scores: Tensor, y: Tensor) -> float:
    """Return the chance that a positive has a higher score than a negative."""
    return float((scores[y > 0.5][:, None] > scores[y < 0.5]).float().mean())
