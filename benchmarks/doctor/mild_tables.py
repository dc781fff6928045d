"""Healthy programs on tables, sets and curves."""

from __future__ import annotations

import math

import torch
from calm_base import Data, flat, r2, warm_cosine
from mild_base import auc, program
from quiet_base import Training, split, supervised
from still_base import decayed, scaled_digits, table
from torch import Tensor, nn, optim
from torch.nn import functional as F

import normkit


@program
def iris_tanh() -> Training:
    """Iris, one hidden layer of 10 tanh from Xavier, no norm, SGD, batch 16: 97 %."""
    from sklearn.datasets import load_iris

    train, test = table(load_iris, 112)
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
    for each in model:
        if isinstance(each, nn.Linear):
            nn.init.xavier_uniform_(each.weight)
            nn.init.zeros_(each.bias)
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    return supervised(model, train, test, optimizer, size=16, steps=250, goal=0.9)


class _Additive(nn.Module):
    """A sum of one small network for each column, with small last weights."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(columns, width))
        self.slope = nn.Parameter(1.5 * torch.randn(columns, width))
        self.middle = nn.Parameter(torch.randn(columns, width, width))
        self.middle.data *= math.sqrt(2 / width)
        self.bias = nn.Parameter(torch.zeros(columns, width))
        self.last = nn.Parameter(0.02 * torch.randn(columns, width))
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu((x[:, :, None] - self.place) * self.slope)
        y = F.gelu(torch.einsum("ncw,cwv->ncv", y, self.middle) + self.bias)
        return (y * self.last).sum((1, 2)) + self.mean


@program
def additive_model() -> Training:
    """Neural additive model of 6 columns, GELU, no norm, AdamW, cosine, batch 100.

    Target standardized; R² 0.945, where noise leaves 0.95.
    """
    x = torch.randn(2600, 6)
    y = (2 * x[:, 0]).sin() + x[:, 1].square() / 2 + (x[:, 2] > 0) * 1.0 - x[:, 3]
    y = y + (-x[:, 4].square()).exp() + 0.35 * torch.randn(2600)
    y = (y - y[:2000].mean()) / y[:2000].std()
    train, test = split(x, y, 2000)
    model = _Additive(6, 16)
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=400, goal=0.9, score=r2,
        loss_fn=F.mse_loss,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 400),
    )  # fmt: skip


class _Sets(nn.Module):
    """Means and largest values over the members of sets `(N, M, C)` with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(
            nn.Linear(2, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 48)
        )
        self.all = nn.Sequential(
            nn.LayerNorm(96), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 1)
        )

    def forward(self, x: Tensor, is_member: Tensor) -> Tensor:
        y, kept = self.each(x), is_member[:, :, None]
        mean = (y * kept).sum(1) / kept.sum(1)
        most = y.masked_fill(~kept, -math.inf).amax(1)
        return self.all(torch.cat((mean, most), 1))[:, 0]


@program
def deep_sets() -> Training:
    """Spread of sets of 4 to 12 points in the plane, masked, layer norm, MSE.

    Adam, step decay, batch 64; R² 0.96 of the logarithm.
    """
    n, most = 2400, 12
    size = torch.randint(4, most + 1, (n,))
    is_member = torch.arange(most) < size[:, None]
    scale = (0.5 * torch.randn(n, 1, 1)).exp()
    x = (torch.randn(n, 1, 2) + scale * torch.randn(n, most, 2)) / 1.5
    kept = is_member[:, :, None]
    x = x * kept
    mean = x.sum(1, keepdim=True) / size[:, None, None]
    spread = ((x - mean).square() * kept).sum((1, 2)) / size
    y = spread.log()
    y = (y - y[:2000].mean()) / y[:2000].std()
    train, test = split((x, is_member), y, 2000)
    model = _Sets()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=420, goal=0.88, score=r2,
        loss_fn=F.mse_loss, schedule=optim.lr_scheduler.StepLR(optimizer, 140, 0.3),
    )  # fmt: skip


