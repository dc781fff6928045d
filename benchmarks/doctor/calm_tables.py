"""Healthy programs on tables: counts, times, ranks, ratings, quantiles."""

from __future__ import annotations

import math

import torch
from calm_base import Data, program, r2
from quiet_base import Training, accuracy, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F


def _linear_norm(i: int, o: int, drop: float) -> list[nn.Module]:
    return [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU(), nn.Dropout(drop)]


class _Entities(nn.Module):
    """Embeddings of categories beside normed numbers (Guo and Berkhahn 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(levels, width) for levels, width in ((12, 6), (7, 4), (30, 8))
        )
        self.drop, self.norm = nn.Dropout(0.05), nn.BatchNorm1d(5)
        self.body = nn.Sequential(
            *_linear_norm(23, 64, 0.1), *_linear_norm(64, 32, 0.1), nn.Linear(32, 2)
        )

    def forward(self, levels: Tensor, numbers: Tensor) -> Tensor:
        known = [t(levels[:, i]) for i, t in enumerate(self.tables)]
        return self.body(
            torch.cat((self.drop(torch.cat(known, 1)), self.norm(numbers)), 1)
        )


@program
def entity_embeddings() -> Training:
    """Three embedded categories, five numbers under batch norm, BN and dropout.

    AdamW, one-cycle, batch 100: 88 % of a label with noise.
    """
    n = 4000
    levels = torch.stack([torch.randint(k, (n,)) for k in (12, 7, 30)], 1)
    numbers = torch.randn(n, 5)
    effects = [torch.randn(k) for k in (12, 7, 30)]
    logit = sum(e[levels[:, i]] for i, e in enumerate(effects))
    logit = logit + 1.5 * numbers[:, 0] * (levels[:, 1] - 3) / 2 + numbers[:, 1]
    y = (torch.rand(n) < (3 * logit).sigmoid()).long()
    train, test = split((levels, numbers), y, 3200)
    model = _Entities()
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=100, steps=320, goal=0.82, score=accuracy,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=321),
    )  # fmt: skip


class _TableResidual(nn.Module):
    """Block of the ResNet for tables of Gorishniy et al. 2021."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(0.1)
        self.grow, self.shrink = (
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shrink(self.drop(F.relu(self.grow(self.norm(x)))))


class _TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(10, 48), _TableResidual(48), _TableResidual(48),
            nn.BatchNorm1d(48), nn.ReLU(),
        )  # fmt: skip
        self.number, self.kind = nn.Linear(48, 1), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.trunk(x)
        return self.number(y), self.kind(y)


