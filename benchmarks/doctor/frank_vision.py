"""Healthy programs on pictures: classes, boxes, pixels, depth."""

from __future__ import annotations

import torch
from calm_base import Data, conv_norm, warm_cosine
from frank_base import letter_masks, letters, outputs, pretrained, program
from quiet_base import Training, digits, split, supervised
from sober_base import cropped, figure_masks
from still_base import decayed, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def tutorial_cnn() -> Training:
    """Letters by the network of PyTorch's CIFAR tutorial, default init, no norm.

    SGD 0.02 with momentum, batch 32.
    """
    train, test = letters(1900, 20, 1600)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24 * 9, 84), nn.ReLU(), nn.Linear(84, 6),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9)
    return supervised(model, train, test, optimizer, size=32, steps=300, goal=0.9)


class _Basic(nn.Module):
    """Basic block of torchvision's ResNet."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.downsample: nn.Module | None = None
        if i != o or stride > 1:
            conv = nn.Conv2d(i, o, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        short = x if self.downsample is None else self.downsample(x)
        return self.relu(y + short)


@program
def resnet_basic_blocks() -> Training:
    """Letters by three basic blocks of torchvision's ResNet, crops and flips.

    SGD 0.05 with momentum, decay 5e-4, cosine, batch 64.
    """
    train, test = letters(2300, 16, 2000)
    model = nn.Sequential(
        conv_norm(3, 12), _Basic(12, 12), _Basic(12, 24, 2), _Basic(24, 48, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 6),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    return supervised(
        model, train, test, optimizer, size=64, steps=280, goal=0.95, change=cropped,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 280),
    )  # fmt: skip


def _grouped(i: int, o: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(4, o), nn.ReLU())


class _Residual(nn.Module):
    """Two group-normed convolutions and the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _grouped(width, width), nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.GroupNorm(4, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


@program
def small_batch_group_norm() -> Training:
    """Letters in batches of 8, residual net with group norm; crops and flips.

    SGD with Nesterov, decay 1e-4, one cycle to 0.08.
    """
    train, test = letters(2100, 16, 1800)
    model = nn.Sequential(
        _grouped(3, 16), _Residual(16), _grouped(16, 32, 2), _Residual(32),
        _grouped(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 6),
    )  # fmt: skip
    optimizer = optim.SGD(
        model.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    return supervised(
        model, train, test, optimizer, size=8, steps=300, goal=0.9, change=cropped,
        schedule=optim.lr_scheduler.OneCycleLR(
            optimizer, 0.08, total_steps=300, pct_start=0.2
        ),
    )  # fmt: skip


@program
def quickstart_dropout() -> Training:
    """Digits by the dense network of Keras' quickstart: 128 ReLU, dropout 0.2.

    Pixels in [0, 1], Xavier, zero bias, Adam 1e-3, batch 32.
    """
    train, test = digits()
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)
    )
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    optimizer = optim.Adam(model.parameters(), 1e-3, eps=1e-7)
    return supervised(model, train, test, optimizer, size=32, steps=300, goal=0.9)


