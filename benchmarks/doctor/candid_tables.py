"""Healthy programs on tables, users and items, times to an event."""

from __future__ import annotations

import math

import torch
from calm_base import Data, warm_cosine
from candid_base import area_under_curve, outputs, program
from quiet_base import Training, split, supervised
from sober_base import explained_share
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR


def _columns(x: Tensor, n: int) -> Tensor:
    """Return columns standardized by the first n rows."""
    return (x - x[:n].mean(0)) / x[:n].std(0)


def _areas(net: nn.Module, data: Data) -> float:
    """Return the area under the curve of one logit a row."""
    return area_under_curve(outputs(net, data).flatten(), data[1])


@program
def concrete_strength() -> Training:
    """Strength of concrete by its mix and age; columns and target standardized.

    Two hidden layers with BN and ReLU, MSE, Adam 5e-3, cosine, batch 64.
    """
    n, train_rows = 1030, 820
    low = torch.tensor([100.0, 0, 0, 120, 0, 800, 600])
    high = torch.tensor([540.0, 360, 200, 250, 32, 1150, 1000])
    mix = low + (high - low) * torch.rand(n, 7)
    mix[:, 1:3] *= torch.rand(n, 2) < 0.5
    ages = torch.tensor([1, 3, 7, 14, 28, 56, 90, 180, 365])
    age = ages[torch.randint(9, (n,))].float()
    binder = mix[:, 0] + 0.8 * mix[:, 1] + 0.4 * mix[:, 2]
    water = mix[:, 3] * (1 - 0.006 * mix[:, 4])
    hard = (1 + age.log()) / (1 + math.log(28))
    y = 24 * (binder / water).clamp(max=4).pow(0.8) * hard.clamp(max=1.3)
    y = y + 0.01 * (mix[:, 5] - 970) + 3 * torch.randn(n)
    x = _columns(torch.cat((mix, age[:, None].log()), 1), train_rows)
    train, test = split(x, _columns(y[:, None], train_rows), train_rows)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.85,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


