"""Healthy programs on tables: crosses, grades, survival, labels with errors, counts."""

from __future__ import annotations

import torch
from calm_base import Data, warm_cosine
from level_base import columns, program
from mild_base import auc
from quiet_base import Subject, Training, accuracy, shuffled, split, supervised
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


class _Cross(nn.Module):
    """Embedded kinds and numbers; cross layers beside a deep part (DCN v2)."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.ModuleList(nn.Embedding(k, 6) for k in (12, 8, 20))
        self.cross = nn.ModuleList(nn.Linear(22, 22) for _ in range(2))
        self.deep = nn.Sequential(
            nn.Linear(22, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(54, 1)
        for each in self.kinds:
            nn.init.normal_(each.weight, 0.0, 0.3)

    def forward(self, kinds: Tensor, x: Tensor) -> Tensor:
        known = [e(kinds[:, i]) for i, e in enumerate(self.kinds)]
        first = torch.cat((*known, x), 1)
        y = first
        for layer in self.cross:
            y = first * layer(y) + y
        return self.head(torch.cat((y, self.deep(first)), 1))[:, 0]


@program
def cross_network() -> Training:
    """Clicks from three kinds and four numbers with products of two, BN, Adam.

    Cosine, batch 128: 0.83 (AUC), where the true chances have 0.87.
    """
    n = 6000
    kinds = torch.stack([torch.randint(k, (n,)) for k in (12, 8, 20)], 1)
    x = torch.randn(n, 4)
    taste = [torch.randn(k, 3) for k in (12, 8, 20)]
    a, b, c = (t[kinds[:, i]] for i, t in enumerate(taste))
    logit = (a * b).sum(1) + c[:, 0] * x[:, 0] + x[:, 1] * x[:, 2] - 1
    y = (torch.rand(n) < logit.sigmoid()).float()
    train, test = split((kinds, x), y, 5000)

    def ranked(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return auc(net.eval()(*data[0]), data[1] == 1)

    model = _Cross()
    optimizer = optim.Adam(model.parameters(), 5e-3, weight_decay=1e-5)
    return supervised(
        model, train, test, optimizer, size=128, steps=300, goal=0.82, score=ranked,
        loss_fn=F.binary_cross_entropy_with_logits,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 301),
    )  # fmt: skip


@program
def conditional_grades() -> Training:
    """Grades 0 to 4 by the chance of one more, among those who got so far (CORN).

    Two layers of BN and ReLU, AdamW, batch 40: mean error 0.22 grades.
    """
    n = 2000
    x = torch.randn(n, 8)
    hidden = x[:, 0] + 0.7 * (2 * x[:, 1]).tanh() + 0.5 * x[:, 2] * x[:, 3]
    hidden = hidden + 0.2 * torch.randn(n)
    y = torch.bucketize(hidden, torch.tensor([-1.2, -0.3, 0.4, 1.2]))
    train, test = columns(x, y, 1600)
    model = nn.Sequential(
        nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, 4),
    )  # fmt: skip

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        step = torch.arange(4)
        asked = (y[:, None] >= step).float()
        above = (y[:, None] > step).float()
        each = F.binary_cross_entropy_with_logits(out, above, reduction="none")
        return (each * asked).sum() / asked.sum()

    def nearness(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            grade = (net.eval()(data[0]).sigmoid().cumprod(1) > 0.5).sum(1)
        return -float((grade - data[1]).abs().float().mean())

    optimizer = optim.AdamW(model.parameters(), 6e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=40, steps=300, goal=-0.4, loss_fn=loss_fn,
        score=nearness,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 301),
    )  # fmt: skip


@program
def discrete_hazard() -> Training:
    """Hazards of ten intervals, 41 % censored, GELU, layer norm, AdamW, batch 100.

    Dropout before the head: concordance 0.767, where the true risks have 0.774.
    """
    n = 3000
    x = torch.randn(n, 7)
    risk = x[:, 0] - 0.8 * x[:, 1] + 0.6 * x[:, 2] * x[:, 3]
    time = -torch.rand(n).clamp(min=1e-6).log() * (-risk).exp() * 5
    stop = -torch.rand(n).clamp(min=1e-6).log() * 9
    seen = (time <= stop) & (time < 10)
    at = torch.minimum(time, stop).clamp(max=9.99)
    y = torch.stack((at.long().float(), seen.float(), at, risk), 1)
    train, test = columns(x, y, 2400)
    model = nn.Sequential(
        nn.Linear(7, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 32),
        nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 10),
    )  # fmt: skip

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        step, last = torch.arange(10), y[:, :1].long()
        died = ((step == last) & (y[:, 1:2] == 1)).float()
        lived = (step < last) | (step == last)
        each = F.binary_cross_entropy_with_logits(out, died, reduction="none")
        return (each * lived).sum(1).mean()

    def concordance(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (1 - net.eval()(data[0]).sigmoid()).cumprod(1).sum(1)
        at, seen = data[1][:, 2], data[1][:, 1] == 1
        pairs = (at[:, None] < at) & seen[:, None]
        return float((left[:, None] < left)[pairs].float().mean())

    optimizer = optim.AdamW(decayed(model, 0.02), 4e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=300, goal=0.74, loss_fn=loss_fn,
        score=concordance, schedule=warm_cosine(optimizer, 20, 301),
    )  # fmt: skip


@program
def swap_noise_autoencoder() -> Training:
    """Cells, one in ten, come from other rows; the net restores all, 24 columns.

    Wide, ReLU after BN, as at Porto Seguro; Adam, batch 128: 83 % of the squared
    error of swapped cells is removed.
    """
    n = 3000
    cause = torch.randn(n, 5)
    x = (cause @ torch.randn(5, 24)).mul(0.7).tanh() + 0.1 * torch.randn(n, 24)
    train, test = columns(x, x, 2500)
    train, test = (train[0], train[0]), (test[0], test[0])

    def swapped(batch: Data) -> Data:
        x, y = batch
        other = x[torch.randint(len(x), x.shape), torch.arange(24)]
        return torch.where(torch.rand_like(x) < 0.1, other, x), y

    def removed(net: nn.Module, data: Data) -> float:
        x, y = swapped(data)
        with torch.no_grad():
            left = (net.eval()(x) - y).square()
        return float(1 - left[x != y].mean() / (x - y)[x != y].square().mean())

    model = nn.Sequential(
        nn.Linear(24, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU(),
        nn.Linear(96, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU(),
        nn.Linear(96, 24),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, train, test, optimizer, size=128, steps=400, goal=0.8, score=removed,
        loss_fn=F.mse_loss, change=swapped,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.992),
    )  # fmt: skip


class _Weighed(nn.Module):
    """A trunk of mixed inputs with three heads; log-variances weigh the losses."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = nn.Embedding(6, 4)
        self.trunk = nn.Sequential(
            nn.Linear(18, 48), nn.LayerNorm(48), nn.SiLU(), nn.Linear(48, 48),
            nn.LayerNorm(48), nn.SiLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(48, o) for o in (1, 1, 3))
        self.log_var = nn.Parameter(torch.zeros(3))

    def forward(self, kind: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = self.trunk(torch.cat((self.kind(kind), x), 1))
        return (*(head(y) for head in self.heads), self.log_var)


@program
def uncertainty_weights() -> Training:
    """Two standardized numbers and one of three classes, weighed by learned variances.

    Seven columns with gaps, each with an indicator, and one kind; AdamW, batch 64:
    0.78, the least of two R2 and the accuracy.
    """
    n = 3500
    kind, x = torch.randint(6, (n,)), torch.randn(n, 7)
    shift = torch.randn(6)[kind]
    first = x[:, 0] + shift + 0.5 * x[:, 1].square() + 0.2 * torch.randn(n)
    second = (x[:, 0] + x[:, 2]).sin() + 0.5 * shift + 0.4 * torch.randn(n)
    third = torch.bucketize(x[:, 3] + 0.5 * shift, torch.tensor([-0.6, 0.6]))
    absent = torch.rand(n, 7) < 0.05
    inputs = torch.cat((x.masked_fill(absent, 0.0), absent.float()), 1)
    first, second = ((a - a[:2800].mean()) / a[:2800].std() for a in (first, second))
    y = torch.stack((first, second, third.float()), 1)
    train, test = split((kind, inputs), y, 2800)

    def loss_fn(out: tuple[Tensor, ...], y: Tensor) -> Tensor:
        a, b, c, s = out
        parts = torch.stack((
            F.mse_loss(a[:, 0], y[:, 0]) / 2, F.mse_loss(b[:, 0], y[:, 1]) / 2,
            F.cross_entropy(c, y[:, 2].long()),
        ))  # fmt: skip
        return ((-s).exp() * parts + s / 2).sum()

    def least(net: nn.Module, data: Data) -> float:
        y = data[1]
        with torch.no_grad():
            a, b, c, _ = net.eval()(*data[0])
        told = [
            1 - float((o[:, 0] - y[:, i]).square().mean() / y[:, i].var())
            for i, o in enumerate((a, b))
        ]
        return min(*told, float((c.argmax(1) == y[:, 2]).float().mean()))

    model = _Weighed()
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=64, steps=350, goal=0.65, loss_fn=loss_fn,
        score=least, schedule=warm_cosine(optimizer, 20, 351),
    )  # fmt: skip


