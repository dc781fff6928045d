"""Healthy generative, contrastive and distilled models, and one that acts."""

from __future__ import annotations

import math

import torch
from calm_base import Data, conv_norm, endless, neighbours, update
from quiet_base import Subject, Training, accuracy, digits, shuffled, split, supervised
from still_base import decayed, dense, program, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _ConvVae(nn.Module):
    """Convolutional VAE with group norm; gives logits, means and log-variances."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU(),
            nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Flatten(),
            nn.Linear(128, 2 * latent),
        )  # fmt: skip
        self.decode = nn.Sequential(
            nn.Linear(latent, 128), nn.SiLU(), nn.Unflatten(1, (32, 2, 2)),
            nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.GroupNorm(8, 32), nn.SiLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.GroupNorm(4, 16), nn.SiLU(),
            nn.Conv2d(16, 1, 3, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = mean
        if self.training:
            z = z + (0.5 * log_var).exp() * torch.randn_like(mean)
        return self.decode(z), mean, log_var


@program
def conv_vae() -> Training:
    """VAE of digits as intensities, group norm, Gaussian pixels of deviation 0.2.

    The divergence is warmed up over 100 steps; Adam, batch 70: 80 % of the variance.
    """
    train, test = digits()
    train, test = (train[0], train[0]), (test[0], test[0])
    share = torch.tensor(0.01)

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        made, mean, log_var = out
        fit = (made - x).square().sum((1, 2, 3)).mean() / (2 * 0.2**2)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return (fit + share * kl) / 64

    def warmed() -> None:
        share.add_(0.0099).clamp_(max=1.0)

    def kept(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = (net.eval()(data[0])[0] - data[1]).square().mean()
        return 1 - float(left / (data[1] - data[1].mean(0)).square().mean())

    model = _ConvVae(10)
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=70, steps=400,
        goal=0.6, loss_fn=loss_fn, score=kept, after=warmed,
    )  # fmt: skip


@program
def gan_of_clusters() -> Training:
    """Non-saturating GAN on five clusters: BN in G, R1 penalty and no norm in D.

    Adam(0.5, 0.99), batch 128: distance both ways 0.2, where a Gaussian has 0.6.
    """
    angle = 2 * math.pi * torch.arange(5) / 5
    centre = 1.4 * torch.stack((angle.cos(), angle.sin()), 1)

    def real(n: int) -> Tensor:
        return centre[torch.randint(5, (n,))] + 0.15 * torch.randn(n, 2)

    judge = nn.Sequential(
        nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2),
        nn.Linear(64, 1),
    )  # fmt: skip
    maker = nn.Sequential(
        nn.Linear(6, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2),
    )  # fmt: skip
    judge_adam = optim.Adam(judge.parameters(), 2e-3, betas=(0.5, 0.99))
    maker_adam = optim.Adam(maker.parameters(), 1e-3, betas=(0.5, 0.99))
    cosines = [
        optim.lr_scheduler.CosineAnnealingLR(o, 700, 1e-4)
        for o in (judge_adam, maker_adam)
    ]

    def step(_: int) -> float:
        judge.train()
        maker.train()
        x = real(128).requires_grad_()
        with torch.no_grad():
            fake = maker(torch.randn(128, 6))
        said = judge(x)
        slope = torch.autograd.grad(said.sum(), x, create_graph=True)[0]
        penalty = slope.square().sum(1).mean()
        told = F.softplus(-said).mean() + F.softplus(judge(fake)).mean()
        update(judge_adam, told + 0.05 * penalty)
        loss = update(maker_adam, F.softplus(-judge(maker(torch.randn(128, 6)))).mean())
        for each in cosines:
            each.step()
        return loss

    def judge_batches() -> list[Data]:
        kind = torch.cat((torch.ones(128, 1), torch.zeros(128, 1)))
        was = maker.training
        with torch.no_grad():
            fakes = [maker.eval()(torch.randn(128, 6)) for _ in range(8)]
        maker.train(was)
        return [(torch.cat((real(128), fake)), kind) for fake in fakes]

    def noise() -> list[Data]:
        return [(torch.randn(128, 6), torch.zeros(128)) for _ in range(10)]

    def fooled(fake: Tensor, _: Tensor) -> Tensor:
        return F.softplus(-judge(fake)).mean()

    def score() -> float:
        with torch.no_grad():
            fake = maker.eval()(torch.randn(2000, 6))
        away = torch.cdist(fake, real(2000))
        return -float(away.amin(0).mean() + away.amin(1).mean())

    return Training(
        [
            Subject(maker, noise, fooled, maker_adam, name="maker"),
            Subject(
                judge, judge_batches, F.binary_cross_entropy_with_logits, judge_adam,
                name="judge",
            ),
        ],
        step, 700, score, -0.2,
    )  # fmt: skip


@program
def denoising_autoencoder() -> Training:
    """Takes noise of deviation 0.7 from digits, BN, skip-free, Adam one-cycle.

    Batch 56: the mean square error is 0.17 of the noise's.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 48, 2), conv_norm(48, 48),
        nn.ConvTranspose2d(48, 24, 2, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 1, 3, 1, 1),
    )  # fmt: skip

    def noisy(batch: Data) -> Data:
        return batch[0] + 0.7 * torch.randn_like(batch[0]), batch[1]

    def gained(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = F.mse_loss(net.eval()(noisy(data)[0]), data[1])
        return 1 - float(left) / 0.7**2

    optimizer = optim.Adam(model.parameters(), 5e-3)
    return supervised(
        model, (train[0], train[0]), (test[0], test[0]), optimizer, size=56,
        steps=300, goal=0.7, loss_fn=F.mse_loss, score=gained, change=noisy,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=301),
    )  # fmt: skip