@program
def table_resnet_two_tasks() -> Training:
    """ResNet for tables with two heads, a standardized number and one of 3 kinds.

    Heavy-tailed columns clipped at 1 and 99 %, Huber and cross entropy, AdamW, batch
    128: mean of R² and accuracy 0.92.
    """
    n, kept = 3000, 2400
    x = torch.distributions.StudentT(3.0).sample((n, 10))
    low, high = x[:kept].quantile(0.01, dim=0), x[:kept].quantile(0.99, dim=0)
    x = x.clamp(low, high)
    x = (x - x[:kept].mean(0)) / x[:kept].std(0)
    y = x[:, 0] * x[:, 1] + torch.sin(2 * x[:, 2]) + x[:, 3] + 0.2 * torch.randn(n)
    y = (y - y[:kept].mean()) / y[:kept].std()
    kinds = torch.stack((x[:, 4], x[:, 5], x[:, 1] + x[:, 3]), 1)
    kind = (kinds + 0.1 * torch.randn(n, 3)).argmax(1)
    train, test = split(x, torch.stack((y, kind.float()), 1), kept)

    def loss_fn(out: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        number, kind = out
        fit = F.huber_loss(number[:, 0], t[:, 0])
        return fit + 0.5 * F.cross_entropy(kind, t[:, 1].long())

    def score(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            number, kind = net(data[0])
        left = (number[:, 0] - data[1][:, 0]).square().mean() / data[1][:, 0].var()
        right = (kind.argmax(1) == data[1][:, 1]).float().mean()
        net.train()
        return float(1 - left + right) / 2

    model = _TwoTasks()
    return supervised(
        model, train, test, optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-4),
        size=128, steps=400, goal=0.8, loss_fn=loss_fn, score=score,
    )  # fmt: skip


@program
def quantiles() -> Training:
    """Three quantiles by the pinball loss; columns in [0, 1], then BN without affine.

    Layer norm inside, Adam, batch 64; 80 % lie between the outer two.
    """
    n = 3000
    x = torch.rand(n, 6) ** torch.tensor([1.0, 2, 0.5, 1, 1, 1])
    middle = torch.sin(4 * x[:, 0]) + 2 * x[:, 1] * x[:, 2]
    y = (middle + (0.1 + 0.6 * x[:, 3]) * torch.randn(n))[:, None]
    y = (y - y[:2400].mean()) / y[:2400].std()
    train, test = split(x, y, 2400)
    model = nn.Sequential(
        nn.BatchNorm1d(6, affine=False),
        nn.Linear(6, 64), nn.LayerNorm(64), nn.SiLU(),
        nn.Linear(64, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 3),
    )  # fmt: skip
    taus = torch.tensor([0.1, 0.5, 0.9])

    def pinball(out: Tensor, y: Tensor) -> Tensor:
        over = y - out
        return torch.maximum(taus * over, (taus - 1) * over).mean()

    def gained(net: nn.Module, data: Data) -> float:
        """Return the share of the loss of constant quantiles that is gone."""
        net.eval()
        with torch.no_grad():
            constant = pinball(train[1].quantile(taus, dim=0).T, data[1])
            return 1 - float(pinball(net(data[0]), data[1]) / constant)

    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=500, goal=0.25, loss_fn=pinball,
        score=gained, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 500),
    )  # fmt: skip


