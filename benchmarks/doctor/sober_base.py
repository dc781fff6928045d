"""Common parts of the healthy programs of sober_runs.py: register, pictures, scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from calm_base import Data
from quiet_base import Training, feed, split
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "PROGRAMS",
    "cropped",
    "explained_share",
    "figure_masks",
    "figures",
    "program",
]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def figure_masks(kind: Tensor, at: Tensor, size: Tensor, side: int) -> Tensor:
    """Return masks `(n, side, side)` of discs, squares, triangles, crosses and rings.

    Args:
        kind: Of each figure, 0 to 4, in the order above.
        at: Row and column of each middle, `(n, 2)`.
        size: Half the width of each, `(n,)`.
        side: Of the picture.
    """
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    p, q = u - at[:, 0, None, None], v - at[:, 1, None, None]
    r = size[:, None, None]
    away, far = (p * p + q * q).sqrt(), torch.maximum(p.abs(), q.abs())
    masks = torch.stack((
        away <= r,
        far <= 0.85 * r,
        (p.abs() <= r) & (q.abs() <= (p + r) / 2),
        (far <= r) & (torch.minimum(p.abs(), q.abs()) <= 0.3 * r),
        (away <= r) & (away >= 0.6 * r),
    ))  # fmt: skip
    return masks[kind, torch.arange(len(kind))]


def figures(n: int, side: int, train: int) -> tuple[Data, Data]:
    """Return colour pictures `(n, 3, side, side)` of one of five figures, standardized.

    Place, size, the colours of figure and ground, and the noise are random.
    """
    kind = torch.randint(5, (n,))
    size = side * (0.22 + 0.1 * torch.rand(n))
    at = size[:, None] + (side - 1 - 2 * size[:, None]) * torch.rand(n, 2)
    mask = figure_masks(kind, at, size, side)[:, None].float()
    ground, colour = 0.4 * torch.rand(n, 3, 1, 1), 0.5 + 0.5 * torch.rand(n, 3, 1, 1)
    x = mask * colour + (1 - mask) * ground + 0.08 * torch.randn(n, 3, side, side)
    mean, std = x[:train].mean((0, 2, 3)), x[:train].std((0, 2, 3))
    return split((x - mean[:, None, None]) / std[:, None, None], kind, train)


def cropped(batch: Data, pad: int = 2) -> Data:
    """Return pictures cropped at random, half of them flipped from side to side."""
    x, y = batch
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    side = x.shape[-1]
    wide = F.pad(x, (pad,) * 4, mode="reflect")
    rows, columns = torch.randint(2 * pad + 1, (2, len(x), 1))
    i = (rows + torch.arange(side))[:, None, :, None]
    j = (columns + torch.arange(side))[:, None, None, :]
    n, c = torch.arange(len(x))[:, None, None, None], torch.arange(3)[:, None, None]
    return wide[n, c[: x.shape[1]], i, j], y


def explained_share(model: nn.Module, data: Data) -> float:
    """Return the share of the targets' variance explained, in eval mode."""
    model.eval()
    with torch.no_grad():
        left = (feed(model, data) - data[1]).square().mean()
    return float(1 - left / (data[1] - data[1].mean(0)).square().mean())