class _Inception(nn.Module):
    """Four branches side by side: 1 × 1, 3 × 3, 5 × 5 and pooled (GoogLeNet)."""

    def __init__(self, i: int, one: int, three: int, five: int, pool: int) -> None:
        super().__init__()
        self.one = conv_norm(i, one, kernel=1)
        self.three = nn.Sequential(
            conv_norm(i, three // 2, kernel=1), conv_norm(three // 2, three)
        )
        self.five = nn.Sequential(
            conv_norm(i, five // 2, kernel=1), conv_norm(five // 2, five, kernel=5)
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_norm(i, pool, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.three(x), self.five(x), self.pool(x)), 1)


@program
def google_net() -> Training:
    """Letters by two inception modules with BN, dropout 0.2 before the head.

    Adam 2e-3, step decay, batch 50, smoothing 0.1.
    """
    train, test = letters(2000, 16, 1700)
    model = nn.Sequential(
        conv_norm(3, 16), nn.MaxPool2d(2), _Inception(16, 8, 16, 8, 8),
        nn.MaxPool2d(2), _Inception(40, 16, 24, 8, 8),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(56, 6),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=220, goal=0.9,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=optim.lr_scheduler.StepLR(optimizer, 120, 0.2),
    )  # fmt: skip


def _separable(i: int, o: int, stride: int = 1) -> nn.Sequential:
    """Return a depthwise and a 1 × 1 convolution, each with BN and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False), nn.BatchNorm2d(i),
        nn.ReLU6(inplace=True),
        nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU6(inplace=True),
    )  # fmt: skip


def _erased(batch: Data) -> Data:
    """Return pictures, in half of which a random 5 × 5 becomes noise."""
    x, y = batch
    n, side = len(x), x.shape[-1]
    i, j = torch.randint(side - 4, (2, n, 1, 1))
    u = torch.arange(side)[:, None]
    v = torch.arange(side)
    inside = (u >= i) & (u < i + 5) & (v >= j) & (v < j + 5)
    gone = (inside & (torch.rand(n, 1, 1) < 0.5))[:, None]
    return torch.where(gone, torch.randn_like(x), x), y


@program
def mobile_net_erased() -> Training:
    """MobileNet v1 of letters, random erasing, BN, ReLU6, dropout 0.1.

    SGD 0.02 with momentum, decay 4e-5, warm-up and cosine, batch 64.
    """
    train, test = letters(2400, 16, 2100)
    model = nn.Sequential(
        conv_norm(3, 16), _separable(16, 32), _separable(32, 48, 2),
        _separable(48, 48), _separable(48, 96, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(96, 6),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=4e-5)
    return supervised(
        model, train, test, optimizer, size=64, steps=270, goal=0.9, change=_erased,
        schedule=warm_cosine(optimizer, 15, 270),
    )  # fmt: skip


class _Probed(nn.Module):
    """A head on a body, which is fixed and in eval mode until it is thawed."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body.requires_grad_(False), head
        self.fixed = True

    def train(self, mode: bool = True) -> _Probed:
        super().train(mode)
        self.body.train(mode and not self.fixed)
        return self

    def thaw(self) -> None:
        """Let the body learn."""
        self.fixed = False
        self.body.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@program
def probe_then_tune() -> Training:
    """From digits 0 to 5 to digits 4 to 9: a head on the fixed body, then all of it.

    The body was trained with BN. The head alone for 100 steps at 3e-3, then all
    weights at 3e-4 (LP-FT); AdamW, decay 0.01, batch 40.
    """
    (x, y), (a, b) = scaled_digits()
    known = y < 6
    body = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 32, 2), conv_norm(32, 48),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip
    first = nn.Sequential(body, nn.Linear(192, 6))
    pretrained(first, (x[known], y[known]), size=64, epochs=4, rate=3e-3)
    train, test = (x[y > 3], y[y > 3] - 4), (a[b > 3], b[b > 3] - 4)
    model = _Probed(body, nn.Linear(192, 6))
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    inner = supervised(model, train, test, optimizer, size=40, steps=250, goal=0.95)

    def step(i: int) -> float:
        if i == 100:
            model.thaw()
            optimizer.param_groups[0]["lr"] = 3e-4
        return inner.step(i)

    return Training(inner.subjects, step, 250, inner.score, 0.95)


class _Pyramid(nn.Module):
    """Feature pyramid: three scales, added from coarse to fine, then summed."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down = nn.ModuleList((
            nn.Sequential(_grouped(1, 16), _grouped(16, 16)),
            nn.Sequential(_grouped(16, 24, 2), _grouped(24, 24)),
            nn.Sequential(_grouped(24, 32, 2), _grouped(32, 32)),
        ))  # fmt: skip
        self.side = nn.ModuleList(nn.Conv2d(c, 24, 1) for c in (16, 24, 32))
        self.smooth = nn.ModuleList(_grouped(24, 16) for _ in range(3))
        self.out = nn.Conv2d(16, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = []
        for part in self.down:
            x = part(x)
            seen.append(x)
        full, y, total = seen[0].shape[2:], None, 0.0
        for i in (2, 1, 0):
            own = self.side[i](seen[i])
            y = own if y is None else own + F.interpolate(y, scale_factor=2)
            told = self.smooth[i](y)
            total = total + F.interpolate(told, full, mode="bilinear")
        return self.out(total)


@program
def feature_pyramid() -> Training:
    """Pixels of ground, discs, squares and rings in 24 × 24 by an FPN, group norm.

    AdamW 3e-3, warm-up and cosine, clip 1, batch 8; mean IoU.
    """
    n, side = 700, 24
    x, y = 0.15 * torch.randn(n, 1, side, side), torch.zeros(n, side, side).long()
    for k in range(2):
        kind, size = torch.randint(3, (n,)), 3.5 + 2 * torch.rand(n)
        at = torch.rand(n, 2) * torch.tensor([10.0, 2.0])
        at = at + torch.tensor([6.5, 5.5 + 11.0 * k])
        mask = figure_masks(torch.tensor([0, 1, 4])[kind], at, size, side)
        x[:, 0] += mask * (0.6 + 0.6 * torch.rand(n, 1, 1))
        y = torch.where(mask, kind[:, None, None] + 1, y)
    train, test = split((x - x[:600].mean()) / x[:600].std(), y, 600)

    def overlap(net: nn.Module, data: Data) -> float:
        said, y = outputs(net, data).argmax(1), data[1]
        each = [
            ((said == k) & (y == k)).sum() / ((said == k) | (y == k)).sum()
            for k in range(4)
        ]
        return float(torch.stack(each).mean())

    model = _Pyramid(4)
    optimizer = optim.AdamW(decayed(model, 0.01), 3e-3)
    return supervised(
        model, train, test, optimizer, size=8, steps=220, goal=0.75, clip=1.0,
        score=overlap, schedule=warm_cosine(optimizer, 15, 220),
    )  # fmt: skip


_ANCHORS, _MIDDLES = torch.tensor([7.0, 11.0]), 2.0 + 4 * torch.arange(6)


def _anchor_targets(at: Tensor, size: Tensor, kind: Tensor, there: Tensor) -> Tensor:
    """Return class and offsets of each anchor `(n, 72, 4)`; 0 is the ground.

    Args:
        at: Middles of boxes `(n, k, 2)`.
        size: Sides of boxes `(n, k)`.
        kind: Classes, from 1 `(n, k)`.
        there: Whether there is a box `(n, k)`.
    """
    u, v = torch.meshgrid(_MIDDLES, _MIDDLES, indexing="ij")
    place = torch.stack((u, v), 2).reshape(-1, 1, 2).expand(-1, 2, 2).reshape(-1, 2)
    wide = _ANCHORS.repeat(36)
    near = ((place - at[:, :, None]).abs()).mul(-1)
    both = near + (wide[:, None] + size[:, :, None, None]) / 2
    least = torch.minimum(wide, size[:, :, None])[..., None]
    shared = both.clamp(min=0).minimum(least).prod(3)
    iou = shared / (wide.square() + size[:, :, None].square() - shared)
    iou = iou * there[:, :, None]
    best = iou == iou.amax(2, keepdim=True)
    score, which = torch.where(best & (iou > 0), iou + 1, iou).max(1)
    n = torch.arange(len(at))[:, None]
    offset = (at[n, which] - place) / wide[:, None]
    scale = (size[n, which] / wide).log()
    label = torch.where(score > 0.45, kind[n, which], 0)
    return torch.cat((label[..., None].float(), 5 * offset, 5 * scale[..., None]), 2)


def _multibox(out: Tensor, y: Tensor) -> Tensor:
    """Return cross entropy with three hard grounds per box, and smooth L1 of boxes."""
    label = y[..., 0].long()
    box = label > 0
    entropy = F.cross_entropy(out[..., :4].mT, label, reduction="none")
    ground = entropy.detach().masked_fill(box, -1.0)
    rank = ground.argsort(1, descending=True).argsort(1)
    hard = (rank < 3 * box.sum(1, keepdim=True)) & ~box
    place = F.smooth_l1_loss(out[..., 4:][box], y[..., 1:][box], reduction="sum")
    return (entropy[box | hard].sum() + place) / box.sum()


class _Anchored(nn.Module):
    """Classes and offsets of two anchors at each cell of 4 × 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 24, 2), conv_norm(24, 32),
            conv_norm(32, 48, 2), conv_norm(48, 48),
        )  # fmt: skip
        self.head = nn.Conv2d(48, 14, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.body(x)).permute(0, 2, 3, 1)
        return y.reshape(len(x), 72, 7)


