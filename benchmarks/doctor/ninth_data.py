"""Data of the ninth set: machines, cells, signs, houses, particles, ratings and texts.

Each function gives batches without an end; a number draws them, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from bugs import Batch
from torch import Tensor

__all__ = [
    "arms",
    "beats",
    "cameras",
    "cells",
    "houses",
    "jets",
    "machines",
    "mails",
    "ratings",
    "recalls",
    "signs",
    "spots",
    "texts",
]


def _source(seed: int) -> torch.Generator:
    """Return a generator of random numbers with its own seed."""
    return torch.Generator().manual_seed(seed)


def machines(
    size: int = 32, seed: int = 0, *, is_other_plant: bool = False
) -> Iterator[Batch]:
    """Give vibrations of three sensors (N, 3, 48), and which of four faults.

    A fault has its own frequency and phase between the sensors. The sensors of the
    other plant have three times the gain, and an offset.
    """
    source = _source(seed)
    time = torch.arange(48.0)
    while True:
        y = torch.randint(4, (size,), generator=source)
        rate = 0.4 + 0.5 * (y % 2) + 0.03 * torch.randn(size, generator=source)
        phase = 6.3 * torch.rand(size, 1, 1, generator=source)
        lag = torch.arange(3.0)[None, :, None] * (1.0 + 1.2 * (y // 2))[:, None, None]
        x = (rate[:, None, None] * time + phase + lag).sin()
        x = x + 0.6 * torch.randn(x.shape, generator=source)
        yield (3.0 * x + 4.0 if is_other_plant else x), y


def cells(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give images of a microscope (N, 1, 16, 16), and the pixels of cells.

    Images have from no cell to six cells, and differ in exposure.
    """
    source = _source(seed)
    grid = torch.arange(16.0)
    while True:
        count = torch.randint(7, (size, 1, 1), generator=source)
        inside = torch.zeros(size, 16, 16, dtype=torch.bool)
        for index in range(6):
            y0, x0 = 16 * torch.rand(2, size, 1, 1, generator=source)
            radius = 2 + 2 * torch.rand(size, 1, 1, generator=source)
            far = ((grid[:, None] - y0) ** 2 + (grid - x0) ** 2).sqrt()
            inside |= (far < radius) & (index < count)
        light = (0.6 * torch.randn(size, 1, 1, generator=source)).exp()
        x = 0.5 + inside + 0.3 * torch.randn(size, 16, 16, generator=source)
        yield (light * x)[:, None], inside.long()


def _shapes(y: Tensor, source: torch.Generator) -> Tensor:
    """Draw a disc, ring, square, cross, diagonal or bar (N, 12, 12) at a place."""
    grid = torch.arange(12.0) - 5.5
    shift = torch.rand(2, len(y), 1, 1, generator=source) * 3 - 1.5
    v, h = grid[:, None] - shift[0], grid - shift[1]
    v, h = torch.broadcast_tensors(v, h)
    far = (v**2 + h**2).sqrt()
    box = torch.maximum(v.abs(), h.abs())
    all_of = torch.stack(
        [
            far < 3.2,
            (far < 4.2) & (far > 2.6),
            (box < 4.2) & (box > 2.8),
            (torch.minimum(v.abs(), h.abs()) < 1) & (box < 4.2),
            ((v - h).abs() < 1.6) & (box < 4.2),
            (v.abs() < 1.6) & (h.abs() < 4.2),
        ]
    )
    return all_of[y, torch.arange(len(y))].float()


