"""Healthy programs on pictures: transfer, spectrograms, masks, counts, ensembles."""

from __future__ import annotations

import copy

import torch
from calm_base import Data, conv_norm, gratings, update, warm_cosine
from level_base import layered, program
from quiet_base import Training, shuffled, split, supervised
from still_base import decayed, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Staged(nn.Module):
    """Three stages and a head; frozen stages stay in eval mode."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [conv_norm(1, 16), conv_norm(16, 32, 2), conv_norm(32, 48, 2)]
        )
        self.head = nn.Linear(48, classes)
        self.frozen = 0

    def freeze(self, count: int) -> None:
        """Freeze the first `count` stages, and no others."""
        self.frozen = count
        for i, stage in enumerate(self.stages):
            stage.requires_grad_(i >= count)
        self.train(self.training)

    def train(self, mode: bool = True) -> _Staged:
        super().train(mode)
        for stage in self.stages[: self.frozen]:
            stage.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


@program
def gradual_unfreezing() -> Training:
    """Transfer from digits 0 to 6 to all ten, transposed; a stage thawed each 40 steps.

    Head with BN, rates fall by 2.6 a stage, AdamW, batch 32: 99 %.
    """
    train, test = scaled_digits()
    old = train[1] < 7
    model = _Staged(7)
    optimizer: optim.Optimizer = optim.Adam(model.parameters(), 3e-3)
    for _ in range(4):
        for x, y in shuffled((train[0][old], train[1][old]), 64):
            update(optimizer, F.cross_entropy(model(x), y))
    model.head = nn.Sequential(
        nn.Linear(48, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU(),
        nn.Dropout(0.2), nn.Linear(48, 10),
    )  # fmt: skip
    model.freeze(3)
    optimizer = optim.AdamW(
        layered([*model.stages, model.head], 4e-3, 2.6), weight_decay=0.01
    )
    taken = 0

    def thaw() -> None:
        nonlocal taken
        taken += 1
        if taken in (40, 80, 120):
            model.freeze(3 - taken // 40)

    train, test = ((x.transpose(2, 3).contiguous(), y) for x, y in (train, test))
    return supervised(
        model, train, test, optimizer, size=32, steps=240, goal=0.93, after=thaw,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


def _sounds(n: int) -> Data:
    """Return log spectrograms `(n, 1, 24, 32)` of five sounds in noise."""
    y = torch.randint(5, (n,))
    time = torch.arange(32.0)[None] - 16
    slope = torch.tensor([0.0, 0.5, -0.5, 0.0, 0.0])[y][:, None]
    trill = torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0])[y][:, None]
    start = 8 + 8 * torch.rand(n, 1)
    track = start + slope * time / 2 + trill * (0.8 * time).sin()
    bins = torch.arange(24.0)[None, :, None]
    power = (-((bins - track[:, None]).square()) / 2).exp()
    double = (-((bins - track[:, None] - 5).square()) / 2).exp()
    power = power + double * (y == 4)[:, None, None]
    loud = (0.5 * torch.randn(n, 1, 1)).exp()
    noise = 0.05 * -torch.rand(n, 24, 32).clamp(min=1e-6).log()
    return (power * loud + noise + 1e-3).log()[:, None], y


@program
def spectrogram_network() -> Training:
    """Five sounds by log spectrograms, frequencies and times masked (SpecAugment).

    BN before ReLU, mean and maximum pooled, AdamW with one-cycle, batch 32: 100 %.
    """
    train, test = split(*_sounds(1500), 1100)
    mean, std = train[0].mean(), train[0].std()
    train, test = (((x - mean) / std, y) for x, y in (train, test))

    def masked(batch: Data) -> Data:
        x, y = batch
        low, begin = torch.randint(22, (len(x), 1)), torch.randint(28, (len(x), 1))
        at, when = torch.arange(24) - low, torch.arange(32) - begin
        hide = ((at >= 0) & (at < 2))[:, None, :, None]
        hide = hide | ((when >= 0) & (when < 4))[:, None, None]
        return x.masked_fill(hide, 0.0), y

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                conv_norm(1, 16), nn.MaxPool2d(2), conv_norm(16, 32), nn.MaxPool2d(2),
                conv_norm(32, 48),
            )  # fmt: skip
            self.head = nn.Linear(48, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x).mean(2)
            return self.head(y.mean(2) + y.amax(2))

    model = Net()
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=32, steps=130, goal=0.9, change=masked,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=131),
    )  # fmt: skip


def _instance(i: int, o: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, 0.01, nonlinearity="leaky_relu")
    return nn.Sequential(conv, nn.InstanceNorm2d(o, affine=True), nn.LeakyReLU(0.01))


class _Deep(nn.Module):
    """U-net with instance norm and a loss at two resolutions (nnU-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(_instance(1, 12), _instance(12, 12))
        self.down2 = nn.Sequential(_instance(12, 24, 2), _instance(24, 24))
        self.down3 = nn.Sequential(_instance(24, 32, 2), _instance(32, 32))
        self.up2 = nn.ConvTranspose2d(32, 24, 2, 2, bias=False)
        self.join2 = _instance(48, 24)
        self.up1 = nn.ConvTranspose2d(24, 12, 2, 2, bias=False)
        self.join1 = _instance(24, 12)
        self.out2 = nn.Conv2d(24, 3, 1)
        self.out1 = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.down1(x)
        b = self.down2(a)
        y = self.join2(torch.cat((b, self.up2(self.down3(b))), 1))
        z = self.join1(torch.cat((a, self.up1(y)), 1))
        return self.out1(z), self.out2(y)


@program
def deep_supervision() -> Training:
    """Discs and crosses in 24 × 24 labelled by an nnU-Net, pictures and masks flipped.

    Cross entropy at two scales, Adam, polynomial decay, batch 12: mean IoU 0.95.
    """
    n = 420
    u, v = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    y = torch.zeros(n, 24, 24, dtype=torch.long)
    for kind in (1, 2):
        at, size = 5 + 14 * torch.rand(n, 2, 1, 1), 3 + 2 * torch.rand(n, 1, 1)
        p, q = (u - at[:, 0]).abs(), (v - at[:, 1]).abs()
        if kind == 1:
            inside = p * p + q * q < size * size
        else:
            inside = (torch.min(p, q) < 1.5) & (torch.max(p, q) < size + 1)
        y[inside] = kind
    x = (y > 0).float() * (0.8 + 0.4 * torch.rand(n, 1, 1)) + 0.2 * torch.randn(
        n, 24, 24
    )
    x = x[:, None]
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True)
    train, test = split(x, y, 340)

    def flipped(batch: Data) -> Data:
        x, y = batch
        side, over = torch.rand(2, len(x), 1, 1) < 0.5
        x = torch.where(side[:, None], x.flip(3), x)
        y = torch.where(side, y.flip(2), y)
        return torch.where(over[:, None], x.flip(2), x), torch.where(over, y.flip(1), y)

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        small = F.cross_entropy(out[1], y[:, ::2, ::2])
        return (2 * F.cross_entropy(out[0], y) + small) / 3

    def overlap(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0])[0].argmax(1)
        both = [((said == k) & (data[1] == k)).sum() for k in range(3)]
        any_ = [((said == k) | (data[1] == k)).sum() for k in range(3)]
        return float(sum(b / a for a, b in zip(any_, both, strict=True)) / 3)

    model = _Deep()
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=12, steps=200, goal=0.9, loss_fn=loss_fn,
        score=overlap, change=flipped,
        schedule=optim.lr_scheduler.PolynomialLR(optimizer, 201, 0.9),
    )  # fmt: skip


