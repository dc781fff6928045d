"""Data of the fifth set: drawings, signals, token sequences and tables.

Each function gives batches without an end; a number draws them, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from bugs import Batch
from sklearn.datasets import load_breast_cancer, load_wine
from torch import Tensor

__all__ = ["drawings", "rounds", "sentences", "signals", "table"]


def drawings(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give noisy drawings (N, 1, 16, 16) of a disc or a box, and its pixels."""
    source = torch.Generator().manual_seed(seed)
    grid = torch.arange(16.0)
    while True:
        y0, x0, radius = torch.rand(3, size, 1, 1, generator=source)
        dy = (grid[:, None] - 4 - 8 * y0).abs()
        dx = (grid[None, :] - 4 - 8 * x0).abs()
        radius = 2 + 3 * radius
        is_disc = torch.rand(size, 1, 1, generator=source) < 0.5
        inside = torch.where(is_disc, (dy**2 + dx**2).sqrt(), torch.maximum(dy, dx))
        target = (inside < radius).long()
        noise = 0.7 * torch.randn(target.shape, generator=source)
        yield (target + noise)[:, None], target


def signals(size: int = 32, seed: int = 0, length: int = 64) -> Iterator[Batch]:
    """Give three channels of a vibration (N, 3, length), and which of five it is.

    The classes differ in frequency; phase, amplitude and noise are those of a sample.
    """
    source = torch.Generator().manual_seed(seed)
    time = torch.arange(length) / 64
    turns = 2 * torch.pi * time
    while True:
        y = torch.randint(5, (size,), generator=source)
        rate = 2.0 + 2 * y[:, None, None]
        phase = 6.3 * torch.rand(size, 3, 1, generator=source)
        amplitude = 0.5 + torch.rand(size, 3, 1, generator=source)
        noise = 0.8 * torch.randn(size, 3, length, generator=source)
        yield amplitude * (rate * turns + phase).sin() + noise, y


def sentences(
    size: int = 32, seed: int = 0, *, length: int = 40, longest: int = 12
) -> Iterator[Batch]:
    """Give sequences of 1 to 29 with zeros at their ends, and the sign of their sum.

    A sequence has 4 to `longest` tokens; those above 15 count for, the others against.
    """
    source = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randint(1, 30, (size, length), generator=source)
        count = torch.randint(4, longest + 1, (size, 1), generator=source)
        x[torch.arange(length) >= count] = 0
        score = (x - 15).masked_fill(x == 0, 0).sum(1)
        yield x, (score > 0).long()


def table(name: str, *, is_scaled: bool = True) -> tuple[Tensor, Tensor]:
    """Return the features and classes of the table "cancer" or "wine"."""
    load = {"cancer": load_breast_cancer, "wine": load_wine}[name]
    x, y = load(return_X_y=True)
    rows = torch.tensor(x, dtype=torch.float32)
    if is_scaled:
        rows = (rows - rows.mean(0)) / rows.std(0)
    return rows, torch.tensor(y)


def rounds(x: Tensor, y: Tensor, size: int = 32) -> Iterator[Batch]:
    """Give the rows of a table in batches, in a new order each time."""
    for seed in itertools.count():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        for part in order.split(size):
            if len(part) == size:
                yield x[part], y[part]
