"""Healthy programs that draw pictures, find boxes or learn from false labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from calm_base import Data, conv_norm, warm_cosine
from candid_base import outputs, program, standard, strokes
from quiet_base import Training, accuracy, split, supervised
from sober_base import explained_share, figure_masks
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
        model, train, test, optimizer, size=14, steps=150, goal=0.57, change=noisy,
        loss_fn=F.mse_loss, clip=1.0, accumulate=2,
        schedule=warm_cosine(optimizer, 20, 150),
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


class _Anchorless(nn.Module):
    """BN body and a head with group norm: kinds, distances, centre-ness (FCOS)."""

    def __init__(self, kinds: int, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(3, 16), conv_norm(16, 24, 2), conv_norm(24, width, 2)
        )
        self.towers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.ReLU(),
                nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.ReLU(),
            )
            for _ in range(2)
        )  # fmt: skip
        self.kind = nn.Conv2d(width, kinds, 3, 1, 1)
        self.box = nn.Conv2d(width, 5, 3, 1, 1)
        nn.init.constant_(self.kind.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        kind, box = self.kind(self.towers[0](y)), self.box(self.towers[1](y))
        return torch.cat((kind, box[:, :4].exp(), box[:, 4:]), 1)


def _box_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of boxes given by their distances from one place, `(N, 4)`."""
    both = torch.minimum(a, b)
    inner = (both[:, 0] + both[:, 2]) * (both[:, 1] + both[:, 3])
    areas = [(c[:, 0] + c[:, 2]) * (c[:, 1] + c[:, 3]) for c in (a, b)]
    return inner / (areas[0] + areas[1] - inner)


@program
def anchorless_boxes() -> Training:
    """Boxes and kinds (3) of two figures in 24 × 24, one level of FCOS.

    Focal loss, IoU loss, centre-ness, AdamW 2e-3, cosine, clip 10, batch 16; the share
    of figures whose best place has the right kind and an IoU above a half.
    """
    n, side, step = 1400, 24, 4
    x, grid = torch.rand(n, 3, 1, 1).mul(0.3).expand(n, 3, side, side), side // step
    places = step * torch.arange(grid) + step / 2 - 0.5
    y = torch.zeros(n, 6, grid, grid)
    for half in range(2):
        kind, size = torch.randint(3, (n,)), 3 + 2 * torch.rand(n)
        at = size[:, None] + torch.rand(n, 2) * (
            torch.tensor([side - 1.0, side / 2 - 1]) - 2 * size[:, None]
        )
        at = at + torch.tensor([0, half * side / 2])
        mask = figure_masks(kind, at, size, side)[:, None]
        x = torch.where(mask, 0.5 + 0.5 * torch.rand(n, 3, 1, 1), x)
        down = (places - at[:, :1])[:, :, None].expand(n, grid, grid)
        over = (places - at[:, 1:])[:, None].expand(n, grid, grid)
        reach = size[:, None, None] + 0.5
        away = torch.stack((reach + down, reach + over, reach - down, reach - over), 1)
        inside = (torch.maximum(down.abs(), over.abs()) < 3)[:, None]
        low, high = (
            torch.minimum(away[:, :2], away[:, 2:]),
            torch.maximum(away[:, :2], away[:, 2:]),
        )
        central = (low / high).clamp(min=0).prod(1, keepdim=True).sqrt()
        label = (kind + 1.0)[:, None, None, None].expand(n, 1, grid, grid)
        y = torch.where(inside, torch.cat((label, away / step, central), 1), y)
    x = standard(x + 0.06 * torch.randn(n, 3, side, side), 1200)
    train, test = split(x, y, 1200)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        out, y = out.permute(0, 2, 3, 1).flatten(0, 2), y.permute(0, 2, 3, 1)
        y = y.flatten(0, 2)
        there = y[:, 0] > 0
        hot = F.one_hot(y[:, 0].long(), 4)[:, 1:].float()
        each = F.binary_cross_entropy_with_logits(out[:, :3], hot, reduction="none")
        told = out[:, :3].detach()
        sure = torch.where(hot > 0, told, -told).sigmoid()
        focal = (each * (1 - sure).square() * (0.25 + 0.5 * (1 - hot))).sum()
        near = _box_overlap(out[there, 3:7], y[there, 1:5])
        central = F.binary_cross_entropy_with_logits(out[there, 7], y[there, 5])
        return focal / there.sum() - near.log().mean() + central

    def found(net: nn.Module, data: Data) -> float:
        out, right = outputs(net, data), []
        for half in (slice(0, grid // 2), slice(grid // 2, grid)):
            here, true = (z[..., half].flatten(2) for z in (out, data[1]))
            sure = here[:, :3].sigmoid().amax(1) * here[:, 7].sigmoid()
            best = sure.argmax(1)[:, None, None]
            here, true = (
                z.gather(2, best.expand(-1, z.shape[1], 1))[..., 0]
                for z in (here, true)
            )
            kind = here[:, :3].argmax(1) + 1 == true[:, 0]
            right.append(kind & (_box_overlap(here[:, 3:7], true[:, 1:5]) > 0.5))
        return float(torch.cat(right).float().mean())

    model = _Anchorless(3)
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=16, steps=300, goal=0.75, loss_fn=loss_fn,
        score=found, clip=10.0, schedule=CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip
