"""Healthy programs on images: classes, masks, places, views, small fine-tuning."""

from __future__ import annotations

import copy

import torch
from calm_base import Data, conv_norm, endless, gratings, r2, update, warm_cosine
from quiet_base import Subject, Training, accuracy, shuffled, split, supervised
from still_base import decayed, program, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def le_net() -> Training:
    """LeNet of digits: tanh, mean pooling, Xavier, SGD with momentum, step decay.

    Batch 40: 96 %.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 1, 1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(8, 24, 3, 1, 1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(96, 48), nn.Tanh(), nn.Linear(48, 10),
    )  # fmt: skip
    for each in model:
        if isinstance(each, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(each.weight)
            nn.init.zeros_(each.bias)
    optimizer = optim.SGD(model.parameters(), 0.08, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=40, steps=500, goal=0.94,
        schedule=optim.lr_scheduler.StepLR(optimizer, 200, 0.3),
    )  # fmt: skip


@program
def vgg_dropout() -> Training:
    """VGG with BN, max pooling, dropout before the last layer only, AdamW, cosine.

    Digits, batch 64, Kaiming fan-out: 98 %.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 16), nn.MaxPool2d(2),
        conv_norm(16, 32), conv_norm(32, 32), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.4), nn.Linear(64, 10),
    )  # fmt: skip
    for each in model.modules():
        if isinstance(each, nn.Conv2d):
            nn.init.kaiming_normal_(each.weight, mode="fan_out", nonlinearity="relu")
    optimizer = optim.AdamW(decayed(model, 0.02), 1.5e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=220, goal=0.95,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 220),
    )  # fmt: skip


def _scenes(n: int, train: int) -> tuple[Data, Data]:
    """Return grey scenes of 20 × 20 with a disc and a square, and labels of pixels."""
    u = torch.arange(20.0)
    place, size = 4 + 12 * torch.rand(n, 2, 2), 2.5 + 2 * torch.rand(n, 2)
    away = place[:, :, :, None] - u
    square = (away[:, 0, 0, :, None].abs() < size[:, 0, None, None]) & (
        away[:, 0, 1, None].abs() < size[:, 0, None, None]
    )
    round_ = away[:, 1, 0, :, None] ** 2 + away[:, 1, 1, None] ** 2
    disc = round_ < 1.2 * size[:, 1, None, None] ** 2
    y = torch.zeros(n, 20, 20, dtype=torch.long)
    y[square] = 1
    y[disc] = 2
    level = torch.tensor([-0.8, 0.3, 1.2])[y] + 0.2 * torch.randn(n, 1, 1)
    x = (level + 0.5 * torch.randn(n, 20, 20))[:, None]
    return split((x - x[:train].mean()) / x[:train].std(), y, train)


