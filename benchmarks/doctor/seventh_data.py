"""Data of the seventh set: pairs of images, tables, sequences and dials.

Each function gives batches without an end; a number draws them, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from bugs import Batch
from torch.nn import functional as F

__all__ = [
    "brackets",
    "dials",
    "friedman",
    "houses",
    "houses_sold",
    "pairs",
    "sensors",
    "shops",
]


def pairs(
    size: int = 32, seed: int = 0, *, is_in_order: bool = False
) -> Iterator[Batch]:
    """Give two images (N, 2, 12, 12) of one texture, and whether the first is sharp.

    The other one is the mean of two images that are a pixel apart. `is_in_order` puts
    the sharp one first in every pair.
    """
    source = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randn(size, 1, 13, 13, generator=source)
        sharp = F.avg_pool2d(drawn, 3, 1, 1)
        shift = torch.randint(1, 3, (size,), generator=source)
        moved = torch.stack(
            [
                each.roll(int(by), 2 - index % 2)
                for index, (each, by) in enumerate(zip(sharp, shift, strict=True))
            ]
        )
        double = (sharp + moved) / math.sqrt(2)
        x = torch.cat([sharp, double], 1)[:, :, :12, :12] * 3
        x = x + 0.3 * torch.randn(x.shape, generator=source)
        y = torch.ones(size)
        if not is_in_order:
            y = torch.randint(2, (size,), generator=source).float()
            x = torch.where(y[:, None, None, None] > 0, x, x.flip(1))
        yield x, y


def friedman(size: int = 64, seed: int = 0, rows: int = 2048) -> Iterator[Batch]:
    """Give ten uniform columns (N, 10), and the standardized target of Friedman (N, 1).

    The rows are the same in every epoch, in another order.
    """
    source = torch.Generator().manual_seed(77)
    x = torch.rand(rows, 10, generator=source)
    y = 10 * (math.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5) ** 2
    y = y + 10 * x[:, 3] + 5 * x[:, 4] + 0.5 * torch.randn(rows, generator=source)
    x, y = (x - 0.5) * math.sqrt(12), ((y - y.mean()) / y.std())[:, None]
    order = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(rows, generator=order).split(size):
            yield x[part], y[part]


def houses(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give a table of flats (N, 6) in its units, and which of three classes each is.

    Rooms, age in years, area in square metres, distance in metres, income of the
    district and a rating from 0 to 5.
    """
    source = torch.Generator().manual_seed(seed)
    centre = torch.tensor([3.5, 40.0, 80.0, 4000.0, 38000.0, 3.0])
    spread = torch.tensor([1.2, 15.0, 25.0, 1500.0, 9000.0, 0.8])
    while True:
        z = torch.randn(size, 6, generator=source)
        score = z[:, 0] + z[:, 5] * z[:, 1].sign() - 0.7 * z[:, 3] + 0.5 * z[:, 4]
        score = score + 0.2 * torch.randn(size, generator=source)
        yield centre + spread * z, (score > -0.8).long() + (score > 0.8).long()


def sensors(size: int = 64, seed: int = 0, *, missing: float = 0.0) -> Iterator[Batch]:
    """Give eight readings (N, 8) of which one in twelve is absent, and one of four.

    An absent one is given as `missing`.
    """
    source = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(
        torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
    ).Q
    while True:
        hidden = torch.randn(size, 2, generator=source)
        y = (hidden[:, 0] > 0).long() + 2 * (hidden[:, 0] * hidden[:, 1] > 0).long()
        noise = 0.15 * torch.randn(size, 8, generator=source)
        x = torch.cat([hidden] * 4, 1) @ turn + noise
        is_absent = torch.rand(size, 8, generator=source) < 1 / 12
        yield x.masked_fill(is_absent, missing), y


def brackets(size: int = 32, seed: int = 0, length: int = 12) -> Iterator[Batch]:
    """Give tokens (N, length) of 24 words, and the word behind the one word marker."""
    source = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randint(1, 24, (size, length), generator=source)
        place = torch.randint(length - 1, (size,), generator=source)
        rows = torch.arange(size)
        x[rows, place] = 0
        yield x, x[rows, place + 1] % 6


def dials(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give noisy dials (N, 1, 12, 12), and a distribution (N, 16) of their angle."""
    source = torch.Generator().manual_seed(seed)
    grid = torch.arange(12.0) - 5.5
    bins = (torch.arange(16.0) + 0.5) * math.pi / 16
    while True:
        angle = math.pi * torch.rand(size, 1, generator=source)
        dx, dy = angle.cos()[:, :, None], angle.sin()[:, :, None]
        across = (grid[None, None, :] * dy - grid[None, :, None] * dx).abs()
        x = 2.0 * (-(across**2)).exp()
        x = x - 0.6 + 0.4 * torch.randn(x.shape, generator=source)
        gap = (angle - bins).abs()
        gap = torch.minimum(gap, math.pi - gap)
        yield x[:, None], (-((gap / 0.35) ** 2) / 2).softmax(1)


def houses_sold(
    size: int = 64, seed: int = 0, *, has_errors: bool = False
) -> Iterator[Batch]:
    """Give the table of Friedman; `has_errors` takes one target in 100 times 60."""
    source = torch.Generator().manual_seed(seed + 9)
    for x, y in friedman(size, seed):
        is_wrong = torch.rand(y.shape, generator=source) < 0.01
        yield x, torch.where(is_wrong & has_errors, 60 * y, y)


def shops(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give two codes of eight and four numbers (N, 6), and which of three follows."""
    source = torch.Generator().manual_seed(seed)
    table = torch.randn(2, 8, generator=torch.Generator().manual_seed(6))
    while True:
        codes = torch.randint(8, (size, 2), generator=source)
        z = torch.randn(size, 4, generator=source)
        score = table[0, codes[:, 0]] + table[1, codes[:, 1]]
        score = score + 1.5 * z[:, 0] + z[:, 1] * z[:, 2].sign() - z[:, 3]
        score = score + 0.2 * torch.randn(size, generator=source)
        yield torch.cat([codes.float(), z], 1), (score > -1).long() + (score > 1).long()
