"""Healthy programs on tables, curves and equations, after well-known examples."""

from __future__ import annotations

import math

import torch
from calm_base import Data, r2
from mild_base import auc
from quiet_base import Training, split, supervised
from steady_base import program
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def polynomial() -> Training:
    """Polynomial of degree four by a linear map of powers, smooth L1, SGD, batch 32.

    The powers are standardized, after pytorch/examples: R² 0.99, the noise's limit.
    """
    x = 4 * torch.rand(1200) - 2
    powers = x[:, None] ** torch.arange(1.0, 5.0)
    y = powers @ torch.tensor([1.0, -2.0, 0.3, 0.8])
    powers = (powers - powers[:900].mean(0)) / powers[:900].std(0)
    y = ((y - y[:900].mean()) / y[:900].std())[:, None] + 0.1 * torch.randn(1200, 1)
    train, test = split(powers, y, 900)
    model = nn.Linear(4, 1)
    return supervised(
        model, train, test, optim.SGD(model.parameters(), 0.3), size=32, steps=600,
        goal=0.95, loss_fn=F.smooth_l1_loss, score=r2,
    )  # fmt: skip


@program
def house_prices() -> Training:
    """Log prices from 9 numbers, some missing, and two kinds one-hot; MLP, Adam.

    Numbers are standardized, missing ones are at the mean with a column that says so;
    decay 1e-4, batch 64: R² 0.93 held out.
    """
    n, kept = 2400, 1800
    number = torch.randn(n, 9)
    number[:, 0] = (0.5 * number[:, 0] + 7).exp()
    quarter, roof = torch.randint(8, (n,)), torch.randint(4, (n,))
    worth = 0.5 * torch.randn(8)[quarter] + 0.2 * torch.randn(4)[roof]
    price = 0.7 * number[:, 0].log() + 0.3 * number[:, 1] + worth
    price = price + 0.2 * number[:, 2].clamp(min=0) * number[:, 3].sign()
    price = price + 0.15 * torch.randn(n)
    absent = torch.rand(n, 9) < 0.05
    absent[:, :4] = False
    number[:, 0] = number[:, 0].log()
    columns = (number - number[:kept].mean(0)) / number[:kept].std(0)
    x = torch.cat(
        (columns.masked_fill(absent, 0.0), absent[:, 4:].float(),
         F.one_hot(quarter, 8).float(), F.one_hot(roof, 4).float()), 1,
    )  # fmt: skip
    y = ((price - price[:kept].mean()) / price[:kept].std())[:, None]
    train, test = split(x, y, kept)
    model = nn.Sequential(
        nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
        nn.Linear(32, 1),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 3e-3, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=64, steps=350, goal=0.85,
        loss_fn=F.mse_loss, score=r2,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 360),
    )  # fmt: skip


class _Tabular(nn.Module):
    """Embeddings and normalized numbers, then linear, ReLU, BN twice (fast.ai)."""

    def __init__(self, sizes: list[int], numbers: int, classes: int) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(s, min(8, s // 2 + 1)) for s in sizes)
        for each in self.embeds:
            nn.init.trunc_normal_(each.weight, std=0.1)
        wide = sum(e.embedding_dim for e in self.embeds) + numbers
        self.bn_cont = nn.BatchNorm1d(numbers)
        self.layers = nn.Sequential(
            nn.Linear(wide, 80, bias=False), nn.ReLU(), nn.BatchNorm1d(80),
            nn.Linear(80, 40, bias=False), nn.ReLU(), nn.BatchNorm1d(40),
            nn.Dropout(0.1), nn.Linear(40, classes),
        )  # fmt: skip

    def forward(self, kinds: Tensor, numbers: Tensor) -> Tensor:
        x = [e(k) for e, k in zip(self.embeds, kinds.unbind(1), strict=True)]
        return self.layers(torch.cat((*x, self.bn_cont(numbers)), 1))


def _customers(n: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return three kinds and five numbers of customers, and which of three plans.

    A plan is the best of three scores, each with noise.
    """
    sizes = (12, 6, 4)
    kinds = torch.stack([torch.randint(s, (n,)) for s in sizes], 1)
    numbers = torch.randn(n, 5)
    score = torch.randn(12, 3)[kinds[:, 0]] + torch.randn(6, 3)[kinds[:, 1]]
    score = score + numbers[:, :3] @ torch.randn(3, 3)
    score = score + torch.randn(4, 3)[kinds[:, 2]] * numbers[:, 3:4]
    return (kinds, numbers), (score + 0.3 * torch.randn(n, 3)).argmax(1)


@program
def fast_ai_tabular() -> Training:
    """Three kinds and five raw numbers, BN of the numbers, ReLU then BN, one-cycle.

    AdamW with cycled momentum, batch 64: 93 % of three plans held out.
    """
    (kinds, numbers), y = _customers(3400)
    numbers = numbers * torch.tensor([1.0, 3, 0.5, 2, 1]) + 1.0
    train, test = split((kinds, numbers), y, 2700)
    model = _Tabular([12, 6, 4], 5, 3)
    optimizer = optim.AdamW(
        model.parameters(), 1e-2, betas=(0.95, 0.99), weight_decay=0.01
    )
    return supervised(
        model, train, test, optimizer, size=64, steps=300, goal=0.8,
        schedule=optim.lr_scheduler.OneCycleLR(
            optimizer, 1e-2, total_steps=301, pct_start=0.25
        ),
    )  # fmt: skip


class _Columns(nn.Module):
    """TabTransformer: kinds attend to each other; numbers are appended."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.column = nn.Embedding(22, 24), nn.Embedding(3, 24)
        self.register_buffer("first", torch.tensor([0, 12, 18]), persistent=False)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                24, 4, 48, 0.1, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.head = nn.Sequential(
            nn.Linear(77, 96), nn.SELU(), nn.Linear(96, 48), nn.SELU(), nn.Linear(48, 3)
        )
        for each in self.head:
            if isinstance(each, nn.Linear):
                nn.init.kaiming_normal_(each.weight, nonlinearity="linear")
                nn.init.zeros_(each.bias)

    def forward(self, kinds: Tensor, numbers: Tensor) -> Tensor:
        x = self.kinds(kinds + self.first) + self.column.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.cat((x.flatten(1), numbers), 1))


@program
def tab_transformer() -> Training:
    """TabTransformer of three kinds and five numbers, dropout 0.1, AdamW, batch 100.

    Pre-norm, warm-up, decay 1e-3: 90 % of three plans held out.
    """
    train, test = split(*_customers(3400), 2700)
    model = _Columns()
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=260, goal=0.8,
        schedule=optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20),
    )  # fmt: skip