class _DeepFM(nn.Module):
    """Factorization machine and network on the same embeddings of categories."""

    def __init__(self, kinds: list[int], width: int) -> None:
        super().__init__()
        start = torch.tensor([0, *kinds[:-1]]).cumsum(0)
        self.register_buffer("start", start)
        self.linear, self.factors = (
            nn.Embedding(sum(kinds), 1),
            nn.Embedding(sum(kinds), width),
        )
        nn.init.zeros_(self.linear.weight)
        nn.init.normal_(self.factors.weight, std=0.1)
        self.bias = nn.Parameter(torch.zeros(()))
        self.deep = nn.Sequential(
            nn.Linear(len(kinds) * width, 32), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(32, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.start
        v = self.factors(x)
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1) / 2
        linear = self.linear(x).sum((1, 2))
        return self.bias + linear + pairs + self.deep(v.flatten(1))[:, 0]


@program
def deep_fm() -> Training:
    """Clicks from five categories by DeepFM, BCE, Adam, batch 200.

    AUC 0.83, where the true odds have 0.845.
    """
    kinds, n = [12, 20, 8, 15, 10], 12000
    x = torch.stack([torch.randint(k, (n,)) for k in kinds], 1)
    main = [0.6 * torch.randn(k) for k in kinds]
    tastes = [torch.randn(k, 2) for k in kinds[:2]]
    odds = torch.stack([m[x[:, i]] for i, m in enumerate(main)]).sum(0) - 0.8
    odds = odds + 1.2 * (tastes[0][x[:, 0]] * tastes[1][x[:, 1]]).sum(1)
    y = (torch.rand(n) < odds.sigmoid()).float()
    train, test = split(x, y, 10000)

    def ranked(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return auc(net.eval()(data[0]), data[1] > 0)

    model = _DeepFM(kinds, 6)
    optimizer = optim.Adam(model.parameters(), 1e-2, weight_decay=1e-5)
    return supervised(
        model, train, test, optimizer, size=200, steps=500, goal=0.8, score=ranked,
        loss_fn=F.binary_cross_entropy_with_logits,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 500),
    )  # fmt: skip


@program
def huber_outliers() -> Training:
    """Regression with a tenth of wild targets: Huber loss, BN of momentum 0.01.

    Eight columns, SGD with momentum, cosine, batch 32; R² 0.955 of the true values.
    """
    n = 2400
    x = torch.randn(n, 8) @ (torch.eye(8) + 0.2 * torch.randn(8, 8))
    y = (x[:, 0] * x[:, 1]).tanh() + x[:, 2] + (1.5 * x[:, 3]).sin() + 0.3 * x[:, 4]
    noisy = y + 0.1 * torch.randn(n)
    noisy = torch.where(torch.rand(n) < 0.1, noisy + 8 * torch.randn(n), noisy)
    middle, scale = noisy[:2000].median(), (noisy[:2000]).diff().abs().median()
    x = (x - x[:2000].mean(0)) / x[:2000].std(0)
    wild, clean = ((t - middle)[:, None] / scale for t in (noisy, y))
    layers: list[nn.Module] = []
    for i, o in ((8, 48), (48, 48)):
        layers += [nn.Linear(i, o, bias=False), nn.BatchNorm1d(o, momentum=0.01)]
        layers.append(nn.ReLU())
    model = nn.Sequential(*layers, nn.Linear(48, 1))
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, (x[:2000], wild[:2000]), (x[2000:], clean[2000:]), optimizer,
        size=32, steps=1500, goal=0.9, loss_fn=nn.HuberLoss(delta=0.5), score=r2,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500),
    )  # fmt: skip


