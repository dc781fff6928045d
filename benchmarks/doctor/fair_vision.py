"""Healthy programs on images: fire modules, shuffles, masks, warps, counts."""

from __future__ import annotations

import math

import torch
from calm_base import Data, conv_norm, gratings, warm_cosine
from fair_base import program
from mild_base import shifted
from quiet_base import Training, digits, split, supervised
from still_base import scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Fire(nn.Module):
    """Squeeze by 1 × 1, expand by 1 × 1 and 3 × 3 (SqueezeNet)."""

    def __init__(self, i: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(i, narrow, 1)
        self.point, self.area = (
            nn.Conv2d(narrow, wide, 1),
            nn.Conv2d(narrow, wide, 3, 1, 1),
        )
        for each in (self.squeeze, self.point, self.area):
            nn.init.kaiming_uniform_(each.weight, nonlinearity="relu")
            nn.init.zeros_(each.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.squeeze(x))
        return F.relu(torch.cat((self.point(y), self.area(y)), 1))


@program
def squeeze_net() -> Training:
    """SqueezeNet of digits, no norm, Kaiming, dropout before the last convolution.

    Adam, cosine, batch 32: 96 %.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, 1, 1), nn.ReLU(), _Fire(24, 12, 24), nn.MaxPool2d(2),
        _Fire(48, 16, 32), _Fire(64, 16, 32), nn.Dropout(0.2), nn.Conv2d(64, 10, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    nn.init.normal_(model[7].weight, std=0.01)
    nn.init.zeros_(model[7].bias)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=350, goal=0.93,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 350),
    )  # fmt: skip


class _Shuffled(nn.Module):
    """Half of the channels pass, the other half is convolved, then both are mixed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.cat((a, self.branch(b)), 1)
        return y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


@program
def shuffle_net() -> Training:
    """ShuffleNet v2 of gratings, BN, AdamW with one cycle, batch 48: 100 %."""
    train, test = gratings(2400, 12, 1900)
    model = nn.Sequential(
        conv_norm(3, 32), _Shuffled(32), _Shuffled(32), conv_norm(32, 48, 2),
        _Shuffled(48), conv_norm(48, 64, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 6),
    )  # fmt: skip
    steps = 130
    optimizer = optim.AdamW(model.parameters(), 6e-3, weight_decay=0.02)
    return supervised(
        model, train, test, optimizer, size=48, steps=steps, goal=0.93,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps + 1),
    )  # fmt: skip


def _erased(batch: Data) -> Data:
    """Set a square of 3 × 3 of each image, at a place of its own, to the mean 0."""
    x, y = batch
    row, column = torch.randint(6, (2, len(x), 1))
    place = torch.arange(8)
    inside = ((place >= row) & (place < row + 3))[:, :, None]
    inside = inside & ((place >= column) & (place < column + 3))[:, None]
    return torch.where(inside[:, None], 0.0, x), y


@program
def cutout_group_norm() -> Training:
    """Digits with a square erased, group norm and SiLU, RMSprop, step decay, batch 20.

    98 % of whole digits.
    """
    train, test = scaled_digits()

    def layer(i: int, o: int, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        return [conv, nn.GroupNorm(4, o), nn.SiLU()]

    model = nn.Sequential(
        *layer(1, 16), *layer(16, 32, 2), *layer(32, 48), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    optimizer = optim.RMSprop(model.parameters(), 1e-3, weight_decay=1e-5)
    return supervised(
        model, train, test, optimizer, size=20, steps=450, goal=0.94, change=_erased,
        schedule=optim.lr_scheduler.StepLR(optimizer, 200, 0.3),
    )  # fmt: skip


class _Warped(nn.Module):
    """Spatial transformer: an affine map, at first the identity, then a BN network."""

    def __init__(self) -> None:
        super().__init__()
        self.find = nn.Sequential(
            conv_norm(1, 8), nn.AvgPool2d(2), conv_norm(8, 12), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(108, 24), nn.ReLU(), nn.Linear(24, 6),
        )  # fmt: skip
        nn.init.zeros_(self.find[7].weight)
        self.find[7].bias.data = torch.tensor([1.0, 0, 0, 0, 1, 0])
        self.body = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 24, 2), conv_norm(24, 32, 2),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.find(x).reshape(-1, 2, 3), x.shape, False)
        return self.body(F.grid_sample(x, grid, align_corners=False))


