"""Healthy programs on tables and graphs: words, times, ranks, molecules, facts."""

from __future__ import annotations

import itertools

import torch
from calm_base import Data
from level_base import columns
from quiet_base import Training, split, supervised
from sober_base import explained_share, program
from still_base import scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def sparse_words() -> Training:
    """Five topics of texts of 60 of 500 words, tf-idf on unit rows, MLP, no norm.

    Kaiming, dropout 0.5 on the hidden units, AdamW, batch 64.
    """
    n, words = 2000, 500
    usual = 1 / (1 + torch.arange(words).float())
    own = (0.5 * torch.randn(5, words)).exp() * usual
    y = torch.randint(5, (n,))
    drawn = torch.multinomial(own[y] / own[y].sum(1, keepdim=True), 60, True)
    count = torch.zeros(n, words).scatter_add(1, drawn, torch.ones(n, 60))
    rare = (1601 / (1 + (count[:1600] > 0).sum(0))).log() + 1
    train, test = split(F.normalize(count.log1p() * rare, dim=1), y, 1600)
    model = nn.Sequential(
        nn.Linear(words, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 5)
    )
    nn.init.kaiming_normal_(model[0].weight, nonlinearity="relu")
    return supervised(
        model, train, test, optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01),
        size=64, steps=200, goal=0.85,
    )  # fmt: skip


class _Implicit(nn.Module):
    """Quantile of a row at a given level, whose cosines gate the row (IQN)."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Linear(columns, 64), nn.LayerNorm(64), nn.ReLU())
        self.level = nn.Sequential(nn.Linear(16, 64), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        waves = (torch.pi * torch.arange(1, 17) * level[..., None]).cos()
        return self.head(self.row(x)[:, None] * self.level(waves))[..., 0]


@program
def implicit_quantiles() -> Training:
    """Quantiles at eight random levels of a row, skewed noise, pinball loss.

    Layer norm, Adam with cosine, batch 100; the score is one minus the mean gap of the
    shares below nine quantiles.
    """
    n = 3000
    x = torch.randn(n, 5)
    spread = 0.3 + 0.5 * x[:, 1].sigmoid()
    y = x[:, 0] + (2 * x[:, 2]).sin() + spread * (0.7 * torch.randn(n)).exp()
    y = ((y - y[:2500].mean()) / y[:2500].std())[:, None]
    train, test = split((x, torch.zeros(n, 8)), y, 2500)

    def drawn(batch: Data) -> Data:
        (x, _), y = batch
        level = torch.rand(len(y), 8)
        return (x, level), torch.stack((y.expand(-1, 8), level))

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        left = y[0] - out
        return torch.maximum(y[1] * left, (y[1] - 1) * left).mean()

    def calibrated(net: nn.Module, data: Data) -> float:
        levels = torch.arange(1, 10) / 10
        with torch.no_grad():
            told = net.eval()(data[0][0], levels.expand(len(data[1]), -1))
        return 1 - float(((data[1] <= told).float().mean(0) - levels).abs().mean())

    model = _Implicit(5)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=250, goal=0.95, loss_fn=loss_fn,
        score=calibrated, change=drawn,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


def _in_order(model: nn.Module, data: Data) -> float:
    """Return Harrell's concordance of the scales with the times, in eval mode."""
    model.eval()
    with torch.no_grad():
        told = model(data[0])[:, 0]
    time, seen = data[1].unbind(1)
    first = (time[:, None] < time) & (seen[:, None] > 0)
    return float((told[:, None] < told)[first].float().mean())


@program
def weibull_times() -> Training:
    """Weibull times to failure, 18 % censored: log-scale and shape by a BN net.

    Times in units of their mean, AdamW with step decay, batch 128; concordance.
    """
    n = 2400
    x = torch.randn(n, 8)
    log_scale = 0.8 * x[:, 0] + 0.6 * (x[:, 1] * x[:, 2]) - 0.5 * x[:, 3].abs()
    time = (log_scale + (-torch.rand(n).clamp(1e-6, 1 - 1e-6).log()).log() / 2).exp()
    end = 4 * -torch.rand(n).clamp(min=1e-6).log()
    seen = time <= end
    time = torch.minimum(time, end).clamp(min=1e-3)
    y = torch.stack((time / time[:2000].mean(), seen.float()), 1)
    train, test = columns(x, y, 2000)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        shape = F.softplus(out[:, 1])
        ratio = shape * (y[:, 0].log() - out[:, 0])
        rate = shape.log() + ratio - y[:, 0].log()
        return (ratio.exp() - y[:, 1] * rate).mean()

    model = nn.Sequential(
        nn.Linear(8, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Linear(48, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 2),
    )  # fmt: skip
    nn.init.zeros_(model[-1].weight)
    nn.init.constant_(model[-1].bias, 0.5)
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=128, steps=250, goal=0.75, loss_fn=loss_fn,
        score=_in_order, schedule=optim.lr_scheduler.StepLR(optimizer, 100, 0.3),
    )  # fmt: skip


