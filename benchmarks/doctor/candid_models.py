"""Healthy programs that generate pictures, learn by themselves or from false labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from calm_base import Data, conv_norm, endless, neighbours, update, warm_cosine
from candid_base import program, strokes
from quiet_base import Subject, Training, accuracy, digits, shuffled, split, supervised
from sober_base import explained_share
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR


class _ClassNorm(nn.Module):
    """BN whose scale and shift come from the class (de Vries et al. 2017)."""

    def __init__(self, width: int, kinds: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.scale, self.shift = nn.Embedding(kinds, width), nn.Embedding(kinds, width)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        scale, shift = self.scale(kind), self.shift(kind)
        return self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]


class _Maker(nn.Module):
    """Digits in [-1, 1] from noise and a class."""

    def __init__(self, noise: int, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(noise, 2 * width * 4)
        self.norms = nn.ModuleList((
            _ClassNorm(2 * width, 10), _ClassNorm(width, 10), _ClassNorm(width, 10)
        ))  # fmt: skip
        self.convs = nn.ModuleList((
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.ConvTranspose2d(width, width, 4, 2, 1, bias=False),
            nn.Conv2d(width, 1, 3, 1, 1),
        ))  # fmt: skip

    def forward(self, z: Tensor, kind: Tensor) -> Tensor:
        y = self.first(z).unflatten(1, (-1, 2, 2))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y, kind)))
        return y.tanh()


class _Projected(nn.Module):
    """Judge with spectral norm; the class is projected on its features (Miyato)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            spectral_norm(nn.Conv2d(1, width, 3, 1, 1)), nn.LeakyReLU(0.1),
            spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1)), nn.LeakyReLU(0.1),
            spectral_norm(nn.Conv2d(2 * width, 2 * width, 4, 2, 1)), nn.LeakyReLU(0.1),
        )  # fmt: skip
        self.real = spectral_norm(nn.Linear(2 * width, 1))
        self.kind = spectral_norm(nn.Embedding(10, 2 * width))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        y = self.body(x).sum((2, 3))
        return self.real(y)[:, 0] + (self.kind(kind) * y).sum(1)


def _reader() -> nn.Module:
    """Return a trained classifier of digits in [-1, 1], in eval mode."""
    (x, y), _ = digits()
    model = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 32, 2), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    optimizer = optim.Adam(model.parameters(), 3e-3)
    for _ in range(5):
        for a, b in shuffled((2 * x - 1, y), 50):
            update(optimizer, F.cross_entropy(model(a), b))
    return model.eval()


@program
def projection_gan() -> Training:
    """Digits by a GAN with class-wise BN, spectral norm, projection and hinge loss.

    Adam (0, 0.9), 1e-3 and 2e-3, linear fall, batch 48; the share of new digits that a
    classifier reads as their class.
    """
    train, _ = digits()
    reader, make, judge = _reader(), _Maker(24), _Projected()
    first = optim.Adam(make.parameters(), 1e-3, (0.0, 0.9))
    second = optim.Adam(judge.parameters(), 2e-3, (0.0, 0.9))
    falls = [LinearLR(o, 1.0, 0.1, 300) for o in (first, second)]
    rows = endless(lambda: shuffled((2 * train[0] - 1, train[1]), 48))

    def seeds(n: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        kind = torch.randint(10, (n,))
        return (torch.randn(n, 24), kind), kind

    def loss_fn(out: Tensor, kind: Tensor) -> Tensor:
        return -judge(out, kind).mean()

    def step(_: int) -> float:
        make.train()
        x, y = next(rows)
        drawn, kind = seeds(48)
        real, false = judge(x, y), judge(make(*drawn).detach(), kind)
        update(second, F.relu(1 - real).mean() + F.relu(1 + false).mean())
        drawn, kind = seeds(48)
        loss = update(first, loss_fn(make(*drawn), kind))
        for fall in falls:
            fall.step()
        return loss

    def score() -> float:
        make.eval()
        drawn, kind = seeds(1000)
        with torch.no_grad():
            return float((reader(make(*drawn)).argmax(1) == kind).float().mean())

    subject = Subject(make, lambda: [seeds(48) for _ in range(20)], loss_fn, first)
    return Training([subject], step, 300, score, 0.8)


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


class _Student(nn.Module):
    """BN body and DINO's head: an MLP, unit length, a weight-normed layer."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 24), conv_norm(24, 48, 2), conv_norm(48, 64), nn.MaxPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(256, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(),
            nn.Linear(96, 32),
        )  # fmt: skip
        self.last = weight_norm(nn.Linear(32, prototypes, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1)
        self.last.parametrizations.weight.original0.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.head(self.body(x)), dim=1))


def _view(x: Tensor) -> Tensor:
    """Return digits turned, scaled and shifted a little, brightened and noisy."""
    n = len(x)
    angle, size = 0.3 * torch.randn(n), 1 + 0.15 * torch.randn(n)
    c, s = size * angle.cos(), size * angle.sin()
    shift = 0.2 * torch.randn(2, n)
    rows = torch.stack((torch.stack((c, -s, shift[0]), 1),
                        torch.stack((s, c, shift[1]), 1)), 1)  # fmt: skip
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    y = F.grid_sample(x, grid, align_corners=False)
    return y * (0.8 + 0.4 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn_like(y)


@program
def dino() -> Training:
    """Digits without labels: a student tells the teacher's prototypes of another view.

    Centred and sharpened, teacher by momentum, AdamW 2e-3, warm-up and cosine, clip 3,
    batch 64; five neighbours' accuracy by the teacher's body.
    """
    train, _ = digits()
    model, teacher = _Student(128), _Student(128)
    teacher.load_state_dict(model.state_dict())
    for p in teacher.parameters():
        p.requires_grad_(False)
    optimizer = optim.AdamW(decayed(model, 0.04), 2e-3)
    schedule = warm_cosine(optimizer, 20, 300)
    center = torch.zeros(128)

    def pairs(x: Tensor) -> tuple[Data, Tensor]:
        a, b = _view(x), _view(x)
        with torch.no_grad():
            told = teacher(torch.cat((b, a)))
        return (torch.cat((a, b)), ((told - center) / 0.05).softmax(1)), told

    def loss_fn(out: Tensor, told: Tensor) -> Tensor:
        return -(told * (out / 0.1).log_softmax(1)).sum(1).mean()

    rows = endless(lambda: shuffled(train, 64))

    def step(i: int) -> float:
        model.train()
        teacher.train()
        (x, told), raw = pairs(next(rows)[0])
        loss = loss_fn(model(x), told)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        center.lerp_(raw.mean(0), 0.1)
        keep = 1 - 0.02 * (1 + math.cos(math.pi * i / 300))
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), model.parameters(), strict=True):
                p.lerp_(q, 1 - keep)
        return float(loss.detach())

    def batches() -> list[Data]:
        return [pairs(x)[0] for x, _ in shuffled(train, 64)]

    subject = Subject(model, batches, loss_fn, optimizer)
    return Training([subject], step, 300, lambda: neighbours(teacher.body), 0.85)


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