@program
def anchor_boxes() -> Training:
    """One or two letters of three in 24 × 24, by anchors with hard grounds (SSD).

    BN, SGD 0.01 with momentum, decay 5e-4, step decay, batch 32; accuracy of the
    surest anchor's letter.
    """
    n, side = 1300, 24
    kind = torch.randint(1, 4, (n, 2))
    size, there = 6 + 6 * torch.rand(n, 2), torch.ones(n, 2, dtype=torch.bool)
    there[:, 1] = torch.rand(n) < 0.5
    at = torch.rand(n, 2, 2) * torch.tensor([10.0, 1.0]) + torch.tensor([7.0, 5.5])
    at[:, 1, 1] += 11
    x = 0.1 * torch.randn(n, 1, side, side)
    for k in range(2):
        which = torch.tensor([1, 2, 3])[kind[:, k] - 1]
        mask = letter_masks(which, at[:, k], size[:, k] - 1, side)
        x[:, 0] += mask * (0.7 + 0.4 * torch.rand(n, 1, 1)) * there[:, k, None, None]
    y = _anchor_targets(at, size, kind, there)
    train, test = split((x - x[:1100].mean()) / x[:1100].std(), y, 1100)

    def surest(net: nn.Module, data: Data) -> float:
        sure, said = outputs(net, data)[..., :4].softmax(2)[..., 1:].max(2)
        first = sure.argmax(1, keepdim=True)
        right = said.gather(1, first) + 1 == data[1][..., 0].gather(1, first)
        return float(right.float().mean())

    model = _Anchored()
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    return supervised(
        model, train, test, optimizer, size=32, steps=290, goal=0.85,
        loss_fn=_multibox, score=surest,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [200, 250], 0.1),
    )  # fmt: skip
