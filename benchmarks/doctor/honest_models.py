"""Healthy programs that generate, encode or learn from uneven and false labels."""

from __future__ import annotations

import math

import torch
from calm_base import Data, conv_norm, update, warm_cosine
from honest_base import conv_group, flowers, outputs, program
from quiet_base import Subject, Training, digits, split, supervised
from sober_base import explained_share
from still_base import decayed, dense
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def conv_autoencoder() -> Training:
    """Digits through a code of 2 × 2 × 8 and back, as in Keras' blog; no norm.

    Glorot weights, sigmoid pixels, BCE, Adam 3e-3, batch 64; the share of the pixels'
    variance.
    """
    (x, _), (a, _) = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(48, 8, 1),
        nn.ConvTranspose2d(8, 48, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(48, 24, 4, 2, 1), nn.ReLU(), nn.Conv2d(24, 1, 3, 1, 1),
        nn.Sigmoid(),
    )  # fmt: skip
    for m in model:
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, (x, x), (a, a), optimizer, size=64, steps=300, goal=0.8,
        loss_fn=F.binary_cross_entropy, score=explained_share,
    )  # fmt: skip


class _Variational(nn.Module):
    """Pictures of 20 × 20 to the means and log variances of codes, and back."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code
        self.encoder = nn.Sequential(
            conv_group(3, 16, 2), conv_group(16, 32, 2), nn.Flatten(),
            nn.Linear(32 * 25, 2 * code),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(code, 32 * 25), nn.ReLU(), nn.Unflatten(1, (32, 5, 5)),
            nn.Upsample(scale_factor=2), conv_group(32, 32),
            nn.Upsample(scale_factor=2), conv_group(32, 16), nn.Conv2d(16, 3, 3, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (log_var / 2).exp()), mean, log_var


@program
def beta_vae() -> Training:
    """Flowers by 12 codes, Gaussian pixels of variance 0.1, beta 2; group norm.

    Adam 2e-3, cosine, clip 5, batch 50; the share of the pixels' variance.
    """
    (x, _), (a, _) = flowers(1800, 20, 1500)

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        again, mean, log_var = out
        pixels = (again - x).square().sum((1, 2, 3)).mean() / 0.2
        away = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return (pixels + 2 * away) / 1200

    def kept(net: nn.Module, data: Data) -> float:
        left = (outputs(net, data)[0] - data[1]).square().mean()
        return float(1 - left / data[1].var())

    model = _Variational(12)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, (x, x), (a, a), optimizer, size=50, steps=300, goal=0.55,
        loss_fn=loss_fn, score=kept, clip=5.0,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


class _Scores(nn.Module):
    """Noise in a point of the plane, by its level; residual blocks of layer norm."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first, self.level = nn.Linear(2, width), nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(),
                nn.Linear(width, width),
            )
            for _ in range(3)
        )  # fmt: skip
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        turns = sigma.log() * 2.0 ** torch.arange(-1, 3)
        y = self.first(x / (sigma.square() + 1).sqrt())
        y = y + self.level(torch.cat((turns.sin(), turns.cos()), 1))
        for block in self.blocks:
            y = y + block(y)
        return self.out(y)


@program
def score_network() -> Training:
    """Points of a spiral by denoising score matching (NCSN).

    Noise of 0.05 to 3, AdamW 2e-3, warm-up, cosine, batch 256; the share of the noise
    that is told.
    """
    n = 8000
    angle = 3 * math.pi * (0.1 + 0.9 * torch.rand(n).sqrt())
    x = torch.stack((angle.cos(), angle.sin()), 1) * angle[:, None]
    x = (x + 0.1 * torch.randn(n, 2)) / x.std()
    sigma = (math.log(0.05) + torch.rand(n, 1) * math.log(60)).exp()
    noise = torch.randn(n, 2)
    train, test = split((x, sigma), noise, 7000)

    def noisy(batch: Data) -> Data:
        (x, _), y = batch
        sigma = (math.log(0.05) + torch.rand(len(x), 1) * math.log(60)).exp()
        noise = torch.randn_like(y)
        return (x + sigma * noise, sigma), noise

    def told(net: nn.Module, data: Data) -> float:
        (x, sigma), noise = data
        return explained_share(net, ((x + sigma * noise, sigma), noise))

    model = _Scores()
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=256, steps=300, goal=0.45, change=noisy,
        loss_fn=F.mse_loss, score=told, clip=1.0,
        schedule=warm_cosine(optimizer, 20, 300),
    )  # fmt: skip