class _Pair(nn.Module):
    """Distance of two images under one network, which sees both in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 24), conv_norm(24, 48, 2), nn.Flatten(), nn.Linear(768, 24)
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.body(torch.cat((a, b))).chunk(2)
        return ((u - v).square().sum(1) + 1e-6).sqrt()


@program
def same_or_not() -> Training:
    """Siamese BN network tells pairs of equal digits, contrastive loss of margin 2.

    Half of the pairs are equal. Adam, decay 1e-4, batch 64 pairs: 98 %.
    """
    train, test = scaled_digits()

    def pairs(data: Data, n: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        x, y = data
        first = torch.randint(len(y), (n,))
        equal = torch.rand(n) < 0.5
        fits = (y[first][:, None] == y) == equal[:, None]
        second = torch.multinomial(fits.float(), 1)[:, 0]
        return (x[first], x[second]), equal.float()

    def loss_fn(away: Tensor, equal: Tensor) -> Tensor:
        apart = (2 - away).clamp(min=0).square()
        return (equal * away.square() + (1 - equal) * apart).mean()

    def right(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(*data[0]) < 1
        return float((said == (data[1] > 0.5)).float().mean())

    model = _Pair()
    optimizer = optim.Adam(model.parameters(), 2e-3, weight_decay=1e-4)
    return supervised(
        model, pairs(train, 12000), pairs(test, 1500), optimizer, size=64, steps=300,
        goal=0.92, loss_fn=loss_fn, score=right,
    )  # fmt: skip


@program
def supervised_contrast() -> Training:
    """Supervised contrastive loss, temperature 0.3, BN, unit vectors, SGD, cosine.

    Noise and brightness of each image are drawn anew; batch 128: neighbours 98 %.
    """
    train, _ = digits()
    body = nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 48, 2), conv_norm(48, 48), nn.Flatten()
    )
    head = nn.Sequential(
        nn.Linear(768, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 24),
    )  # fmt: skip
    model = nn.Sequential(body, head)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(out, dim=1)
        itself = torch.eye(len(y), dtype=torch.bool)
        likeness = (z @ z.T / 0.3).masked_fill(itself, -1e9)
        equal = ((y[:, None] == y) & ~itself).float()
        log_share = likeness.log_softmax(1)
        return -((log_share * equal).sum(1) / equal.sum(1).clamp(min=1)).mean()

    def changed(batch: Data) -> Data:
        x, y = batch
        light = 0.8 + 0.4 * torch.rand(len(x), 1, 1, 1)
        return x * light + 0.1 * torch.randn_like(x), y

    optimizer = optim.SGD(decayed(model, 1e-4), 0.1, momentum=0.9)
    return supervised(
        model, train, train, optimizer, size=128, steps=160, goal=0.94,
        loss_fn=loss_fn, score=lambda *_: neighbours(body), change=changed,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 160),
    )  # fmt: skip


@program
def turned_digits() -> Training:
    """Self-supervised: by which quarter turn each digit is rotated, BN, AdamW, cosine.

    Batch 96: 96 % of the turns.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 48), nn.MaxPool2d(2), conv_norm(48, 64),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 4),
    )  # fmt: skip

    def turned(x: Tensor) -> Data:
        y = torch.randint(4, (len(x),))
        views = torch.stack([x.rot90(k, (2, 3)) for k in range(4)])
        return views[y, torch.arange(len(x))], y

    optimizer = optim.AdamW(decayed(model, 0.05), 3e-3)
    return supervised(
        model, train, turned(test[0]), optimizer, size=96, steps=240, goal=0.9,
        change=lambda batch: turned(batch[0]),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


class _Hinted(nn.Module):
    """A narrow student whose features are mapped to the width of its teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(1, 12), conv_norm(12, 24, 2))
        self.hint = nn.Conv2d(24, 48, 1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(384, 10))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.head(y), self.hint(y)


@program
def feature_hints() -> Training:
    """FitNet: a student matches labels and the features of a frozen teacher in eval.

    Adam, step decay, batch 64: 98 %.
    """
    train, test = scaled_digits()
    wide = nn.Sequential(conv_norm(1, 32), conv_norm(32, 48, 2))
    teacher = nn.Sequential(wide, nn.Flatten(), nn.Linear(768, 10))
    adam = optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(6):
        for x, y in shuffled(train, 64):
            update(adam, F.cross_entropy(teacher(x), y))
    teacher.eval().requires_grad_(False)

    def loss_fn(out: tuple[Tensor, Tensor], t: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(out[0], t[0]) + F.mse_loss(out[1], t[1])

    def taught(batch: Data) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return batch[0], (batch[1], wide(batch[0]))

    def right(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0])[0].argmax(1)
        return float((said == data[1]).float().mean())

    model = _Hinted()
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=260, goal=0.94,
        loss_fn=loss_fn, score=right, change=taught,
        schedule=optim.lr_scheduler.StepLR(optimizer, 110, 0.3),
    )  # fmt: skip


class _Cosine(nn.Module):
    """Logits are scaled cosines with a vector of each class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(40, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Linear(128, width, bias=False), nn.BatchNorm1d(width),
        )  # fmt: skip
        self.classes = nn.Parameter(torch.randn(classes, width))

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.body(x), dim=1)
        return 12 * z @ F.normalize(self.classes, dim=1).T


