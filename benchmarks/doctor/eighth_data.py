"""Data of the eighth set: textures, scans, clips, movements, tables and tags.

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
    "blobs",
    "clips",
    "couples",
    "fabrics",
    "flats",
    "movements",
    "patches",
    "patients",
    "scans",
    "tags",
]


def _waves(angle: Tensor, rate: Tensor, source: torch.Generator) -> Tensor:
    """Give plane waves (N, 12, 12) of a random phase."""
    grid = torch.arange(12.0)
    phase = 6.3 * torch.rand(len(angle), 1, 1, generator=source)
    along = (
        grid * angle.cos()[:, None, None] + grid[:, None] * angle.sin()[:, None, None]
    )
    return (rate[:, None, None] * along + phase).sin()


def fabrics(
    size: int = 32, seed: int = 0, *, noise: float = 1.5, by_depth: bool = False
) -> Iterator[Batch]:
    """Give colour images (N, 3, 12, 12) of woven stripes, and which of six weaves.

    These are three angles of fine or coarse threads; `by_depth` takes three angles of
    flat or deep ones, which differ in contrast.
    """
    source = torch.Generator().manual_seed(seed)
    while True:
        y = torch.randint(6, (size,), generator=source)
        rate = 0.9 + 0.8 * (y % 2) * (not by_depth)
        x = _waves(math.pi * (y // 2) / 3, rate, source)
        colour = 0.6 + 0.8 * torch.rand(size, 3, 1, 1, generator=source)
        if by_depth:
            colour = (0.9 + 0.2 * colour) * (0.6 + 0.9 * (y % 2))[:, None, None, None]
        x = colour * x[:, None]
        yield x + noise * torch.randn(x.shape, generator=source), y


def patches(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give fabrics (N, 3, 12, 12) with a patch of another weave, and its pixels."""
    source = torch.Generator().manual_seed(seed)
    grid = torch.arange(12)
    while True:
        kind = torch.randint(3, (size,), generator=source)
        other = (kind + 1 + torch.randint(2, (size,), generator=source)) % 3
        rate = torch.full((size,), 1.7)
        ground = _waves(math.pi * kind / 3, rate, source)
        patch = _waves(math.pi * other / 3, 0.0 * rate + 0.9, source)
        row, column = torch.randint(3, 9, (2, size, 1, 1), generator=source)
        inside = ((grid[:, None] - row).abs() <= 3) & ((grid - column).abs() <= 3)
        x = torch.where(inside, patch, ground)[:, None].expand(size, 3, 12, 12)
        yield x + 0.5 * torch.randn(x.shape, generator=source), inside.long()


def couples(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give two fabrics (N, 6, 12, 12), and whether they are of one weave (N, 1)."""
    source = torch.Generator().manual_seed(seed)
    for x, y in fabrics(4 * size, seed, noise=0.7):
        is_same = torch.rand(size, generator=source) < 0.5
        mate = (y[None, :] == y[:size, None]) == is_same[:, None]
        mate[:, :size] = False
        other = torch.multinomial(mate.float(), 1, generator=source)[:, 0]
        yield torch.cat([x[:size], x[other]], 1), is_same[:, None].float()


def scans(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give slices (N, 1, 16, 16) in Hounsfield units, and the pixels of a lesion."""
    source = torch.Generator().manual_seed(seed)
    grid = torch.arange(16.0) - 7.5
    far = (grid[:, None] ** 2 + grid**2).sqrt()
    while True:
        radius = 6 + 1.5 * torch.rand(size, 1, 1, generator=source)
        body = far < radius
        dy, dx = 6 * torch.rand(2, size, 1, 1, generator=source) - 3
        gap = ((grid[:, None] - dy) ** 2 + (grid - dx) ** 2).sqrt()
        lesion = gap < 1.5 + 1.5 * torch.rand(size, 1, 1, generator=source)
        x = torch.where(body, 40.0, -900.0) + 70.0 * lesion
        x = x + 30.0 * torch.randn(x.shape, generator=source)
        yield x[:, None], lesion.long()


def clips(
    size: int = 32, seed: int = 0, *, length: int | None = None
) -> Iterator[Batch]:
    """Give bird calls (N, 8, L) with zeros behind their ends, and which of five.

    A batch has calls of about one length, from 12 to 40 steps, and is as long as the
    longest; `length` takes calls of all lengths, and pads them all to it.
    """
    source = torch.Generator().manual_seed(seed)
    while True:
        middle = torch.randint(14, 39, (1,), generator=source)
        counts = middle + torch.randint(-2, 3, (size,), generator=source)
        if length is not None:
            counts = torch.randint(12, 41, (size,), generator=source)
        steps = int(counts.max()) if length is None else length
        y = torch.randint(5, (size,), generator=source)
        start = 2 + 4 * torch.rand(size, 1, generator=source)
        slope = (y[:, None] - 2.0) * 0.8
        share = torch.arange(float(steps)) / counts[:, None]
        pitch = start + slope * (share - 0.5) * 2
        loud = 0.7 + torch.rand(size, 1, 1, generator=source)
        band = torch.arange(8.0)[None, :, None]
        x = loud * (2 * (-((band - pitch[:, None]) ** 2)).exp())
        x = x + 0.3 * torch.randn(x.shape, generator=source)
        is_over = torch.arange(steps) >= counts[:, None]
        yield x.masked_fill(is_over[:, None], 0.0), y


def movements(size: int = 32, seed: int = 0, length: int = 40) -> Iterator[Batch]:
    """Give six readings of a wrist (N, length, 6), and which of four activities."""
    source = torch.Generator().manual_seed(seed)
    time = torch.arange(float(length))
    axes = torch.randn(4, 6, generator=torch.Generator().manual_seed(11))
    while True:
        y = torch.randint(4, (size,), generator=source)
        rate = 0.25 + 0.35 * (y % 2) + 0.03 * torch.randn(size, generator=source)
        phase = 6.3 * torch.rand(size, 1, generator=source)
        swing = (rate[:, None] * time + phase).sin()
        x = swing[:, :, None] * axes[2 * (y // 2)][:, None, :]
        yield x + 0.5 * torch.randn(x.shape, generator=source), y


def flats(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give eight scaled columns of flats (N, 8), and the scaled rent (N, 1)."""
    source = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(size, 8, generator=source)
        rent = x[:, 0] + (1.5 * x[:, 1]).sin() + x[:, 2] * x[:, 3]
        rent = rent + 0.7 * (x[:, 4] - x[:, 5]).abs() - 0.8
        rent = rent / 1.7 + 0.1 * torch.randn(size, generator=source)
        yield x, rent[:, None]


def patients(
    size: int = 64, seed: int = 0, *, is_scaled: bool = True
) -> Iterator[Batch]:
    """Give eight measurements (N, 8), and which of three groups a patient is in.

    They are in their units, from thousandths to thousands, or scaled.
    """
    source = torch.Generator().manual_seed(seed)
    unit = torch.tensor([9000.0, 0.02, 60.0, 1.5, 700.0, 0.3, 12.0, 150.0])
    middle = torch.tensor([7000.0, 0.1, 75.0, 4.0, 2500.0, 1.0, 40.0, 130.0])
    while True:
        z = torch.randn(size, 8, generator=source)
        score = z[:, 0] * z[:, 1] + z[:, 2] + 0.5 * (z[:, 3] + z[:, 4])
        score = score - 0.8 * z[:, 5] + z[:, 6].sin() + 0.6 * z[:, 7].abs()
        score = score + 0.1 * torch.randn(size, generator=source)
        y = (score > -0.4).long() + (score > 1.3).long()
        yield (z if is_scaled else middle + unit * z), y


def blobs(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give standardized images (N, 1, 12, 12) of two spots, and themselves."""
    source = torch.Generator().manual_seed(seed)
    grid = torch.arange(12.0)
    while True:
        x = torch.zeros(size, 12, 12)
        for _ in range(2):
            y0, x0 = 2 + 7 * torch.rand(2, size, 1, 1, generator=source)
            wide = 1.5 + 1.5 * torch.rand(size, 1, 1, generator=source)
            far = (grid[:, None] - y0) ** 2 + (grid - x0) ** 2
            x = x + (-far / (2 * wide**2)).exp()
        x = ((x - 0.36) / 0.37)[:, None]
        yield x, x


def tags(size: int = 32, seed: int = 0, length: int = 14) -> Iterator[Batch]:
    """Give words (N, length) of 30, and one of five tags of each (N, length).

    A tag depends on the word, and on the word before it.
    """
    source = torch.Generator().manual_seed(seed)
    table = torch.randint(3, (30,), generator=torch.Generator().manual_seed(12))
    while True:
        x = torch.randint(30, (size, length), generator=source)
        before = torch.cat([torch.zeros(size, 1, dtype=torch.long), x[:, :-1]], 1)
        yield x, table[x] + (table[before] == 0).long() + (before % 2)
