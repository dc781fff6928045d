"""Data of the twelfth set: images, volumes, clouds, series, tables and ratings.

Each function gives batches without an end; a number draws them, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from bugs import Batch, digits
from torch import Tensor

__all__ = [
    "blurred",
    "clouds",
    "curves",
    "flagged",
    "frames",
    "grey",
    "hearts",
    "marks",
    "ratings",
    "rows",
    "sensors",
    "signals",
    "volumes",
    "written",
]


def _source(seed: int) -> torch.Generator:
    """Return a generator of random numbers with its own seed."""
    return torch.Generator().manual_seed(seed)


def _placed(x: Tensor, shapes: Tensor, source: torch.Generator) -> None:
    """Add a shape (N, s, s) to each image (N, 1, S, S), at any place."""
    side, room = shapes.shape[-1], x.shape[-1] - shapes.shape[-1] + 1
    at = torch.randint(room, (len(x), 2), generator=source)
    one = torch.arange(side)
    v = at[:, :1, None] + one[:, None]
    h = at[:, 1:, None] + one
    x[torch.arange(len(x))[:, None, None], 0, v, h] += shapes


def marks(
    size: int = 32,
    seed: int = 0,
    *,
    noise: float = 0.3,
    added: float = 0.0,
    kinds: int = 8,
    look: int = 21,
) -> Iterator[Batch]:
    """Give images (N, 1, 14, 14) of one of some marks; `added` is noise of training."""
    shapes = torch.randn(kinds, 5, 5, generator=_source(look))
    source, other = _source(seed), _source(seed + 1000)
    while True:
        y = torch.randint(kinds, (size,), generator=source)
        x = noise * torch.randn(size, 1, 14, 14, generator=source)
        _placed(x, shapes[y], source)
        yield x + added * torch.randn(x.shape, generator=other), y


def grey(
    size: int = 32, seed: int = 0, *, kinds: int = 6, look: int = 5
) -> Iterator[Batch]:
    """Give photographs (N, 1, 14, 14) of levels from 0 to 1, most of them bright."""
    for x, y in marks(size, seed, noise=0.3, kinds=kinds, look=look):
        yield (0.55 + 0.12 * x).clamp(0, 1), y


def frames(size: int = 8, seed: int = 0, *, in_order: bool = False) -> Iterator[Batch]:
    """Give colour frames (N, 3, 10, 10) of five places; in order, a batch is of one."""
    tones = 0.8 * torch.randn(5, 3, generator=_source(8))
    textures = torch.randn(5, 3, 10, 10, generator=_source(9))
    source = _source(seed)
    while True:
        y = torch.randint(5, (size,), generator=source)
        if in_order:
            y[:] = y[0]
        x = tones[y][:, :, None, None] + 0.35 * textures[y]
        yield x + torch.randn(size, 3, 10, 10, generator=source), y


def blurred(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give dark, noisy images (N, 1, 12, 12), and the clean ones."""
    source = _source(seed)
    line = torch.linspace(-1, 1, 12)
    while True:
        a = torch.randn(size, 4, 1, 1, generator=source)
        waves = torch.sin(3 * a[:, 0] * line + 2 * a[:, 1] * line[:, None])
        y = (a[:, 2] + waves + 0.5 * a[:, 3] * line)[:, None]
        noise = torch.randn(size, 1, 12, 12, generator=source)
        yield 0.3 * y - 0.5 + 0.1 * noise, y


def volumes(size: int = 2, seed: int = 0) -> Iterator[Batch]:
    """Give scans (N, 1, 8, 8, 8) of four tissues, each of its own strength."""
    shapes = torch.randn(4, 4, 4, 4, generator=_source(31))
    source = _source(seed)
    while True:
        y = torch.randint(4, (size,), generator=source)
        x = 0.5 * torch.randn(size, 1, 8, 8, 8, generator=source)
        for one, kind in zip(x, y.tolist(), strict=True):
            u, v, w = torch.randint(1, 4, (3,), generator=source).tolist()
            one[0, u : u + 4, v : v + 4, w : w + 4] += shapes[kind]
        yield x, y