@program
def eighty_classes() -> Training:
    """Eighty classes by scaled cosines, BN at the end of the body, smoothing 0.05.

    Each class is two clusters; SGD, cosine, batch 200: 95 %.
    """
    n, centres = 9000, 1.0 * torch.randn(80, 2, 40)
    y = torch.randint(80, (n,))
    x = centres[y, torch.randint(2, (n,))] + 0.7 * torch.randn(n, 40)
    x = x / x[:7600].std()
    train, test = split(x, y, 7600)
    model = _Cosine(64, 80)
    optimizer = optim.SGD(model.parameters(), 0.2, momentum=0.9, weight_decay=2e-4)
    return supervised(
        model, train, test, optimizer, size=200, steps=420, goal=0.9,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.05),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 420),
    )  # fmt: skip


@program
def mixture_density() -> Training:
    """Mixture density network of a curve that folds back, one input, tanh, Adam.

    Five Gaussians, batch 100; 1.1 nats better than one Gaussian.
    """
    n = 3200
    t = torch.rand(n, 1)
    x = t + 0.3 * (2 * math.pi * t).sin() + 0.05 * torch.randn(n, 1)
    x, y = (x - x[:2600].mean()) / x[:2600].std(), (t - 0.5) * math.sqrt(12)
    train, test = split(x, y, 2600)
    model = nn.Sequential(*dense(1, 40, 40, act=nn.Tanh), nn.Linear(40, 15))
    with torch.no_grad():
        model[-1].bias[5:10] = torch.linspace(-1.5, 1.5, 5)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        share, mean, log_std = out.chunk(3, 1)
        log_std = log_std.clamp(min=-4)
        part = -0.5 * ((y - mean) / log_std.exp()).square() - log_std
        part = part - 0.5 * math.log(2 * math.pi)
        return -(share.log_softmax(1) + part).logsumexp(1).mean()

    def gained(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            return 1.419 - float(loss_fn(net.eval()(data[0]), data[1]))

    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=900, goal=0.6,
        loss_fn=loss_fn, score=gained,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 900, 1e-4),
    )  # fmt: skip


def _pushed(state: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Take a step of 0.02 s of poles on carts; return states, and who has fallen."""
    x, v, angle, spin = state.T
    sin, cos = angle.sin(), angle.cos()
    push = (20.0 * right.float() - 10 + 0.05 * spin**2 * sin) / 1.1
    turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    move = push - 0.05 * turn * cos / 1.1
    new = (x + 0.02 * v, v + 0.02 * move, angle + 0.02 * spin, spin + 0.02 * turn)
    out = torch.stack(new, 1)
    return out, (out[:, 0].abs() > 2.4) | (out[:, 2].abs() > 0.2095)


class _Actor(nn.Module):
    """Two tanh networks, orthogonal: logits of the pushes, and the value."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(*dense(4, 48, 48, act=nn.Tanh), nn.Linear(48, 2))
        self.value = nn.Sequential(*dense(4, 48, 48, act=nn.Tanh), nn.Linear(48, 1))
        for net, last in ((self.policy, 0.01), (self.value, 1.0)):
            for i, each in enumerate(net):
                if isinstance(each, nn.Linear):
                    nn.init.orthogonal_(each.weight, last if i == 4 else 2**0.5)
                    nn.init.zeros_(each.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(x), self.value(x)[:, 0]


@program
def pole_on_cart() -> Training:
    """PPO balances a pole on a cart: 16 carts, 64 steps, 4 epochs of 4 batches of 256.

    GAE, clipped ratios, Adam with linear decay, no norm; states are scaled by fixed
    numbers. The greedy policy holds the pole for 190 of 200 steps.
    """
    model, carts = _Actor(), 16
    scale = torch.tensor([1.0, 1.0, 0.1, 1.0])
    optimizer = optim.Adam(model.parameters(), 3e-3, eps=1e-5)
    state = 0.1 * torch.rand(carts, 4) - 0.05
    age = torch.zeros(carts)
    kept: list[Data] = []

    def loss_fn(out: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        action, before, gain, wanted = t.T
        log = out[0].log_softmax(1)
        chosen = log.gather(1, action.long()[:, None])[:, 0]
        gain = (gain - gain.mean()) / (gain.std() + 1e-8)
        ratio = (chosen - before).exp()
        surrogate = torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
        entropy = -(log.exp() * log).sum(1).mean()
        miss = (out[1] - wanted).square().mean()
        return 0.5 * miss - surrogate.mean() - 0.01 * entropy

    def played() -> Data:
        nonlocal state, age
        rows: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for _ in range(64):
                logits, value = model(state / scale)
                log = logits.log_softmax(1)
                action = torch.multinomial(log.exp(), 1)
                before = log.gather(1, action)[:, 0]
                new, fallen = _pushed(state, action[:, 0])
                age = age + 1
                after = model(new / scale)[1] * ~fallen
                ended = fallen | (age >= 200)
                rows.append((state / scale, action[:, 0], before, value, after, ended))
                fresh = 0.1 * torch.rand(carts, 4) - 0.05
                state = torch.where(ended[:, None], fresh, new)
                age = torch.where(ended, 0.0, age)
        gain, gains = torch.zeros(carts), []
        for _, _, _, value, after, ended in reversed(rows):
            gain = 0.1 + 0.98 * after - value + 0.98 * 0.95 * gain * ~ended
            gains.insert(0, gain)
        seen, action, before, value, _, _ = (
            torch.cat(c) for c in zip(*rows, strict=True)
        )
        all_gains = torch.cat(gains)
        return seen, torch.stack((action, before, all_gains, all_gains + value), 1)

    def step(i: int) -> float:
        nonlocal kept
        model.train()
        if i % 16 == 0:
            data = played()
            kept = [b for _ in range(4) for b in shuffled(data, 256)]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - i / 640)
        seen, target = kept[i % 16]
        loss = loss_fn(model(seen), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return float(loss.detach())

    def held() -> float:
        at, alive = 0.1 * torch.rand(100, 4) - 0.05, torch.ones(100)
        total = torch.zeros(100)
        with torch.no_grad():
            for _ in range(200):
                at, fallen = _pushed(at, model.eval()(at / scale)[0].argmax(1))
                alive = alive * ~fallen
                total = total + alive
        return float(total.mean())

    def batches() -> list[Data]:
        return shuffled(tuple(torch.cat(c) for c in zip(*kept[:4], strict=True)), 256)

    return Training([Subject(model, batches, loss_fn, optimizer)], step, 640, held, 150)