@program
def spatial_transformer() -> Training:
    """Digits somewhere in 14 × 14 pixels, found by a spatial transformer, BN, Adam.

    Batch 64: 97 %.
    """
    train, test = digits()

    def placed(data: Data) -> Data:
        x = shifted(F.pad(data[0], (3, 3, 3, 3)), 2)
        return (x - 0.1) / 0.27, data[1]

    model = _Warped()
    optimizer = optim.Adam(
        [{"params": model.find.parameters(), "lr": 5e-4},
         {"params": model.body.parameters()}], 3e-3,
    )  # fmt: skip
    return supervised(
        model, train, placed(test), optimizer, size=64, steps=300, goal=0.92,
        change=placed,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


@program
def large_images() -> Training:
    """Blood-cell-like pictures of 64 × 64, two kinds, BN, SGD, cosine, batches of 16.

    The class is whether the discs have a dark centre: 100 %.
    """
    n, side = 360, 64
    y, place = torch.randint(2, (n,)), torch.arange(float(side))
    x = torch.zeros(n, side, side)
    for _ in range(6):
        centre, radius = side * torch.rand(n, 2, 1, 1), 6 + 3 * torch.rand(n, 1, 1)
        away = (place[:, None] - centre[:, 0]) ** 2 + (place - centre[:, 1]) ** 2
        away = away.sqrt() / radius
        x = torch.where(away < 1, 1.0, x)
        x = torch.where((away < 0.5) & (y[:, None, None] == 1), 0.2, x)
    shade = torch.tensor([0.9, 0.3, 0.4])[:, None, None]
    x = 0.8 - x[:, None] * (1 - shade) * 0.7 + 0.1 * torch.randn(n, 3, side, side)
    mean, std = x[:280].mean((0, 2, 3)), x[:280].std((0, 2, 3))
    train, test = split((x - mean[:, None, None]) / std[:, None, None], y, 280)
    model = nn.Sequential(
        conv_norm(3, 12, 2, 5), conv_norm(12, 24, 2), conv_norm(24, 32, 2),
        conv_norm(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)

    def flipped(batch: Data) -> Data:
        is_flipped = torch.rand(len(batch[0]), 1, 1, 1) < 0.5
        return torch.where(is_flipped, batch[0].flip(3), batch[0]), batch[1]

    return supervised(
        model, train, test, optimizer, size=16, steps=160, goal=0.93, change=flipped,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 160),
    )  # fmt: skip


@program
def tiny_patches() -> Training:
    """Patches of 4 × 4 with an edge in one of 8 directions, BN of momentum 0.01, Adam.

    1000 steps of 40: 99 %.
    """
    n = 3000
    y = torch.randint(8, (n,))
    place = torch.arange(4.0) - 1.5
    angle = y * math.pi / 4 + 0.12 * torch.randn(n)
    u, v = torch.meshgrid(place, place, indexing="ij")
    along = angle.cos()[:, None, None] * u + angle.sin()[:, None, None] * v
    x = torch.tanh(2 * (along - 0.4 * torch.randn(n, 1, 1)))
    x = (x + 0.25 * torch.randn(n, 4, 4))[:, None]
    train, test = split((x - x[:2400].mean()) / x[:2400].std(), y, 2400)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 2, bias=False), nn.BatchNorm2d(16, momentum=0.01), nn.ReLU(),
        nn.Conv2d(16, 24, 2, bias=False), nn.BatchNorm2d(24, momentum=0.01), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 8),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 1e-3)
    return supervised(model, train, test, optimizer, size=40, steps=1000, goal=0.9)


class _Helped(nn.Module):
    """A network with a second head in the middle, which is used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(conv_norm(3, 24), conv_norm(24, 32, 2))
        self.high = nn.Sequential(conv_norm(32, 48), conv_norm(48, 48, 2))
        self.helper = nn.Sequential(
            conv_norm(32, 16, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 6),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 6)
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.low(x)
        out = self.head(self.high(y))
        return (out, self.helper(y)) if self.training else out


@program
def auxiliary_head() -> Training:
    """Gratings with an auxiliary head of weight 0.3 in training, BN, Adam, batch 32.

    100 %.
    """
    train, test = gratings(2000, 12, 1600)

    def loss_fn(out: Tensor | tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        if isinstance(out, Tensor):
            return F.cross_entropy(out, y)
        return F.cross_entropy(out[0], y) + 0.3 * F.cross_entropy(out[1], y)

    model = _Helped()
    optimizer = optim.Adam(model.parameters(), 2e-3, weight_decay=1e-5)
    return supervised(
        model, train, test, optimizer, size=32, steps=140, goal=0.93, loss_fn=loss_fn
    )


@program
def counts_by_density() -> Training:
    """Map whose sum is the number of blobs, 0 to 9, BN, AdamW, batch 16.

    Loss of the maps, smoothed points times 10; R² of the counts 0.99.
    """
    n, most, place = 700, 9, torch.arange(16.0)
    count = torch.randint(most + 1, (n,))
    centre = 2 + 12 * torch.rand(n, most, 2)
    is_there = (torch.arange(most) < count[:, None])[..., None, None]
    away = (place[:, None] - centre[..., 0, None, None]) ** 2
    away = away + (place - centre[..., 1, None, None]) ** 2
    spot = (-away / 2).exp() * is_there
    x = spot.sum(1, keepdim=True) + 0.2 * torch.randn(n, 1, 16, 16)
    point = (-away / 2).exp() / (-away / 2).exp().sum((2, 3), keepdim=True) * is_there
    y = 10 * point.sum(1, keepdim=True)
    train, test = split((x - x[:550].mean()) / x[:550].std(), y, 550)
    model = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 24), conv_norm(24, 24), nn.Conv2d(24, 1, 1)
    )
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)

    def counted(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            out, true = net(data[0]).sum((1, 2, 3)), data[1].sum((1, 2, 3))
        return float(1 - (out - true).square().mean() / true.var())

    return supervised(
        model, train, test, optimizer, size=16, steps=200, goal=0.9, score=counted,
        loss_fn=F.mse_loss, schedule=warm_cosine(optimizer, 20, 200),
    )  # fmt: skip