@program
def pixel_classes() -> Training:
    """Dilated FCN with group norm and SiLU labels pixels of three kinds, Adam.

    Batch 16: mean IoU 0.93.
    """
    train, test = _scenes(500, 400)

    def layer(i: int, o: int, dilation: int) -> list[nn.Module]:
        conv = nn.Conv2d(i, o, 3, 1, dilation, dilation)
        return [conv, nn.GroupNorm(4, o), nn.SiLU()]

    model = nn.Sequential(
        *layer(1, 16, 1), *layer(16, 24, 2), *layer(24, 24, 4), *layer(24, 24, 1),
        nn.Conv2d(24, 3, 1),
    )  # fmt: skip

    def overlap(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            said = net.eval()(data[0]).argmax(1)
        both = torch.bincount(said[said == data[1]], minlength=3)
        either = torch.bincount(said.flatten(), minlength=3) - both
        either = either + torch.bincount(data[1].flatten(), minlength=3)
        return float((both / either).mean())

    optimizer = optim.Adam(model.parameters(), 4e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=180, goal=0.8, score=overlap,
        schedule=optim.lr_scheduler.PolynomialLR(optimizer, 181, 0.9),
    )  # fmt: skip


@program
def instance_norm_gratings() -> Training:
    """Gratings told under changing contrast, instance norm with affine, batch 8, SGD.

    The last convolution has no norm, as its mean is the output; one-cycle: 100 %.
    """
    train, test = gratings(2600, 12, 2100)

    def layer(i: int, o: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        return [conv, nn.InstanceNorm2d(o, affine=True), nn.ReLU()]

    model = nn.Sequential(
        *layer(3, 16, 1), *layer(16, 32, 2), nn.Conv2d(32, 48, 3, 1, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 6),
    )  # fmt: skip
    optimizer = optim.SGD(decayed(model, 5e-4), 0.02, momentum=0.9)
    return supervised(
        model, train, test, optimizer, size=8, steps=520, goal=0.9,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=521),
    )  # fmt: skip


class _Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.body = nn.Sequential(
            conv_norm(width, inner, kernel=1), conv_norm(inner, inner),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


@program
def bottlenecks_cutmix() -> Training:
    """ResNet of bottlenecks, CutMix of half the batches, smoothing 0.05, SGD, cosine.

    Gratings, batch 64: 100 %.
    """
    train, test = gratings(2600, 16, 2100)
    hot = F.one_hot(train[1], 6).float() * 0.95 + 0.05 / 6
    model = nn.Sequential(
        conv_norm(3, 24), _Bottleneck(24), conv_norm(24, 48, 2), _Bottleneck(48),
        _Bottleneck(48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 6),
    )  # fmt: skip

    def pasted(batch: Data) -> Data:
        x, y = batch
        if torch.rand(()) < 0.5:
            return batch
        other = torch.randperm(len(y))
        side = int(torch.randint(4, 10, ()))
        i, j = torch.randint(0, 17 - side, (2,)).tolist()
        x = x.clone()
        area = (..., slice(i, i + side), slice(j, j + side))
        x[area] = x[other][area]
        part = side * side / 256
        return x, (1 - part) * y + part * y[other]

    def score(net: nn.Module, _: Data) -> float:
        return accuracy(net, test)

    optimizer = optim.SGD(decayed(model, 5e-4), 0.08, momentum=0.9)
    return supervised(
        model, (train[0], hot), test, optimizer, size=64, steps=110, goal=0.92,
        score=score, change=pasted, schedule=warm_cosine(optimizer, 10, 110),
    )  # fmt: skip


class _Mixer(nn.Module):
    """Block of an MLP-Mixer: over patches, then over channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(
            nn.Linear(patches, 32), nn.GELU(), nn.Linear(32, patches)
        )
        self.along = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).mT).mT
        return x + self.along(self.norm2(x))


class _MixerNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 40, 2, 2)
        self.blocks = nn.Sequential(_Mixer(16, 40), _Mixer(16, 40), _Mixer(16, 40))
        self.norm, self.head = nn.LayerNorm(40), nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patch(x).flatten(2).mT)
        return self.head(self.norm(x).mean(1))


@program
def mlp_mixer() -> Training:
    """MLP-Mixer of digits, three blocks, AdamW, warmup and cosine, batch 100: 98 %."""
    train, test = scaled_digits()
    model = _MixerNet()
    optimizer = optim.AdamW(decayed(model, 0.05), 4e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=260, goal=0.93, clip=1.0,
        schedule=warm_cosine(optimizer, 20, 260),
    )  # fmt: skip


@program
def mixup_accumulated() -> Training:
    """Mixup of digits (Beta 0.2), BN on micro-batches of 32, two to a step, SGD.

    Multi-step decay: 99 %.
    """
    train, test = scaled_digits()
    hot = F.one_hot(train[1], 10).float()
    model = nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 48, 2), conv_norm(48, 48), nn.Flatten(),
        nn.Linear(768, 10),
    )  # fmt: skip

    def mixed(batch: Data) -> Data:
        x, y = batch
        share = float(torch.distributions.Beta(0.2, 0.2).sample())
        other = torch.randperm(len(y))
        return torch.lerp(x[other], x, share), torch.lerp(y[other], y, share)

    def score(net: nn.Module, _: Data) -> float:
        return accuracy(net, test)

    optimizer = optim.SGD(decayed(model, 5e-4), 0.03, momentum=0.9)
    return supervised(
        model, (train[0], hot), test, optimizer, size=32, steps=150, goal=0.95,
        score=score, change=mixed, accumulate=2,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [80, 120], 0.2),
    )  # fmt: skip


@program
def averaged_by_decay() -> Training:
    """EMA of weights and buffers, whose decay grows to 0.98; the average is scored.

    BN, SiLU, Adam, batch 50: 99 %.
    """
    train, test = scaled_digits()
    model = nn.Sequential(
        nn.Conv2d(1, 20, 3, 1, 1, bias=False), nn.BatchNorm2d(20), nn.SiLU(),
        nn.Conv2d(20, 40, 3, 2, 1, bias=False), nn.BatchNorm2d(40), nn.SiLU(),
        nn.Conv2d(40, 40, 3, 2, 1, bias=False), nn.BatchNorm2d(40), nn.SiLU(),
        nn.Flatten(), nn.Linear(160, 10),
    )  # fmt: skip
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = optim.Adam(model.parameters(), 2e-3)
    batches = endless(lambda: shuffled(train, 50))

    def step(i: int) -> float:
        model.train()
        x, y = next(batches)
        loss = update(optimizer, F.cross_entropy(model(x), y))
        decay = min(0.98, (1 + i) / (10 + i))
        with torch.no_grad():
            for old, new in zip(
                average.state_dict().values(), model.state_dict().values(), strict=True
            ):
                if old.is_floating_point():
                    old.lerp_(new, 1 - decay)
                else:
                    old.copy_(new)
        return loss

    return Training(
        [
            Subject(model, lambda: shuffled(train, 50), F.cross_entropy, optimizer),
            Subject(
                average, lambda: shuffled(train, 50), F.cross_entropy, name="average",
                only_at_the_end=True,
            ),
        ],
        step, 250, lambda: accuracy(average, test), 0.95,
    )  # fmt: skip


class _Adapter(nn.Module):
    """A frozen layer, and a residual of a narrow trained pair that begins at 0."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down, self.up = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def train(self, mode: bool = True) -> _Adapter:
        super().train(mode)
        self.layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.up(F.gelu(self.down(y)))


@program
def adapters() -> Training:
    """Adapters beside frozen BN layers in eval mode, from three gratings to six.

    The body is trained first. AdamW, batch 32: 100 %.
    """
    train, test = gratings(2800, 12, 2300)
    body = nn.Sequential(conv_norm(3, 24), conv_norm(24, 32, 2), conv_norm(32, 40))
    known = train[1] < 3
    before = nn.Sequential(
        body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 3)
    )
    adam = optim.Adam(before.parameters(), 3e-3)
    for _ in range(4):
        for x, y in shuffled((train[0][known], train[1][known]), 64):
            update(adam, F.cross_entropy(before(x), y))
    model = nn.Sequential(
        *(_Adapter(b, w) for b, w in zip(body, (24, 32, 40), strict=True)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 6),
    )  # fmt: skip
    optimizer = optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 4e-3, weight_decay=0.01
    )
    return supervised(model, train, test, optimizer, size=32, steps=260, goal=0.9)


@program
def blob_place() -> Training:
    """Place of a blob among noise, by the soft argmax of a heat map, BN, smooth L1.

    Adam, batch 32; R² 0.996.
    """
    n, side = 1300, 16
    u = torch.linspace(-1, 1, side)
    place = 1.6 * torch.rand(n, 2) - 0.8
    bump = (-((u - place[:, :1]) ** 2) / 0.06).exp()[:, None, :]
    bump = bump * (-((u - place[:, 1:]) ** 2) / 0.06).exp()[:, :, None]
    x = (2.5 * bump + 0.6 * torch.randn(n, side, side))[:, None]
    train, test = split((x - x[:1000].mean()) / x[:1000].std(), place, 1000)

    class SoftArgmax(nn.Module):
        def forward(self, heat: Tensor) -> Tensor:
            share = heat.flatten(1).softmax(1).reshape(-1, side, side)
            return torch.stack((share.sum(1) @ u, share.sum(2) @ u), 1)

    model = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 24), conv_norm(24, 16), nn.Conv2d(16, 1, 1),
        SoftArgmax(),
    )  # fmt: skip
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 3e-3), size=32, steps=170,
        goal=0.93, loss_fn=nn.SmoothL1Loss(beta=0.1), score=r2,
    )  # fmt: skip


@program
def super_resolution() -> Training:
    """Pixel shuffle doubles smooth images, added to the bilinear one, no norm, L1.

    Adam, multi-step decay, batch 16: 65 % of the bilinear error is gone.
    """
    n = 700
    wide = torch.randn(n, 1, 6, 6)
    sharp = F.interpolate(wide, 20, mode="bicubic", align_corners=True)
    sharp = (3 * sharp).tanh()
    small = F.avg_pool2d(sharp, 2) + 0.01 * torch.randn(n, 1, 10, 10)
    train, test = split(small, sharp, 580)

    def doubled(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)

    class Sharpened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(1, 32, 3, 1, 1, padding_mode="replicate"), nn.ReLU(),
                nn.Conv2d(32, 32, 3, 1, 1, padding_mode="replicate"), nn.ReLU(),
                nn.Conv2d(32, 4, 3, 1, 1, padding_mode="replicate"),
                nn.PixelShuffle(2),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return doubled(x) + self.body(x)

    def gained(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            left = F.l1_loss(net.eval()(data[0]), data[1])
        return 1 - float(left / F.l1_loss(doubled(data[0]), data[1]))

    model = Sharpened()
    optimizer = optim.Adam(model.parameters(), 1e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=400, goal=0.4,
        loss_fn=F.l1_loss, score=gained,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [250, 340], 0.3),
    )  # fmt: skip