@program
def info_gan() -> Training:
    """Six clusters by an InfoGAN: the code of a sample is told from it, BN in G.

    Adam(0.5, 0.999), 2e-3 and 4e-3, falling to a tenth, R1 penalty, batch 128; the
    share of samples near a cluster less that of clusters unseen.
    """
    turn = math.pi / 3 * torch.arange(6)
    middles = 1.5 * torch.stack((turn.cos(), turn.sin()), 1)
    make = nn.Sequential(
        nn.Linear(14, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2),
    )  # fmt: skip
    judge = nn.Sequential(
        nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2)
    )
    real, code = nn.Linear(64, 1), nn.Linear(64, 6)
    judging = nn.Sequential(judge, real)
    first = optim.Adam([*make.parameters(), *code.parameters()], 2e-3, (0.5, 0.999))
    second = optim.Adam(judging.parameters(), 4e-3, (0.5, 0.999))
    falls = [optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 300) for o in (first, second)]

    def seeds(n: int) -> Data:
        kind = torch.randint(6, (n,))
        return torch.cat((torch.randn(n, 8), F.one_hot(kind, 6)), 1), kind

    def loss_fn(out: Tensor, kind: Tensor) -> Tensor:
        seen = judge(out)
        return F.softplus(-real(seen)).mean() + F.cross_entropy(code(seen), kind)

    def step(_: int) -> float:
        make.train()
        z, kind = seeds(128)
        x = middles[torch.randint(6, (128,))] + 0.15 * torch.randn(128, 2)
        x.requires_grad_()
        logit = judging(x)
        slope = torch.autograd.grad(logit.sum(), x, create_graph=True)[0]
        told = F.softplus(-logit).mean() + F.softplus(judging(make(z).detach())).mean()
        update(second, told + 0.1 * slope.square().sum(1).mean())
        loss = update(first, loss_fn(make(z), kind))
        for fall in falls:
            fall.step()
        return loss

    def score() -> float:
        make.eval()
        with torch.no_grad():
            away, which = torch.cdist(make(seeds(1200)[0]), middles).min(1)
        near = away < 0.6
        seen = torch.bincount(which[near], minlength=6) > 40
        return float(near.float().mean() - (~seen).float().mean())

    subject = Subject(make, lambda: [seeds(128) for _ in range(20)], loss_fn, first)
    return Training([subject], step, 300, score, 0.85)


class _Switch(nn.Module):
    """Each token through the likeliest of four feed-forward nets, times its chance."""

    def __init__(self, width: int, experts: int = 4) -> None:
        super().__init__()
        self.route = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(
                *dense(width, 2 * width, act=nn.GELU), nn.Linear(2 * width, width)
            )
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chance = self.route(x).softmax(-1)
        best, which = chance.max(-1)
        hot = F.one_hot(which, len(self.experts)).to(x.dtype)
        every = torch.stack([expert(x) for expert in self.experts], -1)
        y = (every * hot[..., None, :]).sum(-1) * best[..., None]
        even = len(self.experts) * (hot.mean((0, 1)) * chance.mean((0, 1))).sum()
        return y, even


