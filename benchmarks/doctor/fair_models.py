"""Healthy programs by kind: adversaries, densities, bandits, processes, pairs."""

from __future__ import annotations

import math

import torch
from calm_base import Data, update, warm_cosine
from fair_base import program
from quiet_base import Subject, Training, digits, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def conditional_gan() -> Training:
    """Points about one of 4 corners as asked: BN in the generator, none in the critic.

    Non-saturating, real labels 0.9, Adam (0.5, 0.999), linear decay, batch 128: 99 %
    lie within three deviations of their corner, with 0.8 of the true spread; the score
    is the product.
    """
    corners = torch.tensor([[1.0, 1], [-1, 1], [-1, -1], [1, -1]])
    width = 0.25
    maker = nn.Sequential(
        nn.Linear(8, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Linear(48, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 2),
    )  # fmt: skip
    judge = nn.Sequential(
        nn.Linear(6, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2),
        nn.Linear(64, 1),
    )  # fmt: skip
    adam = [
        optim.Adam(maker.parameters(), 1e-3, (0.5, 0.999)),
        optim.Adam(judge.parameters(), 2e-3, (0.5, 0.999)),
    ]
    steps = 1400
    slow = [optim.lr_scheduler.LinearLR(a, 1.0, 0.05, steps) for a in adam]
    bce = F.binary_cross_entropy_with_logits

    def asked(n: int) -> tuple[Tensor, Tensor, Tensor]:
        kind = torch.randint(4, (n,))
        one_hot = F.one_hot(kind, 4).float()
        return kind, one_hot, torch.cat((torch.randn(n, 4), one_hot), 1)

    def judged(point: Tensor, one_hot: Tensor) -> Tensor:
        return judge(torch.cat((point, one_hot), 1))

    def made_loss(point: Tensor, one_hot: Tensor) -> Tensor:
        return F.softplus(-judged(point, one_hot)).mean()

    def pairs() -> Data:
        kind, one_hot, noise = asked(128)
        real = corners[kind] + width * torch.randn(128, 2)
        with torch.no_grad():
            fake = maker(noise)
        x = torch.cat((torch.cat((real, fake)), one_hot.repeat(2, 1)), 1)
        return x, torch.cat((torch.full((128, 1), 0.9), torch.zeros(128, 1)))

    def requests() -> Data:
        _, one_hot, noise = asked(128)
        return noise, one_hot

    def step(_: int) -> float:
        maker.train()
        judge.train()
        x, y = pairs()
        update(adam[1], bce(judge(x), y))
        noise, one_hot = requests()
        loss = update(adam[0], made_loss(maker(noise), one_hot))
        for each in slow:
            each.step()
        return loss

    def score() -> float:
        maker.eval()
        kind, _, noise = asked(2000)
        with torch.no_grad():
            away = maker(noise) - corners[kind]
        within = (away.norm(dim=1) < 3 * width).float().mean()
        spread = torch.stack([away[kind == k].std(0) for k in range(4)]) / width
        return float(within * spread.clamp(max=1).mean())

    return Training(
        [
            Subject(maker, lambda: [requests() for _ in range(20)], made_loss, adam[0],
                    name="generator"),
            Subject(judge, lambda: [pairs() for _ in range(20)], bce, adam[1],
                    name="critic"),
        ],
        step, steps, score, 0.7,
    )  # fmt: skip


class _Sparse(nn.Linear):
    """A linear layer whose weights a mask of 0 and 1 multiplies."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.float())

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        return F.linear(input, self.weight * self.mask, self.bias)


@program
def made() -> Training:
    """MADE: binary digits, pixel by pixel, two masked layers of 252, no norm.

    AdamW, cosine, batch 50: of held-out digits, 31 % of the bits of
    independent pixels are saved.
    """
    (x, _), (new, _) = digits()
    x, new = (a.flatten(1).gt(0.4).float() for a in (x, new))
    place, hidden = torch.arange(64), torch.arange(252) % 63
    model = nn.Sequential(
        _Sparse(hidden[:, None] >= place), nn.ReLU(),
        _Sparse(hidden[:, None] >= hidden), nn.ReLU(),
        _Sparse(place[:, None] > hidden),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 1e-2, weight_decay=0.05)
    bce = F.binary_cross_entropy_with_logits

    def saved(net: nn.Module, data: Data) -> float:
        net.eval()
        rate = x.mean(0).clamp(0.002, 0.998)
        with torch.no_grad():
            alone = bce(rate.logit().expand_as(data[1]), data[1])
            return 1 - float(bce(net(data[0]), data[1]) / alone)

    return supervised(
        model, (x, x), (new, new), optimizer, size=50, steps=600, goal=0.25,
        loss_fn=bce, score=saved,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 600),
    )  # fmt: skip


@program
def contextual_bandit() -> Training:
    """Rewards of 5 arms by an MLP, epsilon-greedy, replay of all that was tried, Adam.

    Tanh of 32 and 32, 32 trials a step, batch 128: 0.998 of the best arms'
    gain over chance.
    """
    arms = torch.randn(5, 6)
    model = nn.Sequential(
        nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5)
    )
    optimizer = optim.Adam(model.parameters(), 3e-3)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def worth(x: Tensor) -> Tensor:
        return torch.tanh(x @ arms.T / 1.5)

    def explore(rate: float) -> None:
        x = torch.randn(32, 6)
        with torch.no_grad():
            best = model(x).argmax(1)
        arm = torch.where(torch.rand(32) < rate, torch.randint(5, (32,)), best)
        gain = worth(x).gather(1, arm[:, None])[:, 0] + 0.2 * torch.randn(32)
        seen.append((x, arm, gain))

    def batch() -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, arm, gain = (torch.cat(part) for part in zip(*seen, strict=True))
        pick = torch.randint(len(x), (128,))
        return x[pick], (arm[pick], gain[pick])

    def loss_fn(out: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(out.gather(1, y[0][:, None])[:, 0], y[1])

    for _ in range(8):
        explore(1.0)

    def step(i: int) -> float:
        model.train()
        explore(max(0.1, 1 - i / 200))
        x, y = batch()
        return update(optimizer, loss_fn(model(x), y))

    def score() -> float:
        model.eval()
        x = torch.randn(2000, 6)
        gain = worth(x)
        with torch.no_grad():
            got = gain.gather(1, model(x).argmax(1)[:, None]).mean()
        return float((got - gain.mean()) / (gain.amax(1).mean() - gain.mean()))

    return Training(
        [Subject(model, lambda: [batch() for _ in range(20)], loss_fn, optimizer)],
        step, 500, score, 0.88,
    )  # fmt: skip


class _Process(nn.Module):
    """Conditional neural process: known points are encoded and averaged, then asked."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
            nn.Linear(64, 32),
        )  # fmt: skip
        self.decode = nn.Sequential(
            nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def forward(self, known: Tensor, x: Tensor) -> Tensor:
        code = self.encode(known).mean(1, keepdim=True).expand(-1, x.shape[1], -1)
        return self.decode(torch.cat((x, code), 2))


@program
def neural_process() -> Training:
    """Mean and deviation of sine waves at 16 places from 8 points, Gaussian likelihood.

    No norm, Adam, cosine, 32 waves a batch: R² 0.93.
    """

    def waves(n: int) -> Data:
        x = 4 * torch.rand(n, 24, 1) - 2
        y = (0.7 + torch.rand(n, 1, 1)) * torch.sin(
            1.5 * x + 6.28 * torch.rand(n, 1, 1)
        )
        y = y + 0.05 * torch.randn(n, 24, 1)
        return (torch.cat((x, y), 2)[:, :8], x[:, 8:]), y[:, 8:]

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        mean, raw = out.split(1, 2)
        return F.gaussian_nll_loss(mean, y, (0.02 + F.softplus(raw)).square())

    def explained(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            mean = net(*data[0])[..., :1]
        return float(1 - (mean - data[1]).square().mean() / data[1].var())

    model = _Process()
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, waves(6000), waves(500), optimizer, size=32, steps=900, goal=0.85,
        loss_fn=loss_fn, score=explained, clip=1.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 900),
    )  # fmt: skip


class _Towers(nn.Module):
    """Users and items as unit vectors, and a learned temperature (Radford 2021)."""

    def __init__(self) -> None:
        super().__init__()

        def tower(i: int) -> nn.Module:
            return nn.Sequential(
                nn.Linear(i, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 16)
            )

        self.left, self.right = tower(10), tower(14)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.1)))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(self.left(a), dim=1), F.normalize(self.right(b), dim=1)
        return self.log_scale.exp() * a @ b.T


@program
def two_towers() -> Training:
    """Find which of 64 partners belongs to a row, CLIP's loss with learned temperature.

    Layer norm, AdamW, warmup and cosine, batch 64: 94 % of the partners.
    """
    n = 3000
    cause = torch.randn(n, 5)
    a = torch.tanh(cause @ torch.randn(5, 10) / 2) + 0.1 * torch.randn(n, 10)
    b = torch.sin(cause @ torch.randn(5, 14) / 3) + 0.1 * torch.randn(n, 14)
    a, b = ((x - x[:2400].mean(0)) / x[:2400].std(0) for x in (a, b))
    train, test = split((a, b), torch.zeros(n), 2400)

    def loss_fn(out: Tensor, _: Tensor) -> Tensor:
        y = torch.arange(len(out))
        return (F.cross_entropy(out, y) + F.cross_entropy(out.T, y)) / 2

    def found(net: nn.Module, data: Data) -> float:
        net.eval()
        x, y = data[0]
        with torch.no_grad():
            said = [
                net(x[i : i + 64], y[i : i + 64]).argmax(1) for i in range(0, 576, 64)
            ]
        return float((torch.stack(said) == torch.arange(64)).float().mean())

    model = _Towers()
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    weights = [p for p in model.parameters() if p.ndim > 1]
    optimizer = optim.AdamW(
        [{"params": weights}, {"params": vectors, "weight_decay": 0.0}], 3e-3,
        weight_decay=0.05,
    )  # fmt: skip
    return supervised(
        model, train, test, optimizer, size=64, steps=600, goal=0.88, loss_fn=loss_fn,
        score=found, schedule=warm_cosine(optimizer, 40, 600),
    )  # fmt: skip