def _gain(grades: Tensor, place: Tensor) -> Tensor:
    """Return the discounted gain of each document at its place, from 0."""
    return (2.0**grades - 1) / (place + 2).log2()


def _lambda_loss(out: Tensor, grades: Tensor) -> Tensor:
    """Return the pairs' logistic losses, weighed by what a swap does to NDCG."""
    place = out.detach().argsort(1, True).argsort(1).float()
    ideal = _gain(grades.sort(1, True).values, torch.arange(out.shape[1])).sum(1)
    discount = 1 / (place + 2).log2()
    swap = (2.0**grades)[:, :, None] - (2.0**grades)[:, None]
    swap = swap * (discount[:, :, None] - discount[:, None])
    better = grades[:, :, None] > grades[:, None]
    loss = F.softplus(out[:, None] - out[:, :, None]) * swap.abs() * better
    return (loss.sum((1, 2)) / ideal.clamp(min=1)).mean()


def _ndcg(model: nn.Module, data: Data) -> float:
    """Return the mean NDCG of all places, in eval mode."""
    model.eval()
    with torch.no_grad():
        order = model(data[0]).argsort(1, True)
    place = torch.arange(order.shape[1])
    ideal = _gain(data[1].sort(1, True).values, place).sum(1).clamp(min=1)
    return float((_gain(data[1].gather(1, order), place).sum(1) / ideal).mean())


@program
def lambda_rank() -> Training:
    """Twelve documents a query, grades 0 to 3, LambdaRank; NDCG of random order 0.67.

    Layer norm, ELU, Adam, batch of 32 queries, exponential decay.
    """
    n = 1000
    x = torch.randn(n, 12, 10)
    worth = x[..., 0] + x[..., 1] * x[..., 2] + (2 * x[..., 3]).tanh()
    worth = worth + 0.3 * torch.randn(n, 12) + torch.randn(n, 1)
    place = worth.argsort(1, True).argsort(1)
    grades = (place < 1).float() + (place < 3).float() + (place < 6).float()
    train, test = split(x, grades, 800)
    model = nn.Sequential(
        nn.Linear(10, 64), nn.LayerNorm(64), nn.ELU(), nn.Linear(64, 32),
        nn.LayerNorm(32), nn.ELU(), nn.Linear(32, 1, bias=False), nn.Flatten(1),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=220, goal=0.9,
        loss_fn=_lambda_loss, score=_ndcg,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
    )  # fmt: skip


class _GatedTasks(nn.Module):
    """Four shared experts; each of two tasks has its own gate and tower (MMoE)."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(self._layer(columns, 24) for _ in range(4))
        self.gates = nn.ModuleList(nn.Linear(columns, 4) for _ in range(2))
        self.towers = nn.ModuleList(
            nn.Sequential(self._layer(24, 16), nn.Linear(16, 1)) for _ in range(2)
        )

    def _layer(self, i: int, o: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        made = torch.stack([expert(x) for expert in self.experts], 1)
        tasks = zip(self.gates, self.towers, strict=True)
        mixed = [t((g(x).softmax(1)[..., None] * made).sum(1)) for g, t in tasks]
        return torch.cat(mixed, 1)


def _area(told: Tensor, yes: Tensor) -> Tensor:
    """Return the area under the ROC curve."""
    return (told[yes > 0][:, None] > told[yes == 0]).float().mean()


@program
def gated_tasks() -> Training:
    """Two yes-or-no tasks of one table by four experts and two gates, BN, Adam.

    A third and a fifth are positive; sum of the two BCE, batch 128; mean area under
    the curve.
    """
    n = 3600
    x = torch.randn(n, 12)
    both = x[:, 0] * x[:, 1] + x[:, 2]
    first = 2 * (both + x[:, 3].abs() - 1.5) + 0.5 * torch.randn(n)
    second = 2 * (both - x[:, 4] - 1.5) + 0.5 * torch.randn(n)
    y = (torch.stack((first, second), 1) > 0).float()
    train, test = columns(x, y, 3000)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return 2 * F.binary_cross_entropy_with_logits(out, y)

    def mean_area(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            out = net.eval()(data[0])
        return float(sum(_area(out[:, k], data[1][:, k]) for k in range(2)) / 2)

    model = _GatedTasks(12)
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=200, goal=0.9, loss_fn=loss_fn,
        score=mean_area, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Tied(nn.Module):
    """Autoencoder whose decoder has the encoder's matrices, transposed."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(o, i))
            for i, o in itertools.pairwise(widths)
        )
        self.into = nn.ParameterList(torch.zeros(o) for o in widths[1:])
        self.back = nn.ParameterList(torch.zeros(i) for i in widths[:-1])

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for k, (w, b) in enumerate(zip(self.weights, self.into, strict=True)):
            x = F.linear(x, w, b)
            x = x if k == last else x.tanh()
        for k in range(last, -1, -1):
            x = F.linear(x, self.weights[k].T, self.back[k])
            x = x.tanh() if k else x
        return x


