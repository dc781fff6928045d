"""Data of the fifteenth set: small images, signals, tables, sentences and masks.

Each function draws what it gives with a number of its own, so that two calls with the
same arguments give the same data.
"""

from __future__ import annotations

import torch
from bugs import Batch
from sklearn.datasets import load_digits, make_friedman1
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

__all__ = [
    "beats",
    "cells",
    "digits",
    "friedman",
    "glyphs",
    "loader",
    "parts",
    "sensors",
    "speech",
    "stacked",
]


def loader(data: Batch, size: int = 32, *, shuffle: bool = True) -> DataLoader[Batch]:
    """Give whole batches of a pair of tensors."""
    return DataLoader(
        TensorDataset(*data), batch_size=size, shuffle=shuffle, drop_last=shuffle
    )


def parts(data: Batch, size: int = 64, count: int = 8) -> list[Batch]:
    """Return the first batches as a list."""
    return list(loader(data, size, shuffle=False))[:count]


def digits() -> tuple[Batch, Batch]:
    """Return digits (N, 1, 8, 8) in [0, 1] for training, and those left for a test."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    images = torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(y)[order]
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def glyphs(count: int, seed: int, noise: float = 0.5, kinds: int = 8) -> Batch:
    """Return images (N, 1, 16, 16), each with one of some marks somewhere."""
    drawn = torch.Generator().manual_seed(77)
    marks = F.interpolate(torch.randn(kinds, 1, 4, 4, generator=drawn), size=(8, 8))
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(kinds, (count,), generator=source)
    x = noise * torch.randn(count, 1, 16, 16, generator=source)
    corner = torch.randint(9, (count, 2), generator=source).tolist()
    for one, label, (v, h) in zip(x, labels.tolist(), corner, strict=True):
        one[:, v : v + 8, h : h + 8] += marks[label]
    return x, labels


def beats(count: int, seed: int, noise: float = 0.7, spread: float = 0.5) -> Batch:
    """Return signals (N, 2, 64) of five rhythms, each as loud as its recording was."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=source)
    time = torch.arange(64) / 64
    phase = torch.rand(count, 1, generator=source)
    pace = (3 + labels).view(-1, 1)
    first = torch.sin(2 * torch.pi * (pace * time + phase))
    second = torch.sin(2 * torch.pi * (pace * time**2 * 2 + phase)).sign()
    x = torch.stack([first, second], 1)
    x = x + noise * torch.randn(x.shape, generator=source)
    loud = torch.exp(spread * torch.randn(count, 1, 1, generator=source))
    return x * loud, labels


def sensors(count: int, seed: int) -> Batch:
    """Return series (N, 24, 4): kelvin, pascal, metres a second, and volts."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=source)
    time = torch.arange(24) / 24
    slow = torch.randn(count, 24, 4, generator=source)
    up = (labels % 2 * 2 - 1).view(-1, 1) * time
    swing = torch.sin(2 * torch.pi * (2 + 2 * (labels // 2)).view(-1, 1) * time)
    slow[..., 2] += 1.5 * up
    slow[..., 3] += 1.5 * swing
    middle, width = [295.0, 101_300.0, 0.4, 0.02], [3.0, 400.0, 0.1, 0.005]
    return slow * torch.tensor(width) + torch.tensor(middle), labels


def friedman(count: int, seed: int, noise: float = 1.0) -> Batch:
    """Return a table (N, 10) in [0, 1], and a value (N,) of about 14 +- 5."""
    x, y = make_friedman1(count, noise=noise, random_state=seed)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def stacked(data: Batch) -> Batch:
    """Return a table with its value standardised, as a column."""
    x, y = data
    return x, ((y - 14.4) / 4.9).unsqueeze(1)


def speech(count: int, seed: int, longest: int = 120) -> Batch:
    """Return log spectra (N, T, 12) of four words, with zeros behind the shorter."""
    drawn = torch.Generator().manual_seed(9)
    words = torch.randn(4, 6, 12, generator=drawn)
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=source)
    sizes = torch.exp(3.0 + 0.9 * torch.randn(count, generator=source))
    x = -9 + 1.5 * torch.randn(count, longest, 12, generator=source)
    for one, label, size in zip(x, labels.tolist(), sizes.int().tolist(), strict=True):
        size = min(max(size, 8), longest)
        place = int(torch.randint(size - 5, (1,), generator=source))
        one[place : place + 6] += 0.7 * words[label]
        one[size:] = 0.0
    return x, labels


def cells(count: int, seed: int, noise: float = 0.5) -> Batch:
    """Return micrographs (N, 1, 24, 24) of uneven light, and masks of the cells."""
    source = torch.Generator().manual_seed(seed)
    grid = torch.arange(24.0)
    mask = torch.zeros(count, 1, 24, 24)
    for _ in range(3):
        centre = 24 * torch.rand(count, 2, 1, generator=source)
        radius = 2.0 + 2.5 * torch.rand(count, 1, 1, generator=source)
        far = (grid - centre[:, 0]).unsqueeze(2) ** 2
        far = far + (grid - centre[:, 1]).unsqueeze(1) ** 2
        mask[:, 0] = mask[:, 0].maximum((far < radius**2).float())
    light = 1.5 * torch.randn(count, 1, 1, 1, generator=source)
    gain = torch.exp(0.5 * torch.randn(count, 1, 1, 1, generator=source))
    image = _blurred(mask) + noise * torch.randn(mask.shape, generator=source)
    return gain * image + light, mask


def _blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1)
