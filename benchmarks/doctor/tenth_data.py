"""Data of the tenth set: movements, drawings, scenes, tables, graphs and texts.

Each function gives batches without an end; a number draws them, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bugs import Batch
from torch import Tensor

__all__ = [
    "clicks",
    "drawings",
    "events",
    "genes",
    "hands",
    "loans",
    "molecules",
    "movements",
    "orders",
    "plants",
    "prices",
    "scenes",
    "sentences",
    "tissues",
    "vessels",
    "yields",
]


def _source(seed: int) -> torch.Generator:
    """Return a generator of random numbers with its own seed."""
    return torch.Generator().manual_seed(seed)


def movements(
    size: int = 32, seed: int = 0, *, is_one_each: bool = False
) -> Iterator[Batch]:
    """Give accelerations (N, 3, 48), and which of four: slow or fast, weak or strong.

    All windows of a batch are of one movement where `is_one_each` holds.
    """
    source = _source(seed)
    time = torch.arange(48.0)
    while True:
        y = torch.randint(4, (size,), generator=source)
        if is_one_each:
            y[:] = y[0]
        rate = 0.35 + 0.35 * (y % 2) + 0.03 * torch.randn(size, generator=source)
        high = 0.6 + 0.8 * (y // 2) + 0.1 * torch.randn(size, generator=source)
        phase = 6.3 * torch.rand(size, 1, 1, generator=source)
        lag = torch.arange(3.0)[None, :, None]
        x = high[:, None, None] * (rate[:, None, None] * time + phase + lag).sin()
        yield x + 0.2 * torch.randn(x.shape, generator=source), y


def _drawn(y: Tensor, v0: Tensor, h0: Tensor, side: int) -> Tensor:
    """Draw one of six figures (N, side, side), nine pixels wide, at its centre."""
    grid = torch.arange(float(side))
    v, h = torch.broadcast_tensors(
        grid[:, None] - v0[:, None, None], grid - h0[:, None, None]
    )
    far = (v**2 + h**2).sqrt()
    is_in = torch.maximum(v.abs(), h.abs()) < 4.2
    all_of = torch.stack(
        [
            far < 3.2,
            (far < 4.2) & (far > 2.4),
            ((v.abs() < 1) | (h.abs() < 1)) & is_in,
            (((v - h).abs() < 1.2) | ((v + h).abs() < 1.2)) & is_in,
            (v.abs() > 1.6) & (v.abs() < 3.6) & is_in,
            (h.abs() > 1.6) & (h.abs() < 3.6) & is_in,
        ]
    )
    return all_of[y, torch.arange(len(y))].float()


def drawings(
    size: int = 32, seed: int = 0, *, kinds: int = 6, is_dark: bool = False
) -> Iterator[Batch]:
    """Give colour images (N, 3, 14, 14) of figures, and which of six.

    `is_dark` gives dark figures on bright paper, in other light for each image.
    """
    source = _source(seed)
    while True:
        y = torch.randint(kinds, (size,), generator=source)
        v0, h0 = 5 + 3 * torch.rand(2, size, generator=source)
        colour = 0.7 + 0.8 * torch.rand(size, 3, 1, 1, generator=source)
        x = 1.6 * colour * _drawn(y, v0, h0, 14)[:, None] - 0.5
        x = x + 0.4 * torch.randn(x.shape, generator=source)
        if is_dark:
            light = 1 + torch.rand(size, 1, 1, 1, generator=source)
            x = light * (0.5 - x)
        yield x, y


def scenes(size: int = 32, seed: int = 0, *, is_crop: bool = False) -> Iterator[Batch]:
    """Give images (N, 1, 24, 24) of a figure in a field, or crops of 12 around it."""
    source = _source(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        v0, h0 = 6 + 12 * torch.rand(2, size, generator=source)
        x = 2.0 * _drawn(y, v0, h0, 24) - 0.4
        x = x + 0.4 * torch.randn(x.shape, generator=source)
        if is_crop:
            jitter = torch.randint(-1, 2, (2, size), generator=source)
            top = (v0.round().long() - 6 + jitter[0]).clamp(0, 12)
            left = (h0.round().long() - 6 + jitter[1]).clamp(0, 12)
            span = torch.arange(12)
            rows, columns = top[:, None] + span, left[:, None] + span
            first = torch.arange(size)[:, None, None]
            x = x[first, rows[:, :, None], columns[:, None, :]]
        yield x[:, None], y


def tissues(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give images (N, 1, 16, 16) of tissue, and which of three kinds each pixel is."""
    source = _source(seed)
    grid = torch.arange(16.0)
    stripes = (1.6 * (grid[:, None] + grid)).sin()
    while True:
        y = torch.zeros(size, 16, 16, dtype=torch.long)
        for kind in (1, 2, 1, 2):
            v0, h0 = 16 * torch.rand(2, size, 1, 1, generator=source)
            far = ((grid[:, None] - v0) ** 2 + (grid - h0) ** 2).sqrt()
            y[far < 3.5] = kind
        x = 2.0 + 1.5 * (y == 1) + 1.2 * stripes * (y == 2)
        x = x + 0.4 * torch.randn(x.shape, generator=source)
        yield ((x - 2.4) / 1.0)[:, None], y


def vessels(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give images (N, 1, 16, 16) of thin vessels beside discs, and the vessels."""
    source = _source(seed)
    grid = torch.arange(16.0)
    while True:
        x, y = torch.zeros(size, 16, 16), torch.zeros(size, 16, 16)
        for _ in range(2):
            v0, h0 = 16 * torch.rand(2, size, 1, 1, generator=source)
            far = ((grid[:, None] - v0) ** 2 + (grid - h0) ** 2).sqrt()
            x = torch.maximum(x, (far < 2.8).float())
        angle = 3.15 * torch.rand(size, 1, 1, generator=source)
        v0, h0 = 5 + 6 * torch.rand(2, size, 1, 1, generator=source)
        off = (grid[:, None] - v0) * angle.cos() + (grid - h0) * angle.sin()
        y = (off.abs() < 0.9).float()
        x = 2.0 * torch.maximum(x, y) - 0.5
        yield (x + 0.3 * torch.randn(x.shape, generator=source))[:, None], y[:, None]


def loans(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give eight scaled columns and two codes of ten (N, 10), and which of three."""
    fixed = _source(31)
    level = torch.randn(2, 10, 3, generator=fixed)
    weight = torch.randn(8, 3, generator=fixed)
    source = _source(seed)
    while True:
        x = torch.randn(size, 8, generator=source)
        codes = torch.randint(10, (size, 2), generator=source)
        score = x @ weight + 2 * (level[0][codes[:, 0]] + level[1][codes[:, 1]])
        score = score + 1.5 * (x[:, :3] * x[:, 3:6])
        score = score + 0.2 * torch.randn(score.shape, generator=source)
        yield torch.cat([x, codes.float()], 1), score.argmax(1)


def yields(size: int = 40, seed: int = 0) -> Iterator[Batch]:
    """Give nine scaled columns of a field (N, 9), and its scaled yield (N, 1)."""
    source = _source(seed)
    while True:
        x = torch.randn(size, 9, generator=source)
        y = x[:, 0] * x[:, 1] + (2 * x[:, 2]).sin() + 0.8 * x[:, 3]
        y = y + x[:, 4].relu() - 0.6 * x[:, 5].abs() + 0.4 * x[:, 6] * x[:, 7]
        y = y + 0.1 * torch.randn(size, generator=source)
        yield x, (y / 1.8)[:, None]


def plants(
    size: int = 32, seed: int = 0, *, site: int | None = None
) -> Iterator[Batch]:
    """Give twelve measures of a plant at one of three sites (N, 12), and its kind.

    Sites differ in the level of all measures; `site` gives the plants of one.
    """
    fixed = _source(17)
    level = 4.0 * torch.randn(3, 12, generator=fixed)
    kind = torch.randn(5, 12, generator=fixed)
    source = _source(seed)
    while True:
        y = torch.randint(5, (size,), generator=source)
        where = torch.randint(3, (size,), generator=source)
        if site is not None:
            where[:] = site
        x = kind[y] + level[where] + 0.6 * torch.randn(size, 12, generator=source)
        yield x / 3.5, y


def molecules(
    size: int = 32, seed: int = 0, *, places: int | None = None
) -> Iterator[Any]:
    """Give nodes (N, P, 6) and bonds (N, P, P) of molecules, and which of three.

    A batch has molecules of about one size, from 8 to 28; `places` takes all sizes and
    pads them to it. Kinds differ in how many bonds an atom has.
    """
    source = _source(seed)
    while True:
        middle = int(torch.randint(10, 27, (1,), generator=source))
        counts = middle + torch.randint(-2, 3, (size,), generator=source)
        if places is not None:
            counts = torch.randint(8, 29, (size,), generator=source)
        steps = int(counts.max()) if places is None else places
        y = torch.randint(3, (size,), generator=source)
        is_real = torch.arange(steps) < counts[:, None]
        sort = torch.randint(6, (size, steps), generator=source)
        nodes = torch.eye(6)[sort] * is_real[:, :, None]
        share = torch.tensor([1.2, 2.4, 4.8])[y] / counts
        drawn = torch.rand(size, steps, steps, generator=source) < share[:, None, None]
        bonds = drawn.triu(1).float()
        bonds = (bonds + bonds.mT) * is_real[:, :, None] * is_real[:, None]
        yield {"nodes": nodes, "bonds": bonds}, y


def orders(size: int = 32, seed: int = 0, length: int = 12) -> Iterator[Batch]:
    """Give words (N, length) of 20, and which of four groups has the most words."""
    source = _source(seed)
    while True:
        y = torch.randint(4, (size,), generator=source)
        x = torch.randint(20, (size, length), generator=source)
        own = 4 * torch.randint(5, (size, length), generator=source) + y[:, None]
        is_own = torch.rand(size, length, generator=source) < 0.5
        yield torch.where(is_own, own, x), y


def clicks(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give a person and an article (N, 24), and whether it was read (N, 1)."""
    fixed = _source(5)
    one, two = torch.randn(2, 12, 3, generator=fixed) / 12**0.5
    source = _source(seed)
    while True:
        x = torch.randn(size, 24, generator=source)
        match = 3 * ((x[:, :12] @ one) * (x[:, 12:] @ two)).sum(1)
        match = match + 0.3 * torch.randn(size, generator=source)
        yield x, (match > 0).float()[:, None]


def prices(
    size: int = 32, seed: int = 0, *, is_raw: bool = False, length: int = 16
) -> Iterator[Batch]:
    """Give prices and volumes of days (N, length, 2), and the scaled next price.

    Prices are about 180 and volumes about 5000, or both are scaled.
    """
    source = _source(seed)
    while True:
        a, b = torch.randn(2, size, generator=source)
        phase = 6.3 * torch.rand(size, 1, generator=source)
        days = torch.arange(length + 1.0)
        price = a[:, None] + 0.8 * (0.5 * days + phase).sin()
        volume = b[:, None] + 0.3 * torch.randn(size, length, generator=source)
        y = (price[:, -1] + 0.5 * volume[:, -4:].mean(1)) / 1.3
        price = price[:, :-1] + 0.05 * torch.randn(size, length, generator=source)
        x = torch.stack([price, volume], 2)
        if is_raw:
            x = x * torch.tensor([20.0, 900.0]) + torch.tensor([180.0, 5000.0])
        yield x, y[:, None]


def hands(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give images (N, 1, 16, 16) of a disc and a ring, and both centres (N, 4)."""
    source = _source(seed)
    grid = torch.arange(16.0)
    while True:
        place = 2 + 12 * torch.rand(4, size, generator=source)
        x = torch.zeros(size, 16, 16)
        for index in range(2):
            v0, h0 = (
                place[2 * index, :, None, None],
                place[2 * index + 1, :, None, None],
            )
            far = ((grid[:, None] - v0) ** 2 + (grid - h0) ** 2).sqrt()
            part = far < 2 if index == 0 else (far < 3.2) & (far > 1.8)
            x = torch.maximum(x, part.float())
        x = 2 * x - 0.3 + 0.2 * torch.randn(x.shape, generator=source)
        yield x[:, None], ((place - 8) / 3.5).T


def genes(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give sixty scaled columns (N, 60), and which of three; nine columns matter."""
    source = _source(seed)
    while True:
        x = torch.randn(size, 60, generator=source)
        score = x[:, :3] + x[:, 3:6] + 0.7 * x[:, 6:9]
        score = score + 0.4 * torch.randn(size, 3, generator=source)
        yield x, score.argmax(1)


def sentences(size: int = 32, seed: int = 0, length: int = 20) -> Iterator[Batch]:
    """Give letters (N, length) of 30, and which of four pairs of letters is in it."""
    source = _source(seed)
    rows = torch.arange(size)
    while True:
        y = torch.randint(4, (size,), generator=source)
        x = torch.randint(30, (size, length), generator=source)
        for _ in range(2):
            at = torch.randint(length - 1, (size,), generator=source)
            x[rows, at], x[rows, at + 1] = y % 2, 2 + y // 2
        yield x, y


def events(
    size: int = 32, seed: int = 0, *, is_new: bool = False, length: int = 14
) -> Iterator[Batch]:
    """Give five counters over time (N, length, 5), and which of five fails.

    Counters of the new machine have other places, and its failures are weaker.
    """
    source = _source(seed)
    rows = torch.arange(size)
    while True:
        y = torch.randint(5, (size,), generator=source)
        x = 0.6 * torch.randn(size, length, 5, generator=source)
        at = torch.randint(2, length - 4, (size,), generator=source)
        column = (2 * y + 1) % 5 if is_new else y
        for step in range(3):
            x[rows, at + step, column] += 1.5 if is_new else 1.8
        yield x, y