class _Gated(nn.Module):
    """Pre-norm residual block with a gated linear unit (SwiGLU) and RMS norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = normkit.nn.RMSNorm(width)
        self.enter = nn.Linear(width, 2 * hidden, bias=False)
        self.leave = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.enter(self.norm(x)).chunk(2, 1)
        return x + self.leave(y * F.silu(gate))


@program
def gated_checkers() -> Training:
    """Three SwiGLU blocks with RMS norm on the squares of a board of 4 × 4.

    AdamW, warmup and cosine, clipped, batch 128: 98 %.
    """
    x = 4 * torch.rand(3500, 2)
    y = x.floor().sum(1).long() % 2
    train, test = split((x - 2) / 1.155, y, 2800)
    model = nn.Sequential(
        nn.Linear(2, 32), _Gated(32, 48), _Gated(32, 48), _Gated(32, 48),
        normkit.nn.RMSNorm(32), nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = optim.AdamW(decayed(model, 0.01), 6e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=450, goal=0.92, clip=1.0,
        schedule=warm_cosine(optimizer, 30, 450),
    )  # fmt: skip


class _Sine(nn.Module):
    """Linear layer and sine with the start of Sitzmann et al. 2020."""

    def __init__(self, i: int, o: int, omega: float, is_first: bool = False) -> None:
        super().__init__()
        self.linear, self.omega = nn.Linear(i, o), omega
        bound = 1 / i if is_first else math.sqrt(6 / i) / omega
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return (self.omega * self.linear(x)).sin()


@program
def siren_picture() -> Training:
    """SIREN learns a picture from half its pixels, Adam, cosine, batch 256.

    Coordinates in [-1, 1]; R² 0.999 at the other half.
    """
    side = 48
    line = torch.linspace(-1, 1, side)
    place = torch.cartesian_prod(line, line)
    y = torch.zeros(len(place))
    for _ in range(12):
        centre, width = 1.6 * torch.rand(2) - 0.8, 0.12 + 0.2 * torch.rand(())
        away = (place - centre).square().sum(1)
        y = y + torch.randn(()) * torch.exp(-away / width.square())
    y = (y / y.std())[:, None]
    order = torch.randperm(len(place))
    train, test = split(place[order], y[order], len(place) // 2)
    model = nn.Sequential(
        _Sine(2, 48, 8.0, is_first=True), _Sine(48, 48, 8.0), nn.Linear(48, 1)
    )
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=256, steps=500, goal=0.97, score=r2,
        loss_fn=F.mse_loss,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 500),
    )  # fmt: skip


@program
def sigmoids_with_norm() -> Training:
    """Five layers of 64 sigmoids, BN of momentum 0.3 before each; digits as rows.

    Xavier, Adam, step decay, batch 200: 98 %.
    """
    train, test = (flat(d) for d in scaled_digits())
    layers: list[nn.Module] = []
    for i in (64, 64, 64, 64, 64):
        linear = nn.Linear(i, 64, bias=False)
        nn.init.xavier_normal_(linear.weight)
        layers += [linear, nn.BatchNorm1d(64, momentum=0.3), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=200, steps=200, goal=0.93,
        schedule=optim.lr_scheduler.StepLR(optimizer, 80, 0.3),
    )  # fmt: skip


class _Absent(nn.Module):
    """Puts a learned number of each column where a value is absent (NaN)."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.instead = nn.Parameter(torch.zeros(columns))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.isnan(), self.instead, x)


@program
def learned_absent() -> Training:
    """Breast cancer; a tenth of the values is absent, learned numbers stand there.

    30 columns standardized by what is there; two layers with BN and dropout 0.2, AdamW,
    batch 32: 95 %.
    """
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(3))
    x, y = torch.tensor(x, dtype=torch.float32)[order], torch.tensor(y)[order]
    x = x.masked_fill(torch.rand(x.shape) < 0.1, math.nan)
    mean = x[:420].nanmean(0)
    std = (x[:420] - mean).square().nanmean(0).sqrt()
    train, test = split((x - mean) / std, y, 420)
    layers: list[nn.Module] = [_Absent(30)]
    for i, o in ((30, 32), (32, 16)):
        layers += [nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU()]
        layers.append(nn.Dropout(0.2))
    model = nn.Sequential(*layers, nn.Linear(16, 2))
    optimizer = optim.AdamW(decayed(model, 0.02), 2e-3)
    return supervised(model, train, test, optimizer, size=32, steps=250, goal=0.93)


@program
def anomaly_autoencoder() -> Training:
    """Autoencoder of 16 sensors driven by 3 causes; a sensor that errs is found.

    GELU, BN before a bottleneck of 3, NAdam, cosine, batch 200: AUC 0.98 of the error.
    """
    mix, bend = torch.randn(3, 16), torch.randn(3, 16)

    def sensors(n: int) -> Tensor:
        cause = torch.randn(n, 3)
        y = cause @ mix + 1.5 * (0.7 * cause @ bend).tanh()
        return y + 0.15 * torch.randn(n, 16)

    x = sensors(2500)
    mean, std = x[:2000].mean(0), x[:2000].std(0)
    x = (x - mean) / std
    bad = x[2000:].clone()
    which = torch.randint(16, (500,))
    bad[torch.arange(500), which] += 1.2 * torch.randn(500).sign()
    both = torch.cat((x[2000:], bad))
    is_bad = torch.arange(1000) >= 500

    def layer(i: int, o: int) -> list[nn.Module]:
        return [nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.GELU()]

    model = nn.Sequential(
        *layer(16, 48), *layer(48, 24), nn.Linear(24, 3), nn.Linear(3, 24), nn.GELU(),
        nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 16),
    )  # fmt: skip

    def found(net: nn.Module, _: Data) -> float:
        with torch.no_grad():
            error = (net.eval()(both) - both).square().sum(1)
        return auc(error, is_bad)

    optimizer = optim.NAdam(model.parameters(), 5e-3)
    return supervised(
        model, (x[:2000], x[:2000]), (both, both), optimizer, size=200, steps=400,
        goal=0.9, loss_fn=F.mse_loss, score=found,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 400),
    )  # fmt: skip
