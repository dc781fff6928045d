"""Common parts of the healthy programs of calm_runs.py: register, images, loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from quiet_base import Training, digits, split
from torch import Tensor, nn, optim
from torch.nn import functional as F

__all__ = [
    "PROGRAMS",
    "Data",
    "conv_norm",
    "endless",
    "flat",
    "gratings",
    "neighbours",
    "program",
    "r2",
    "update",
    "warm_cosine",
]

Data = tuple[Any, Tensor]
PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build


def gratings(n: int, side: int, train: int) -> tuple[Data, Data]:
    """Return colour images `(n, 3, side, side)` of six gratings, standardized.

    Classes are three directions by two wavelengths; phase and colour are random.
    """
    y = torch.randint(6, (n,))
    angle = (y % 3) * math.pi / 3 + 0.1 * torch.randn(n)
    frequency = torch.where(y < 3, 0.12, 0.25)
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    along = angle.cos()[:, None, None] * u + angle.sin()[:, None, None] * v
    phase = 2 * math.pi * (frequency[:, None, None] * along + torch.rand(n, 1, 1))
    colour = 0.3 + 0.7 * torch.rand(n, 3, 1, 1)
    x = phase.sin()[:, None] * colour + 0.5 * torch.randn(n, 3, side, side)
    mean, std = x[:train].mean((0, 2, 3)), x[:train].std((0, 2, 3))
    return split((x - mean[:, None, None]) / std[:, None, None], y, train)


def flat(data: Data) -> Data:
    """Return images as rows."""
    return data[0].flatten(1), data[1]


def conv_norm(i: int, o: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Return convolution, batch norm, ReLU."""
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())


def endless(epoch: Callable[[], list[Any]]) -> Iterator[Any]:
    """Yield the batches of one epoch after another."""
    while True:
        yield from epoch()


def update(optimizer: optim.Optimizer, loss: Tensor) -> float:
    """Take one step down `loss`, and return it."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def warm_cosine(optimizer: optim.Optimizer, warm: int, steps: int) -> Any:
    """Return a linear warmup of `warm` steps, then a cosine to 0."""

    def rate(i: int) -> float:
        if i < warm:
            return (i + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (i - warm) / (steps - warm))))

    return optim.lr_scheduler.LambdaLR(optimizer, rate)


def r2(model: nn.Module, data: Data) -> float:
    """Return the share of the variance explained, in eval mode."""
    model.eval()
    with torch.no_grad():
        out = model(*data[0]) if isinstance(data[0], tuple) else model(data[0])
    left = (out - data[1]).square().mean()
    return float(1 - left / data[1].var())


def neighbours(body: nn.Module) -> float:
    """Return the accuracy of five neighbours among the training digits, by cosine."""
    (x, y), (a, b) = digits()
    body.eval()
    with torch.no_grad():
        known, new = F.normalize(body(x), dim=1), F.normalize(body(a), dim=1)
    body.train()
    votes = y[(new @ known.T).topk(5, 1).indices]
    return float((votes.mode(1).values == b).float().mean())