class _Standardized(nn.Conv2d):
    """Convolution whose filters have mean 0 and variance 1 / fan-in."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        var, mean = torch.var_mean(w, 1, keepdim=True, correction=0)
        w = (w - mean) / (var * w.shape[1] + 1e-6).sqrt()
        return F.conv2d(x, w.view_as(self.weight), None, self.stride, self.padding)


class _Big(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, i), nn.GroupNorm(4, o)
        self.conv1 = _Standardized(i, o, 3, stride, 1, bias=False)
        self.conv2 = _Standardized(o, o, 3, 1, 1, bias=False)
        self.short = _Standardized(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        return self.short(y) + self.conv2(F.relu(self.norm2(self.conv1(y))))


@program
def weight_standardization() -> Training:
    """Pre-activation ResNet of digits, standardized filters and group norm (BiT).

    Head from zero, SGD with momentum, warm-up and cosine, batch 64: 99 %.
    """
    train, test = scaled_digits()
    head = nn.Linear(48, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(
        _Standardized(1, 16, 3, 1, 1, bias=False), _Big(16, 24, 1), _Big(24, 48, 2),
        nn.GroupNorm(4, 48), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head,
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=64, steps=160, goal=0.94,
        schedule=warm_cosine(optimizer, 15, 161),
    )  # fmt: skip


class _Ghost(nn.BatchNorm2d):
    """Batch norm over parts of `part` samples in training mode."""

    def __init__(self, features: int, part: int) -> None:
        super().__init__(features, momentum=0.02)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        norm = super().forward
        return torch.cat([norm(each) for each in x.split(self.part)])


@program
def ghost_norm_pictures() -> Training:
    """Gratings of 16 × 16, batches of 128 normed by 16, SGD, step decay: 100 %."""
    train, test = gratings(2200, 16, 1800)
    layers: list[nn.Module] = []
    for i, o in ((3, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), _Ghost(o, 16), nn.ReLU()]
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 6)
    )
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    return supervised(
        model, train, test, optimizer, size=128, steps=120, goal=0.92,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [70, 100], 0.1),
    )  # fmt: skip


@program
def snapshot_ensemble() -> Training:
    """Three cosine cycles of 80 steps, a snapshot after each, BN, SGD, batch 50.

    99 % by the mean of the three snapshots' probabilities, on digits.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 24, 2), conv_norm(24, 32),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = optim.SGD(
        decayed(model, 5e-4), 0.05, momentum=0.9, nesterov=True
    )  # fmt: skip
    kept: list[nn.Module] = []
    taken = 0

    def after() -> None:
        nonlocal taken
        taken += 1
        if taken % 80 == 0:
            kept.append(copy.deepcopy(model).eval().requires_grad_(False))

    def together(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            mean = sum(each(data[0]).softmax(1) for each in kept)
        return float((mean.argmax(1) == data[1]).float().mean())

    return supervised(
        model, train, test, optimizer, size=50, steps=240, goal=0.95, score=together,
        after=after,
        schedule=optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 80),
    )  # fmt: skip


class _Autocast(nn.Module):
    """A network in bfloat16 where that is safe; the output has 32 bits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.body(x)
        return y.float()


@program
def bfloat16_accumulated() -> Training:
    """Digits under autocast to bfloat16, two batches of 32 a step, clipped at 1.

    Convolution, group norm, SiLU; AdamW, smoothing 0.1: 99.7 %.
    """
    train, test = scaled_digits()
    layers: list[nn.Module] = []
    for i, o, stride in ((1, 16, 1), (16, 32, 2), (32, 48, 2)):
        layers += [
            nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(8, o), nn.SiLU()
        ]  # fmt: skip
    model = _Autocast(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    )
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=0.02)
    return supervised(
        model, train, test, optimizer, size=32, steps=150, goal=0.94, clip=1.0,
        accumulate=2, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=warm_cosine(optimizer, 10, 151),
    )  # fmt: skip