@program
def tied_autoencoder() -> Training:
    """Digits as rows to ten numbers and back, matrices shared with the decoder.

    Xavier, tanh, linear code, no norm, Adam with one-cycle, batch 50, MSE.
    """
    train, test = scaled_digits()
    train, test = ((d[0].flatten(1), d[0].flatten(1)) for d in (train, test))
    model = _Tied(64, 40, 10)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=240, goal=0.6,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=241),
    )  # fmt: skip


class _Messages(nn.Module):
    """Three rounds of messages by the kind of a bond, then a gated sum (MPNN)."""

    def __init__(self, atoms: int, bonds: int, width: int = 40) -> None:
        super().__init__()
        self.into = nn.Linear(atoms, width)
        self.send = nn.Parameter(torch.randn(bonds, width, width) / width**0.5)
        self.cell = nn.GRUCell(width, width)
        self.gate = nn.Linear(2 * width, width)
        self.value = nn.Linear(width, width)
        self.head = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, atoms: Tensor, bonds: Tensor) -> Tensor:
        first = h = self.into(atoms).relu()
        for _ in range(3):
            sent = torch.einsum("nbij,njk,bkl->nil", bonds, h, self.send) / 3
            h = self.cell(sent.flatten(0, 1), h.flatten(0, 1)).view_as(h)
        gate = self.gate(torch.cat((h, first), 2)).sigmoid()
        there = atoms.sum(2, keepdim=True)
        return self.head((there * gate * self.value(h)).sum(1) / 10)


def _molecules(n: int) -> Data:
    """Return trees of 6 to 12 atoms, of 4 kinds with 2 kinds of bonds, and a number.

    It sums what the atoms give, and what each bond gives by its ends.
    """
    size = torch.randint(6, 13, (n,))
    kind, bonds = torch.randint(4, (n, 12)), torch.zeros(n, 2, 12, 12)
    charge = torch.tensor([-1.0, 0.2, 0.5, 1.2])
    y = torch.zeros(n)
    each = torch.arange(n)
    for i in range(12):
        there = size > i
        y += charge[kind[:, i]] * 0.3 * there
        if i:
            to, bond = (torch.rand(n) * i).long(), torch.randint(2, (n,))
            bonds[each, bond, i, to] = bonds[each, bond, to, i] = there.float()
            both = charge[kind[:, i]] * charge[kind[each, to]]
            y += both * (1 - 0.6 * bond) * there
    there = (torch.arange(12) < size[:, None])[..., None]
    return (F.one_hot(kind, 4) * there.float(), bonds), y


@program
def message_passing() -> Training:
    """Tell a number of small molecules by messages along two kinds of bonds and a GRU.

    One-hot atoms, padded to 12, no norm, Adam with cosine, batch 40, MSE.
    """
    x, y = _molecules(1700)
    y = ((y - y[:1400].mean()) / y[:1400].std())[:, None]
    train, test = split(x, y, 1400)
    model = _Messages(4, 2)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=40, steps=240, goal=0.8,
        loss_fn=F.mse_loss, score=explained_share, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


class _Facts(nn.Module):
    """Scores of all tails of a head and a relation, by products of three (DistMult)."""

    def __init__(self, entities: int, relations: int, width: int = 48) -> None:
        super().__init__()
        self.entities = nn.Embedding(entities, width)
        self.relations = nn.Embedding(relations, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.2)
        for each in (self.entities, self.relations):
            nn.init.xavier_normal_(each.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.entities(x[:, 0])) * self.relations(x[:, 1])
        return self.drop(y) @ self.entities.weight.T


@program
def knowledge_graph() -> Training:
    """Tails of facts about 90 entities by 6 relations, DistMult, cross entropy.

    BN of the heads, dropout 0.2, smoothing 0.1, Adam, batch 128; a tail held out among
    the ten likeliest.
    """
    entities, relations = 90, 6
    own = torch.randn(entities, 6)
    ways = torch.randn(relations, 6)
    facts = torch.cartesian_prod(torch.arange(entities), torch.arange(relations))
    strength = (own[facts[:, 0]] * ways[facts[:, 1]]) @ own.T
    tails = strength.topk(8, 1).indices
    x, y = facts.repeat_interleave(8, 0), tails.flatten()
    order = torch.randperm(len(y))
    train, test = split(x[order], y[order], 3600)

    def among(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            best = net.eval()(data[0]).topk(10, 1).indices
        return float((best == data[1][:, None]).any(1).float().mean())

    model = _Facts(entities, relations)
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=300, goal=0.5, score=among,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip
