"""Healthy programs on tables: incomes, rentals, credit, quantiles, hazards."""

from __future__ import annotations

import math

import torch
from calm_base import Data
from gentle_base import area_under_curve
from honest_base import area, outputs, program
from level_base import columns
from quiet_base import Training, feed, split, supervised
from sober_base import explained_share
from still_base import decayed, dense
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


@program
def adult_income() -> Training:
    """Is an income high? Five numbers, standardized, and three one-hot kinds.

    MLP with BN and dropout 0.2, BCE, Adam 1e-3, batch 64; AUC.
    """
    n, sizes = 4000, (8, 6, 12)
    numbers = torch.randn(n, 5)
    numbers[:, 4] = (numbers[:, 4] + numbers[:, 0]) / 2**0.5
    kinds = [torch.multinomial(torch.rand(k) + 0.2, n, True) for k in sizes]
    effect = sum(torch.randn(k)[c] for k, c in zip(sizes, kinds, strict=True))
    logit = effect + 1.5 * numbers[:, 0] - numbers[:, 1].square() + numbers[:, 2]
    y = (torch.rand(n) < (1.5 * logit - 0.5).sigmoid()).float()[:, None]
    numbers = (numbers - numbers[:3200].mean(0)) / numbers[:3200].std(0)
    hot = [F.one_hot(c, k).float() for k, c in zip(sizes, kinds, strict=True)]
    train, test = split(torch.cat((numbers, *hot), 1), y, 3200)
    layers: list[nn.Module] = []
    for i, o in ((31, 64), (64, 32)):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU(), nn.Dropout(0.2)]
    model = nn.Sequential(*layers, nn.Linear(32, 1))
    optimizer = optim.Adam(model.parameters(), 1e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.85, score=area,
        loss_fn=F.binary_cross_entropy_with_logits,
    )  # fmt: skip


@program
def bike_sharing() -> Training:
    """Log of hourly rentals by weather and by sines of hour and month; no norm.

    MLP of two ReLU layers, targets standardized, MSE, Adam 2e-3, batch 64.
    """
    n = 4000
    hour, month = 24 * torch.rand(n).clamp(max=0.999), 12 * torch.rand(n)
    day, rest = (2 * math.pi * hour / 24), (torch.rand(n) < 0.3).float()
    year = 2 * math.pi * month / 12
    warm = 12 - 10 * year.cos() + 3 * torch.randn(n)
    wet, wind = 0.4 + 0.2 * torch.rand(n), 8 * torch.rand(n) ** 2
    rush = (-(hour - 8).square() / 3).exp() + (-(hour - 17.5).square() / 4).exp()
    leisure = (-(hour - 14).square() / 20).exp()
    mean = 3 + 1.5 * torch.where(rest > 0, leisure, rush) + 0.06 * warm - 0.05 * wind
    y = torch.poisson((mean - wet - 0.5 * day.cos()).exp()).add(1).log()[:, None]
    x = torch.stack((
        day.sin(), day.cos(), (2 * day).sin(), (2 * day).cos(), year.sin(), year.cos(),
        rest, warm, wet, wind,
    ), 1)  # fmt: skip
    train, test = columns(x, (y - y[:3200].mean()) / y[:3200].std(), 3200)
    model = nn.Sequential(*dense(10, 64, 64, act=nn.ReLU), nn.Linear(64, 1))
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.8,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
    )  # fmt: skip


@program
def credit_default() -> Training:
    """One client in fifteen defaults: skewed amounts by logs, pos_weight 5, AUC.

    MLP with layer norm, SiLU and dropout 0.1, AdamW 2e-3, cosine, batch 128.
    """
    n = 6000
    amounts = (1.2 * torch.randn(n, 6) + 6).exp()
    late = torch.poisson(0.4 * torch.ones(n, 3))
    age = 21 + 44 * torch.rand(n, 1)
    logs = amounts.log1p()
    risk = logs[:, 0] - logs[:, 1] + 0.8 * late.sum(1) + 0.5 * late[:, 0] * late[:, 1]
    risk = 1.3 * (risk - 0.03 * (age[:, 0] - 40)) + 0.3 * torch.randn(n)
    y = (torch.rand(n) < (risk - 6.0).sigmoid()).float()[:, None]
    x = torch.cat((logs, late, age), 1)
    train, test = columns(x, y, 4500)
    layers: list[nn.Module] = []
    for i, o in ((10, 48), (48, 48)):
        layers += [nn.Linear(i, o), nn.LayerNorm(o), nn.SiLU(), nn.Dropout(0.1)]
    model = nn.Sequential(*layers, nn.Linear(48, 1))
    optimizer = optim.AdamW(decayed(model, 0.01), 2e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=200, goal=0.85, score=area,
        loss_fn=nn.BCEWithLogitsLoss(pos_weight=torch.tensor(5.0)),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Trees(nn.Module):
    """Sum of the leaves of soft oblivious trees; each level has one split."""

    def __init__(self, wide: int, trees: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(wide)
        self.cut = nn.Linear(wide, trees * depth)
        nn.init.normal_(self.cut.weight, std=wide**-0.5)
        nn.init.uniform_(self.cut.bias, -1, 1)
        self.leaves = nn.Parameter(0.1 * torch.randn(trees, 2**depth))
        self.shape = trees, depth

    def forward(self, x: Tensor) -> Tensor:
        right = (2 * self.cut(self.norm(x))).sigmoid().reshape(-1, *self.shape)
        chance = torch.ones(len(x), self.shape[0], 1)
        for k in range(self.shape[1]):
            p = right[:, :, k : k + 1]
            chance = torch.cat((chance * p, chance * (1 - p)), 2)
        return (chance * self.leaves).sum((1, 2))[:, None]


@program
def soft_trees() -> Training:
    """Regression with steps and products by 24 soft trees of depth four, BN before.

    Targets standardized, MSE, Adam 0.01, cosine, batch 128.
    """
    n = 3600
    x = torch.randn(n, 8) * torch.linspace(0.5, 3, 8) + torch.linspace(-2, 2, 8)
    z = (x - x.mean(0)) / x.std(0)
    y = 2 * (z[:, 0] > 0.3) * (z[:, 1] < 0) + z[:, 2] + (z[:, 3] > 0) * z[:, 4]
    y = (y + 0.2 * torch.randn(n))[:, None]
    train, test = columns(x, (y - y[:3000].mean()) / y[:3000].std(), 3000)
    model = _Trees(8, 24, 4)
    optimizer = optim.Adam(model.parameters(), 0.01)
    return supervised(
        model, train, test, optimizer, size=128, steps=250, goal=0.75,
        loss_fn=F.mse_loss, score=explained_share,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


_LEVELS = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])


class _Growing(nn.Module):
    """The lowest quantile, and positive gaps to each of the others."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            weight_norm(nn.Linear(wide, 64)), nn.ELU(), weight_norm(nn.Linear(64, 64)),
            nn.ELU(), nn.Linear(64, len(_LEVELS)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        low, gaps = self.body(x).split([1, len(_LEVELS) - 1], 1)
        return torch.cat((low, low + F.softplus(gaps).cumsum(1)), 1)


@program
def growing_quantiles() -> Training:
    """Five quantiles that can't cross, noise by the place; weight norm, ELU.

    Pinball loss, Adam 3e-3, cosine, batch 128; one less the worst fault of coverage.
    """
    n = 5000
    x = torch.randn(n, 6)
    mean = 1.5 * x[:, 0] + (2 * x[:, 1]).sin() + x[:, 2] * x[:, 3]
    y = (mean + (0.4 + x[:, 4].abs()) * torch.randn(n))[:, None]
    train, test = split(x, (y - y[:4000].mean()) / y[:4000].std(), 4000)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        left = y - out
        return torch.maximum(_LEVELS * left, (_LEVELS - 1) * left).sum(1).mean()

    def covered(net: nn.Module, data: Data) -> float:
        below = (data[1] < outputs(net, data)).float().mean(0)
        return 1 - float((below - _LEVELS).abs().max())

    model = _Growing(6)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=250, goal=0.93, loss_fn=loss_fn,
        score=covered, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 250),
    )  # fmt: skip


@program
def piecewise_hazard() -> Training:
    """Time of failure by constant hazards of six spans (PEANN), half of them censored.

    MLP with BN and dropout 0.1, exposures' likelihood, AdamW 2e-3, batch 128; the
    share of pairs whose order is told.
    """
    n, spans = 4000, 6
    x = torch.randn(n, 10)
    risk = x[:, 0] + 0.7 * x[:, 1] * x[:, 2] - 0.8 * x[:, 3].abs()
    time = (-torch.rand(n).log() * (-risk).exp()) ** 0.7
    censor = 2.5 * torch.rand(n)
    seen, time = (time < censor).float(), torch.minimum(time, censor)
    edges = torch.cat((torch.zeros(1), time.quantile(torch.linspace(0, 1, 7)[1:])))
    width = edges.diff()
    exposed = ((time[:, None] - edges[:-1]) / width).clamp(0, 1)
    at = (torch.searchsorted(edges, time) - 1).clamp(0, spans - 1)
    ends = F.one_hot(at, spans) * seen[:, None]
    train, test = split(x, torch.stack((exposed, ends, time.expand(6, -1).mT), 1), 3200)

    def loss_fn(log_hazard: Tensor, y: Tensor) -> Tensor:
        exposed, ends, _ = y.unbind(1)
        return (log_hazard.exp() * exposed - log_hazard * ends).sum(1).mean()

    def concordance(net: nn.Module, data: Data) -> float:
        hazard = outputs(net, data).exp().sum(1)
        _, ends, time = data[1].unbind(1)
        seen, time = ends.sum(1) > 0, time[:, 0]
        pairs = seen[:, None] & (time[:, None] < time)
        return float((hazard[:, None] > hazard)[pairs].float().mean())

    layers: list[nn.Module] = []
    for i, o in ((10, 48), (48, 48)):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU(), nn.Dropout(0.1)]
    model = nn.Sequential(*layers, nn.Linear(48, spans))
    nn.init.constant_(model[-1].bias, -1.0)
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=128, steps=200, goal=0.72, loss_fn=loss_fn,
        score=concordance,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Preferred(nn.Module):
    """Difference of the rewards of two answers."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.reward = nn.Sequential(
            nn.Linear(wide, 64), nn.RMSNorm(64), nn.GELU(), nn.Linear(64, 64),
            nn.RMSNorm(64), nn.GELU(), nn.Linear(64, 1),
        )  # fmt: skip

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.reward(a) - self.reward(b)


@program
def preference_reward() -> Training:
    """Which of two answers is preferred, by codes of 24 (Bradley–Terry reward).

    RMS norm, GELU, AdamW 2e-3, decay 0.01, cosine, batch 64; AUC.
    """
    n, wide = 5000, 24
    a, b = torch.randn(2, n, wide)
    direction = torch.randn(wide) / wide**0.5

    def worth(x: Tensor) -> Tensor:
        return 3 * (x @ direction) - x[:, :4].square().sum(1)

    y = (torch.rand(n) < (worth(a) - worth(b)).sigmoid()).float()[:, None]
    train, test = split((a, b), y, 4000)

    def agreed(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            return area_under_curve(feed(net, data)[:, 0], data[1][:, 0])

    model = _Preferred(wide)
    optimizer = optim.AdamW(decayed(model, 0.01), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=300, goal=0.85, score=agreed,
        loss_fn=F.binary_cross_entropy_with_logits,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip
