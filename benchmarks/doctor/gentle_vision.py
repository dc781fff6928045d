"""Healthy programs on pictures: classes, boxes, key points, pixels, motion."""

from __future__ import annotations

import torch
from calm_base import Data, conv_norm, warm_cosine
from gentle_base import outputs, patterns, program
from quiet_base import Training, digits, split, supervised
from sober_base import cropped, figure_masks, figures
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Aggregated(nn.Module):
    """Bottleneck with a grouped 3 × 3 convolution (ResNeXt)."""

    def __init__(self, i: int, o: int, stride: int = 1, groups: int = 4) -> None:
        super().__init__()
        mid = o // 2
        self.body = nn.Sequential(
            conv_norm(i, mid, kernel=1),
            nn.Conv2d(mid, mid, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(mid), nn.ReLU(),
            nn.Conv2d(mid, o, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip
        self.short: nn.Module = nn.Identity()
        if i != o or stride > 1:
            conv = nn.Conv2d(i, o, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


@program
def aggregated_residuals() -> Training:
    """ResNeXt of patterns, Kaiming, flips and crops.

    SGD 0.1 with Nesterov and cosine, decay 5e-4, batch 64.
    """
    train, test = patterns(2000, 16, 1600)
    model = nn.Sequential(
        conv_norm(3, 16), _Aggregated(16, 32), _Aggregated(32, 32, 2),
        _Aggregated(32, 64, 2), _Aggregated(64, 64), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 6),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    optimizer = optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return supervised(
        model, train, test, optimizer, size=64, steps=100, goal=0.9, change=cropped,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
    )  # fmt: skip


class _Twice(nn.Module):
    """Two normed convolutions added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_norm(width, width), conv_norm(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _Nine(nn.Module):
    """ResNet-9: pooled convolutions, two residual pairs, logits times 0.125."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(3, 16),
            conv_norm(16, 24), nn.MaxPool2d(2), _Twice(24),
            conv_norm(24, 48), nn.MaxPool2d(2),
            conv_norm(48, 64), nn.MaxPool2d(2), _Twice(64),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return 0.125 * self.head(self.body(x))


@program
def resnet_nine() -> Training:
    """ResNet-9 of figures as for DAWNBench: crops, flips, triangular rate, batch 128.

    SGD with Nesterov, peak of 0.3 at a fifth, decay 5e-4 times the batch's share.
    """
    train, test = figures(2400, 16, 2000)
    model = _Nine(5)
    optimizer = optim.SGD(
        model.parameters(), 1.0, momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def rate(i: int) -> float:
        return 0.3 * min((i + 1) / 20, (101 - i) / 81)

    return supervised(
        model, train, test, optimizer, size=128, steps=100, goal=0.9, change=cropped,
        schedule=optim.lr_scheduler.LambdaLR(optimizer, rate),
    )  # fmt: skip


def _leaky(i: int, o: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.LeakyReLU(0.1))


@program
def detection_grid() -> Training:
    """One or two figures of three kinds in 24 × 24 by a grid of 6 × 6 (YOLO).

    BN and leaky ReLU, squares of boxes times 5, empty cells times 0.5, Adam,
    warm-up and cosine, batch 32; the F1 of cells with the right kind.
    """
    n, side, cell = 1100, 24, 4
    x = 0.1 * torch.randn(n, 1, side, side)
    y, each = torch.zeros(n, 5, 6, 6), torch.arange(n)
    for k in range(2):
        kind, size = torch.randint(3, (n,)), 3 + 1.5 * torch.rand(n)
        at = torch.rand(n, 2) * torch.tensor([3.0, 13.0])
        at = at + torch.tensor([5.0 + 11 * k, 5.0])
        there = torch.rand(n) < (1.0, 0.6)[k]
        mask = figure_masks(torch.tensor([0, 2, 3])[kind], at, size, side)
        x[:, 0] += mask * (0.7 + 0.5 * torch.rand(n, 1, 1)) * there[:, None, None]
        i, j = (at / cell).long().unbind(1)
        inside = at / cell - (at / cell).floor()
        box = torch.cat((
            torch.ones(n, 1), inside, size[:, None] / 4, kind[:, None].float()
        ), 1)  # fmt: skip
        y[each[there], :, i[there], j[there]] = box[there]
    train, test = split((x - x[:900].mean()) / x[:900].std(), y, 900)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        full = y[:, 0] > 0
        found = F.binary_cross_entropy_with_logits(out[:, 0], y[:, 0], reduction="none")
        found = (found * torch.where(full, 1.0, 0.5)).sum()
        place = (out[:, 1:3].sigmoid() - y[:, 1:3]).square().sum(1)[full].sum()
        size = (out[:, 3] - y[:, 3]).square()[full].sum()
        kind = F.cross_entropy(
            out[:, 4:].movedim(1, 3)[full], y[:, 4][full].long(), reduction="sum"
        )
        return (found + 5 * (place + size) + kind) / len(y)

    def f1(net: nn.Module, data: Data) -> float:
        out, real = outputs(net, data), data[1][:, 0] > 0
        said = out[:, 0] > 0
        hits = said & real & (out[:, 4:].argmax(1) == data[1][:, 4].long())
        return float(2 * hits.sum() / (said.sum() + real.sum()))

    model = nn.Sequential(
        _leaky(1, 16), _leaky(16, 32, 2), _leaky(32, 32), _leaky(32, 64, 2),
        _leaky(64, 64), nn.Conv2d(64, 7, 1),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=200, goal=0.85, loss_fn=loss_fn,
        score=f1, schedule=warm_cosine(optimizer, 20, 200),
    )  # fmt: skip


class _Hourglass(nn.Module):
    """Down to a quarter and up again, with a residual branch at each scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.keep1, self.keep2 = conv_norm(width, width), conv_norm(width, width)
        self.down1, self.down2 = conv_norm(width, width), conv_norm(width, width)
        self.low, self.up = conv_norm(width, width), conv_norm(width, width)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(F.max_pool2d(x, 2))
        b = self.low(self.down2(F.max_pool2d(a, 2)))
        a = self.up(self.keep2(a) + F.interpolate(b, scale_factor=2.0))
        return self.keep1(x) + F.interpolate(a, scale_factor=2.0)


class _Stacked(nn.Module):
    """Two hourglasses; the maps of the first are fed to the second."""

    def __init__(self, points: int, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(1, width, 2), conv_norm(width, width))
        self.glass = nn.ModuleList(_Hourglass(width) for _ in range(2))
        self.maps = nn.ModuleList(nn.Conv2d(width, points, 1) for _ in range(2))
        self.back_maps = nn.Conv2d(points, width, 1)
        self.back = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.glass[0](x)
        first = self.maps[0](y)
        x = x + self.back(y) + self.back_maps(first)
        return torch.stack((first, self.maps[1](self.glass[1](x))), 1)


@program
def stacked_hourglass() -> Training:
    """Find the ends of a dumbbell as heat maps of 12 × 12 from 24 × 24.

    Squares of both stacks' maps, BN, RMSprop 2.5e-3, batch 16; ends within 1.5 cells.
    """
    n, side = 600, 24
    first = 4 + 16 * torch.rand(n, 2)
    turn = 2 * torch.pi * torch.rand(n, 1)
    second = first + 10 * torch.cat((turn.cos(), turn.sin()), 1)
    second = torch.where((second < 4) | (second > 20), 2 * first - second, second)
    ends = torch.stack((first, second.clamp(4, 20)), 1)
    part = torch.linspace(0, 1, 25)[:, None]
    line = ends[:, :1] * (1 - part) + ends[:, 1:] * part
    x = torch.zeros(n, side, side)
    i, j = line.round().long().unbind(2)
    x[torch.arange(n)[:, None], i, j] = 0.6
    for k, kind in enumerate((0, 4)):
        size = torch.full((n,), 3.0)
        x += figure_masks(torch.full((n,), kind), ends[:, k], size, side)
    x = x + 0.15 * torch.randn_like(x)
    grid = torch.stack(torch.meshgrid(*[torch.arange(12.0)] * 2, indexing="ij"), 2)
    away = (grid - ends[:, :, None, None] / 2).square().sum(4)
    y = (-away / 2).exp()
    train, test = split(((x - x[:480].mean()) / x[:480].std())[:, None], y, 480)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y[:, None].expand_as(out))

    def near(net: nn.Module, data: Data) -> float:
        peaks = [m.flatten(2).argmax(2) for m in (outputs(net, data)[:, 1], data[1])]
        rows, columns = (peaks[0] // 12 - peaks[1] // 12, peaks[0] % 12 - peaks[1] % 12)
        return float((rows.square() + columns.square() <= 2.25).float().mean())

    model = _Stacked(2)
    optimizer = optim.RMSprop(model.parameters(), 2.5e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=160, goal=0.85, loss_fn=loss_fn,
        score=near, schedule=optim.lr_scheduler.StepLR(optimizer, 110, 0.1),
    )  # fmt: skip


class _Linked(nn.Module):
    """Encoder and decoder joined by sums (LinkNet)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1 = conv_norm(1, width)
        self.down2 = nn.Sequential(
            conv_norm(width, 2 * width, 2), conv_norm(2 * width, 2 * width)
        )
        self.down3 = nn.Sequential(
            conv_norm(2 * width, 3 * width, 2), conv_norm(3 * width, 3 * width)
        )
        self.up3 = self._up(3 * width, 2 * width)
        self.up2 = self._up(2 * width, width)
        self.out = nn.Conv2d(width, 1, 3, 1, 1)

    def _up(self, i: int, o: int) -> nn.Sequential:
        conv = nn.ConvTranspose2d(i, o, 2, 2, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU(), conv_norm(o, o))

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        return self.out(a + self.up2(b + self.up3(self.down3(b))))


@program
def thin_vessels() -> Training:
    """Thin curves among noise and blots, a tenth of the pixels, by LinkNet.

    Cross entropy and Tversky loss (0.3, 0.7), BN, AdamW, cosine, batch 16; Dice.
    """
    n, side = 500, 24
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    y = torch.zeros(n, side, side, dtype=torch.bool)
    for across in (u, v):
        gain, rate, phase = torch.rand(3, n, 1, 1)
        other = v if across is u else u
        curve = 4 + 16 * torch.rand(n, 1, 1)
        curve = curve + (2 + 3 * gain) * (0.5 * rate * other + 6.3 * phase).sin()
        y |= (across - curve).abs() < 0.8
    size, at = 2 + 2 * torch.rand(n), side * torch.rand(n, 2)
    blot = figure_masks(torch.zeros(n, dtype=torch.long), at, size, side)
    x = 0.8 * y.float() + 0.6 * blot + 0.3 * torch.randn(n, side, side)
    x = ((x - x[:400].mean()) / x[:400].std())[:, None]
    train, test = split(x, y[:, None].float(), 400)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        p = out.sigmoid()
        hit = (p * y).sum()
        kept = hit / (hit + 0.3 * (p * (1 - y)).sum() + 0.7 * ((1 - p) * y).sum())
        return F.binary_cross_entropy_with_logits(out, y) + 1 - kept

    def dice(net: nn.Module, data: Data) -> float:
        said, real = outputs(net, data) > 0, data[1] > 0
        return float(2 * (said & real).sum() / (said.sum() + real.sum()))

    model = _Linked()
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=16, steps=160, goal=0.8, loss_fn=loss_fn,
        score=dice, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 160),
    )  # fmt: skip


class _Window(nn.Module):
    """Pre-norm attention in windows of 4 × 4, shifted or not, and an MLP (Swin)."""

    def __init__(self, width: int, side: int, shift: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.bias = nn.Parameter(0.02 * torch.randn(heads, 49))
        i, j = torch.arange(16) // 4, torch.arange(16) % 4
        apart = (i[:, None] - i + 3) * 7 + j[:, None] - j + 3
        self.register_buffer("apart", apart)
        part = (torch.arange(side) >= side - 4).long()
        part = part + (torch.arange(side) >= side - shift) * (shift > 0)
        part = self._cut((part[:, None] * 3 + part)[None, ..., None])[..., 0]
        self.register_buffer("same", part[:, :, None] == part[:, None])
        self.shift, self.heads = shift, heads

    def _cut(self, x: Tensor) -> Tensor:
        n, side, _, c = x.shape
        x = x.view(n, side // 4, 4, side // 4, 4, c).transpose(2, 3)
        return x.reshape(-1, 16, c)

    def forward(self, x: Tensor) -> Tensor:
        n, side, _, c = x.shape
        y = self._cut(self.norm1(x).roll((-self.shift, -self.shift), (1, 2)))
        q, k, v = self.qkv(y).view(-1, 16, 3, self.heads, c // self.heads).unbind(2)
        bias = self.bias[:, self.apart].masked_fill(~self.same[:, None], -1e4)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            bias.repeat(n, 1, 1, 1),
        ).transpose(1, 2).reshape(-1, 16, c)  # fmt: skip
        y = self.out(y).view(n, side // 4, side // 4, 4, 4, c).transpose(2, 3)
        y = y.reshape(n, side, side, c).roll((self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.mlp(self.norm2(x))


class _Merge(nn.Module):
    """Join 2 × 2 tokens, norm, a linear map to twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.map = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat((x[:, ::2], x[:, 1::2]), 3)
        return self.map(self.norm(torch.cat((rows[:, :, ::2], rows[:, :, 1::2]), 3)))


class _Swin(nn.Module):
    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.embed, self.norm0 = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.blocks = nn.Sequential(
            _Window(width, 8, 0), _Window(width, 8, 2), _Merge(width),
            _Window(2 * width, 4, 0),
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm0(self.embed(x).movedim(1, 3)))
        return self.head(self.norm(x).mean((1, 2)))


@program
def shifted_windows() -> Training:
    """Swin transformer of patterns: windows of 4 × 4, shifted, tokens merged once.

    AdamW, decay 0.05 of matrices, warm-up and cosine, smoothing 0.1, batch 50.
    """
    train, test = patterns(2400, 16, 2000)
    model = _Swin(6)
    optimizer = optim.AdamW(decayed(model, 0.05), 2e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=150, goal=0.9, change=cropped,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1), clip=1.0,
        schedule=warm_cosine(optimizer, 15, 150),
    )  # fmt: skip


class _Number(nn.Module):
    """Convolutions over a strip of three digits and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 32), nn.MaxPool2d(2),
            conv_norm(32, 48), nn.Flatten(),
            nn.Linear(48 * 5 * 13, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
            nn.Dropout(0.2),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(128, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.stack([head(y) for head in self.heads], 1)


@program
def house_numbers() -> Training:
    """Three digits in a strip of 10 × 26, each told by a head of its own (SVHN).

    Contrast, ground and place vary; BN, dropout, Adam, exponential decay, batch 64.
    """

    def strips(data: Data, n: int) -> Data:
        which = torch.randint(len(data[1]), (n, 3))
        x = torch.zeros(n, 10, 26)
        strip = data[0][which, 0].transpose(1, 2).flatten(2)
        i, j = torch.randint(3, (2, n, 1))
        rows, columns = i + torch.arange(8), j + torch.arange(24)
        x[torch.arange(n)[:, None, None], rows[..., None], columns[:, None]] = strip
        x = x * (0.5 + 0.5 * torch.rand(n, 1, 1)) + 0.3 * torch.rand(n, 1, 1)
        x = x + 0.05 * torch.randn_like(x)
        return (x[:, None] - 0.31) / 0.28, data[1][which]

    known, new = digits()
    train, test = strips(known, 3000), strips(new, 500)
    model = _Number()
    optimizer = optim.Adam(model.parameters(), 2e-3)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 1), y.flatten())

    return supervised(
        model, train, test, optimizer, size=64, steps=140, goal=0.85, loss_fn=loss_fn,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
    )  # fmt: skip
