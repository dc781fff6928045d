"""Data of the seventeenth set: images, masks, scenes, sounds, series, tables, texts.

Each function draws what it gives with a generator of its own, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from bugs import Batch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

__all__ = [
    "bearings",
    "cells",
    "consumption",
    "fabrics",
    "grids",
    "joined",
    "loader",
    "loans",
    "logs",
    "reversals",
    "rooms",
    "utterances",
    "wells",
]


def loader(data: Any, size: int = 32, *, shuffle: bool = True) -> DataLoader[Any]:
    """Give whole batches of some tensors."""
    return DataLoader(
        TensorDataset(*data), batch_size=size, shuffle=shuffle, drop_last=shuffle
    )


def _source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fabrics(count: int, seed: int, noise: float = 0.2, kinds: int = 6) -> Batch:
    """Return photographs (N, 3, 16, 16) in [0, 1] of weaves, of any light and dye."""
    source = _source(seed)
    labels = torch.randint(kinds, (count,), generator=source)
    grid = torch.arange(16.0)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    angle = math.pi * labels / kinds + 0.08 * torch.randn(count, generator=source)
    angle = angle.view(-1, 1, 1)
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=source)
    wave = torch.sin(1.6 * (x * angle.cos() + y * angle.sin()) + phase)
    dye = 0.3 + 0.7 * torch.rand(count, 3, 1, 1, generator=source)
    light = 0.25 + 0.5 * torch.rand(count, 1, 1, 1, generator=source)
    image = light + 0.25 * dye * wave.unsqueeze(1)
    image = image + noise * torch.randn(count, 3, 16, 16, generator=source)
    return image.clamp(0, 1), labels


def _blobs(count: int, source: torch.Generator, size: int, most: int = 3) -> Tensor:
    """Return distances (N, 1, size, size) to the nearest of a few centres."""
    grid = torch.arange(float(size))
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    centre = size * torch.rand(count, most, 2, generator=source)
    radius = 2 + 2 * torch.rand(count, most, generator=source)
    far = (y - centre[:, :, :1, None]) ** 2 + (x - centre[:, :, 1:, None]) ** 2
    far = far.sqrt() / radius[:, :, None, None]
    return far.amin(1, keepdim=True)


def cells(count: int, seed: int, size: int = 16) -> Batch:
    """Return micrographs (N, 1, 16, 16) of any exposure, and masks of the nuclei."""
    source = _source(seed)
    far = _blobs(count, source, size)
    x = torch.exp(-(far**2)) + 0.2 * torch.randn(far.shape, generator=source)
    gain = torch.exp(0.7 * torch.randn(count, 1, 1, 1, generator=source))
    level = 1.5 * torch.randn(count, 1, 1, 1, generator=source)
    return gain * x + level, (far < 1).float()


def rooms(count: int, seed: int, size: int = 16) -> Batch:
    """Return images (N, 3, 16, 16) of lamps of any strength, and depths of things."""
    source = _source(seed)
    far = _blobs(count, source, size, 2)
    slope = torch.linspace(1.0, -1.0, size).view(1, 1, -1, 1)
    depth = slope - 1.2 * torch.exp(-(far**2))
    tint = torch.tensor([1.0, 0.8, 0.5]).view(1, 3, 1, 1)
    lamp = torch.exp(0.8 * torch.randn(count, 1, 1, 1, generator=source))
    x = lamp * (1.5 - depth) * tint
    x = x + 0.15 * lamp * torch.randn(count, 3, size, size, generator=source)
    return x, depth


def grids(count: int, seed: int, size: int = 8) -> Batch:
    """Return views (N, 3, 8, 8) of a field, and what four moves bring.

    A move brings 1 if it leads to the quarter with the food, and else -1; there is a
    stone as well, and each view has the light of its hour.
    """
    source = _source(seed)
    quarter = torch.randint(4, (count,), generator=source)
    half = size // 2
    inside = torch.randint(half, (count, 2), generator=source)
    row = half * (quarter // 2) + inside[:, 0]
    column = half * (quarter % 2) + inside[:, 1]
    stone = torch.randint(size, (count, 2), generator=source)
    x = torch.zeros(count, 3, size, size)
    every = torch.arange(count)
    x[every, 0, row, column] = 1.0
    x[every, 1, stone[:, 0], stone[:, 1]] = 1.0
    light = torch.exp(0.7 * torch.randn(count, 1, 1, 1, generator=source))
    level = torch.randn(count, 1, 1, 1, generator=source)
    x = light * (2 * x + 0.2 * torch.randn(x.shape, generator=source)) + level
    return x, 2.0 * F.one_hot(quarter, 4).float() - 1.0


def bearings(count: int, seed: int, kinds: int = 5) -> Batch:
    """Return windows (N, 1, 64) of vibration, and which of five faults is in them."""
    source = _source(seed)
    labels = torch.randint(kinds, (count,), generator=source)
    time = torch.arange(64.0)
    pace = 0.35 + 0.3 * labels.view(-1, 1)
    pace = pace * (1 + 0.03 * torch.randn(count, 1, generator=source))
    phase = 2 * math.pi * torch.rand(count, 1, generator=source)
    x = torch.sin(pace * time + phase) + 0.6 * torch.randn(count, 64, generator=source)
    load = 1 + 0.4 * labels.view(-1, 1) * torch.rand(count, 1, generator=source)
    return (load * x).unsqueeze(1), labels


def utterances(count: int, seed: int, words: int = 6) -> list[tuple[Tensor, int]]:
    """Return log powers (12, frames) of words, each of a length of its own."""
    spoken = torch.randn(words, 12, 8, generator=_source(17))
    source = _source(seed)
    labels = torch.randint(words, (count,), generator=source).tolist()
    found = []
    for label in labels:
        size = int(torch.randint(12, 64, (1,), generator=source))
        start = int(torch.randint(size - 8 + 1, (1,), generator=source))
        x = 1.0 * torch.randn(12, size, generator=source)
        x[:, start : start + 8] += 0.62 * spoken[label]
        found.append((x - 7.0, label))
    return found


def consumption(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return loads (N, 36, 1) around zero, the next value (N,), and the kind of day."""
    source = _source(seed)
    start = 24 * torch.rand(count, 1, generator=source)
    time = start + torch.arange(37.0)
    kind = torch.randint(4, (count,), generator=source)
    second = torch.tensor([0.0, 0.7, 0.0, 0.7])[kind].view(-1, 1)
    pace = torch.tensor([1.0, 1.0, 2.0, 2.0])[kind].view(-1, 1)
    size = 1 + 0.2 * torch.randn(count, 1, generator=source)
    wave = torch.sin(pace * 2 * math.pi * time / 24)
    wave = wave + second * torch.sin(math.pi * time / 3)
    x = size * wave + 0.15 * torch.randn(count, 37, generator=source)
    return x[:, :-1].unsqueeze(2), x[:, -1], kind


