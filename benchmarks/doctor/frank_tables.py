"""Healthy programs on tables, bags of words, users and items, times to an event."""

from __future__ import annotations

import math

import torch
from calm_base import Data, endless
from frank_base import outputs, program
from gentle_base import area_under_curve
from level_base import columns
from quiet_base import Subject, Training, accuracy, split, supervised
from sober_base import explained_share
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def fuel_economy() -> Training:
    """Miles per gallon from cylinders, weight and the like, as Keras' tutorial.

    Columns and target standardized, two layers of 64 ReLU, no norm, Adam 1e-3, L1 loss,
    batch 32.
    """
    n = 900
    cylinders = torch.tensor([4.0, 6.0, 8.0])[torch.randint(3, (n,))]
    volume = 45 * cylinders + 30 * torch.randn(n) - 60
    power = 12 * cylinders + 0.1 * volume + 12 * torch.randn(n)
    weight = 1200 + 7 * volume + 4 * power + 250 * torch.randn(n)
    spurt = 24 - 0.07 * power + 1.5 * torch.randn(n)
    year = 70 + 12 * torch.rand(n)
    origin = F.one_hot(torch.randint(3, (n,)), 3).float()
    miles = 60000 / weight + 0.7 * (year - 70) - 0.02 * power + 2 * origin[:, 2]
    y = miles * (1 + 0.06 * torch.randn(n))
    y = (y - y[:720].mean()) / y[:720].std()
    x = torch.stack((cylinders, volume, power, weight, spurt, year), 1)
    train, test = columns(torch.cat((x, origin), 1), y[:, None], 720)
    model = nn.Sequential(
        nn.Linear(9, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    optimizer = optim.Adam(model.parameters(), 1e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=300, goal=0.8,
        loss_fn=F.l1_loss, score=explained_share,
    )  # fmt: skip


@program
def passengers() -> Training:
    """Predict survival from class, sex, age, family, fare and port; one-hot kinds.

    Absent ages take the median with a flag. BN and dropout 0.3, He weights, BCE, Adam
    3e-3, decay 1e-4, batch 32; AUC.
    """
    n = 1309
    rank = torch.multinomial(torch.tensor([0.25, 0.2, 0.55]), n, True)
    woman = (torch.rand(n) < 0.36).float()
    age = (29 + 14 * torch.randn(n)).clamp(0.5, 75)
    family = torch.poisson(torch.full((n,), 0.9))
    fare = (4.2 - 0.8 * rank + 0.25 * family + 0.5 * torch.randn(n)).exp()
    port = F.one_hot(torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), n, True), 3)
    sure = 2.8 * woman - 1.0 * rank - 0.03 * (age - 29) - 0.3 * (family - 1).abs()
    y = (torch.rand(n) < (sure - 0.2).sigmoid()).float()[:, None]
    absent = torch.rand(n) < 0.2
    age = torch.where(absent, age[~absent].median(), age)
    number = torch.stack((age, family, (fare + 1).log()), 1)
    number = (number - number[:1000].mean(0)) / number[:1000].std(0)
    kind = torch.cat((F.one_hot(rank, 3), port), 1).float()
    flags = torch.stack((woman, absent.float()), 1)
    train, test = split(torch.cat((number, kind, flags), 1), y, 1000)
    model = nn.Sequential(
        nn.Linear(11, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(48, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(24, 1),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
    optimizer = optim.Adam(model.parameters(), 3e-3, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=32, steps=250, goal=0.78,
        loss_fn=F.binary_cross_entropy_with_logits,
        score=lambda net, d: area_under_curve(outputs(net, d)[:, 0], d[1][:, 0]),
    )  # fmt: skip


@program
def weighted_land_cover() -> Training:
    """Five kinds of land, 50 to 4 % each, by 20 columns; classes weighed by rarity.

    Layer norm, GELU, dropout 0.1, weights from square roots of shares, AdamW, one
    cycle to 5e-3, batch 128; mean recall.
    """
    n = 4000
    share = torch.tensor([0.5, 0.26, 0.13, 0.07, 0.04])
    y = torch.multinomial(share, n, True)
    middle = torch.randn(5, 2, 8)
    which = torch.randint(2, (n,))
    x = 1.3 * middle[y, which] + torch.randn(n, 8)
    x = torch.cat((x @ torch.randn(8, 14) / 8**0.5, x[:, :6].square().sqrt()), 1)
    train, test = columns(x + 0.2 * torch.randn(n, 20), y, 3200)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1),
        nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU(), nn.Dropout(0.1),
        nn.Linear(64, 5),
    )  # fmt: skip
    count = torch.bincount(train[1], minlength=5).float()
    weight = count.rsqrt() / count.rsqrt().mean()

    def recall(net: nn.Module, data: Data) -> float:
        said, y = outputs(net, data).argmax(1), data[1]
        each = [(said[y == k] == k).float().mean() for k in range(5)]
        return float(torch.stack(each).mean())

    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=128, steps=250, goal=0.75,
        loss_fn=nn.CrossEntropyLoss(weight), score=recall,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=250),
    )  # fmt: skip


