"""Common parts of the healthy programs of frank_runs.py: register, letters, scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from calm_base import Data
from gentle_base import outputs
from quiet_base import Training, shuffled, split
from torch import Tensor, nn, optim
from torch.nn import functional as F

__all__ = ["PROGRAMS", "letter_masks", "letters", "outputs", "pretrained", "program"]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


# Row and column of both ends of the strokes of L, T, X, H, Z and V; three each.
_STROKES = torch.tensor([
    [[0, 0, 1, 0], [1, 0, 1, 1], [1, 0, 1, 1]],
    [[0, 0, 0, 1], [0, 0.5, 1, 0.5], [0, 0.5, 1, 0.5]],
    [[0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 1, 0]],
    [[0, 0, 1, 0], [0, 1, 1, 1], [0.5, 0, 0.5, 1]],
    [[0, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 1]],
    [[0, 0, 1, 0.5], [1, 0.5, 0, 1], [1, 0.5, 0, 1]],
])  # fmt: skip


def letter_masks(kind: Tensor, at: Tensor, size: Tensor, side: int) -> Tensor:
    """Return soft masks `(n, side, side)` of the letters L, T, X, H, Z and V.

    Args:
        kind: Of each letter, 0 to 5, in the order above.
        at: Row and column of each middle, `(n, 2)`.
        size: Height and width of each, `(n,)`.
        side: Of the picture.
    """
    turn = 0.15 * torch.randn(len(kind))[:, None, None]
    ends = (_STROKES[kind].reshape(-1, 6, 2) - 0.5) * size[:, None, None]
    row, column = ends[..., :1], ends[..., 1:]
    ends = torch.cat((
        row * turn.cos() - column * turn.sin(), row * turn.sin() + column * turn.cos()
    ), 2)  # fmt: skip
    first, last = (ends + at[:, None]).reshape(-1, 3, 2, 2).unbind(2)
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack((u, v), 2).flatten(0, 1).float()
    along = (last - first)[:, :, None]
    apart = place - first[:, :, None]
    share = (apart * along).sum(3) / along.square().sum(3)
    away = (apart - share.clamp(0, 1)[..., None] * along).norm(dim=3).amin(1)
    return (4 * (1 - away)).sigmoid().reshape(-1, side, side)


def letters(n: int, side: int, train: int) -> tuple[Data, Data]:
    """Return colour pictures `(n, 3, side, side)` of six letters, standardized.

    Place, size, turn, the colours of letter and ground, and the noise are random.
    """
    kind = torch.randint(6, (n,))
    size = side * (0.45 + 0.2 * torch.rand(n))
    room = (side - 2 - size)[:, None]
    at = size[:, None] / 2 + 0.5 + room * torch.rand(n, 2)
    mask = letter_masks(kind, at, size, side)[:, None]
    ground, colour = 0.4 * torch.rand(n, 3, 1, 1), 0.6 + 0.4 * torch.rand(n, 3, 1, 1)
    x = mask * colour + (1 - mask) * ground + 0.15 * torch.randn(n, 3, side, side)
    mean, std = x[:train].mean((0, 2, 3)), x[:train].std((0, 2, 3))
    return split((x - mean[:, None, None]) / std[:, None, None], kind, train)


def pretrained(
    model: nn.Module, train: Data, *, size: int, epochs: int, rate: float
) -> nn.Module:
    """Return the classifier after some epochs of Adam, cosine to 0."""
    optimizer = optim.Adam(model.parameters(), rate)
    steps = epochs * (len(train[1]) // size)
    fall = optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for x, y in shuffled(train, size):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            fall.step()
    return model