@program
def leaving_customers() -> Training:
    """Tell if a customer leaves (one in five); numbers standardized, kinds one-hot.

    Two layers of BN and ReLU, dropout 0.2 before the logit, leavers weighed by 4,
    AdamW 2e-3, batch 64; the area under the curve.
    """
    n, train_rows = 4000, 3200
    months = 72 * torch.rand(n).square()
    bill = 20 + 100 * torch.rand(n)
    kinds = [torch.randint(k, (n,)) for k in (3, 3, 4, 2, 2)]
    told = 1.4 * (kinds[0] == 0) + 0.9 * (kinds[1] == 1) + 0.5 * (kinds[2] == 2)
    risk = told + 0.02 * (bill - 70) - 0.05 * months + 0.8 * kinds[3] * kinds[4] - 1.3
    y = (torch.rand(n) < (1.4 * risk).sigmoid()).float()
    numbers = torch.stack((months, bill, months * bill), 1)
    hot = [F.one_hot(k).float() for k in kinds]
    x = torch.cat((_columns(numbers, train_rows), *hot), 1)
    train, test = split(x, y[:, None], train_rows)
    weight = (train[1] < 0.5).sum() / train[1].sum()
    model = nn.Sequential(
        nn.Linear(x.shape[1], 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(32, 1),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.8,
        loss_fn=lambda out, y: F.binary_cross_entropy_with_logits(
            out, y, pos_weight=weight
        ),
        score=lambda net, data: _areas(net, (data[0], data[1][:, 0])),
    )  # fmt: skip


@program
def edible_mushrooms() -> Training:
    """Edible or not, by 16 one-hot kinds of cap, gill, ring, smell and place; an MLP.

    Two hidden layers of ReLU, no norm, SGD 0.1 with momentum, batch 32.
    """
    n, sizes = 2400, (6, 4, 10, 2, 9, 2, 2, 2, 12, 2, 4, 4, 9, 3, 6, 7)
    kind = torch.stack([(k * torch.rand(n).pow(1.3)).long() for k in sizes], 1)
    bad = (kind[:, 4] >= 5) | ((kind[:, 8] < 2) & (kind[:, 13] == 1))
    bad |= (kind[:, 0] == 2) & (kind[:, 11] > 1)
    y = bad.long()
    hot = [F.one_hot(kind[:, i], k) for i, k in enumerate(sizes)]
    train, test = split(torch.cat(hot, 1).float(), y, 2000)
    model = nn.Sequential(
        nn.Linear(sum(sizes), 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(),
        nn.Linear(24, 2),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return supervised(model, train, test, optimizer, size=32, steps=250, goal=0.93)


class _Pieces(nn.Module):
    """Columns encoded by the share of each quantile's span that is passed (PLE)."""

    def __init__(self, x: Tensor, pieces: int = 8) -> None:
        super().__init__()
        edges = x.quantile(torch.linspace(0, 1, pieces + 1), 0).T
        self.register_buffer("start", edges[:, :-1].clone())
        self.register_buffer("span", edges.diff(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        share = (x[:, :, None] - self.start) / self.span
        share[:, :, 1:-1] = share[:, :, 1:-1].clamp(0, 1)
        share[:, :, 0] = share[:, :, 0].clamp(max=1)
        share[:, :, -1] = share[:, :, -1].clamp(min=0)
        return share.flatten(1)


@program
def piecewise_linear_columns() -> Training:
    """Fit a jagged target of six columns, piecewise linear encoding and an MLP, L1.

    Dropout 0.1, layer norm, AdamW 3e-3, warm-up and cosine, batch 128; the share of the
    variance.
    """
    n = 4000
    x = torch.cat((torch.randn(n, 3), torch.rand(n, 3)), 1)
    x[:, 1] = x[:, 1].exp()
    y = (x[:, 0] > 0.3).float() + (3 * x[:, 3] % 1) - (x[:, 1] - 1).abs().clamp(max=2)
    y = y + x[:, 4] * (x[:, 2] > 0) + 0.1 * torch.randn(n)
    train, test = split(x, _columns(y[:, None], 3300), 3300)
    layers: list[nn.Module] = []
    for i in (48, 96):
        layers += [nn.Linear(i, 96), nn.LayerNorm(96), nn.ReLU(), nn.Dropout(0.1)]
    model = nn.Sequential(_Pieces(train[0]), *layers, nn.Linear(96, 1))
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=240, goal=0.8,
        loss_fn=F.l1_loss, score=explained_share,
        schedule=warm_cosine(optimizer, 15, 240),
    )  # fmt: skip


class _Collaborative(nn.Module):
    """Product of embeddings beside an MLP over others (NeuMF)."""

    def __init__(self, users: int, items: int, width: int = 16) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_deep = nn.Embedding(users, width)
        self.item_deep = nn.Embedding(items, width)
        self.mlp = nn.Sequential(
            nn.Linear(2 * width, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()
        )
        self.head = nn.Linear(width + 16, 1)
        for m in self.modules():
            if isinstance(m, nn.Embedding):
                nn.init.normal_(m.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        near = self.users(user) * self.items(item)
        deep = self.mlp(torch.cat((self.user_deep(user), self.item_deep(item)), 1))
        return self.head(torch.cat((near, deep), 1))[:, 0]


@program
def neural_collaborative() -> Training:
    """Which of 80 films 200 people watch, four others beside each watched, by NeuMF.

    BCE, Adam 5e-3, batch 256; the area under the curve of pairs held out.
    """
    users, items = 200, 80
    taste = torch.randn(users, 4) @ torch.randn(4, items) + 0.7 * torch.randn(items)
    watched = torch.rand(users, items) < (1.2 * taste - 2).sigmoid()
    pairs = watched.nonzero()
    others = (~watched).nonzero()
    others = others[torch.randperm(len(others))[: 4 * len(pairs)]]
    rows = torch.cat((pairs, others))
    y = torch.cat((torch.ones(len(pairs)), torch.zeros(len(others))))
    order = torch.randperm(len(y))
    user, item = rows[order].unbind(1)
    train, test = split((user, item), y[order], int(0.85 * len(y)))
    model = _Collaborative(users, items)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=256, steps=300, goal=0.8,
        loss_fn=F.binary_cross_entropy_with_logits, score=_areas,
    )  # fmt: skip


@program
def accelerated_failure() -> Training:
    """Fit times to a failure, a third censored, as log-normal laws by an MLP.

    Layer norm, dropout 0.1, Adam 3e-3, cosine, batch 64; the share of pairs in order.
    """
    n = 2400
    x = torch.randn(n, 9)
    middle = 0.8 * x[:, 0] - 0.6 * x[:, 1] + 0.5 * (2 * x[:, 2]).sin() * x[:, 3]
    log_time = 1 + middle + 0.5 * torch.randn(n)
    log_end = 1.6 + 1.2 * torch.randn(n)
    died = (log_time < log_end).float()
    y = torch.stack((torch.minimum(log_time, log_end), died), 1)
    train, test = split(x, y, 2000)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        log_sd = out[:, 1].clamp(-3, 3)
        z = (y[:, 0] - out[:, 0]) / log_sd.exp()
        event = 0.5 * z.square() + log_sd
        return torch.where(y[:, 1] > 0, event, -torch.special.log_ndtr(-z)).mean()

    def in_order(net: nn.Module, data: Data) -> float:
        told, (time, died) = outputs(net, data)[:, 0], data[1].unbind(1)
        known = (time[:, None] < time) & (died[:, None] > 0)
        return float((told[:, None] < told)[known].float().mean())

    model = nn.Sequential(
        nn.Linear(9, 48), nn.LayerNorm(48), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(48, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 2),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=220, goal=0.78, loss_fn=loss_fn,
        score=in_order, schedule=CosineAnnealingLR(optimizer, 220),
    )  # fmt: skip