class _SwitchModel(nn.Module):
    """Causal pre-norm blocks with RMS norm, tied words, switched feed-forward."""

    def __init__(self, words: int, longest: int, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.places = nn.Parameter(0.02 * torch.randn(longest, width))
        nn.init.normal_(self.embed.weight, std=0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(5))
        self.attend = nn.ModuleList(
            nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2)
        )
        self.switch = nn.ModuleList(_Switch(width) for _ in range(2))
        mask = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, even = self.embed(x) + self.places, torch.zeros(())
        for k in range(2):
            z = self.norms[2 * k](y)
            y = y + self.attend[k](z, z, z, attn_mask=self.mask, need_weights=False)[0]
            z, uneven = self.switch[k](self.norms[2 * k + 1](y))
            y, even = y + z, even + uneven
        return F.linear(self.norms[4](y), self.embed.weight), even / 2


@program
def switch_transformer() -> Training:
    """Next of 40 words in one of two tongues, by a Switch transformer.

    Top-1 of 4 experts, balance 0.01, RMS norm, AdamW 3e-3, warm-up, clip 1, batch 32;
    the accuracy.
    """
    n, words, longest = 1600, 40, 25
    follow = torch.stack([torch.randperm(words) for _ in range(2)])
    tongue = torch.randint(2, (n,))
    rows = [torch.randint(words, (n,))]
    for _ in range(longest - 1):
        usual = follow[tongue, rows[-1]]
        rows.append(
            torch.where(torch.rand(n) < 0.85, usual, torch.randint(words, (n,)))
        )
    x = torch.stack(rows, 1)
    train, test = split(x[:, :-1], x[:, 1:], 1400)

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(out[0].flatten(0, 1), y.flatten()) + 0.01 * out[1]

    def right(net: nn.Module, data: Data) -> float:
        return float((outputs(net, data)[0].argmax(2) == data[1]).float().mean())

    model = _SwitchModel(words, longest - 1)
    optimizer = optim.AdamW(decayed(model, 0.05), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=220, goal=0.7, loss_fn=loss_fn,
        score=right, clip=1.0, schedule=warm_cosine(optimizer, 20, 220),
    )  # fmt: skip


@program
def generalized_cross_entropy() -> Training:
    """Digits, three labels in ten false, by the generalized cross entropy (q 0.5).

    Convolutions with BN, SGD 0.05 with momentum, cosine, batch 64.
    """
    (x, y), test = digits()
    wrong = torch.rand(len(y)) < 0.3
    y = torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y)
    mean, std = x.mean(), x.std()
    model = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 32), nn.MaxPool2d(2), conv_norm(32, 48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        chance = out.softmax(1).gather(1, y[:, None])
        return ((1 - chance.clamp(min=1e-6).sqrt()) / 0.5).mean()

    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    return supervised(
        model, ((x - mean) / std, y), ((test[0] - mean) / std, test[1]), optimizer,
        size=64, steps=240, goal=0.93, loss_fn=loss_fn,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


@program
def logit_adjusted() -> Training:
    """Long-tailed flowers, 800 to 80 a class, logits adjusted by the classes' logs.

    CNN with BN, SGD 0.01 with Nesterov, cosine, batch 64; the balanced
    accuracy of plain logits.
    """
    (x, y), (a, b) = flowers(5000, 20, 4400)
    many = torch.tensor([800, 450, 250, 140, 80])
    rows = torch.cat([(y == k).nonzero()[: many[k], 0] for k in range(5)])
    counts = torch.bincount(y[rows], minlength=5)
    prior = (counts / counts.sum()).log()
    model = nn.Sequential(
        conv_norm(3, 16), nn.MaxPool2d(2), conv_norm(16, 32), nn.MaxPool2d(2),
        conv_norm(32, 64), nn.Flatten(), nn.Linear(64 * 25, 5),
    )  # fmt: skip

    def balanced(net: nn.Module, data: Data) -> float:
        right = (outputs(net, data).argmax(1) == data[1]).float()
        return float(torch.stack([right[data[1] == k].mean() for k in range(5)]).mean())

    optimizer = optim.SGD(
        model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return supervised(
        model, (x[rows], y[rows]), (a, b), optimizer, size=64, steps=200, goal=0.85,
        loss_fn=lambda out, y: F.cross_entropy(out + prior, y), score=balanced,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip
