"""Healthy programs that generate pictures, or learn from false labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from calm_base import conv_norm, warm_cosine
from candid_base import program, strokes
from quiet_base import Training, accuracy, supervised
from sober_base import explained_share
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR


class _TimeBlock(nn.Module):
    """Group norm, SiLU, convolution, twice; time and class added between (DDPM)."""

    def __init__(self, i: int, o: int, told: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(8, i), nn.SiLU(), nn.Conv2d(i, o, 3, 1, 1)
        )
        self.told = nn.Linear(told, o)
        self.second = nn.Sequential(
            nn.GroupNorm(8, o), nn.SiLU(), nn.Conv2d(o, o, 3, 1, 1)
        )
        self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        nn.init.zeros_(self.second[2].weight)
        nn.init.zeros_(self.second[2].bias)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        y = self.first(x) + self.told(told)[:, :, None, None]
        return self.short(x) + self.second(y)


class _Guided(nn.Module):
    """U-Net of two scales; class 5 stands for no class."""

    def __init__(self, w: int = 16, told: int = 48) -> None:
        super().__init__()
        self.kind = nn.Embedding(6, told)
        self.time = nn.Sequential(nn.Linear(16, told), nn.SiLU(), nn.Linear(told, told))
        self.stem = nn.Conv2d(3, w, 3, 1, 1)
        self.high, self.low = _TimeBlock(w, w, told), _TimeBlock(2 * w, 2 * w, told)
        self.down = nn.Conv2d(w, 2 * w, 3, 2, 1)
        self.middle, self.last = (
            _TimeBlock(2 * w, 2 * w, told), _TimeBlock(3 * w, w, told),
        )  # fmt: skip
        self.up = nn.Conv2d(2 * w, 2 * w, 3, 1, 1)
        self.out = nn.Sequential(
            nn.GroupNorm(8, w), nn.SiLU(), nn.Conv2d(w, 3, 3, 1, 1)
        )

    def forward(self, x: Tensor, t: Tensor, kind: Tensor) -> Tensor:
        turns = t[:, None] * 1000 * (-torch.arange(8) * math.log(1e4) / 8).exp()
        told = self.time(torch.cat((turns.sin(), turns.cos()), 1)) + self.kind(kind)
        told = F.silu(told)
        a = self.high(self.stem(x), told)
        y = self.middle(self.low(self.down(a), told), told)
        y = self.up(F.interpolate(y, scale_factor=2.0))
        return self.out(self.last(torch.cat((y, a), 1), told))


@program
def guided_diffusion() -> Training:
    """Curves of 16 × 16 from noise, with classifier-free guidance; cosine schedule.

    Group norm, AdamW 3e-3, warm-up and cosine, clip 1, two batches of 14 a step; an
    average of the weights tells the share of the noise.
    """
    (x, y), (a, b) = strokes(2400, 16, 2000)

    def noisy(batch: Any) -> Any:
        (x, _, kind), _ = batch
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        kept = (t * math.pi / 2).cos()[:, None, None, None]
        kind = torch.where(torch.rand(len(x)) < 0.1, 5, kind)
        return (kept * x + (1 - kept.square()).sqrt() * noise, t, kind), noise

    train = (x, torch.zeros(len(x)), y), x
    test = (a, torch.zeros(len(a)), b), a
    model = _Guided()
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    average = optim.swa_utils.AveragedModel(
        model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.97)
    )
    return supervised(
        model, train, test, optimizer, size=14, steps=200, goal=0.6, change=noisy,
        loss_fn=F.mse_loss, clip=1.0, accumulate=2,
        schedule=warm_cosine(optimizer, 20, 200),
        after=lambda: average.update_parameters(model),
        score=lambda _, data: explained_share(average.module, noisy(data)),
    )  # fmt: skip


@program
def soft_bootstrapping() -> Training:
    """Curves, a quarter of the labels false, by targets mixed with the net's own.

    CNN with BN, 0.8 of a label (Reed et al. 2014), Adam 2e-3, cosine, crops, batch 64.
    """
    (x, y), test = strokes(3000, 20, 2600)
    wrong = torch.rand(len(y)) < 0.25
    y = torch.where(wrong, (y + torch.randint(1, 5, y.shape)) % 5, y)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        own = out.detach().softmax(1)
        return F.cross_entropy(out, 0.8 * F.one_hot(y, 5) + 0.2 * own)

    model = nn.Sequential(
        conv_norm(3, 16), nn.MaxPool2d(2), conv_norm(16, 32), nn.MaxPool2d(2),
        conv_norm(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, (x, y), test, optimizer, size=64, steps=220, goal=0.85, loss_fn=loss_fn,
        score=accuracy, schedule=CosineAnnealingLR(optimizer, 220),
    )  # fmt: skip
