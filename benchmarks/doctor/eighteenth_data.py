"""Data of the eighteenth set: signs, poses, clouds, graphs, series, reviews, tables.

Each function draws what it gives with a generator of its own, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from bugs import Batch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

__all__ = [
    "activities",
    "arms",
    "beats",
    "claims",
    "clouds",
    "digit_images",
    "exposures",
    "forces",
    "graphs",
    "loader",
    "molecules",
    "poses",
    "prices",
    "reviews",
    "roads",
    "signs",
]

Graph = tuple[Tensor, Tensor, float]


def loader(data: Any, size: int = 32, *, shuffle: bool = True) -> DataLoader[Any]:
    """Give whole batches of some tensors."""
    return DataLoader(
        TensorDataset(*data), batch_size=size, shuffle=shuffle, drop_last=shuffle
    )


def _source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    line = torch.arange(float(size))
    y, x = torch.meshgrid(line, line, indexing="ij")
    return y, x


def signs(count: int, seed: int, noise: float = 0.08) -> Batch:
    """Return images (N, 3, 16, 16) in [0, 1], and which of six signs each has."""
    source = _source(seed)
    labels = torch.randint(6, (count,), generator=source)
    y, x = _grid(16)
    centre = 5 + 5 * torch.rand(count, 2, 1, 1, generator=source)
    radius = 3 + 2 * torch.rand(count, 1, 1, generator=source)
    dy, dx = (y - centre[:, 0]) / radius, (x - centre[:, 1]) / radius
    far = (dy**2 + dx**2).sqrt()
    edge = torch.maximum(dy.abs(), dx.abs())
    shapes = torch.stack(
        [
            far < 1,
            (far < 1.1) & (far > 0.6),
            edge < 0.9,
            (edge < 1) & (edge > 0.55),
            (edge < 1) & (torch.minimum(dy.abs(), dx.abs()) < 0.3),
            (edge < 1) & ((dy - dx).abs() < 0.45),
        ]
    )
    mask = shapes[labels, torch.arange(count)].float().unsqueeze(1)
    light = 0.15 + 0.4 * torch.rand(count, 1, 1, 1, generator=source)
    paint = 0.1 + 0.35 * torch.rand(count, 3, 1, 1, generator=source)
    image = light + paint * mask
    image = image + noise * torch.randn(count, 3, 16, 16, generator=source)
    return image.clamp(0, 1), labels


def poses(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 16, 16) of any camera, and heat maps of two joints.

    One joint is a disc and the other a bar; a camera has a gain and a level.
    """
    source = _source(seed)
    y, x = _grid(16)
    at = 2 + 12 * torch.rand(count, 2, 2, 1, 1, generator=source)
    dy, dx = y - at[:, :, 0], x - at[:, :, 1]
    disc = torch.exp(-(dy[:, 0] ** 2 + dx[:, 0] ** 2) / 3)
    bar = torch.exp(-(dy[:, 1] ** 2) / 8 - dx[:, 1] ** 2 / 0.8)
    image = (disc + bar).unsqueeze(1)
    image = image + 0.15 * torch.randn(image.shape, generator=source)
    gain = torch.exp(0.6 * torch.randn(count, 1, 1, 1, generator=source))
    level = 1.5 * torch.randn(count, 1, 1, 1, generator=source)
    return gain * image + level, 3 * torch.exp(-(dy**2 + dx**2) / 4)


def roads(count: int, seed: int) -> Batch:
    """Return views (N, 3, 16, 16) in any weather, and where the road is (N, 16, 16).

    The three kinds of pixels are road, verge and sky.
    """
    source = _source(seed)
    y, x = _grid(16)
    horizon = 4 + 4 * torch.rand(count, 1, 1, generator=source)
    middle = 8 + 2 * torch.randn(count, 1, 1, generator=source)
    slope = 0.4 + 0.4 * torch.rand(count, 1, 1, generator=source)
    road = (x - middle).abs() < 1 + slope * (y - horizon)
    mask = torch.where(y < horizon, 2, torch.where(road, 0, 1))
    colours = torch.tensor([[0.3, 0.3, 0.35], [0.25, 0.4, 0.25], [0.4, 0.45, 0.6]])
    image = colours[mask].movedim(3, 1)
    light = torch.exp(0.5 * torch.randn(count, 1, 1, 1, generator=source))
    fog = 0.5 * torch.rand(count, 1, 1, 1, generator=source)
    image = light * image + fog
    return image + 0.15 * torch.randn(image.shape, generator=source), mask


