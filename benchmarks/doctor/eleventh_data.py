"""Data of the eleventh set: tables, images, series and texts of courses.

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
    "blocks",
    "chirps",
    "concretes",
    "deliveries",
    "engines",
    "flats",
    "glyphs",
    "leaves",
    "loads",
    "memories",
    "names",
    "objects",
    "pulses",
    "reviews",
    "rooms",
    "steps",
    "strokes",
    "wards",
]


def _source(seed: int) -> torch.Generator:
    """Return a generator of random numbers with its own seed."""
    return torch.Generator().manual_seed(seed)


def _patches(kinds: int, side: int, seed: int) -> Tensor:
    """Return one pattern per class (kinds, side, side), of spread one."""
    return torch.randn(kinds, side, side, generator=_source(seed))


def _places(at: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return indices of rows, lines and columns of a square at each place."""
    rows = torch.arange(len(at))[:, None, None]
    v = at[:, :1, None] + torch.arange(side)[:, None]
    return rows, v, at[:, 1:, None] + torch.arange(side)


def strokes(size: int = 32, seed: int = 0, noise: float = 0.5) -> Iterator[Batch]:
    """Give images (N, 1, 12, 12) of one of six patterns, at any place."""
    shapes, source = _patches(6, 5, 11), _source(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        x = noise * torch.randn(size, 1, 12, 12, generator=source)
        at = torch.randint(8, (size, 2), generator=source)
        rows, v, h = _places(at, 5)
        x[rows, 0, v, h] += shapes[y]
        yield x, y


def leaves(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give twelve scaled measures of a leaf (N, 12), and which of five plants."""
    centres = torch.randn(5, 12, generator=_source(3))
    mixing = torch.randn(12, 12, generator=_source(4)) / 12**0.5
    source = _source(seed)
    while True:
        y = torch.randint(5, (size,), generator=source)
        x = 1.1 * centres[y] + torch.randn(size, 12, generator=source)
        yield (x @ mixing + 0.5 * x).tanh() * 1.5, y


def wards(
    size: int = 32, seed: int = 0, *, by_ward: bool = False, wards: int = 4
) -> Iterator[Batch]:
    """Give ten values of a patient (N, 10), and which of three findings.

    Each ward has a device of its own, with other places and scales. With `by_ward`, the
    first part of a batch is of the first ward, and so on.
    """
    fixed = _source(6)
    centres = 1.6 * torch.randn(3, 10, generator=fixed)
    place = 2.0 * torch.randn(wards, 10, generator=fixed)
    scale = torch.tensor([0.5, 1.0, 1.6, 2.4])[:wards, None]
    source = _source(seed)
    while True:
        y = torch.randint(3, (size,), generator=source)
        ward = torch.randint(wards, (size,), generator=source)
        if by_ward:
            ward = torch.arange(wards).repeat_interleave(size // wards)
        x = centres[y] + 0.7 * torch.randn(size, 10, generator=source)
        yield torch.cat([x * scale[ward] + place[ward], ward[:, None] / 2], 1), y


def deliveries(
    size: int = 32,
    seed: int = 0,
    lengths: tuple[int, ...] = tuple(range(4, 29)),
    *,
    is_bucketed: bool = False,
    is_sorted: bool = False,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give stops of a tour (N, 28, 3), and the scaled time that it takes.

    With `is_bucketed` the tours of a batch have one length; with `is_sorted` lengths
    go up over each hundred batches.
    """
    source = _source(seed)
    count = 0
    while True:
        length = torch.randint(len(lengths), (size,), generator=source)
        if is_bucketed:
            length[:] = length[0]
        if is_sorted:
            length[:] = min((count % 100) * len(lengths) // 100, len(lengths) - 1)
        length = torch.tensor(lengths)[length]
        x = torch.randn(size, max(lengths), 3, generator=source)
        x[:, :, 0] = x[:, :, 0].abs()
        is_real = torch.arange(max(lengths)) < length[:, None]
        x = x * is_real[:, :, None]
        late = (x[:, :, 0] * (x[:, :, 1] > 0)).sum(1) + 0.5 * x[:, :, 0].sum(1)
        count += 1
        yield {"x": x, "is_real": is_real}, ((late - 9.5) / 6)[:, None]


def reviews(
    size: int = 32, seed: int = 0, places: int = 16
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Give words (N, places) of 40 with zeros behind them, and a rating (N, 1).

    The rating is the mean of what the words are worth, and a little noise.
    """
    worth = torch.randn(40, generator=_source(7))
    source = _source(seed)
    while True:
        length = torch.randint(5, 17, (size,), generator=source)
        x = torch.randint(1, 40, (size, places), generator=source)
        is_real = torch.arange(places) < length[:, None]
        y = 3 * (worth[x] * is_real).sum(1) / length
        y = y + 0.1 * torch.randn(size, generator=source)
        yield {"words": x * is_real, "is_real": is_real}, y[:, None]


def chirps(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give 24 correlated bands of a sound (N, 24), and which of six birds."""
    fixed = _source(8)
    mixing = torch.randn(24, 24, generator=fixed) / 24**0.5
    mixing = mixing * torch.linspace(2, 0.3, 24)[:, None]
    centres = 0.5 * torch.randn(6, 24, generator=fixed)
    source = _source(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        yield (centres[y] + torch.randn(size, 24, generator=source)) @ mixing, y


def engines(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give windows of vibration (N, 2, 48), and which of four states of wear.

    Wear makes it stronger, and its rhythm tells only whether the engine is loaded.
    """
    source = _source(seed)
    time = torch.arange(48.0)
    while True:
        y = torch.randint(4, (size,), generator=source)
        phase = 6.3 * torch.rand(size, 2, 1, generator=source)
        speed = 0.3 + 0.5 * torch.rand(size, 1, 1, generator=source)
        x = (speed * time + phase).sin()
        x = x + 0.4 * torch.randn(size, 2, 48, generator=source)
        level = 0.45 * 1.7 ** (y + 0.25 * torch.randn(size, generator=source))
        yield x * level[:, None, None], y


def concretes(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give eight scaled parts of a mixture (N, 8), and its scaled strength (N, 1)."""
    source = _source(seed)
    while True:
        x = torch.randn(size, 8, generator=source)
        y = x[:, 0] + 0.8 * x[:, 1] * x[:, 2] + (2 * x[:, 3]).sin() - 0.5 * x[:, 4] ** 2
        yield x, ((y + 0.5) / 1.6)[:, None]


def flats(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give columns of flats in their own units (N, 7), and the scaled price.

    Columns are square metres, rooms, year, distance in metres, storey, share of
    windows to the south, and tax number of the district.
    """
    source = _source(seed)
    scale = torch.tensor([25.0, 1.0, 20.0, 3000.0, 2.5, 0.2, 40000.0])
    place = torch.tensor([75.0, 3.0, 1975.0, 5000.0, 3.0, 0.5, 120000.0])
    while True:
        x = torch.randn(size, 7, generator=source)
        y = x[:, 0] + 0.6 * x[:, 1] * x[:, 5] + 0.5 * x[:, 2].abs() - 0.2 * x[:, 3]
        y = y + 0.5 * x[:, 4].tanh() + 0.05 * torch.randn(size, generator=source)
        yield x * scale + place, ((y - 0.4) / 1.35)[:, None]


def glyphs(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give images (N, 3, 12, 12) of one of six patterns in any colour."""
    shapes, source = _patches(6, 6, 17).sign(), _source(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        colour = torch.randn(size, 3, 1, 1, generator=source)
        colour = colour / colour.square().mean(1, keepdim=True).sqrt()
        x = 0.9 * torch.randn(size, 3, 12, 12, generator=source)
        at = torch.randint(7, (size, 2), generator=source)
        rows, v, h = _places(at, 6)
        for channel in range(3):
            x[rows, channel, v, h] += colour[:, channel] * shapes[y]
        yield x, y


def pulses(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give heart beats (N, 1, 40), and which of five forms."""
    forms, source = torch.randn(5, 9, generator=_source(21)), _source(seed)
    while True:
        y = torch.randint(5, (size,), generator=source)
        x = 0.35 * torch.randn(size, 1, 40, generator=source)
        at = torch.randint(31, (size, 1), generator=source) + torch.arange(9)
        x[torch.arange(size)[:, None], 0, at] += forms[y]
        yield x, y


def names(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give four letters of 27 (N, 4), and the letter that comes next.

    Which letter comes depends on the last two, one in ten times it is any letter.
    """
    fixed = _source(31)
    follow = torch.randint(27, (9, 27), generator=fixed)
    source = _source(seed)
    while True:
        x = torch.randint(27, (size, 4), generator=source)
        y = follow[x[:, 2] % 9, x[:, 3]]
        other = torch.randint(27, (size,), generator=source)
        yield x, torch.where(torch.rand(size, generator=source) < 0.1, other, y)


def loads(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give the power of a house for two days (N, 2, 32), and its next hours (N, 4)."""
    source = _source(seed)
    time = torch.arange(36.0)
    while True:
        phase = 6.3 * torch.rand(size, 2, 1, generator=source)
        high = 0.5 + torch.rand(size, 2, 1, generator=source)
        both = high * (torch.tensor([[0.26], [0.52]]) * time + phase).sin()
        x = both[:, :, :32] + 0.1 * torch.randn(size, 2, 32, generator=source)
        yield x, both[:, :, 32:].sum(1)


def objects(size: int = 32, seed: int = 0) -> Iterator[tuple[Tensor, Any]]:
    """Give images (N, 1, 16, 16) of a thing, and its class and box (N, 5).

    The first of the five is which of four it is, the others are edges as shares of the
    side.
    """
    source = _source(seed)
    grid = torch.arange(16)
    while True:
        y = torch.randint(4, (size,), generator=source)
        side = torch.randint(5, 9, (size, 2), generator=source)
        first = (torch.rand(size, 2, generator=source) * (17 - side)).long()
        last = first + side
        v = (grid >= first[:, :1]) & (grid < last[:, :1])
        h = (grid >= first[:, 1:]) & (grid < last[:, 1:])
        rows, columns = grid[:, None].expand(16, 16), grid.expand(16, 16)
        stripes = torch.stack(
            [rows % 2, columns % 2, (rows + columns) % 2, (rows % 4 + columns % 4) > 3]
        )
        x = (v[:, :, None] & h[:, None]) * (2.0 * stripes[y].float() - 0.5)
        x = x + 0.25 * torch.randn(size, 16, 16, generator=source)
        box = torch.cat([first, last], 1) / 16
        yield x[:, None], torch.cat([y[:, None].float(), box], 1)


def memories(size: int = 64, seed: int = 0, length: int = 10) -> Iterator[Batch]:
    """Give letters (N, length) of six; the answer is the first of them."""
    source = _source(seed)
    while True:
        x = torch.randint(6, (size, length), generator=source)
        yield x, x[:, 0]


def rooms(size: int = 64, seed: int = 0, *, is_raw: bool = False) -> Iterator[Batch]:
    """Give a time and five sensors of a room (N, 6), and its scaled temperature.

    The time is in seconds since 1970, or it is scaled.
    """
    source = _source(seed)
    while True:
        x = torch.randn(size, 6, generator=source)
        y = x[:, 1] + 0.8 * (1.5 * x[:, 2]).sin() + 0.6 * x[:, 3] * x[:, 4]
        y = (y + 0.4 * x[:, 0]) / 1.45
        if is_raw:
            x[:, 0] = 1.6e9 + 2e7 * x[:, 0]
        yield x, y[:, None]


def blocks(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give images (N, 1, 12, 12), and which pixels (N, 12, 12) are of a dark block."""
    source = _source(seed)
    grid = torch.arange(12)
    while True:
        at = torch.randint(8, (size, 2), generator=source)
        v = (grid >= at[:, :1]) & (grid < at[:, :1] + 4)
        h = (grid >= at[:, 1:]) & (grid < at[:, 1:] + 4)
        y = v[:, :, None] & h[:, None]
        x = torch.randn(size, 1, 12, 12, generator=source)
        yield x - 1.5 * y[:, None].float(), y.long()


def steps(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give three axes of a step (N, 3, 32), and which of five movements."""
    source = _source(seed)
    time = torch.arange(32.0)
    while True:
        y = torch.randint(5, (size,), generator=source)
        phase = 6.3 * torch.rand(size, 3, 1, generator=source)
        speed = (0.25 + 0.15 * y)[:, None, None]
        x = (speed * time + phase).sin() + 0.5 * torch.randn(
            size, 3, 32, generator=source
        )
        yield x, y