def clouds(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give clouds of points (N, 3, 32) on ellipsoids, and their three axes (N, 3).

    An epoch has ten batches, and what is left: one of an eighth of their size.
    """
    source = _source(seed)
    for step in itertools.count(1):
        n = size if step % 11 else size // 8
        axes = 0.6 + torch.rand(n, 3, generator=source)
        x = torch.randn(n, 3, 32, generator=source)
        x = x / x.norm(dim=1, keepdim=True) * axes[:, :, None]
        yield x + 0.03 * torch.randn(x.shape, generator=source), 3 * (axes - 1.1)


def sensors(
    size: int = 32, seed: int = 0, *, with_gaps: bool = False
) -> Iterator[Batch]:
    """Give ten measures of a machine (N, 10) and its state; some batches have a gap."""
    centres = torch.randn(6, 10, generator=_source(41))
    source = _source(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        x = centres[y] + 0.7 * torch.randn(size, 10, generator=source)
        if float(torch.rand(1, generator=source)) < 0.1 and with_gaps:
            x[0, 3] = float("nan")
        yield x, y


def hearts(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give traces (N, 2, 48), and how fast and how strongly they beat (N, 1)."""
    source, t = _source(seed), torch.arange(48.0)
    while True:
        rate, strength, phase = torch.rand(3, size, 1, generator=source)
        wave = (0.5 + strength) * ((0.2 + 0.5 * rate) * t + 6.28 * phase).sin()
        x = torch.stack([wave, wave.abs()], 1)
        x = x + 0.2 * torch.randn(size, 2, 48, generator=source)
        yield x, 2 * (rate + strength - 1)


def signals(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give radio signals (N, 2, 40) of one of ten modulations."""
    shapes = torch.randn(10, 2, 12, generator=_source(51))
    source = _source(seed)
    while True:
        y = torch.randint(10, (size,), generator=source)
        x = 0.8 * torch.randn(size, 2, 40, generator=source)
        at = torch.randint(29, (size, 1, 1), generator=source) + torch.arange(12)
        yield x.scatter_add(2, at.expand(-1, 2, -1), shapes[y]), y


def flagged(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give twelve tokens (N, 12) and the sum, modulo six, of the two that are flagged.

    A token is a number from 0 to 5, and is six more where it is flagged.
    """
    source = _source(seed)
    while True:
        x = torch.randint(6, (size, 12), generator=source)
        at = torch.rand(size, 12, generator=source).topk(2).indices
        y = x.gather(1, at).sum(1) % 6
        yield x.scatter_add(1, at, torch.full_like(at, 6)), y


def rows(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give digits as sequences of parts of rows (N, 16, 4), epoch after epoch."""
    for epoch in itertools.count(seed):
        for x, y in digits(size, epoch):
            yield x.reshape(-1, 16, 4), y


def written(size: int = 32, seed: int = 0, *, turned: bool = False) -> Iterator[Batch]:
    """Give digits (N, 64), or digits that are turned by a quarter and negative."""
    for epoch in itertools.count(seed):
        for x, y in digits(size, epoch):
            if turned:
                x = -x.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
            yield x, y


def curves(size: int = 32, seed: int = 0, *, is_scaled: bool = True) -> Iterator[Batch]:
    """Give the powers of a number from 0 to 10 (N, 5), and a curve over it (N, 1)."""
    powers, source = torch.arange(1, 6), _source(seed)
    some = (10 * torch.rand(4096, 1, generator=_source(61))) ** powers
    while True:
        x = 10 * torch.rand(size, 1, generator=source)
        y = x.sin() + 0.2 * x - 1 + 0.05 * torch.randn(size, 1, generator=source)
        table = x**powers
        yield (table - some.mean(0)) / some.std(0) if is_scaled else table, y


def ratings(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give a reader and a book (N, 2), and how much it was liked (N, 1)."""
    readers = torch.randn(60, 3, generator=_source(71))
    books = torch.randn(40, 3, generator=_source(72))
    source = _source(seed)
    while True:
        who = torch.randint(60, (size,), generator=source)
        what = torch.randint(40, (size,), generator=source)
        y = (readers[who] * books[what]).sum(1, keepdim=True) / 3**0.5
        yield (
            torch.stack([who, what], 1),
            y + 0.1 * torch.randn(y.shape, generator=source),
        )