class _Bag(nn.Module):
    """Mean of the words from each offset on, and a linear layer."""

    def __init__(self, words: int, width: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(words, width)
        self.fc = nn.Linear(width, classes)
        nn.init.uniform_(self.embedding.weight, -0.5, 0.5)
        nn.init.uniform_(self.fc.weight, -0.5, 0.5)
        nn.init.zeros_(self.fc.bias)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.fc(self.embedding(text, offsets))


@program
def news_bags() -> Training:
    """News of four topics, 20 to 40 of 600 words, as PyTorch's AG_NEWS tutorial.

    EmbeddingBag with offsets, SGD of rate 5 clipped at 0.1, rate times 0.1 late, batch
    64.
    """
    n, words = 2600, 600
    y = torch.randint(4, (n,))
    often = 1 / (5 + torch.arange(words).float())
    chance = often[torch.randperm(words)] * (0.5 * torch.randn(4, words)).exp()
    long = torch.randint(20, 41, (n,))
    rows = [
        torch.multinomial(chance[k], int(m), True) for k, m in zip(y, long, strict=True)
    ]

    def joined(part: list[int]) -> Data:
        text = [rows[i] for i in part]
        ends = torch.tensor([0, *(len(t) for t in text[:-1])]).cumsum(0)
        return (torch.cat(text), ends), y[part]

    def epoch() -> list[Data]:
        order = torch.randperm(2200).tolist()
        return [joined(order[i : i + 64]) for i in range(0, 2200 - 63, 64)]

    model = _Bag(words, 64, 4)
    optimizer = optim.SGD(model.parameters(), 5.0)
    fall = optim.lr_scheduler.MultiStepLR(optimizer, [200], 0.1)
    batches = endless(epoch)

    def step(_: int) -> float:
        model.train()
        x, y = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(*x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        fall.step()
        return float(loss.detach())

    def score() -> float:
        return accuracy(model, joined(list(range(2200, n))))

    subject = Subject(model, epoch, F.cross_entropy, optimizer)
    return Training([subject], step, 260, score, 0.8)


class _Uncertain(nn.Module):
    """Linear layer with normal weights, its output drawn (local reparametrization)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(o, i) / i**0.5)
        self.rho = nn.Parameter(torch.full((o, i), -4.0))
        self.bias = nn.Parameter(torch.zeros(o))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.mean, self.bias)
        if not self.training:
            return y
        wide = F.linear(x.square(), F.softplus(self.rho).square())
        return y + (wide + 1e-8).sqrt() * torch.randn_like(y)

    def divergence(self) -> Tensor:
        """Return the divergence from the prior N(0, 0.5²)."""
        wide = F.softplus(self.rho)
        both = (wide.square() + self.mean.square()) / 0.5
        return (both - 0.5 + math.log(0.5) - wide.log()).sum()


@program
def bayes_by_backprop() -> Training:
    """Strength of concrete by a net of normal weights and known noise, tanh.

    The divergence shared out over 1200 rows, Adam 1e-2, cosine, batch 100.
    """
    n = 1500
    x = torch.rand(n, 6)
    cement, water, ash, age, slag, sand = x.unbind(1)
    y = 2 * cement / (0.5 + water) + 0.8 * (1 + 9 * age).log() + 0.5 * slag * age
    y = y - 0.4 * (sand - 0.5).abs() + 0.3 * ash + 0.25 * torch.randn(n)
    y = (y - y[:1200].mean()) / y[:1200].std()
    train, test = columns(x, y[:, None], 1200)
    layers = [_Uncertain(6, 40), nn.Tanh(), _Uncertain(40, 40), nn.Tanh()]
    model = nn.Sequential(*layers, _Uncertain(40, 1))

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        far = sum(m.divergence() for m in model if isinstance(m, _Uncertain))
        return 0.5 * ((out - y) / 0.3).square().mean() + far / 1200

    optimizer = optim.Adam(model.parameters(), 1e-2)
    return supervised(
        model, train, test, optimizer, size=100, steps=300, goal=0.8, loss_fn=loss_fn,
        score=explained_share,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


class _TwoCauses(nn.Module):
    """Shared body and a branch for each cause; chances of cause and time together."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1)
        )
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(64 + width, 32), nn.ReLU(), nn.Linear(32, times))
            for _ in range(2)
        )
        self.none = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        both = torch.cat((h, x), 1)
        each = [branch(both) for branch in self.branches]
        return torch.cat((*each, self.none(h)), 1).log_softmax(1)


@program
def competing_risks() -> Training:
    """Which of two causes, and in which of 8 spans, by 12 columns (DeepHit).

    A quarter censored; likelihood, BN, dropout 0.1, AdamW 3e-3, batch 100; the mean
    concordance of both causes.
    """
    n, times = 3000, 8
    x = torch.randn(n, 12)
    first = (-(x[:, 0] + 0.7 * x[:, 1] * x[:, 2]) + 0.2).exp()
    second = (-(0.8 * x[:, 3] - x[:, 4].abs() + 1) + 0.2).exp()
    at = -torch.rand(2, n).log() * torch.stack((first, second))
    stop = -torch.rand(n).log() * 2.5
    time, cause = at.min(0)
    cause = torch.where(time < stop, cause + 1, 0)
    time = torch.minimum(time, stop)
    ends = time[:2400].quantile(torch.arange(1, times) / times)
    span = torch.bucketize(time, ends)
    train, test = columns(x, torch.stack((span, cause), 1), 2400)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        span, cause = y.unbind(1)
        seen = out.gather(1, (span + times * (cause - 1).clamp(min=0))[:, None])[:, 0]
        later = torch.arange(times) > span[:, None]
        left = torch.cat((later, later, torch.ones(len(y), 1).bool()), 1)
        alive = out.masked_fill(~left, -1e9).logsumexp(1)
        return -torch.where(cause > 0, seen, alive).mean()

    def concordance(net: nn.Module, data: Data) -> float:
        chance, (span, cause) = outputs(net, data).exp(), data[1].unbind(1)
        each = []
        for k in range(2):
            risk = chance[:, times * k : times * (k + 1)].cumsum(1)
            own = risk.gather(1, span[:, None])
            pair = (cause == k + 1)[:, None] & (span[:, None] < span)
            other = risk[:, span].T
            each.append((own > other)[pair].float().mean())
        return float(torch.stack(each).mean())

    model = _TwoCauses(12, times)
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=100, steps=220, goal=0.66,
        loss_fn=loss_fn, score=concordance,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 220),
    )  # fmt: skip


@program
def list_wise_ranking() -> Training:
    """Ten offers a search, one or two are booked, by ListNet's cross entropy.

    Columns standardized, BN over offers, ReLU, AdamW 3e-3, batch 40 lists; NDCG.
    """
    n, offers = 2000, 10
    x = torch.randn(n, offers, 9) + 0.5 * torch.randn(n, 1, 9)
    taste = x[..., 0] - x[..., 1].abs() + x[..., 2] * x[..., 3] + 0.5 * x[..., 4]
    taste = taste + 0.5 * torch.randn(n, offers)
    rank = taste.argsort(1, descending=True).argsort(1)
    two = torch.rand(n, 1) < 0.5
    y = (rank == 0).float() + ((rank == 1) & two).float()
    x = (x - x[:1600].mean((0, 1))) / x[:1600].std((0, 1))
    train, test = split(x, y, 1600)
    model = nn.Sequential(
        nn.Flatten(0, 1), nn.Linear(9, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1),
        nn.Unflatten(0, (-1, offers)), nn.Flatten(1),
    )  # fmt: skip

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y / y.sum(1, keepdim=True))

    def gain(net: nn.Module, data: Data) -> float:
        fade = 1 / (2 + torch.arange(offers).float()).log2()
        order = outputs(net, data).argsort(1, descending=True)
        best = data[1].sort(1, descending=True).values
        found = (data[1].gather(1, order) * fade).sum(1)
        return float((found / (best * fade).sum(1)).mean())

    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=40, steps=240, goal=0.75,
        loss_fn=loss_fn, score=gain,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip
