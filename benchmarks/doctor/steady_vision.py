"""Healthy programs on images, after examples of d2l, torchvision, timm and fast.ai."""

from __future__ import annotations

import torch
from calm_base import Data, conv_norm, gratings, update, warm_cosine
from mild_base import shifted
from quiet_base import Subject, Training, accuracy, shuffled, split, supervised
from steady_base import explained, program
from still_base import decayed, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


def _disks(n: int, side: int) -> tuple[Tensor, Tensor]:
    """Return pictures of three disks `(n, 1, side, side)` in [0, 1], and their map.

    The map has 0 for the ground, 1 for a bright disk, 2 for a striped one.
    """
    place = torch.arange(float(side))
    x, kind = 0.25 * torch.ones(n, 1, 1) * torch.ones(side, side), torch.zeros(n, 1, 1)
    kind = kind.expand(n, side, side).long()
    bright = torch.tensor(0.85)
    stripes = 0.5 + 0.4 * torch.sin(1.6 * (place[:, None] + place))
    for i in range(3):
        centre, radius = side * torch.rand(n, 2, 1, 1), 2 + 3 * torch.rand(n, 1, 1)
        away = (place[:, None] - centre[:, 0]) ** 2 + (place - centre[:, 1]) ** 2
        inside = (1.5 * (radius - away.sqrt())).sigmoid()
        x = torch.lerp(x, (bright, stripes)[i % 2].expand_as(x), inside)
        kind = torch.where(inside > 0.5, 1 + i % 2, kind)
    return x[:, None], kind


