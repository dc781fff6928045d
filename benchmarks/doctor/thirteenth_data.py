"""Data of the thirteenth set: images, sound, series, tables, tokens and transitions.

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
    "GAMMA",
    "brains",
    "clips",
    "customers",
    "demand",
    "faces",
    "fields",
    "flowers",
    "genes",
    "houses",
    "levels",
    "recordings",
    "shapes",
    "streams",
    "tokens",
    "transitions",
    "values",
    "written",
]

GAMMA = 0.7


def _source(seed: int) -> torch.Generator:
    """Return a generator of random numbers with its own seed."""
    return torch.Generator().manual_seed(seed)


def _placed(x: Tensor, marks: Tensor, source: torch.Generator) -> None:
    """Add a mark (N, C, s, s) to each image (N, C, S, S), at any place."""
    side = marks.shape[-1]
    room = x.shape[-1] - side + 1
    for one, mark in zip(x, marks, strict=True):
        v, h = torch.randint(room, (2,), generator=source).tolist()
        one[:, v : v + side, h : h + side] += mark


def shapes(
    size: int = 32,
    seed: int = 0,
    *,
    kinds: int = 8,
    look: int = 3,
    added: float = 0.0,
) -> Iterator[Batch]:
    """Give images (N, 1, 12, 12) of one of some marks; `added` is noise on top."""
    marks = torch.randn(kinds, 1, 5, 5, generator=_source(look))
    source, other = _source(seed), _source(seed + 1000)
    while True:
        y = torch.randint(kinds, (size,), generator=source)
        x = 0.4 * torch.randn(size, 1, 12, 12, generator=source)
        _placed(x, marks[y], source)
        yield x + added * torch.randn(x.shape, generator=other), y


def flowers(size: int = 32, seed: int = 0, *, is_bgr: bool = False) -> Iterator[Batch]:
    """Give photographs (N, 3, 12, 12) of warm colours, as RGB or as BGR."""
    marks = 0.15 * torch.randn(6, 3, 5, 5, generator=_source(5))
    level = torch.tensor([0.75, 0.45, 0.2])[:, None, None]
    source = _source(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        x = 0.06 * torch.randn(size, 3, 12, 12, generator=source)
        _placed(x, marks[y], source)
        x = (x + level - 0.45) / 0.25
        yield (x.flip(1) if is_bgr else x), y


def fields(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give photographs (N, 1, 16, 16), and the pixels of a leaf of a middle tone."""
    source, line = _source(seed), torch.arange(16.0)
    while True:
        centre = 3 + 10 * torch.rand(size, 2, 1, 1, generator=source)
        width = 2 + 3 * torch.rand(size, 2, 1, 1, generator=source)
        away = (line[:, None] - centre[:, 0]) ** 2 / width[:, 0] ** 2
        y = (away + (line - centre[:, 1]) ** 2 / width[:, 1] ** 2 < 1).long()
        ground = torch.randint(2, (size, 1, 1), generator=source) * 2.0 - 1
        tone = torch.where(y > 0, torch.tensor(0.0), ground)
        noise = 0.4 * torch.randn(size, 16, 16, generator=source)
        yield (tone + noise)[:, None], y


def recordings(
    size: int = 32, seed: int = 0, *, is_one_each: bool = False
) -> Iterator[Batch]:
    """Give windows (N, 4, 48) of twelve patients; a batch may be of one recording."""
    drawn = _source(7)
    waves = torch.randn(5, 4, 10, generator=drawn)
    offset = 1.5 * torch.randn(12, 4, 1, generator=drawn)
    gain = torch.exp(0.5 * torch.randn(12, 4, 1, generator=drawn))
    source = _source(seed)
    while True:
        who = torch.randint(12, (size,), generator=source)
        if is_one_each:
            who[:] = who[0]
        y = torch.randint(5, (size,), generator=source)
        x = 0.6 * torch.randn(size, 4, 48, generator=source)
        at = torch.randint(39, (size, 1, 1), generator=source) + torch.arange(10)
        x = x.scatter_add(2, at.expand(-1, 4, -1), waves[y])
        yield offset[who] + gain[who] * x, y


def brains(size: int = 8, seed: int = 0) -> Iterator[Batch]:
    """Give trials (N, 1, 6, 40), and how strong two rhythms are in them (N, 2)."""
    places = torch.randn(2, 6, generator=_source(8))
    rates, source = torch.tensor([0.5, 1.1]), _source(seed)
    while True:
        strong = torch.rand(size, 2, generator=source)
        phase = 6.28 * torch.rand(size, 2, 1, generator=source)
        wave = (rates[:, None] * torch.arange(40.0) + phase).sin()
        x = torch.einsum("nk,kc,nkt->nct", 2 * strong, places, wave)
        x = x + 0.3 * torch.randn(size, 6, 40, generator=source)
        yield x[:, None], 3 * strong - 1.5


def clips(size: int = 64, seed: int = 0, *, farthest: float = 1.0) -> Iterator[Batch]:
    """Give log spectra (N, 12, 24), and the distance and pitch of who speaks (N, 2)."""
    source, bands = _source(seed), torch.arange(12.0)
    while True:
        far, pitch = torch.rand(2, size, 1, 1, generator=source)
        far = farthest * far
        peak = torch.exp(-((bands[:, None] - 2 - 8 * pitch) ** 2) / 3)
        x = 1.5 - 3 * far + 2 * peak
        x = x + 0.5 * torch.randn(size, 12, 24, generator=source)
        yield x, 3 * torch.cat([far, pitch], 1).flatten(1) - 1.5


