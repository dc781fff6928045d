"""Healthy programs on tables and graphs: counts, effects, tastes, edges, gates."""

from __future__ import annotations

import math

import torch
from calm_base import Data
from gentle_base import area_under_curve, outputs, program
from quiet_base import Training, split, supervised
from sober_base import explained_share
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Periodic(nn.Module):
    """Each column by learned waves and a map of its own, then an MLP (PLR)."""

    def __init__(self, columns: int, waves: int = 16, width: int = 8) -> None:
        super().__init__()
        self.rate = nn.Parameter(0.5 * torch.randn(columns, waves))
        self.map = nn.Parameter(torch.empty(columns, 2 * waves, width))
        nn.init.uniform_(self.map, -((2 * waves) ** -0.5), (2 * waves) ** -0.5)
        self.mlp = nn.Sequential(
            nn.Linear(columns * width, 96), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(96, 96), nn.ReLU(), nn.Dropout(0.1), nn.Linear(96, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        turn = 2 * math.pi * self.rate * x[..., None]
        waves = torch.cat((turn.cos(), turn.sin()), 2)
        return self.mlp(torch.einsum("ncw,cwd->ncd", waves, self.map).relu().flatten(1))


@program
def periodic_embeddings() -> Training:
    """Regression on eight standardized columns through periodic embeddings (PLR).

    Dropout 0.1, AdamW 2e-3, batch 128, cosine; targets standardized.
    """
    n = 3000
    x = torch.randn(n, 8)
    y = (3 * x[:, 0]).sin() + x[:, 1] * (x[:, 2] > 0) + 0.5 * (4 * x[:, 3]).cos()
    y = y + 0.3 * x[:, 4].square() + 0.3 * torch.randn(n)
    y = ((y - y[:2500].mean()) / y[:2500].std())[:, None]
    train, test = split(x, y, 2500)
    model = _Periodic(8)
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=300, goal=0.7,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


@program
def zero_inflated() -> Training:
    """Zero-inflated counts by a chance of absence and a rate (ZIP likelihood).

    MLP with LayerNorm, Adam 3e-3, clip 1, batch 100; the correlation of said and true
    means.
    """
    n = 2600
    x = torch.randn(n, 6)
    rate = (0.8 + 0.6 * x[:, 0] - 0.4 * x[:, 1] + 0.4 * (2 * x[:, 2]).sin()).exp()
    there = (0.5 + 1.5 * x[:, 3] - x[:, 4]).sigmoid()
    y = torch.poisson(rate) * (torch.rand(n) < there)
    train, _ = split(x, y, 2100)
    test = (x[2100:], (rate * there)[2100:])
    model = nn.Sequential(
        nn.Linear(6, 64), nn.LayerNorm(64), nn.SiLU(),
        nn.Linear(64, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 2),
    )  # fmt: skip

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        absent, log_rate = out.unbind(1)
        count = y * log_rate - log_rate.exp() - (y + 1).lgamma()
        none = torch.logaddexp(F.logsigmoid(absent), F.logsigmoid(-absent) + count)
        return -torch.where(y > 0, F.logsigmoid(-absent) + count, none).mean()

    def correlation(net: nn.Module, data: Data) -> float:
        absent, log_rate = outputs(net, data).unbind(1)
        mean = (-absent).sigmoid() * log_rate.exp()
        return float(torch.corrcoef(torch.stack((mean, data[1])))[0, 1])

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=100, steps=200,
        goal=0.9, loss_fn=loss_fn, score=correlation, clip=1.0,
    )  # fmt: skip


class _Arms(nn.Module):
    """Shared layers, a head of the outcome for each treatment (TARNet)."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(columns, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU()
        )
        self.arms = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 32), nn.ELU(), nn.Linear(32, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat([arm(y) for arm in self.arms], 1)


@program
def treatment_effects() -> Training:
    """Outcomes under one of two treatments, chosen by the columns (TARNet).

    ELU, no norm, AdamW 3e-3, cosine, batch 100; the share of the true effects.
    """
    n = 3000
    x = torch.randn(n, 10)
    effect = 1 + x[:, 0] + (x[:, 1] > 0).float() - 0.5 * x[:, 2].tanh()
    base = x[:, 3] + (1.5 * x[:, 4]).sin() + 0.5 * x[:, 0]
    taken = (torch.rand(n) < (0.7 * x[:, 0] - 0.5 * x[:, 3]).sigmoid()).long()
    y = base + effect * taken + 0.3 * torch.randn(n)
    mean, std = y[:2500].mean(), y[:2500].std()
    rows = torch.stack(((y - mean) / std, taken.float()), 1)
    train, test = (x[:2500], rows[:2500]), (x[2500:], effect[2500:] / std)
    model = _Arms(10)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out.gather(1, y[:, 1:].long())[:, 0], y[:, 0])

    def share(net: nn.Module, data: Data) -> float:
        out = outputs(net, data)
        left = (out[:, 1] - out[:, 0] - data[1]).square().mean()
        return float(1 - left / data[1].var())

    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=100, steps=300, goal=0.8, loss_fn=loss_fn,
        score=share, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


class _WideDeep(nn.Module):
    """Weights of crossed categories plus an MLP on embeddings and columns."""

    def __init__(self, sizes: tuple[int, ...], columns: int, crossed: int) -> None:
        super().__init__()
        self.wide = nn.Embedding(crossed, 1)
        nn.init.zeros_(self.wide.weight)
        self.embed = nn.ModuleList(nn.Embedding(k, 6) for k in sizes)
        for e in self.embed:
            nn.init.normal_(e.weight, std=0.3)
        width = 6 * len(sizes) + columns
        self.deep = nn.Sequential(
            nn.Linear(width, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
            nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, 1),
        )  # fmt: skip

    def forward(self, fields: Tensor, crossed: Tensor, x: Tensor) -> Tensor:
        found = [e(fields[:, k]) for k, e in enumerate(self.embed)]
        deep = self.deep(torch.cat((*found, x), 1))
        return (deep + self.wide(crossed).sum(1))[:, 0]


@program
def wide_and_deep() -> Training:
    """Clicks by three fields, one cross of them and four columns (wide and deep).

    BN in the deep part, AdamW at a rate of its own for the wide part, batch 128; AUC.
    """
    n, sizes = 5000, (12, 20, 8)
    fields = torch.stack([torch.randint(k, (n,)) for k in sizes], 1)
    crossed = (fields[:, 0] * 8 + fields[:, 2])[:, None]
    x = torch.randn(n, 4)
    logit = 1.5 * torch.randn(96)[crossed[:, 0]] + torch.randn(20)[fields[:, 1]]
    logit = logit + x[:, 0] - x[:, 1] * x[:, 2]
    y = (torch.rand(n) < logit.sigmoid()).float()
    train, test = split((fields, crossed, x), y, 4200)
    model = _WideDeep(sizes, 4, 96)
    deep = [*model.embed.parameters(), *model.deep.parameters()]
    optimizer = optim.AdamW(
        [{"params": model.wide.parameters(), "lr": 0.02}, {"params": deep}], 3e-3
    )
    return supervised(
        model, train, test, optimizer, size=128, steps=200, goal=0.75,
        loss_fn=F.binary_cross_entropy_with_logits,
        score=lambda net, data: area_under_curve(outputs(net, data), data[1]),
    )  # fmt: skip


class _Tastes(nn.Module):
    """Logits of all items from a noisy code of those a user has (Mult-VAE)."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.coder = nn.Sequential(nn.Linear(items, 64), nn.Tanh(), nn.Linear(64, 32))
        self.decoder = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, items))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_normal_(m.weight)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.dropout(F.normalize(x, dim=1), 0.5, self.training)
        mean, log_var = self.coder(x).chunk(2, 1)
        code = mean
        if self.training:
            code = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return self.decoder(code), mean, log_var