def exposures(count: int, seed: int) -> Batch:
    """Return photographs (N, 3, 16, 16), and by how much to correct each (N, 1)."""
    source = _source(seed)
    image, _ = signs(count, seed + 100, 0.05)
    stops = torch.randn(count, 1, generator=source)
    x = image * torch.exp(0.6 * stops).view(-1, 1, 1, 1)
    x = x + 0.03 * torch.randn(x.shape, generator=source)
    return (x - 0.5) / 0.35, -stops


def clouds(count: int, seed: int, points: int = 48) -> Batch:
    """Return clouds of points (N, 3, 48) on a surface of one of five kinds."""
    source = _source(seed)
    labels = torch.randint(5, (count,), generator=source)
    u = torch.randn(count, points, 3, generator=source)
    sphere = u / u.norm(dim=2, keepdim=True)
    cube = u / u.abs().amax(2, keepdim=True)
    ring = sphere[..., :2] / sphere[..., :2].norm(dim=2, keepdim=True)
    height = 2 * torch.rand(count, points, 1, generator=source) - 1
    pipe = torch.cat([ring, height], 2)
    cone = torch.cat([ring * (1 - height) / 2, height], 2)
    torus = torch.cat([ring * (0.8 + 0.3 * sphere[..., 2:]), 0.3 * height], 2)
    every = torch.stack([sphere, cube, pipe, cone, torus])
    x = every[labels, torch.arange(count)]
    turn = 2 * math.pi * torch.rand(count, generator=source)
    c, s, o = turn.cos(), turn.sin(), torch.zeros(count)
    rows = [c, -s, o, s, c, o, o, o, o + 1]
    x = x @ torch.stack(rows, 1).view(count, 3, 3)
    size = torch.exp(0.3 * torch.randn(count, 1, 1, generator=source))
    x = size * x + 0.08 * torch.randn(x.shape, generator=source)
    return x.mT.contiguous(), labels


def molecules(count: int, seed: int) -> list[Graph]:
    """Return graphs of 6 to 60 atoms: features (n, 8), bonds (n, n), and a property.

    Most are small. Two traits, which all atoms of a graph show, make its property.
    """
    ways = torch.randn(2, 8, generator=_source(18))
    source = _source(seed)
    found = []
    for _ in range(count):
        n = 6 + int(54 * torch.rand(1, generator=source) ** 3)
        traits = torch.randn(2, generator=source)
        x = traits @ ways + torch.randn(n, 8, generator=source) + 1.0
        bonds = torch.eye(n)
        chain = torch.arange(n - 1)
        bonds[chain, chain + 1] = bonds[chain + 1, chain] = 1.0
        value = 1.6 * float(traits[0] * torch.sigmoid(2 * traits[1]))
        found.append((x, bonds / bonds.sum(1, keepdim=True), value))
    return found


