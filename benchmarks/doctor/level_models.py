"""Healthy generative models, metric learning, distillation and control."""

from __future__ import annotations

import copy
import math

import torch
from calm_base import Data, conv_norm, endless, update, warm_cosine
from level_base import program, pulled
from quiet_base import Subject, Training, accuracy, digits, shuffled, supervised
from still_base import scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def relativistic_gan() -> Training:
    """Relativistic average GAN on a spiral: BN in G, none in D, Adam(0.5, 0.999).

    Batch 128: distance both ways 0.09; a Gaussian of that spread has 0.36, new real
    points have 0.04.
    """

    def real(n: int) -> Tensor:
        t = 0.15 + 0.85 * torch.rand(n, 1).sqrt()
        angle = 3 * math.pi * t
        way = torch.cat((angle.cos(), angle.sin()), 1)
        return 1.8 * t * way + 0.04 * torch.randn(n, 2)

    judge = nn.Sequential(
        nn.Linear(2, 96), nn.LeakyReLU(0.2), nn.Linear(96, 96), nn.LeakyReLU(0.2),
        nn.Linear(96, 1),
    )  # fmt: skip
    maker = nn.Sequential(
        nn.Linear(4, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU(),
        nn.Linear(96, 96, bias=False), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 2),
    )  # fmt: skip
    judge_adam = optim.Adam(judge.parameters(), 1e-3, betas=(0.5, 0.999))
    maker_adam = optim.Adam(maker.parameters(), 1e-3, betas=(0.5, 0.999))
    falls = [
        optim.lr_scheduler.CosineAnnealingLR(adam, 801)
        for adam in (judge_adam, maker_adam)
    ]

    def apart(out: Tensor, is_first: Tensor) -> Tensor:
        a, b = out[is_first], out[~is_first]
        above, below = a - b.mean(), b - a.mean()
        return (F.softplus(-above).mean() + F.softplus(below).mean()) / 2

    def fooled(made: Tensor, points: Tensor) -> Tensor:
        mark = torch.arange(2 * len(made)) < len(made)
        return apart(judge(torch.cat((made, points)))[:, 0], mark)

    def pair() -> Data:
        with torch.no_grad():
            made = maker(torch.randn(128, 4))
        return torch.cat((real(128), made)), torch.arange(256) < 128

    def told(out: Tensor, mark: Tensor) -> Tensor:
        return apart(out[:, 0], mark)

    def step(_: int) -> float:
        maker.train()
        x, mark = pair()
        loss = update(judge_adam, told(judge(x), mark))
        judge.requires_grad_(False)
        update(maker_adam, fooled(maker(torch.randn(128, 4)), real(128)))
        judge.requires_grad_(True)
        for each in falls:
            each.step()
        return loss

    def score() -> float:
        maker.eval()
        with torch.no_grad():
            return pulled(maker(torch.randn(1000, 4)), real(1000))

    def noise() -> list[Data]:
        return [(torch.randn(128, 4), real(128)) for _ in range(20)]

    return Training(
        [
            Subject(maker, noise, fooled, maker_adam, name="generator"),
            Subject(
                judge, lambda: [pair() for _ in range(20)], told, judge_adam,
                name="discriminator",
            ),
        ],
        step, 800, score, -0.25,
    )  # fmt: skip


class _Cyclic(nn.Module):
    """VAE of rows of 64; gives logits, means and log-variances."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(64, 96), nn.LayerNorm(96), nn.ELU(), nn.Linear(96, 2 * latent)
        )
        self.decode = nn.Sequential(
            nn.Linear(latent, 96), nn.LayerNorm(96), nn.ELU(), nn.Linear(96, 64)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = mean
        if self.training:
            z = z + (0.5 * log_var).exp() * torch.randn_like(mean)
        return self.decode(z), mean, log_var


@program
def cyclical_annealing() -> Training:
    """VAE of digits, the divergence's weight grows to 1 in three cycles of 120 steps.

    It is 1 in half of each and in the last 100 steps; layer norm, ELU, Adam, batch 64:
    63 % of the variance by eight latents.
    """
    train, test = digits()
    train, test = ((d[0].flatten(1), d[0].flatten(1)) for d in (train, test))
    share = torch.tensor(0.0)
    taken = 0

    def grown() -> None:
        nonlocal taken
        taken += 1
        share.fill_(1.0 if taken >= 360 else min(1.0, taken % 120 / 60))

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        made, mean, log_var = out
        fit = F.binary_cross_entropy_with_logits(made, x, reduction="none").sum(1)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)
        return (fit + share * kl).mean()

    def kept(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(data[0])[0].sigmoid() - data[1]).square().mean()
        return 1 - float(left / (data[1] - data[1].mean(0)).square().mean())

    model = _Cyclic(8)
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=64, steps=460,
        goal=0.45, loss_fn=loss_fn, score=kept, after=grown,
    )  # fmt: skip


class _Dueling(nn.Module):
    """A value of the state and an advantage of each action (Wang et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 48),
            nn.LayerNorm(48), nn.ReLU(),
        )  # fmt: skip
        self.value, self.gain = nn.Linear(48, 1), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        gain = self.gain(y)
        return self.value(y) + gain - gain.mean(1, keepdim=True)


def _pushed(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next places and speeds of masses, and their rewards."""
    place, speed = state.unbind(1)
    speed = (0.95 * speed + 0.15 * (action - 1)).clamp(-1, 1)
    place = (place + 0.3 * speed).clamp(-2, 2)
    return torch.stack((place, speed), 1), 1 - place.abs() - 0.1 * speed.abs()


@program
def dueling_network() -> Training:
    """Dueling double DQN holds 16 masses at the origin, replay of 6400 moves, Adam.

    Target of slow weights (0.02 a step), layer norm, Huber loss, batch 64: reward
    0.76 a move; at random -0.16, a linear rule set by hand 0.63.
    """
    model = _Dueling()
    slow = copy.deepcopy(model).requires_grad_(False)
    optimizer = optim.Adam(model.parameters(), 1e-3)

    def fresh(n: int) -> Tensor:
        return torch.stack((4 * torch.rand(n) - 2, torch.rand(n) - 0.5), 1)

    state, age = fresh(16), 0
    memory: list[tuple[Tensor, ...]] = []

    def act(greed: float) -> None:
        nonlocal state, age
        with torch.no_grad():
            best = model(state).argmax(1)
        action = torch.where(torch.rand(16) < greed, best, torch.randint(3, (16,)))
        after, reward = _pushed(state, action)
        memory.append((state, action, reward, after))
        del memory[:-400]
        age += 1
        state = after if age % 25 else fresh(16)

    for _ in range(20):
        act(0.0)

    def drawn() -> Data:
        when = torch.randint(len(memory), (64,)).tolist()
        who = torch.randint(16, (64,)).tolist()
        old, action, reward, new = (
            torch.stack([memory[t][k][w] for t, w in zip(when, who, strict=True)])
            for k in range(4)
        )
        with torch.no_grad():
            best = model(new).argmax(1, keepdim=True)
            value = 0.1 * reward + 0.9 * slow(new).gather(1, best)[:, 0]
        return old, torch.stack((action.float(), value), 1)

    def loss_fn(out: Tensor, wanted: Tensor) -> Tensor:
        chosen = out.gather(1, wanted[:, :1].long())[:, 0]
        return F.smooth_l1_loss(chosen, wanted[:, 1])

    def step(i: int) -> float:
        model.train()
        act(min(0.9, i / 400))
        x, wanted = drawn()
        loss = update(optimizer, loss_fn(model(x), wanted))
        with torch.no_grad():
            for a, b in zip(slow.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 0.02)
        return loss

    def score() -> float:
        model.eval()
        place, total = fresh(300), 0.0
        with torch.no_grad():
            for _ in range(25):
                place, reward = _pushed(place, model(place).argmax(1))
                total += float(reward.mean()) / 25
        return total

    subject = Subject(model, lambda: [drawn() for _ in range(20)], loss_fn, optimizer)
    return Training([subject], step, 800, score, 0.5)


class _Proxies(nn.Module):
    """Unit vectors of digits, and a proxy for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 32, 2), nn.Flatten(), nn.Linear(512, 32)
        )
        self.proxies = nn.Parameter(torch.randn(10, 32))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=1) @ F.normalize(self.proxies, dim=1).T


@program
def proxy_anchor() -> Training:
    """Proxy-Anchor loss (margin 0.1, scale 16), proxies at a tenfold rate, AdamW.

    Digits, BN in the body, batch 60, cosine: 98 % by the nearest proxy.
    """
    train, test = digits()
    model = _Proxies()

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        own = F.one_hot(y, 10).bool()
        pull = (-16 * (out - 0.1)).masked_fill(~own, -math.inf)
        push = (16 * (out + 0.1)).masked_fill(own, -math.inf)
        zero = torch.zeros(1, 10)
        pulls = torch.cat((zero, pull)).logsumexp(0)[own.any(0)].mean()
        return pulls + torch.cat((zero, push)).logsumexp(0).mean()

    optimizer = optim.AdamW(
        [
            {"params": model.body.parameters()},
            {"params": [model.proxies], "lr": 1e-2, "weight_decay": 0.0},
        ],
        1e-3, weight_decay=0.01,
    )  # fmt: skip
    return supervised(
        model, train, test, optimizer, size=60, steps=160, goal=0.95, loss_fn=loss_fn,
        schedule=warm_cosine(optimizer, 10, 161),
    )  # fmt: skip


@program
def ensemble_distilled() -> Training:
    """Three BN nets' mean probabilities at temperature 3 teach a small net digits.

    Teachers in eval mode; three quarters soft targets; batch 50, SGD, cosine: 96 %.
    """
    train, test = scaled_digits()
    teachers = []
    for _ in range(3):
        net = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 32, 2), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
        adam = optim.Adam(net.parameters(), 3e-3)
        batches = endless(lambda: shuffled(train, 64))
        for _ in range(80):
            x, y = next(batches)
            update(adam, F.cross_entropy(net(x), y))
        teachers.append(net.eval().requires_grad_(False))

    def taught(batch: Data) -> Data:
        x, y = batch
        with torch.no_grad():
            soft = torch.stack([(t(x) / 3).softmax(1) for t in teachers]).mean(0)
        return x, torch.cat((soft, y[:, None].float()), 1)

    def loss_fn(out: Tensor, target: Tensor) -> Tensor:
        log_p = (out / 3).log_softmax(1)
        kl = F.kl_div(log_p, target[:, :10], reduction="batchmean") * 9
        return 0.75 * kl + 0.25 * F.cross_entropy(out, target[:, 10].long())

    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=50, steps=250, goal=0.93, loss_fn=loss_fn,
        score=accuracy, change=taught,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 251),
    )  # fmt: skip