@program
def multinomial_tastes() -> Training:
    """Items of users from those they have, a multinomial VAE with weak KL (Mult-VAE).

    Rows of unit length, dropout 0.5, Adam 3e-3, batch 100; recall of three hidden
    items among twenty.
    """
    users, items = 2000, 200
    taste = torch.randn(users, 4)
    chance = (1.5 * taste @ torch.randn(4, items) + 0.7 * torch.randn(items)).softmax(1)
    got = torch.multinomial(chance, 18)
    rows = torch.zeros(users, items).scatter(1, got, 1.0)
    seen = torch.zeros(users, items).scatter(1, got[:, 3:], 1.0)
    train, test = (rows[:1600], rows[:1600]), (seen[1600:], got[1600:, :3])
    model = _Tastes(items)

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Tensor:
        logits, mean, log_var = out
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        return (0.2 * kl - (logits.log_softmax(1) * y).sum(1)).mean()

    def recall(net: nn.Module, data: Data) -> float:
        logits = outputs(net, data)[0].masked_fill(data[0] > 0, -math.inf)
        best = logits.topk(20, 1).indices
        return float((best[:, :, None] == data[1][:, None]).any(1).float().mean())

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=100, steps=200,
        goal=0.7, loss_fn=loss_fn, score=recall,
    )  # fmt: skip