def graphs(parts: list[Graph], most: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return features, bonds and a mask, padded to `most` atoms, and the properties."""
    x, bonds, mask = [], [], []
    for features, links, _ in parts:
        n = len(features)
        x.append(F.pad(features, (0, 0, 0, most - n)))
        bonds.append(F.pad(links, (0, most - n, 0, most - n)))
        mask.append((torch.arange(most) < n).float())
    batch = torch.stack(x), torch.stack(bonds), torch.stack(mask)
    return batch, torch.tensor([value for _, _, value in parts])


def beats(count: int, seed: int) -> Batch:
    """Return windows (N, 1, 64) of a heart, with any gain and level, and their kind."""
    source = _source(seed)
    labels = torch.randint(4, (count,), generator=source)
    time = torch.arange(64.0)
    at = 16 + 24 * torch.rand(count, 1, generator=source)
    wide = torch.tensor([1.5, 1.5, 3.0, 3.0])[labels].view(-1, 1)
    late = torch.tensor([0.5, -0.5, 0.5, -0.5])[labels].view(-1, 1)
    x = torch.exp(-(((time - at) / wide) ** 2))
    x = x + late * torch.exp(-(((time - at - 10) / 3) ** 2))
    x = x + 0.12 * torch.randn(count, 64, generator=source)
    gain = torch.exp(0.7 * torch.randn(count, 1, generator=source))
    level = 1.5 * torch.randn(count, 1, generator=source)
    return (gain * x + level).unsqueeze(1), labels


def activities(count: int, seed: int) -> Batch:
    """Return windows (N, 6, 32) of a watch, and which of five activities each is."""
    source = _source(seed)
    labels = torch.randint(5, (count,), generator=source)
    way = torch.randn(5, 6, 1, generator=_source(19))
    time = torch.arange(32.0)
    pace = torch.tensor([0.3, 0.45, 0.6, 0.8, 1.0])[labels].view(-1, 1, 1)
    pace = pace * (1 + 0.05 * torch.randn(count, 1, 1, generator=source))
    phase = 2 * math.pi * torch.rand(count, 6, 1, generator=source)
    x = torch.sin(pace * time + phase) + 0.5 * way[labels]
    wear = 0.6 * torch.randn(count, 6, 1, generator=source)
    return x + wear + 0.5 * torch.randn(count, 6, 32, generator=source), labels


def digit_images() -> tuple[Batch, Batch]:
    """Return digits (N, 8, 8) in [0, 1] for training, and for the test."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32).view(-1, 8, 8) / 16
    y = torch.tensor(y)
    order = torch.randperm(len(x), generator=_source(20))
    x, y = x[order], y[order]
    return (x[:1280], y[:1280]), (x[1280:], y[1280:])


def reviews(count: int, seed: int, length: int = 16) -> Batch:
    """Return words (N, 16) of reviews, and whether they are good.

    Words 1 to 9 praise and 10 to 18 blame; 19 turns the next word round.
    """
    source = _source(seed)
    x = torch.randint(20, 60, (count, length), generator=source)
    labels = torch.randint(2, (count,), generator=source)
    for row, label in zip(x, labels.tolist(), strict=True):
        places = torch.randperm(length - 1, generator=source)[:4] + 1
        for at in places.tolist():
            turns = bool(torch.rand(1, generator=source) < 0.3)
            good = bool(label) != turns
            row[at] = int(torch.randint(1, 10, (1,), generator=source)) + 9 * (not good)
            if turns:
                row[at - 1] = 19
            elif row[at - 1] == 19:
                row[at - 1] = 20
    return x, labels


def prices(count: int, seed: int) -> Batch:
    """Return closing prices (N, 20, 1) of shares, and the next one (N, 1)."""
    source = _source(seed)
    start = 250 + 90 * torch.randn(count, 1, generator=source)
    time = torch.arange(21.0)
    pace = 0.3 + 0.4 * torch.rand(count, 1, generator=source)
    phase = 2 * math.pi * torch.rand(count, 1, generator=source)
    x = start + 50 * torch.sin(pace * time + phase)
    x = x + 4 * torch.randn(count, 21, generator=source)
    return x[:, :-1].unsqueeze(2), x[:, -1:]


def claims(count: int, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return categories and figures (N, 8) of claims, and which of three kinds."""
    source = _source(seed)
    category = torch.randint(6, (count,), generator=source)
    z = torch.randn(count, 8, generator=source)
    lean = torch.randn(6, generator=_source(21))[category]
    worth = z[:, 0] * z[:, 1] + 1.5 * torch.sin(1.5 * z[:, 2]) + 0.7 * z[:, 3] + lean
    label = (worth > -0.8).long() + (worth > 0.8).long()
    figures = torch.cat([torch.exp(0.8 * z[:, 4:]), z[:, :4]], 1)
    return (category, figures), label


def forces(count: int, seed: int) -> Batch:
    """Return measures (N, 6) around zero, and a force (N, 1) of either sign."""
    source = _source(seed)
    z = torch.randn(count, 6, generator=source)
    y = z[:, 0] * z[:, 1] + torch.sin(2 * z[:, 2]) + 0.6 * z[:, 3].abs() - 0.5
    y = y + 0.1 * torch.randn(count, generator=source)
    return z, y.unsqueeze(1)


def arms(count: int, seed: int) -> Batch:
    """Return angles (N, 4) of a robot, and in which quarter its hand is."""
    source = _source(seed)
    angle = 1.2 * torch.randn(count, 4, generator=source)
    total = angle.cumsum(1)
    size = torch.tensor([1.0, 0.8, 0.6, 0.4])
    x, y = (size * total.cos()).sum(1), (size * total.sin()).sum(1)
    return angle, 2 * (x > 0).long() + (y > 0).long()