@program
def co_teaching() -> Training:
    """One label in four is wrong; each of two nets picks what the other learns.

    The share left out grows to a quarter in 60 steps; BN, Adam, batch 80: 99 %, the
    lesser of two, on right labels.
    """
    n = 3000
    centre = 2.0 * torch.randn(12, 12)
    group = torch.randint(12, (n,))
    x, right = centre[group] + torch.randn(n, 12), group % 4
    wrong = (right + torch.randint(1, 4, (n,))) % 4
    y = torch.where(torch.rand(n) < 0.25, wrong, right)
    (x, y), test = columns(x, y, 2400)
    test = (test[0], right[2400:])

    def net() -> nn.Module:
        return nn.Sequential(
            nn.Linear(12, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU(),
            nn.Linear(40, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU(),
            nn.Linear(40, 4),
        )  # fmt: skip

    models = [net(), net()]
    adams = [optim.Adam(each.parameters(), 3e-3) for each in models]
    share = 0.0

    def chosen(loss: Tensor) -> Tensor:
        return loss.detach().argsort()[: round((1 - share) * len(loss))]

    def step(i: int) -> float:
        nonlocal share
        share = min(1.0, i / 60) * 0.25
        part = torch.randint(len(y), (80,))
        losses = []
        for each in models:
            each.train()
            losses.append(F.cross_entropy(each(x[part]), y[part], reduction="none"))
        picks = [chosen(loss) for loss in losses]
        total = 0.0
        for adam, loss, pick in zip(adams, losses, picks[::-1], strict=True):
            adam.zero_grad()
            mean = loss[pick].mean()
            mean.backward()
            adam.step()
            total += float(mean.detach())
        return total / 2

    def picked_by(peer: nn.Module) -> list[Data]:
        batches = []
        for a, b in shuffled((x, y), 80)[:20]:
            was = peer.training
            with torch.no_grad():
                loss = F.cross_entropy(peer.eval()(a), b, reduction="none")
            peer.train(was)
            keep = torch.full_like(b, -100)
            pick = chosen(loss)
            keep[pick] = b[pick]
            batches.append((a, keep))
        return batches

    one, other = models
    return Training(
        [
            Subject(one, lambda: picked_by(other), F.cross_entropy, adams[0], name="a"),
            Subject(other, lambda: picked_by(one), F.cross_entropy, adams[1], name="b"),
        ],
        step, 300, lambda: min(accuracy(each, test) for each in models), 0.88,
    )  # fmt: skip


@program
def negative_binomial() -> Training:
    """Hires of an hour: counts by a negative binomial, log link, tanh, Xavier, RMSprop.

    The hour as sine and cosine and four numbers, batch 50: 91 % of the variance
    of the log mean.
    """
    n = 3000
    hour, x = torch.rand(n) * 6.2832, torch.randn(n, 4)
    log_mean = 2 + 0.8 * hour.sin() - 0.4 * (2 * hour).cos() + 0.3 * x[:, 0]
    log_mean = log_mean - 0.2 * x[:, 1].square()
    rate = torch.distributions.Gamma(5.0, 5.0).sample((n,)) * log_mean.exp()
    y = torch.stack((torch.poisson(rate), log_mean), 1)
    inputs = torch.cat((hour.sin()[:, None], hour.cos()[:, None], x), 1)
    train, test = columns(inputs, y, 2500)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(),
                nn.Linear(32, 1),
            )  # fmt: skip
            for each in self.body:
                if isinstance(each, nn.Linear):
                    nn.init.xavier_uniform_(each.weight)
                    nn.init.zeros_(each.bias)
            nn.init.constant_(self.body[-1].bias, float(train[1][:, 0].mean().log()))
            self.log_size = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(x)[:, 0], self.log_size

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        size = out[1].exp()
        each = torch.distributions.NegativeBinomial(size, logits=out[0] - out[1])
        return -each.log_prob(y[:, 0]).mean()

    def kept(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(data[0])[0] - data[1][:, 1]).square().mean()
        return 1 - float(left / data[1][:, 1].var())

    model = Net()
    optimizer = optim.RMSprop(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=450, goal=0.85, loss_fn=loss_fn,
        score=kept, schedule=optim.lr_scheduler.StepLR(optimizer, 150, 0.3),
    )  # fmt: skip


@program
def mechanisms_of_action() -> Training:
    """Ten labels by 40 columns: BN, weight-normalized layers, BCE smoothed by 0.001.

    Dropout after the last BN, one-cycle, batch 128: 0.87 (mean AUC), best 0.90.
    """
    n = 4000
    x = torch.randn(n, 40)
    logit = 1.6 * (x @ F.normalize(torch.randn(40, 10), dim=0)) ** 2 - 4
    y = (torch.rand(n, 10) < logit.sigmoid()).float()
    train, test = columns(x, y, 3300)
    model = nn.Sequential(
        nn.BatchNorm1d(40), weight_norm(nn.Linear(40, 96)), nn.ReLU(),
        nn.BatchNorm1d(96), weight_norm(nn.Linear(96, 64)), nn.ReLU(),
        nn.BatchNorm1d(64), nn.Dropout(0.2), weight_norm(nn.Linear(64, 10)),
    )  # fmt: skip

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, y * 0.998 + 0.001)

    def ranked(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            out = net.eval()(data[0])
        return sum(auc(out[:, k], data[1][:, k] == 1) for k in range(10)) / 10

    optimizer = optim.Adam(model.parameters(), 5e-3, weight_decay=1e-5)
    return supervised(
        model, train, test, optimizer, size=128, steps=280, goal=0.7, loss_fn=loss_fn,
        score=ranked,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=281),
    )  # fmt: skip