def loans(count: int, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return branches and figures (N, 5) of customers in units, and their standing."""
    source = _source(seed)
    branch = torch.randint(8, (count,), generator=source)
    z = torch.randn(count, 5, generator=source)
    lean = torch.randn(8, generator=_source(18))[branch]
    risk = z[:, 0] * z[:, 1] + torch.sin(2 * z[:, 2]) + 0.8 * lean
    label = (risk > -0.7).long() + (risk > 0.7).long()
    income = 52000 + 18000 * z[:, 0]
    age = 43 + 12 * z[:, 1]
    sum_ = 240000 + 90000 * z[:, 2]
    rate = 0.045 + 0.012 * z[:, 3]
    months = 160 + 60 * z[:, 4]
    return (branch, torch.stack([income, age, sum_, rate, months], 1)), label


def wells(count: int, seed: int) -> Batch:
    """Return logs (N, 6) of wells around zero, and the yield (N, 1) in barrels."""
    source = _source(seed)
    z = torch.randn(count, 6, generator=source)
    y = torch.tanh(z[:, 0] + z[:, 1]) + 0.7 * z[:, 2] * z[:, 3] + 0.4 * z[:, 4]
    y = y + 0.1 * torch.randn(count, generator=source)
    return z, (70.0 + 25.0 * y).unsqueeze(1)


def reversals(count: int, seed: int, length: int = 8) -> tuple[Tensor, Tensor]:
    """Return letters (N, 8), and the same ones from the last to the first (N, 9).

    0 is the start in front of each answer.
    """
    x = torch.randint(1, 9, (count, length), generator=_source(seed))
    return x, F.pad(x.flip(1), (1, 0))


def logs(count: int, seed: int, length: int = 12) -> Batch:
    """Return events (N, 12), and which of three marks comes first of all."""
    source = _source(seed)
    x = torch.randint(4, 24, (count, length), generator=source)
    labels = torch.randint(3, (count,), generator=source)
    for one, label in zip(x, labels.tolist(), strict=True):
        order = torch.randperm(length, generator=source)[:3].sort().values
        one[order] = torch.tensor([1 + label, 1 + (label + 1) % 3, 1 + (label + 2) % 3])
    return x, labels


def joined(parts: list[tuple[Tensor, int]], *, wraps: bool) -> Batch:
    """Pad a batch to its longest, with zeros or by saying each word again."""
    longest = max(x.shape[1] for x, _ in parts)
    rows = []
    for x, _ in parts:
        if wraps:
            times = math.ceil(longest / x.shape[1])
            rows.append(x.repeat(1, times)[:, :longest])
        else:
            rows.append(F.pad(x, (0, longest - x.shape[1])))
    return torch.stack(rows), torch.tensor([label for _, label in parts])
