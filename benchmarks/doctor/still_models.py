"""Healthy generative, contrastive and self-supervised models."""

from __future__ import annotations

import copy
import math

import torch
from calm_base import Data, conv_norm, neighbours, update
from quiet_base import Subject, Training, digits, supervised
from still_base import decayed, program, scaled_digits
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

    The divergence is warmed up over 100 steps; Adam, batch 70: 79 % of the variance.
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

    Adam(0.5, 0.99), batch 128: distance both ways 0.10, where a Gaussian has 0.40 and
    new real points have 0.03.
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
        made = copy.deepcopy(maker).train()
        with torch.no_grad():
            fakes = [made(torch.randn(128, 6)) for _ in range(8)]
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
    """Autoencoder that takes noise of deviation 0.7 from digits, BN.

    Adam one-cycle, batch 56: the mean square error is 0.22 of the noise's.
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
            conv_norm(1, 24),
            conv_norm(24, 48, 2),
            nn.Flatten(),
            nn.Linear(768, 24, bias=False),
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.body(torch.cat((a, b))).chunk(2)
        return ((u - v).square().sum(1) + 1e-6).sqrt()


@program
def same_or_not() -> Training:
    """Siamese BN network tells pairs of equal digits, contrastive loss of margin 2.

    Half of the pairs are equal. Adam, decay 1e-4, batch 64 pairs: 99 %.
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

    Noise and brightness of each image are drawn anew; batch 128: neighbours 99 %.
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

    Batch 96: 95 % of the turns.
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