class _Rate(nn.Module):
    """Log of an expected count: log rate plus log exposure."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(8, 48), nn.LayerNorm(48), nn.ReLU(),
            nn.Linear(48, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 1),
        )  # fmt: skip

    def forward(self, x: Tensor, exposure: Tensor) -> Tensor:
        return self.body(x)[:, 0] + exposure.log()


@program
def claim_counts() -> Training:
    """Poisson regression of claims, log link, exposure as offset, layer norm, Adam.

    Six numbers and a binary column as one-hot, batch 128: 45 % of the deviance.
    """
    n = 5000
    numbers, flag = torch.randn(n, 6), torch.rand(n) < 0.3
    x = torch.cat((numbers, F.one_hot(flag.long(), 2).float()), 1)
    exposure = 0.2 + 0.8 * torch.rand(n)
    rate = (0.6 * x[:, 0] + 0.4 * x[:, 1] * x[:, 2] + 0.8 * x[:, 6] - 0.5).exp()
    y = torch.poisson(2 * rate * exposure)
    train, test = split((x, exposure), y, 4000)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.poisson_nll_loss(out, y)

    def deviance(log_mean: Tensor, y: Tensor) -> float:
        ratio = torch.where(y > 0, y * (y.clamp(min=1).log() - log_mean), 0.0)
        return float(2 * (ratio - y + log_mean.exp()).mean())

    def explained(net: nn.Module, data: Data) -> float:
        net.eval()
        (x, exposure), y = data
        with torch.no_grad():
            mean = (y.sum() / exposure.sum() * exposure).log()
            return 1 - deviance(net(x, exposure), y) / deviance(mean, y)

    model = _Rate()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 2e-3, weight_decay=1e-5),
        size=128, steps=450, goal=0.3, loss_fn=loss_fn, score=explained,
    )  # fmt: skip


def _cox(risk: Tensor, target: Tensor) -> Tensor:
    """Return the negative partial log-likelihood of a batch (Cox 1975), per event."""
    order = target[:, 0].argsort(descending=True)
    risk, event = risk[order, 0], target[order, 1]
    return -((risk - risk.logcumsumexp(0)) * event).sum() / event.sum().clamp(min=1)


@program
def survival() -> Training:
    """DeepSurv: Cox's loss, a third censored, BN and dropout, RMSprop, batch 128.

    Concordance 0.8.
    """
    n = 2600
    x = torch.randn(n, 8)
    hazard = (x[:, 0] + x[:, 1] ** 2 / 1.5 - x[:, 2] * x[:, 3]).clamp(-4, 4)
    time = -torch.rand(n).clamp(min=1e-6).log() / hazard.exp()
    last = -torch.rand(n).clamp(min=1e-6).log() * 2
    target = torch.stack((torch.minimum(time, last), (time <= last).float()), 1)
    train, test = split(x, target, 2000)
    model = nn.Sequential(
        *_linear_norm(8, 48, 0.1), *_linear_norm(48, 24, 0.1),
        nn.Linear(24, 1, bias=False),
    )  # fmt: skip

    def concordance(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            risk = net(data[0])[:, 0]
        time, event = data[1].T
        pairs = (time[:, None] < time[None]) & (event[:, None] > 0)
        return float((risk[:, None] > risk[None])[pairs].float().mean())

    return supervised(
        model, train, test, optim.RMSprop(model.parameters(), 2e-3), size=128,
        steps=350, goal=0.72, loss_fn=_cox, score=concordance,
    )  # fmt: skip


@program
def ranking() -> Training:
    """RankNet: 16 documents a query, grades 0 to 4, layer norm, SGD with momentum.

    32 queries a batch; 97 % of the pairs of different grades in order.
    """
    n = 900
    x = torch.randn(n, 16, 10)
    merit = x[..., 0] + x[..., 1] * x[..., 2] + torch.relu(x[..., 3])
    merit = merit + 0.3 * torch.randn(n, 16)
    grade = torch.bucketize(merit, torch.tensor([-0.5, 0.3, 1.2, 2.2])).float()
    train, test = split(x, grade, 700)
    model = nn.Sequential(
        nn.Linear(10, 64), nn.LayerNorm(64), nn.ReLU(),
        nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(1),
    )  # fmt: skip

    def pairs(out: Tensor, grade: Tensor) -> tuple[Tensor, Tensor]:
        return out[:, :, None] - out[:, None], grade[:, :, None] > grade[:, None]

    def loss_fn(out: Tensor, grade: Tensor) -> Tensor:
        ahead, better = pairs(out, grade)
        return F.softplus(-ahead)[better].mean()

    def ordered(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            ahead, better = pairs(net.eval()(data[0]), data[1])
        return float((ahead[better] > 0).float().mean())

    return supervised(
        model, train, test,
        optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-5), size=32,
        steps=400, goal=0.92, loss_fn=loss_fn, score=ordered,
    )  # fmt: skip


class _Factors(nn.Module):
    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_bias, self.item_bias = nn.Embedding(users, 1), nn.Embedding(items, 1)
        self.mean = nn.Parameter(torch.tensor(3.5))
        for each in (self.user, self.item):
            nn.init.normal_(each.weight, std=0.3 / math.sqrt(width))
        for each in (self.user_bias, self.item_bias):
            nn.init.zeros_(each.weight)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        bias = self.mean + self.user_bias(user)[:, 0] + self.item_bias(item)[:, 0]
        return bias + (self.user(user) * self.item(item)).sum(1)


@program
def matrix_factorization() -> Training:
    """Ratings 1 to 5 by factors of 8 and biases, no norm, Adam with decay, batch 256.

    R² 0.89 of ratings that were held out.
    """
    users, items, n = 150, 100, 9000
    tastes, kinds = torch.randn(users, 3), torch.randn(items, 3)
    user, item = torch.randint(users, (n,)), torch.randint(items, (n,))
    y = 3.5 + 0.4 * torch.randn(users)[user] + 0.4 * torch.randn(items)[item]
    y = y + 0.5 * (tastes[user] * kinds[item]).sum(1) + 0.25 * torch.randn(n)
    train, test = split((user, item), y.clamp(1, 5), 7500)
    model = _Factors(users, items, 8)
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 1e-2, weight_decay=1e-4),
        size=256, steps=500, goal=0.75, loss_fn=F.mse_loss, score=r2,
    )  # fmt: skip