class _Gates(nn.Module):
    """Columns times gates that are open or shut, and an MLP (STG)."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.open = nn.Parameter(0.5 * torch.ones(columns))
        self.mlp = nn.Sequential(
            nn.Linear(columns, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
            nn.Linear(32, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate = self.open
        if self.training:
            gate = gate + 0.5 * torch.randn_like(x)
        left = 0.5 * (1 + (self.open / (0.5 * 2**0.5)).erf())
        return self.mlp(x * gate.clamp(0, 1))[:, 0], left.sum()


@program
def stochastic_gates() -> Training:
    """Two classes by 5 of 30 standardized columns, found by stochastic gates (STG).

    Gates' penalty 0.01 each, Adam 6e-3 and 0.03 for the gates, batch 256; AUC.
    """
    n = 4500
    x = torch.randn(n, 30)
    logit = x[:, 0] * x[:, 1] + 2 * x[:, 2] - x[:, 3].square() + 1 + x[:, 4]
    y = (torch.rand(n) < (2 * logit).sigmoid()).float()
    train, test = split(x, y, 4000)
    model = _Gates(30)

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out[0], y) + 0.01 * out[1]

    optimizer = optim.Adam(
        [{"params": model.mlp.parameters()}, {"params": [model.open], "lr": 0.03}], 6e-3
    )
    return supervised(
        model, train, test, optimizer, size=256, steps=300, goal=0.85, loss_fn=loss_fn,
        score=lambda net, data: area_under_curve(outputs(net, data)[0], data[1]),
    )  # fmt: skip


class _Sage(nn.Module):
    """Two layers of a node's own row and the mean of sampled neighbours."""

    def __init__(self, columns: int, classes: int, width: int = 48) -> None:
        super().__init__()
        self.one = nn.Linear(2 * columns, width)
        self.two = nn.Linear(2 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def _first(self, own: Tensor, near: Tensor) -> Tensor:
        return self.norm1(self.one(torch.cat((own, near.mean(-2)), -1))).relu()

    def forward(self, own: Tensor, near: Tensor, far: Tensor) -> Tensor:
        y = torch.cat((self._first(own, near), self._first(near, far).mean(1)), 1)
        y = self.norm2(self.two(y)).relu()
        return self.head(F.dropout(y, 0.3, self.training))


@program
def sampled_neighbours() -> Training:
    """Kinds of 1500 nodes by sampled neighbours at two steps (GraphSAGE, LayerNorm).

    Eight neighbours of each and five of those, Adam 3e-3, batch 64; held-out nodes.
    """
    n, kinds, degree = 1500, 5, 10
    y = torch.randint(kinds, (n,))
    same = [(y == k).nonzero()[:, 0] for k in range(kinds)]
    mate = torch.stack([same[k][torch.randint(len(same[k]), (degree,))] for k in y])
    any_ = torch.randint(n, (n, degree))
    edges = torch.where(torch.rand(n, degree) < 0.6, mate, any_)
    x = torch.randn(kinds, 16)[y] * 0.5 + torch.randn(n, 16)
    x = (x - x.mean(0)) / x.std(0)

    def near(nodes: Tensor, many: int) -> Tensor:
        which = torch.rand(*nodes.shape, degree).argsort(-1)[..., :many]
        return edges[nodes].gather(-1, which)

    def sampled(batch: Data) -> Data:
        nodes, y = batch
        one = near(nodes, 8)
        return (x[nodes], x[one], x[near(one, 5)]), y

    order = torch.randperm(n)
    train, (rest, told) = split(order, y[order], 1100)
    model = _Sage(16, kinds)
    return supervised(
        model, train, sampled((rest, told)), optim.Adam(model.parameters(), 3e-3),
        size=64, steps=150, goal=0.85, change=sampled,
    )  # fmt: skip


@program
def species_at_sites() -> Training:
    """Twelve species of uneven rates at sites told by 60 columns, many labels.

    MLP with BN on standardized columns, weights of positives up to 5, AdamW, cosine,
    batch 64; the mean AUC.
    """
    train, test = _species()
    rate = train[1].mean(0)
    weight = ((1 - rate) / rate).sqrt().clamp(max=5)
    model = nn.Sequential(
        nn.Linear(60, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(96, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 12),
    )  # fmt: skip

    def mean_auc(net: nn.Module, data: Data) -> float:
        out = outputs(net, data)
        each = [area_under_curve(out[:, k], data[1][:, k]) for k in range(12)]
        return sum(each) / 12

    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.8,
        loss_fn=nn.BCEWithLogitsLoss(pos_weight=weight), score=mean_auc,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


def _species() -> tuple[Data, Data]:
    """Return sites of 60 columns from 8 hidden causes, and the species there."""
    n = 3000
    cause = torch.randn(n, 8)
    x = cause @ torch.randn(8, 60) / 8**0.5 + 0.5 * torch.randn(n, 60)
    x = (x - x[:2500].mean(0)) / x[:2500].std(0)
    logit = 1.2 * cause @ torch.randn(8, 12) - torch.linspace(0, 4, 12)
    return split(x, (torch.rand(n, 12) < logit.sigmoid()).float(), 2500)
