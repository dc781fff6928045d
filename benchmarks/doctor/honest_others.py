"""Healthy programs of further kinds: solids, flows, graphs, waves."""

from __future__ import annotations

import math

import torch
from calm_base import Data, endless, update
from honest_base import conv_group, outputs, program
from quiet_base import Subject, Training, digits, split, supervised
from sober_base import explained_share
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def voxel_net() -> Training:
    """Solids of four kinds in grids of 12³ cells, 0 or 1, by VoxNet with BN.

    Leaky ReLU, dropout 0.3, Adam 2e-3, step decay, batch 32.
    """
    n, side = 900, 12
    y, size = torch.randint(4, (n,)), (3.2 + 1.6 * torch.rand(n, 1, 1, 1))
    grid = torch.stack(torch.meshgrid(*[torch.arange(side) - 5.5] * 3, indexing="ij"))
    at = grid + (2 * torch.rand(n, 3, 1, 1, 1) - 1)
    turn, _ = torch.linalg.qr(torch.randn(n, 3, 3))
    at = torch.einsum("nij,njabc->niabc", turn, at).abs()
    flat = at[:, :2].square().sum(1).sqrt()
    solids = torch.stack((
        at.square().sum(1).sqrt() < size, at.amax(1) < 0.8 * size,
        (flat < 0.45 * size) & (at[:, 2] < 1.4 * size),
        ((flat - 0.75 * size).abs() < 1.1) & (at[:, 2] < 1.1),
    ))  # fmt: skip
    x = solids[y, torch.arange(n)].float()[:, None]
    x = torch.where(torch.rand(x.shape) < 0.01, 1 - x, x)
    train, test = split(x, y, 720)
    model = nn.Sequential(
        nn.Conv3d(1, 12, 3, bias=False), nn.BatchNorm3d(12), nn.LeakyReLU(0.1),
        nn.Conv3d(12, 24, 3, 2, bias=False), nn.BatchNorm3d(24), nn.LeakyReLU(0.1),
        nn.MaxPool3d(2), nn.Flatten(), nn.Linear(24 * 8, 64), nn.LeakyReLU(0.1),
        nn.Dropout(0.3), nn.Linear(64, 4),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=150, goal=0.9,
        schedule=optim.lr_scheduler.StepLR(optimizer, 100, 0.2),
    )  # fmt: skip


class _Flow(nn.Module):
    """Change of a map over time by two convolutions; four steps of Heun's rule."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = conv_group(width + 1, width), conv_group(width, width)
        self.last = nn.Conv2d(width, width, 3, 1, 1)

    def change(self, t: float, x: Tensor) -> Tensor:
        time = torch.full_like(x[:, :1], t)
        return self.last(self.second(self.first(torch.cat((x, time), 1))))

    def forward(self, x: Tensor) -> Tensor:
        h = 0.25
        for k in range(4):
            slope = self.change(k * h, x)
            x = x + h / 2 * (slope + self.change((k + 1) * h, x + h * slope))
        return x


@program
def ode_blocks() -> Training:
    """Digits by an ODE-Net: strided stem, a flow by Heun's rule, head; group norm.

    SGD 0.05 with momentum 0.9, cosine, clip 1, batch 64.
    """
    train, test = digits()
    mean, std = train[0].mean(), train[0].std()
    model = nn.Sequential(
        conv_group(1, 24), conv_group(24, 24, 2), _Flow(24), nn.GroupNorm(4, 24),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, ((train[0] - mean) / std, train[1]), ((test[0] - mean) / std, test[1]),
        optimizer, size=64, steps=240, goal=0.93, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


class _Propagated(nn.Module):
    """Logits of each node by an MLP, spread over the graph (APPNP)."""

    def __init__(self, spread: Tensor, words: int, kinds: int) -> None:
        super().__init__()
        self.register_buffer("spread", spread)
        self.body = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(words, 32), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(32, kinds),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        first = y = self.body(x)
        for _ in range(10):
            y = 0.9 * self.spread @ y + 0.1 * first
        return y


@program
def predict_then_propagate() -> Training:
    """Topics of 600 papers by words, 0 or 1, and citations; 20 labels a topic (APPNP).

    Rows of words sum to 1, dropout 0.5, Adam 0.01, decay 5e-3, whole graph a step.
    """
    n, kinds, words = 600, 5, 200
    y = torch.randint(kinds, (n,))
    rate = 0.02 + 0.06 * (torch.rand(kinds, words) < 0.15)
    x = (torch.rand(n, words) < rate[y]).float()
    x = x / x.sum(1, keepdim=True).clamp(min=1)
    links = torch.rand(n, n) < torch.where(y[:, None] == y, 0.025, 0.002)
    links = (links.triu(1) | links.triu(1).T).float() + torch.eye(n)
    degree = links.sum(1).rsqrt()
    labels = torch.full((n,), -100)
    for k in range(kinds):
        rows = (y == k).nonzero()[:20, 0]
        labels[rows] = k
    model = _Propagated(degree[:, None] * links * degree, words, kinds)
    optimizer = optim.Adam([
        {"params": model.body[1].parameters(), "weight_decay": 5e-3},
        {"params": model.body[4].parameters()},
    ], 0.01)  # fmt: skip

    def step(_: int) -> float:
        model.train()
        return update(optimizer, F.cross_entropy(model(x), labels))

    def score() -> float:
        found = outputs(model, (x, y)).argmax(1)
        return float((found == y)[labels < 0].float().mean())

    subject = Subject(model, lambda: [(x, labels)] * 10, F.cross_entropy, optimizer)
    return Training([subject], step, 200, score, 0.8)


class _String(nn.Module):
    """Place of a string by position and time; start and ends are built in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(),
            nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1),
        )  # fmt: skip
        for m in self.net:
            if isinstance(m, nn.Linear):
                nn.init.xavier_normal_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, at: Tensor) -> Tensor:
        x, t = at[:, :1], at[:, 1:]
        free = self.net(2 * at - 1)
        return (math.pi * x).sin() + t.square() * 4 * x * (1 - x) * free

    def residual(self, at: Tensor) -> Tensor:
        """Return u_tt - u_xx at each point."""
        with torch.enable_grad():
            at = at.detach().requires_grad_()
            slope = torch.autograd.grad(self(at).sum(), at, create_graph=True)[0]
            parts = [
                torch.autograd.grad(slope[:, k].sum(), at, create_graph=True)[0][:, k]
                for k in range(2)
            ]
        return parts[1] - parts[0]


@program
def wave_on_string() -> Training:
    """Motion of a string by the wave equation at 200 new points a step (PINN).

    Start and ends built in, tanh from Xavier, Adam 5e-3, exponential decay; the share
    of the exact motion.
    """
    model = _String()
    optimizer = optim.Adam(model.parameters(), 5e-3)
    fall = optim.lr_scheduler.ExponentialLR(optimizer, 0.992)

    def drawn() -> list[Data]:
        points = [torch.rand(200, 2) for _ in range(20)]
        return [(at, torch.zeros(200)) for at in points]

    rows = endless(drawn)

    def step(_: int) -> float:
        model.train()
        at, zero = next(rows)
        loss = update(optimizer, F.mse_loss(model.residual(at), zero))
        fall.step()
        return loss

    def score() -> float:
        at = torch.rand(2000, 2)
        x, t = (math.pi * at).unbind(1)
        return explained_share(model, (at, (x.sin() * t.cos())[:, None]))

    subject = Subject(
        model, drawn, F.mse_loss, optimizer,
        forward=lambda net, batch: net.residual(batch[0]),
    )  # fmt: skip
    return Training([subject], step, 300, score, 0.95)