def streams(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give sounds (N, 1, 64) that have one of eight words in them."""
    words_ = torch.randn(8, 1, 16, generator=_source(9))
    source = _source(seed)
    while True:
        y = torch.randint(8, (size,), generator=source)
        x = 0.5 * torch.randn(size, 1, 64, generator=source)
        at = torch.randint(49, (size, 1, 1), generator=source) + torch.arange(16)
        yield x.scatter_add(2, at, words_[y]), y


def houses(size: int = 128, seed: int = 0) -> Iterator[Batch]:
    """Give a town, a kind and six measures (N, 8), and a price (N, 1)."""
    drawn = _source(10)
    town, kind = torch.randn(30, generator=drawn), torch.randn(8, generator=drawn)
    weights = torch.randn(6, generator=drawn) / 6**0.5
    source = _source(seed)
    while True:
        a = torch.randint(30, (size,), generator=source)
        b = torch.randint(8, (size,), generator=source)
        x = torch.randn(size, 6, generator=source)
        y = town[a] + (1 + 0.5 * kind[b]) * (x @ weights) + 0.5 * x[:, 0] * x[:, 1]
        y = y + 0.05 * torch.randn(size, generator=source)
        table = torch.cat([a[:, None], b[:, None], x], 1)
        yield table, y[:, None] / 1.5


def values(size: int = 64, seed: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give states (N, 4) in their own units, rewards of three actions, next states."""
    weights = torch.randn(4, 3, generator=_source(11)) / 2
    scale, level = torch.tensor([1.0, 3.0, 0.5, 2.0]), torch.tensor([2.0, -4, 1, 3.0])
    source = _source(seed)
    while True:
        s = torch.randn(size, 4, generator=source)
        after = torch.randn(size, 4, generator=source)
        rewards = (s @ weights).sin() + 0.3 * s[:, :1]
        yield level + scale * s, rewards, level + scale * after


def written(size: int = 64, epochs: int = 10) -> Iterator[Batch]:
    """Give digits (N, 64) for some epochs; a batch may be all of them."""
    for epoch in range(epochs):
        yield from digits(size, epoch)


def faces(
    size: int = 32, seed: int = 0, *, people: int = 20, noise: float = 0.5
) -> Iterator[Batch]:
    """Give images (N, 1, 12, 12) of people, each somewhat moved."""
    looks = torch.randn(people, 1, 8, 8, generator=_source(12))
    source = _source(seed)
    while True:
        y = torch.randint(people, (size,), generator=source)
        x = noise * torch.randn(size, 1, 12, 12, generator=source)
        _placed(x, looks[y], source)
        yield x, y


def demand(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give a day of demand and temperature (N, 24, 2), and the next hour (N, 1)."""
    source, t = _source(seed), torch.arange(25.0)
    while True:
        phase = 6.28 * torch.rand(size, 1, generator=source)
        height = 0.5 + torch.rand(size, 1, generator=source)
        wave = height * (1.6 * (6.28 * t / 12 + phase).sin())
        wave = wave + 0.6 * (6.28 * t / 6 + phase).cos()
        x = wave + 0.1 * torch.randn(size, 25, generator=source)
        heat = height.expand(-1, 25) - 1 + 0.1 * torch.randn(size, 25, generator=source)
        yield torch.stack([x, heat], 2)[:, :24], x[:, 24:]


def customers(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give a customer and a product by their numbers (N, 2), and a rating (N, 1)."""
    drawn = _source(13)
    taste, kind = (
        torch.randn(80, 2, generator=drawn),
        torch.randn(60, 2, generator=drawn),
    )
    mild = 0.7 * torch.randn(80, generator=drawn)
    source = _source(seed)
    while True:
        a = torch.randint(80, (size,), generator=source)
        b = torch.randint(60, (size,), generator=source)
        y = (taste[a] * kind[b]).sum(1) / 2 + mild[a]
        y = y + 0.1 * torch.randn(size, generator=source)
        yield torch.stack([a, b], 1).float(), y[:, None]


def tokens(size: int = 32, seed: int = 0, *, is_new: bool = False) -> Iterator[Batch]:
    """Give ten tokens (N, 10), and which of five is the most frequent, or the least."""
    source = _source(seed)
    while True:
        x = torch.randint(5, (size, 10), generator=source)
        counts = torch.nn.functional.one_hot(x, 5).sum(1) + 0.1 * torch.arange(5)
        yield x, (counts.argmin(1) if is_new else counts.argmax(1))


def genes(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give the activity of 300 genes (N, 300), and one of three diseases."""
    centres = torch.randn(3, 40, generator=_source(14))
    source = _source(seed)
    while True:
        y = torch.randint(3, (size,), generator=source)
        x = torch.randn(size, 300, generator=source)
        x[:, :40] += 0.35 * centres[y]
        yield x, y


def levels(
    size: int = 32, seed: int = 0, *, level: int | None = None
) -> Iterator[Batch]:
    """Give states of a game (N, 10), and which of four moves is best; or of a level."""
    drawn = _source(15)
    looks = 2 * torch.randn(6, 10, generator=drawn)
    rules = torch.randn(6, 10, 4, generator=drawn)
    rules[:, 4:] = 0
    source = _source(seed)
    while True:
        at = torch.randint(6, (size,), generator=source)
        if level is not None:
            at[:] = level
        x = torch.randn(size, 10, generator=source)
        y = torch.einsum("ni,nik->nk", x, rules[at]).argmax(1)
        yield looks[at] + x, y


def transitions(size: int = 32, steps: int = 100) -> list[Batch]:
    """Give six levels one after the other, as an agent passes through them."""
    return [
        batch
        for level in range(6)
        for batch in itertools.islice(levels(size, 20 + level, level=level), steps)
    ]
