"""Healthy programs on images: plain, residual and conditioned networks."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from calm_base import Data, conv_norm, gratings, r2, update, warm_cosine
from mild_base import program, shifted
from quiet_base import Subject, Training, accuracy, shuffled, split, supervised
from still_base import decayed, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def all_convolutional() -> Training:
    """Strided convolutions with BN in place of pooling, 1 × 1 head, smoothing 0.1.

    Gratings of 16 × 16, Kaiming, SGD with momentum, polynomial decay, batch 50: 100 %.
    """
    train, test = gratings(2200, 16, 1800)
    model = nn.Sequential(
        conv_norm(3, 16), conv_norm(16, 16, 2), conv_norm(16, 32), conv_norm(32, 32, 2),
        nn.Dropout2d(0.1), nn.Conv2d(32, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for each in model.modules():
        if isinstance(each, nn.Conv2d) and each.bias is None:
            nn.init.kaiming_normal_(each.weight, nonlinearity="relu")
    optimizer = optim.SGD(decayed(model, 5e-4), 0.05, momentum=0.9)
    return supervised(
        model, train, test, optimizer, size=50, steps=160, goal=0.95,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=optim.lr_scheduler.PolynomialLR(optimizer, 160, 2.0),
    )  # fmt: skip


@program
def elu_then_norm() -> Training:
    """Convolution, ELU, BN of digits; NAdam, two batches of 32 to a step: 99 %."""
    train, test = scaled_digits()
    layers: list[nn.Module] = []
    for i, o, stride in ((1, 16, 1), (16, 32, 2), (32, 48, 2)):
        layers += [nn.Conv2d(i, o, 3, stride, 1), nn.ELU(), nn.BatchNorm2d(o)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 10))
    optimizer = optim.NAdam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=200, goal=0.95, accumulate=2,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
    )  # fmt: skip


class _Fixup(nn.Module):
    """A residual block without a norm (Zhang et al. 2019)."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        self.conv1.weight.data /= math.sqrt(blocks)
        nn.init.zeros_(self.conv2.weight)
        self.bias = nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x + self.bias[0]) + self.bias[1])
        y = self.conv2(y + self.bias[2]) * self.scale + self.bias[3]
        return F.relu(x + y)


@program
def fixup_residual() -> Training:
    """Fixup ResNet of digits without norms: branches and head start at zero.

    Biases and scales at a fifth of the rate, SGD with momentum, cosine with warmup,
    shifted by up to a pixel, batch 64: 97 %.
    """
    train, test = scaled_digits()
    blocks = 4
    head = nn.Linear(128, 10)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    first, down = nn.Conv2d(1, 16, 3, 1, 1), nn.Conv2d(16, 32, 3, 2, 1)
    for conv in (first, down):
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)
    model = nn.Sequential(
        first, nn.ReLU(), _Fixup(16, blocks), _Fixup(16, blocks), down, nn.ReLU(),
        _Fixup(32, blocks), _Fixup(32, blocks), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        head,
    )  # fmt: skip
    small = [p for n, p in model.named_parameters() if n.endswith(("bias", "scale"))]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    optimizer = optim.SGD(
        [{"params": weights, "weight_decay": 1e-4}, {"params": small, "lr": 0.02}],
        0.1, momentum=0.9, nesterov=True,
    )  # fmt: skip

    def change(batch: Data) -> Data:
        low = batch[0].min()
        return shifted(batch[0] - low, 1) + low, batch[1]

    return supervised(
        model, train, test, optimizer, size=64, steps=260, goal=0.94, change=change,
        schedule=warm_cosine(optimizer, 20, 260),
    )  # fmt: skip


class _Segmenter(nn.Module):
    """Encoder and decoder with transposed convolutions; skips are added."""

    def __init__(self) -> None:
        super().__init__()

        def up(i: int, o: int) -> nn.Sequential:
            conv = nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())

        self.enter = conv_norm(1, 12)
        self.down1, self.down2 = conv_norm(12, 24, 2), conv_norm(24, 32, 2)
        self.up2, self.up1 = up(32, 24), up(24, 12)
        self.leave = nn.Sequential(conv_norm(12, 12), nn.Conv2d(12, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down1(a)
        y = b + self.up2(self.down2(b))
        return self.leave(a + self.up1(y))


@program
def transposed_segmentation() -> Training:
    """Pixels of ground, discs and, rarely, crosses; class weights, Adam, cosine.

    BN, batch 16, 20 × 20 pixels; mean IoU 0.90.
    """
    n, side = 620, 20
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")

    def place() -> tuple[Tensor, Tensor]:
        centre = 4 + 12 * torch.rand(n, 2, 1, 1)
        return (u - centre[:, 0]).abs(), (v - centre[:, 1]).abs()

    kind = torch.zeros(n, side, side, dtype=torch.long)
    a, b = place()
    kind[a.square() + b.square() < (2.5 + 2 * torch.rand(n, 1, 1)) ** 2] = 1
    a, b = place()
    kind[((a < 1) & (b < 4)) | ((b < 1) & (a < 4))] = 2
    bright = torch.tensor([0.0, 1.0, 1.0])[kind] * (0.8 + 0.6 * torch.rand(n, 1, 1))
    x = (bright + 0.3 * torch.randn(n, side, side))[:, None]
    x = (x - x[:500].mean()) / x[:500].std()
    train, test = split(x, kind, 500)
    weight = 1 / torch.bincount(train[1].flatten()).float().sqrt()

    def overlap(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0]).argmax(1)
        parts = [
            ((said == c) & (data[1] == c)).sum() / ((said == c) | (data[1] == c)).sum()
            for c in range(3)
        ]
        return float(torch.stack(parts).mean())

    model = _Segmenter()
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=240, goal=0.8, score=overlap,
        loss_fn=nn.CrossEntropyLoss(weight / weight.mean()),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


class _Partly(nn.Module):
    """A network whose first part is fixed: no gradient, its norms in eval mode."""

    def __init__(self, stem: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        self.stem, self.rest = stem.requires_grad_(False), rest

    def train(self, mode: bool = True) -> _Partly:
        super().train(mode)
        self.stem.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.stem(x))


@program
def frozen_stem() -> Training:
    """Pretrained on digits 0 to 4; on 5 to 9 the first two layers stay as they are.

    The last block, whose BN keeps on learning, and a new head: AdamW, batch 32: 99 %.
    """
    (x, y), (a, b) = scaled_digits()
    stem = nn.Sequential(conv_norm(1, 16), conv_norm(16, 32, 2))
    block = conv_norm(32, 48, 2)
    first = nn.Sequential(stem, block, nn.Flatten(), nn.Linear(192, 5))
    adam = optim.Adam(first.parameters(), 3e-3)
    for _ in range(6):
        for image, label in shuffled((x[y < 5], y[y < 5]), 32):
            update(adam, F.cross_entropy(first(image), label))
    head = nn.Linear(192, 5)
    model = _Partly(stem, nn.Sequential(block, nn.Flatten(), nn.Dropout(0.2), head))
    optimizer = optim.AdamW(
        [{"params": block.parameters(), "lr": 5e-4}, {"params": head.parameters()}],
        2e-3, weight_decay=0.01,
    )  # fmt: skip
    return supervised(
        model, (x[y > 4], y[y > 4] - 5), (a[b > 4], b[b > 4] - 5), optimizer,
        size=32, steps=160, goal=0.94,
    )  # fmt: skip


class _Dropped(nn.Module):
    """A residual branch with BN, left out for some of the images."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        conv = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.branch = nn.Sequential(
            conv_norm(width, width), conv, nn.BatchNorm2d(width)
        )
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.training:
            kept = torch.rand(len(x), 1, 1, 1) >= self.drop
            y = y * kept / (1 - self.drop)
        return F.relu(x + y)


@program
def average_recalibrated() -> Training:
    """EMA of weights (0.95) whose statistics are gathered anew each 20 steps.

    ResNet of digits, stochastic depth 0.1, RMSprop with momentum, batch 64: 98 % by
    the average.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        conv_norm(1, 16), _Dropped(16, 0.05), conv_norm(16, 32, 2), _Dropped(32, 0.1),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = optim.RMSprop(model.parameters(), 1e-3, 0.9, eps=1e-3, momentum=0.9)

    def calibrate() -> None:
        some = [x for x, _ in shuffled(train, 64)[:20]]
        optim.swa_utils.update_bn(some, average)
        average.eval()

    taken = 0

    def after() -> None:
        nonlocal taken
        taken += 1
        with torch.no_grad():
            pairs = zip(average.parameters(), model.parameters(), strict=True)
            for its, mine in pairs:
                its.lerp_(mine, 0.05)
        if taken % 20 == 0:
            calibrate()

    loss_fn = nn.CrossEntropyLoss()
    second = Subject(
        average, lambda: shuffled(train, 64)[:20], loss_fn, name="average",
        only_at_the_end=True,
    )  # fmt: skip
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.95, loss_fn=loss_fn,
        score=lambda _, data: accuracy(average, data), after=after, extra=[second],
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


@program
def angle_regression() -> Training:
    """Angle of a noisy bar as cosine and sine of twice the angle; GN, SiLU, MSE.

    Adam, one-cycle, batch 40; R² 0.985.
    """
    n, side = 1500, 15
    angle = math.pi * torch.rand(n, 1, 1)
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    u, v = u - 7 - torch.randn(n, 1, 1), v - 7 - torch.randn(n, 1, 1)
    along = angle.cos() * u + angle.sin() * v
    across = angle.cos() * v - angle.sin() * u
    bar = torch.exp(-across.square() / 2) * (along.abs() < 5)
    x = (bar + 0.25 * torch.randn(n, side, side))[:, None]
    x = (x - x[:1200].mean()) / x[:1200].std()
    y = torch.cat(((2 * angle).cos(), (2 * angle).sin()), 2)[:, 0]
    train, test = split(x, y, 1200)

    def layer(i: int, o: int) -> list[nn.Module]:
        conv = nn.Conv2d(i, o, 3, 2, 1, bias=False)
        return [conv, nn.GroupNorm(4, o), nn.SiLU()]

    model = nn.Sequential(
        *layer(1, 16), *layer(16, 32), *layer(32, 48), nn.Flatten(),
        nn.Linear(192, 32), nn.SiLU(), nn.Linear(32, 2),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=40, steps=260, goal=0.93, score=r2,
        loss_fn=F.mse_loss,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=261),
    )  # fmt: skip


class _Film(nn.Module):
    """Convolution and BN whose scale and shift depend on the question."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(o, affine=False)
        self.scale, self.shift = nn.Embedding(2, o), nn.Embedding(2, o)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, question: Tensor) -> Tensor:
        scale = self.scale(question)[:, :, None, None]
        shift = self.shift(question)[:, :, None, None]
        return F.relu(self.norm(self.conv(x)) * scale + shift)


class _Answers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shapes = ((3, 16, 1), (16, 32, 2), (32, 32, 2))
        self.layers = nn.ModuleList(_Film(*shape) for shape in shapes)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, question: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x, question)
        return self.head(x.mean((2, 3)))


@program
def film_questions() -> Training:
    """Which direction (3) or which wavelength (2) a grating has, as a question asks.

    Conditional BN (FiLM), AdamW, cosine with warmup, batch 80: 100 %.
    """
    train, test = gratings(2600, 12, 2100)

    def asked(data: Data) -> Data:
        question = torch.randint(2, (len(data[1]),))
        answer = torch.where(question == 0, data[1] % 3, 3 + data[1] // 3)
        return (data[0], question), answer

    model = _Answers()
    optimizer = optim.AdamW(decayed(model, 0.01), 5e-3)
    return supervised(
        model, asked(train), asked(test), optimizer, size=80, steps=170, goal=0.94,
        schedule=warm_cosine(optimizer, 15, 170),
    )  # fmt: skip
