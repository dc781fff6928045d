"""Data of the sixteenth set: images, volumes, sounds, tables, series, texts, graphs.

Each function draws what it gives with a generator of its own, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

from typing import Any

import torch
from bugs import Batch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

__all__ = [
    "customers",
    "fruits",
    "heartbeats",
    "houses",
    "load_curves",
    "loader",
    "molecules",
    "patients",
    "reviews",
    "scans",
    "sounds",
    "spectra",
    "vitals",
]


def loader(data: Any, size: int = 32, *, shuffle: bool = True) -> DataLoader[Any]:
    """Give whole batches of some tensors."""
    return DataLoader(
        TensorDataset(*data), batch_size=size, shuffle=shuffle, drop_last=shuffle
    )


def _source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fruits(count: int, seed: int, noise: float = 0.12, kinds: int = 6) -> Batch:
    """Return photographs (N, 3, 16, 16) in [0, 1], with a patterned patch somewhere."""
    looks = torch.rand(kinds, 3, 4, 4, generator=_source(5))
    looks = F.interpolate(looks, size=(8, 8))
    source = _source(seed)
    labels = torch.randint(kinds, (count,), generator=source)
    light = 0.3 + 0.4 * torch.rand(count, 1, 1, 1, generator=source)
    x = light + noise * torch.randn(count, 3, 16, 16, generator=source)
    corner = torch.randint(9, (count, 2), generator=source).tolist()
    for one, label, (v, h) in zip(x, labels.tolist(), corner, strict=True):
        one[:, v : v + 8, h : h + 8] += 0.8 * (looks[label] - 0.5)
    return x.clamp(0, 1), labels


def patients(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return skin images with age and pulse, and one of six findings."""
    image, label = fruits(count, seed, 0.2)
    source = _source(seed + 1000)
    record = torch.randn(count, 4, generator=source)
    record[:, 0] += (label % 3).float()
    record[:, 1] += (label // 3).float() * 2
    return {"image": image, "record": record}, label


def scans(count: int, seed: int, noise: float = 0.3) -> Batch:
    """Return volumes (N, 1, 8, 8, 8) of four shapes, each of a scanner's brightness."""
    shapes = torch.randn(4, 1, 2, 2, 2, generator=_source(6))
    shapes = F.interpolate(shapes, scale_factor=2.0)
    source = _source(seed)
    labels = torch.randint(4, (count,), generator=source)
    x = noise * torch.randn(count, 1, 8, 8, 8, generator=source)
    corner = torch.randint(5, (count, 3), generator=source).tolist()
    for one, label, (a, b, c) in zip(x, labels.tolist(), corner, strict=True):
        one[:, a : a + 4, b : b + 4, c : c + 4] += shapes[label]
    gain = torch.exp(0.9 * torch.randn(count, 1, 1, 1, 1, generator=source))
    level = 2.0 * torch.randn(count, 1, 1, 1, 1, generator=source)
    return gain * x + level, labels


def sounds(count: int, seed: int, words: int = 6, look: int = 7) -> Batch:
    """Return powers (N, 16, 32) of a spectrum over time, with a word somewhere."""
    spoken = torch.randn(words, 16, 8, generator=_source(look))
    source = _source(seed)
    labels = torch.randint(words, (count,), generator=source)
    x = torch.randn(count, 16, 32, generator=source)
    place = torch.randint(25, (count,), generator=source).tolist()
    for one, label, start in zip(x, labels.tolist(), place, strict=True):
        one[:, start : start + 8] += 1.3 * spoken[label]
    return torch.exp(x - 3), labels


def spectra(count: int, seed: int, words: int = 6, look: int = 7) -> Batch:
    """Return log spectra (N, 1, 16, 32) of unit variance, and the words."""
    x, labels = sounds(count, seed, words, look)
    return (x.log() + 3).unsqueeze(1) / 1.2, labels


def heartbeats(count: int, seed: int) -> Batch:
    """Return leads (N, 1, 96) of any gain and offset, and where the beats are."""
    source = _source(seed)
    time = torch.arange(96.0)
    pace = 18 + 12 * torch.rand(count, 1, generator=source)
    phase = pace * torch.rand(count, 1, generator=source)
    far = (time - phase) % pace
    far = torch.minimum(far, pace - far)
    wave = torch.exp(-((far / 1.5) ** 2)) - 0.4 * torch.exp(-(((far - 5) / 2) ** 2))
    x = wave + 0.25 * torch.randn(count, 96, generator=source)
    gain = torch.exp(1.0 * torch.randn(count, 1, generator=source))
    level = 5.0 * torch.randn(count, 1, generator=source)
    return (gain * x + level).unsqueeze(1), (far < 3).float().unsqueeze(1)


def customers(count: int, seed: int) -> Batch:
    """Return a table (N, 8) of unequal units, and three kinds of customers."""
    ways = torch.randn(8, 6, generator=_source(8))
    source = _source(seed)
    z = torch.randn(count, 8, generator=source)
    hidden = torch.tanh(z @ ways)
    values = torch.stack(
        [hidden[:, 0] + hidden[:, 1], hidden[:, 2] * 2, hidden[:, 4] - hidden[:, 5]], 1
    )
    width = torch.tensor([0.1, 12.0, 3.0, 40.0, 0.5, 900.0, 1.0, 5.0])
    middle = torch.tensor([0.4, 45.0, 8.0, 70.0, 0.0, 2500.0, 2.0, 30.0])
    return z * width + middle, values.argmax(1)


def houses(count: int, seed: int) -> Batch:
    """Return a table (N, 6) in its units, and a value (N, 1) in thousands."""
    source = _source(seed)
    z = torch.randn(count, 6, generator=source)
    y = torch.tanh(z[:, 0]) + 0.8 * z[:, 1] * torch.sigmoid(2 * z[:, 2])
    y = y + 0.5 * torch.cos(2 * z[:, 3]) + 0.3 * z[:, 4] * z[:, 5]
    y = y + 0.1 * torch.randn(count, generator=source)
    width = torch.tensor([1.9, 1100.0, 2.2, 0.5, 2.1, 2.0])
    middle = torch.tensor([3.9, 1420.0, 5.4, 3.0, 35.6, -119.6])
    return z * width + middle, (206.0 + 115.0 * y).unsqueeze(1)


def load_curves(count: int, seed: int) -> Batch:
    """Return the load (N, 36, 1) of a grid in megawatts, and that of the next hour."""
    source = _source(seed)
    start = 24 * torch.rand(count, 1, generator=source)
    time = start + torch.arange(37.0)
    size = 1 + 0.3 * torch.randn(count, 1, generator=source)
    wave = torch.sin(2 * torch.pi * time / 24) + 0.5 * torch.sin(torch.pi * time / 6)
    x = size * wave + 0.1 * torch.randn(count, 37, generator=source)
    x = 5200 + 800 * x.unsqueeze(2)
    return x[:, :-1], x[:, -1]


def reviews(count: int, seed: int, longest: int = 48, mean: float = 2.3) -> Batch:
    """Return token numbers (N, longest), 0 behind the end, and three opinions.

    Words 1 to 9 speak for the opinions; the others say nothing.
    """
    source = _source(seed)
    labels = torch.randint(3, (count,), generator=source)
    x = torch.randint(10, 60, (count, longest), generator=source)
    sizes = torch.exp(mean + 0.6 * torch.randn(count, generator=source))
    sizes = sizes.int().clamp(5, longest - 1).tolist()
    for one, label, size in zip(x, labels.tolist(), sizes, strict=True):
        said = torch.randint(3, (4,), generator=source)
        places = torch.randperm(size, generator=source)[:4]
        opinions = torch.tensor([label, label, label, int(said[0])])
        one[places] = 1 + 3 * opinions + said
        one[size:] = 0
    return x, labels


def vitals(count: int, seed: int, longest: int = 48) -> Batch:
    """Return stays (N, hours, 3) with zeros behind their end, and their courses.

    The signs are pulse, temperature and oxygen; one of them drifts, or none.
    """
    source = _source(seed)
    labels = torch.randint(4, (count,), generator=source)
    x = torch.randn(count, longest, 3, generator=source)
    x = x + 0.7 * torch.randn(count, 1, 3, generator=source)
    sizes = torch.exp(2.6 + 0.6 * torch.randn(count, generator=source))
    sizes = sizes.int().clamp(6, longest).tolist()
    for one, label, size in zip(x, labels.tolist(), sizes, strict=True):
        if label:
            one[:size, label - 1] += torch.linspace(0.0, 4.0, size)
    x = x * torch.tensor([9.0, 0.4, -1.5]) + torch.tensor([78.0, 36.8, 97.0])
    for one, size in zip(x, sizes, strict=True):
        one[size:] = 0.0
    return x, labels


def molecules(count: int, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return atoms (N, 10, 5) and bonds (N, 10, 10), and one of three kinds.

    The kind is the colour that most neighbours of red atoms have.
    """
    source = _source(seed)
    colour = torch.randint(4, (count, 10), generator=source)
    bonds = (torch.rand(count, 10, 10, generator=source) < 0.3).float().triu(1)
    bonds = bonds + bonds.mT
    atoms = F.one_hot(colour, 4).float()
    near = (bonds @ atoms)[..., 1:]
    red = atoms[..., :1]
    counts = (near * red).sum(1)
    weight = 1 + 0.1 * torch.randn(count, 10, 1, generator=source)
    return (torch.cat([atoms, weight], 2), bonds), counts.argmax(1)
