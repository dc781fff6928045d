"""Data of the sixth set: clouds of points, recordings, graphs, series and scenes.

Each function gives batches without an end; a number draws them, so that two calls with
the same arguments give the same data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bugs import Batch
from torch.nn import functional as F

__all__ = [
    "clouds",
    "credit",
    "graphs",
    "marks",
    "recordings",
    "scenes",
    "series",
    "textures",
    "words",
]


def clouds(size: int = 32, seed: int = 0, points: int = 48) -> Iterator[Batch]:
    """Give points (N, 3, points) of a surface, and which of four it is.

    Sphere, cube, cylinder and cone are turned about the vertical and scaled.
    """
    source = torch.Generator().manual_seed(seed)
    while True:
        y = torch.randint(4, (size,), generator=source)
        ball = torch.randn(size, 3, points, generator=source)
        cube = 2 * torch.rand(size, 3, points, generator=source) - 1
        angle = 6.3 * torch.rand(size, points, generator=source)
        height = 2 * torch.rand(size, points, generator=source) - 1
        radius = (1 - height) / 2
        surfaces = torch.stack(
            [
                ball / ball.norm(dim=1, keepdim=True),
                cube / cube.abs().amax(1, keepdim=True),
                torch.stack([angle.cos(), angle.sin(), height], 1),
                torch.stack([radius * angle.cos(), radius * angle.sin(), height], 1),
            ]
        )
        x = surfaces[y, torch.arange(size)]
        turn = 6.3 * torch.rand(size, 1, generator=source)
        a, b = x[:, 0].clone(), x[:, 1].clone()
        x[:, 0], x[:, 1] = (
            a * turn.cos() - b * turn.sin(),
            a * turn.sin() + b * turn.cos(),
        )
        scale = 0.7 + 0.6 * torch.rand(size, 1, 1, generator=source)
        yield scale * x + 0.05 * torch.randn(x.shape, generator=source), y


def recordings(size: int = 32, seed: int = 0, unit: float = 1.0) -> Iterator[Batch]:
    """Give eight electrodes over 128 samples (N, 8, 128), and which of four hands.

    A rhythm of 10 µV is weaker over one pair of electrodes, in noise of 10 µV; `unit`
    is how many of the unit of x are a microvolt.
    """
    source = torch.Generator().manual_seed(seed)
    time = torch.arange(128.0) / 128
    while True:
        y = torch.randint(4, (size,), generator=source)
        phase = 6.3 * torch.rand(size, 8, 1, generator=source)
        rate = 9 + 3 * torch.rand(size, 1, 1, generator=source)
        strength = torch.full((size, 8, 1), 10.0)
        for pair in range(2):
            strength[torch.arange(size), 2 * y + pair] = 2.0
        noise = 10 * torch.randn(size, 8, 128, generator=source)
        x = strength * (6.283 * rate * time + phase).sin() + noise
        yield unit * x, y


def graphs(size: int = 32, seed: int = 0, nodes: int = 12) -> Iterator[Batch]:
    """Give graphs, adjacency beside four features (N, 12, 16), and which of three.

    Trees, rings with three chords, and two groups with one edge between them.
    """
    source = torch.Generator().manual_seed(seed)
    while True:
        x, y = [], torch.randint(3, (size,), generator=source)
        for kind in y.tolist():
            a = torch.zeros(nodes, nodes)
            if kind == 0:
                for node in range(1, nodes):
                    a[node, torch.randint(node, (), generator=source)] = 1
            elif kind == 1:
                a[torch.arange(nodes), (torch.arange(nodes) + 1) % nodes] = 1
                for _ in range(3):
                    one, other = torch.randint(nodes, (2,), generator=source)
                    a[one, other] = 1
            else:
                half = nodes // 2
                drawn = torch.rand(2, half, half, generator=source) < 0.4
                a[:half, :half], a[half:, half:] = drawn[0], drawn[1]
                a[0, half] = 1
            a = ((a + a.T) > 0).float().fill_diagonal_(0)
            order = torch.randperm(nodes, generator=source)
            a = a[order][:, order]
            features = 0.3 * torch.randn(nodes, 4, generator=source)
            features[:, 0] += a.sum(1)
            x.append(torch.cat([a, features], 1))
        yield torch.stack(x), y


def series(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give 48 hours of the demand of a shop (N, 1, 48), and the next 12 (N, 12).

    Shops differ in level and in how much they swing; both are in units of the whole.
    """
    source = torch.Generator().manual_seed(seed)
    time = torch.arange(60.0)
    while True:
        level = 1.5 * torch.randn(size, 1, generator=source)
        swing = 0.3 + torch.rand(size, 1, generator=source)
        phase = 6.3 * torch.rand(size, 1, generator=source)
        slope = 0.01 * torch.randn(size, 1, generator=source)
        noise = 0.1 * torch.randn(size, 60, generator=source)
        x = level + swing * (6.283 * time / 24 + phase).sin() + slope * time + noise
        yield x[:, None, :48], x[:, 48:]