def signs(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give colour images (N, 3, 12, 12) of signs, and which of six shapes."""
    source = _source(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        colour = 0.8 + 0.8 * torch.rand(size, 3, 1, 1, generator=source)
        x = 1.5 * colour * _shapes(y, source)[:, None]
        yield x - 0.4 + 0.5 * torch.randn(x.shape, generator=source), y


def cameras(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give a visible and a thermal image (N, 2, 12, 12) of two signs, and both kinds.

    There are nine pairs of kinds; thermal images are bright and have little contrast.
    """
    source = _source(seed)
    while True:
        y = torch.randint(3, (2, size), generator=source)
        visible = 1.5 * _shapes(y[0], source)
        visible = visible + 0.3 * torch.randn(visible.shape, generator=source)
        thermal = 5.0 - 0.6 * _shapes(y[1], source)
        thermal = thermal + 0.12 * torch.randn(thermal.shape, generator=source)
        yield torch.stack([visible, thermal], 1), 3 * y[0] + y[1]


def houses(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give ten scaled columns of houses (N, 10), and the scaled price (N, 1)."""
    source = _source(seed)
    while True:
        x = torch.randn(size, 10, generator=source)
        price = x[:, 0] + 0.8 * x[:, 1] * x[:, 2] + (1.5 * x[:, 3]).sin()
        price = price + 0.7 * x[:, 4].abs() - 0.5 * x[:, 5] + 0.4 * x[:, 6] * x[:, 0]
        price = (price - 0.56) / 1.9
        yield x, (price + 0.1 * torch.randn(size, generator=source))[:, None]


def spots(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give images (N, 1, 16, 16) of rings and discs, and maps with the rings' centres.

    A centre is three pixels wide; three rings and two discs are in an image.
    """
    source = _source(seed)
    grid = torch.arange(16.0)
    while True:
        x, y = torch.zeros(size, 16, 16), torch.zeros(size, 16, 16)
        for index in range(5):
            v, h = 2 + 12 * torch.rand(2, size, 1, 1, generator=source)
            far = ((grid[:, None] - v) ** 2 + (grid - h) ** 2).sqrt()
            x = torch.maximum(x, (far < 2.6).float())
            if index < 3:
                x = torch.where(far < 1.4, 0.0, x)
                y = torch.maximum(y, (far < 1.4).float())
        x = 2 * x - 0.8 + 0.2 * torch.randn(x.shape, generator=source)
        yield x[:, None], y[:, None]


def jets(
    size: int = 32, seed: int = 0, *, length: int | None = None
) -> Iterator[Batch]:
    """Give particles (N, P, 4) of jets, with zeros behind the last, and their kind.

    Kinds differ in the spread of the particles. A batch has jets of about one length,
    from 8 to 30; `length` takes jets of all lengths, and pads them all to it.
    """
    source = _source(seed)
    while True:
        middle = torch.randint(10, 29, (1,), generator=source)
        counts = middle + torch.randint(-2, 3, (size,), generator=source)
        if length is not None:
            counts = torch.randint(8, 31, (size,), generator=source)
        steps = int(counts.max()) if length is None else length
        y = torch.randint(4, (size,), generator=source)
        wide = (0.4 * 1.8**y)[:, None, None]
        x = torch.randn(size, steps, 4, generator=source)
        x = torch.cat([wide * x[:, :, :2], 2.0 + 0.5 * x[:, :, 2:]], 2)
        is_over = torch.arange(steps) >= counts[:, None]
        yield x.masked_fill(is_over[:, :, None], 0.0), y


def beats(size: int = 32, seed: int = 0, *, lows: float = 0.6) -> Iterator[Batch]:
    """Give windows of a heart's signal (N, 1, 64), and which of four kinds.

    Two kinds have low waves, of `lows` of the height, two are narrow.
    """
    source = _source(seed)
    time = torch.arange(64.0)
    while True:
        y = torch.randint(4, (size,), generator=source)
        start = 16 * torch.rand(size, 1, generator=source)
        wide = (1.2 + 1.6 * (y // 2))[:, None]
        x = torch.zeros(size, 64)
        for beat in range(3):
            x = x + (-(((time - start - 20 * beat) / wide) ** 2)).exp()
        high = 1.0 - (1.0 - lows) * (y % 2)
        high = high * (0.9 + 0.2 * torch.rand(size, generator=source))
        x = 2 * high[:, None] * x
        scale = 0.2 * high[:, None]
        yield (x + scale * torch.randn(x.shape, generator=source))[:, None], y


def ratings(size: int = 128, seed: int = 0) -> Iterator[Batch]:
    """Give users of 60 and films of 50 (N, 2), and the scaled rating (N, 1)."""
    fixed = _source(21)
    user = torch.randn(60, 4, generator=fixed)
    film = torch.randn(50, 4, generator=fixed)
    source = _source(seed)
    while True:
        u = torch.randint(60, (size,), generator=source)
        f = torch.randint(50, (size,), generator=source)
        score = (user[u] * film[f]).sum(1) / 2
        score = score + 0.1 * torch.randn(size, generator=source)
        yield torch.stack([u, f], 1), score[:, None]


def arms(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give three angles and three speeds of an arm (N, 6), and its torques (N, 2)."""
    source = _source(seed)
    while True:
        x = torch.randn(size, 6, generator=source)
        a, v = x[:, :3], x[:, 3:]
        one = (a[:, 0] + a[:, 1]).sin() + 0.5 * v[:, 0] * a[:, 2].cos()
        two = a[:, 1].cos() * v[:, 1] + 0.5 * a[:, 2] + 0.3 * v[:, 2]
        y = torch.stack([one, two], 1)
        yield x, y + 0.05 * torch.randn(size, 2, generator=source)


def mails(size: int = 64, seed: int = 0, *, low: float = 0.0) -> Iterator[Batch]:
    """Give twelve counts of words (N, 12), and whether a mail is spam: `low`, or 1.

    The groups overlap.
    """
    source = _source(seed)
    while True:
        x = torch.randn(size, 12, generator=source)
        score = x[:, :3].sum(1) + x[:, 3] * x[:, 4] - 0.6 * x[:, 5].abs() + 0.5
        score = score + 0.7 * torch.randn(size, generator=source)
        yield x, torch.where(score > 0, 1.0, low)[:, None]


def recalls(size: int = 32, seed: int = 0, length: int = 20) -> Iterator[Batch]:
    """Give sequences (N, length, 5), and which of four signals was the first one.

    All steps behind the first have noise in their fifth column.
    """
    source = _source(seed)
    while True:
        y = torch.randint(4, (size,), generator=source)
        x = torch.zeros(size, length, 5)
        x[torch.arange(size), 0, y] = 1.0
        x[:, 1:, 4] = 0.5 * torch.randn(size, length - 1, generator=source)
        yield x, y


def texts(size: int = 32, seed: int = 0, length: int = 16) -> Iterator[Batch]:
    """Give words (N, length) of 40, and which of three groups has the most words."""
    source = _source(seed)
    while True:
        y = torch.randint(3, (size,), generator=source)
        x = torch.randint(40, (size, length), generator=source)
        own = 3 * torch.randint(13, (size, length), generator=source) + y[:, None]
        mine = torch.rand(size, length, generator=source) < math.sqrt(0.2)
        yield torch.where(mine, own, x), y