class _Fourier(nn.Module):
    """Fixed random Fourier features of a place, then an MLP to a colour."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", 3.0 * torch.randn(2, 48))
        self.net = nn.Sequential(
            nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
            nn.Linear(64, 3), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, place: Tensor) -> Tensor:
        angle = 2 * math.pi * place @ self.b
        return self.net(torch.cat((angle.sin(), angle.cos()), 1))


@program
def fourier_picture() -> Training:
    """Random Fourier features draw a picture of 48 × 48, a quarter of it held out.

    Sigmoid at the end, MSE, Adam 2e-3, batch 256: R² 0.997.
    """
    side = torch.linspace(0, 1, 48)
    u, v = (g.flatten() for g in torch.meshgrid(side, side, indexing="ij"))
    rings = (14 * ((u - 0.4) ** 2 + (v - 0.6) ** 2).sqrt()).sin()
    waves = (9 * u + 4 * (6 * v).sin()).cos()
    colour = torch.stack((rings, waves, rings * waves), 1) * 0.4 + 0.5
    place = torch.stack((u, v), 1)
    order = torch.randperm(len(u))
    train, test = split(place[order], colour[order], 48 * 36)
    model = _Fourier()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 2e-3), size=256, steps=500,
        goal=0.92, loss_fn=F.mse_loss, score=r2,
    )  # fmt: skip


class _Neural(nn.Module):
    """NeuMF: a product of factors and a tower over users and items, joined."""

    def __init__(self, users: int, items: int) -> None:
        super().__init__()
        self.user_gmf, self.item_gmf = nn.Embedding(users, 8), nn.Embedding(items, 8)
        self.user_mlp, self.item_mlp = nn.Embedding(users, 16), nn.Embedding(items, 16)
        for each in (self.user_gmf, self.item_gmf, self.user_mlp, self.item_mlp):
            nn.init.normal_(each.weight, std=0.3)
        self.tower = nn.Sequential(
            nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()
        )
        self.out = nn.Linear(24, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = self.user_gmf(user) * self.item_gmf(item)
        deep = torch.cat((self.user_mlp(user), self.item_mlp(item)), 1)
        return self.out(torch.cat((product, self.tower(deep)), 1))[:, 0]


@program
def neural_filtering() -> Training:
    """NeuMF of 80 users and 120 items, who liked what, Adam, decay, batch 128.

    Area under the curve 0.86 held out, where the true chances have 0.89.
    """
    users, items, n = 80, 120, 9000
    a, b = torch.randn(users, 3), torch.randn(items, 3)
    lean = 0.8 * torch.randn(items)
    pair = torch.randperm(users * items)[:n]
    user, item = pair // items, pair % items
    logit = 1.5 * (a[user] * b[item]).sum(1) + lean[item]
    y = (torch.rand(n) < logit.sigmoid()).float()
    train, test = split((user, item), y, 7600)

    def area(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            return auc(net(*data[0]), data[1] > 0.5)

    model = _Neural(users, items)
    optimizer = optim.Adam(model.parameters(), 2e-2, weight_decay=3e-4)
    return supervised(
        model, train, test, optimizer, size=128, steps=300, goal=0.82,
        loss_fn=F.binary_cross_entropy_with_logits, score=area,
    )  # fmt: skip