@program
def network_in_network() -> Training:
    """NiN of digits: 1 × 1 convolutions after each, dropout 0.3, global average.

    Kaiming, no norm, Adam 2e-3, batch 64, as d2l builds it: held out 98 %.
    """

    def block(i: int, o: int, kernel: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(i, o, kernel, stride, kernel // 2), nn.ReLU(),
            nn.Conv2d(o, o, 1), nn.ReLU(), nn.Conv2d(o, o, 1), nn.ReLU(),
        ]  # fmt: skip

    train, test = scaled_digits()
    model = nn.Sequential(
        *block(1, 32, 3, 1), nn.MaxPool2d(2), *block(32, 64, 3, 1), nn.Dropout(0.3),
        *block(64, 64, 3, 2), nn.Conv2d(64, 10, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )  # fmt: skip
    for each in model[:-3]:
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_uniform_(each.weight, nonlinearity="relu")
            assert each.bias is not None
            nn.init.zeros_(each.bias)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(model, train, test, optimizer, size=64, steps=300, goal=0.93)


class _Residual(nn.Module):
    """The basic block of ResNet."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(
                nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


def _resnet(classes: int) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        _Residual(16, 16), _Residual(16, 32, 2), _Residual(32, 48, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, classes),
    )  # fmt: skip
    for each in model.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
    return model


@program
def reference_recipe() -> Training:
    """ResNet of gratings by torchvision's recipe: smoothing, warm-up, cosine, EMA.

    SGD 0.1, decay 5e-4 on the weights alone, EMA of weights and buffers (0.93),
    batch 48: the averaged model has 100 %, the model itself the same.
    """
    train, test = gratings(2400, 12, 1900)
    model, steps = _resnet(6), 110
    averaged = optim.swa_utils.AveragedModel(
        model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.93), use_buffers=True
    )
    optimizer = optim.SGD(decayed(model, 5e-4), 0.1, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    averaged.eval()
    return supervised(
        model, train, test, optimizer, size=48, steps=steps, goal=0.95,
        loss_fn=loss_fn, schedule=warm_cosine(optimizer, 10, steps),
        after=lambda: averaged.update_parameters(model),
        score=lambda net, data: min(accuracy(averaged, data), accuracy(net, data)),
        extra=[
            Subject(
                averaged, lambda: shuffled(train, 48), loss_fn, name="average",
                only_at_the_end=True,
            )
        ],
    )  # fmt: skip


def _known_four(data: Data) -> nn.Sequential:
    """Return a ResNet trained on four of the gratings."""
    model = _resnet(4)
    known = data[1] < 4
    optimizer = optim.Adam(model.parameters(), 3e-3)
    for _ in range(3):
        for x, y in shuffled((data[0][known], data[1][known]), 48):
            update(optimizer, F.cross_entropy(model(x), y))
    return model


@program
def whole_fine_tuning() -> Training:
    """Transfer from four gratings to six, all weights tuned, new head, batch 16.

    SGD 0.01 with momentum 0.9, StepLR, as in PyTorch's tutorial: held out 100 %.
    """
    train, test = gratings(2400, 12, 1900)
    model = _known_four(train)
    model[-1] = nn.Linear(48, 6)
    optimizer = optim.SGD(model.parameters(), 0.01, momentum=0.9)
    schedule = optim.lr_scheduler.StepLR(optimizer, 100, 0.1)
    return supervised(
        model, train, test, optimizer, size=16, steps=200, goal=0.94, schedule=schedule
    )


class _Learner(nn.Module):
    """A frozen body in eval mode under the head of fast.ai: average and maximum."""

    def __init__(self, body: nn.Module, classes: int) -> None:
        super().__init__()
        self.body = body.requires_grad_(False).eval()
        self.head = nn.Sequential(
            nn.BatchNorm1d(96), nn.Linear(96, 64, bias=False), nn.ReLU(),
            nn.BatchNorm1d(64), nn.Dropout(0.25), nn.Linear(64, classes, bias=False),
        )  # fmt: skip
        for each in self.head:
            if isinstance(each, nn.Linear):
                nn.init.kaiming_normal_(each.weight)

    def train(self, mode: bool = True) -> _Learner:
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(torch.cat((y.amax((2, 3)), y.mean((2, 3))), 1))


@program
def frozen_with_concat_pool() -> Training:
    """Transfer from four gratings to six, body frozen in eval mode, one-cycle, Adam.

    Head with BN after the ReLU and dropout after the last BN, batch 32: 98 %.
    """
    train, test = gratings(2400, 12, 1900)
    model = _Learner(_known_four(train)[:-3], 6)
    optimizer = optim.AdamW(model.head.parameters(), 5e-3, betas=(0.95, 0.99))
    return supervised(
        model, train, test, optimizer, size=32, steps=150, goal=0.92,
        schedule=optim.lr_scheduler.OneCycleLR(
            optimizer, 5e-3, total_steps=151, pct_start=0.25
        ),
    )  # fmt: skip


class _Mobile(nn.Module):
    """MBConv of EfficientNet: expand, depthwise, squeeze-excite, project, drop path."""

    def __init__(self, i: int, o: int, stride: int, drop: float) -> None:
        super().__init__()
        wide, self.drop = 4 * i, drop
        self.expand, self.bn1 = nn.Conv2d(i, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depth = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.reduce, self.widen = nn.Conv2d(wide, i // 4, 1), nn.Conv2d(i // 4, wide, 1)
        self.project, self.bn3 = nn.Conv2d(wide, o, 1, bias=False), nn.BatchNorm2d(o)
        self.has_skip = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn1(self.expand(x)))
        y = F.silu(self.bn2(self.depth(y)))
        gate = self.widen(F.silu(self.reduce(y.mean((2, 3), keepdim=True))))
        y = self.bn3(self.project(y * gate.sigmoid()))
        if not self.has_skip:
            return y
        if self.training and self.drop:
            keep = torch.rand(len(y), 1, 1, 1) >= self.drop
            y = y * keep / (1 - self.drop)
        return x + y


@program
def efficient_rmsprop() -> Training:
    """EfficientNet-like net of gratings as timm trains it: RMSprop, warm-up, decay.

    RMSprop with momentum 0.9 and eps 1e-3, drop path 0.1, SiLU, batch 64: 100 %.
    """
    train, test = gratings(2400, 12, 1900)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU(),
        _Mobile(16, 16, 1, 0.05), _Mobile(16, 24, 2, 0.0), _Mobile(24, 24, 1, 0.1),
        nn.Conv2d(24, 64, 1, bias=False), nn.BatchNorm2d(64), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 6),
    )  # fmt: skip
    steps = 110
    optimizer = optim.RMSprop(
        decayed(model, 1e-5), 4e-3, alpha=0.9, eps=1e-3, momentum=0.9
    )
    return supervised(
        model, train, test, optimizer, size=64, steps=steps, goal=0.94,
        schedule=warm_cosine(optimizer, 15, steps),
    )  # fmt: skip


class _Enhanced(nn.Module):
    """EDSR: residual blocks without norm, pixel shuffle, the rest over bicubic."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 24, 3, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(24, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 24, 3, 1, 1)
            )
            for _ in range(3)
        )
        self.body = nn.Conv2d(24, 24, 3, 1, 1)
        self.up, self.tail = nn.Conv2d(24, 64, 3, 1, 1), nn.Conv2d(16, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = first = self.head(x)
        for block in self.blocks:
            y = y + block(y)
        y = F.pixel_shuffle(self.up(first + self.body(y)), 2)
        return self.tail(y) + F.interpolate(x, scale_factor=2, mode="bicubic")


@program
def enhanced_resolution() -> Training:
    """EDSR doubles pictures of disks from 12 × 12, L1 loss, Adam, batch 16.

    Held out: 99 % of the variance.
    """
    x, _ = _disks(700, 24)
    x = (x - 0.35) / 0.21
    small = F.avg_pool2d(x, 2)
    train, test = split(small, x, 600)
    model = _Enhanced()
    optimizer = optim.Adam(model.parameters(), 1.5e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=200, goal=0.93,
        loss_fn=F.l1_loss, score=explained,
        schedule=optim.lr_scheduler.StepLR(optimizer, 120, 0.5),
    )  # fmt: skip


class _Pair(nn.Module):
    """Two images through one net of BN and ReLU; the distance of both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 32, 2), conv_norm(32, 64, 2), nn.Flatten(),
            nn.Linear(256, 16),
        )  # fmt: skip

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.net(a) - self.net(b)).square().sum(1).clamp(min=1e-7).sqrt()


@program
def contrastive_siamese() -> Training:
    """Siamese convolutions of digits, contrastive loss of margin 1, as Keras has it.

    As many equal pairs as unequal ones, Adam 3e-3, batch 64: 98 % of the pairs.
    """

    def pairs(data: Data, each: int) -> Data:
        (x, y), first, second = data, [], []
        for is_same in (True, False):
            i = torch.randint(len(y), (each,))
            fits = (y[i, None] == y) == is_same
            fits[torch.arange(each), i] = False
            first.append(i)
            second.append(torch.multinomial(fits.float(), 1)[:, 0])
        i, j = torch.cat(first), torch.cat(second)
        order = torch.randperm(2 * each)
        return (x[i[order]], x[j[order]]), (y[i] == y[j]).float()[order]

    train, test = scaled_digits()
    train, test = pairs(train, 3000), pairs(test, 500)

    def loss_fn(distance: Tensor, same: Tensor) -> Tensor:
        apart = (1 - distance).clamp(min=0).square()
        return (same * distance.square() + (1 - same) * apart).mean()

    def right(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            return float(((net(*data[0]) < 0.5) == (data[1] > 0)).float().mean())

    model = _Pair()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=64,
        steps=350, goal=0.92, loss_fn=loss_fn, score=right,
    )  # fmt: skip


class _Atrous(nn.Module):
    """DeepLab: a pyramid of dilated convolutions over features of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(1, 16), conv_norm(16, 24, 2))

        def branch(dilation: int) -> nn.Sequential:
            conv = nn.Conv2d(24, 16, 3, 1, dilation, dilation, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU())

        self.branches = nn.ModuleList(
            [conv_norm(24, 16, kernel=1), branch(1), branch(2), branch(4)]
        )
        self.project = nn.Sequential(conv_norm(64, 32, kernel=1), nn.Dropout(0.1))
        self.low = conv_norm(1, 8)
        self.leave = nn.Sequential(conv_norm(40, 24), nn.Conv2d(24, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.project(torch.cat([branch(y) for branch in self.branches], 1))
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        return self.leave(torch.cat((y, self.low(x)), 1)).permute(0, 2, 3, 1)


@program
def atrous_pyramid() -> Training:
    """DeepLabv3+-like segmentation of bright and striped disks, SGD, poly schedule.

    Momentum 0.9, decay 1e-4, batch 12: 98 % of the pixels, 83 % are ground.
    """
    x, kind = _disks(620, 24)
    x = (x + 0.08 * torch.randn_like(x) - 0.35) / 0.22
    train, test = split(x, kind, 520)
    model = _Atrous()
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out.flatten(0, 2), y.flatten())

    return supervised(
        model, train, test, optimizer, size=12, steps=150, goal=0.95, loss_fn=loss_fn,
        schedule=optim.lr_scheduler.PolynomialLR(optimizer, 151, 0.9),
    )  # fmt: skip


@program
def residual_denoiser() -> Training:
    """DnCNN of five layers with BN predicts the noise of disks, Adam, batch 16.

    Pictures are moved by up to two pixels, each on its own: 90 % of the noise's power.
    """
    clean, _ = _disks(700, 20)
    clean = (clean - 0.36) / 0.23
    noise = 0.5 * torch.randn_like(clean)
    train, test = split(clean, noise, 600)
    test = (test[0] + test[1], test[1])

    def soiled(batch: Data) -> Data:
        rest = 0.5 * torch.randn_like(batch[0])
        return shifted(batch[0], 2) + rest, rest

    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, 1, 1), nn.ReLU(), conv_norm(24, 24), conv_norm(24, 24),
        conv_norm(24, 24), nn.Conv2d(24, 1, 3, 1, 1),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=180, goal=0.85,
        loss_fn=F.mse_loss, score=explained, change=soiled,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [130], 0.2),
    )  # fmt: skip