def scenes(size: int = 16, seed: int = 0) -> Iterator[Batch]:
    """Give images (N, 1, 32, 32) of squares, and where their centres are (N, 336).

    Squares of 3, 7 and 15 pixels belong to grids of 16, 8 and 4 cells a side.
    """
    source = torch.Generator().manual_seed(seed)
    grid = torch.arange(32)
    while True:
        x = 0.3 * torch.randn(size, 1, 32, 32, generator=source)
        levels = [torch.zeros(size, side, side) for side in (16, 8, 4)]
        for index in range(size):
            for _ in range(3):
                level = int(torch.randint(3, (), generator=source))
                half = (1, 3, 7)[level]
                row, column = torch.randint(half, 32 - half, (2,), generator=source)
                inside = ((grid - row).abs() <= half)[:, None]
                inside = inside & ((grid - column).abs() <= half)
                x[index, 0][inside] += 1.0
                cell = 2 << level
                levels[level][index, row // cell, column // cell] = 1
        yield x, torch.cat([level.flatten(1) for level in levels], 1)


def textures(size: int = 32, seed: int = 0) -> Iterator[Batch]:
    """Give textures (N, 1, 16, 16), and brightness, contrast and grain (N, 3)."""
    source = torch.Generator().manual_seed(seed)
    while True:
        y = torch.randn(size, 3, generator=source)
        coarse = torch.randn(size, 1, 4, 4, generator=source)
        content = F.interpolate(coarse, (16, 16), mode="bilinear")
        grain = torch.randn(size, 1, 16, 16, generator=source)
        brightness, contrast, amount = y[:, :, None, None, None].unbind(1)
        grain = 0.2 * (amount / 2).exp() * grain
        yield (0.5 * contrast).exp() * (content + grain) + brightness, y


def credit(size: int = 64, seed: int = 0) -> Iterator[Batch]:
    """Give payments (N, 9), three codes of ten and six numbers, and which are fraud.

    About one of 20 is; it depends on pairs of codes, and on two of the numbers.
    """
    source = torch.Generator().manual_seed(seed)
    secret = torch.Generator().manual_seed(99)
    table = torch.randn(3, 10, generator=secret)
    while True:
        codes = torch.randint(10, (size, 3), generator=source)
        numbers = torch.randn(size, 6, generator=source)
        risk = sum(table[column, codes[:, column]] for column in range(3))
        risk = risk + 1.5 * numbers[:, 0] + numbers[:, 1].abs()
        risk = risk + 0.3 * torch.randn(size, generator=source)
        yield torch.cat([codes.float(), numbers], 1), (risk > 4.7).long()


def words(size: int = 32, seed: int = 0, length: int = 24) -> Iterator[Batch]:
    """Give sequences of 64 words, each with four that may follow, and their next."""
    source = torch.Generator().manual_seed(seed)
    follow = torch.randint(64, (64, 4), generator=torch.Generator().manual_seed(98))
    while True:
        steps = [torch.randint(64, (size,), generator=source)]
        for _ in range(length):
            choice = torch.randint(4, (size,), generator=source)
            steps.append(follow[steps[-1], choice])
        text = torch.stack(steps, 1)
        yield text[:, :-1], text[:, 1:]


def marks(size: int = 32, seed: int = 0, length: int = 40) -> Iterator[Batch]:
    """Give noise (N, length, 5) whose first step marks one of four, and which."""
    source = torch.Generator().manual_seed(seed)
    while True:
        y = torch.randint(4, (size,), generator=source)
        x = 0.5 * torch.randn(size, length, 5, generator=source)
        x[:, :, 4] = 0
        x[:, 0] = F.pad(2 * F.one_hot(y, 4).float(), (0, 1), value=1.0)
        yield x, y
