"""Healthy programs on images: classification, segmentation, detection, fine-tuning."""

from __future__ import annotations

import torch
from quiet_base import Training, digits, program, shuffled, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import normkit


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


@program
def cnn_mixup() -> Training:
    """BN CNN, mixup and label smoothing, AdamW cosine, batch 64: 99 % held out."""
    train, test = digits()
    model = nn.Sequential(
        _block(1, 24), _block(24, 48, 2), _block(48, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    beta = torch.distributions.Beta(0.2, 0.2)

    def mixup(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch[0], F.one_hot(batch[1], 10).float()
        share, order = beta.sample(), torch.randperm(len(x))
        return torch.lerp(x[order], x, share), torch.lerp(y[order], y, share)

    return supervised(
        model, train, test, optimizer, size=64, steps=300, goal=0.96, change=mixup,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        nn.init.zeros_(self.bn2.weight)
        self.short = nn.Sequential()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


@program
def resnet_zero_gamma() -> Training:
    """ResNet, last gamma of each branch 0 at the start, SGD nesterov one-cycle.

    Batch 128: 99 % held out.
    """
    train, test = digits()
    model = nn.Sequential(
        _block(1, 16), _Residual(16, 16, 1), _Residual(16, 32, 2),
        _Residual(32, 32, 1), _Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = OneCycleLR(optimizer, 0.1, total_steps=141)
    mean, std = train[0].mean(), train[0].std()
    train, test = (((d[0] - mean) / std, d[1]) for d in (train, test))
    return supervised(
        model, train, test, optimizer, size=128, steps=140, goal=0.96,
        schedule=schedule,
    )  # fmt: skip


def _shapes(n: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy images `(n, 1, side, side)`, masks of discs, and their centres."""
    grid = torch.arange(side).float()
    rows, columns = grid[:, None], grid[None, :]
    centre = side * (0.25 + 0.5 * torch.rand(n, 2))
    radius = side * (0.1 + 0.12 * torch.rand(n))
    away = (rows - centre[:, 0, None, None]) ** 2
    away = away + (columns - centre[:, 1, None, None]) ** 2
    mask = (away < radius[:, None, None] ** 2).float()[:, None]
    contrast = 0.6 + 0.4 * torch.rand(n, 1, 1, 1)
    return mask * contrast + 0.25 * torch.randn(n, 1, side, side), mask, centre


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = _block(1, 12), _block(12, 24)
        self.middle = _block(24, 32)
        self.up2 = nn.ConvTranspose2d(32, 24, 2, 2)
        self.join2 = _block(48, 24)
        self.up1 = nn.ConvTranspose2d(24, 12, 2, 2)
        self.join1 = _block(24, 12)
        self.head = nn.Conv2d(12, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up2(self.middle(F.max_pool2d(b, 2)))
        y = self.up1(self.join2(torch.cat((y, b), 1)))
        return self.head(self.join1(torch.cat((y, a), 1)))


def _dice(logits: Tensor, mask: Tensor) -> Tensor:
    p = logits.sigmoid()
    both = 2 * (p * mask).sum((1, 2, 3)) + 1
    return 1 - (both / (p.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)).mean()


@program
def unet() -> Training:
    """U-Net with BN segments discs in noise, BCE + Dice, Adam, batch 8: IoU 0.95."""
    x, mask, _ = _shapes(480, 24)
    train, test = split(x, mask, 400)
    model = _UNet()

    def iou(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        net.eval()
        with torch.no_grad():
            said, true = net(data[0]) > 0, data[1] > 0.5
        return float((said & true).sum() / (said | true).sum())

    return supervised(
        model, train, test, optim.Adam(model.parameters(), 1e-3), size=8, steps=250,
        goal=0.85, score=iou,
        loss_fn=lambda o, t: F.binary_cross_entropy_with_logits(o, t) + _dice(o, t),
    )  # fmt: skip


def _focal(logits: Tensor, heat: Tensor) -> Tensor:
    """Focal loss of Lin et al. 2017, summed and divided by the number of objects."""
    p = logits.sigmoid()
    right = torch.where(heat > 0.5, p, 1 - p)
    alpha = torch.where(heat > 0.5, 0.25, 0.75)
    loss = F.binary_cross_entropy_with_logits(logits, heat, reduction="none")
    return (alpha * (1 - right) ** 2 * loss).sum() / heat.sum().clamp(min=1)


@program
def focal_detector() -> Training:
    """Detector with focal loss, 1 cell of 36 positive, prior bias -4.6, GN.

    SGD with warmup, batch 16; the centre is found within a cell in 99 %.
    """
    x, _, centre = _shapes(900, 24)
    cell = (centre / 4).long()
    heat = torch.zeros(900, 1, 6, 6)
    heat[torch.arange(900), 0, cell[:, 0], cell[:, 1]] = 1
    train, test = split(x, heat, 800)

    def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(conv, nn.GroupNorm(8, outputs), nn.ReLU())

    model = nn.Sequential(
        layer(1, 16, 1), layer(16, 32, 2), layer(32, 32, 2), layer(32, 32, 1),
        nn.Conv2d(32, 1, 3, 1, 1),
    )  # fmt: skip
    last = model[-1]
    assert isinstance(last, nn.Conv2d)
    nn.init.normal_(last.weight, std=0.01)
    assert last.bias is not None
    nn.init.constant_(last.bias, -4.6)
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    warm = optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=40)

    def near(net: nn.Module, data: tuple[Tensor, Tensor]) -> float:
        net.eval()
        with torch.no_grad():
            said, true = net(data[0]).flatten(1).argmax(1), data[1].flatten(1).argmax(1)
        rows = (said // 6 - true // 6).abs() <= 1
        return float((rows & ((said % 6 - true % 6).abs() <= 1)).float().mean())

    return supervised(
        model, train, test, optimizer, size=16, steps=350, goal=0.95, score=near,
        loss_fn=_focal, schedule=warm, clip=10.0,
    )  # fmt: skip


@program
def accumulate_group_norm() -> Training:
    """GN with weight standardization, gradients of 4 micro-batches of 8, SGD: 98 %."""
    train, test = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1, bias=False), nn.GroupNorm(8, 32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.GroupNorm(8, 64), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    for each in model:
        if isinstance(each, nn.Conv2d):
            normkit.nn.weight_standardization(each)
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=8, steps=200, goal=0.95, accumulate=4
    )


class _Excite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(channels, channels // 4, 1)
        self.grow = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.grow(F.silu(self.shrink(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class _HalfNet(nn.Module):
    """Depthwise separable convolutions under bfloat16 autocast."""

    def __init__(self) -> None:
        super().__init__()

        def part(i: int, o: int, stride: int) -> list[nn.Module]:
            return [
                nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False), nn.BatchNorm2d(i),
                nn.SiLU(), _Excite(i), nn.Conv2d(i, o, 1, bias=False),
                nn.BatchNorm2d(o), nn.SiLU(),
            ]  # fmt: skip

        stem = [nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()]
        self.body = nn.Sequential(*stem, *part(16, 32, 1), *part(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = self.head(self.body(x).mean((2, 3)))
        return scores.float()


@program
def autocast_bfloat16() -> Training:
    """Depthwise CNN, BN, SiLU, squeeze-excite in bfloat16 autocast.

    RMSprop with momentum and exponential decay, batch 32: 95 %.
    """
    train, test = digits()
    model = _HalfNet()
    optimizer = optim.RMSprop(
        model.parameters(), 1e-3, alpha=0.9, momentum=0.9, eps=1e-3
    )
    return supervised(
        model, train, test, optimizer, size=32, steps=180, goal=0.93,
        schedule=optim.lr_scheduler.ExponentialLR(optimizer, 0.985),
    )  # fmt: skip


def _pretrained(classes: int, train: tuple[Tensor, Tensor]) -> nn.Sequential:
    body = nn.Sequential(
        _block(1, 24), _block(24, 32, 2), _block(32, 48, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    net = nn.Sequential(body, nn.Linear(48, classes))
    optimizer = optim.Adam(net.parameters(), 3e-3)
    for _ in range(6):
        for x, y in shuffled(train, 64):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return body


class _Probe(nn.Module):
    """A frozen body, kept in eval mode, under a head that learns."""

    def __init__(self, body: nn.Module, classes: int) -> None:
        super().__init__()
        self.body = body.requires_grad_(False).eval()
        self.head = nn.Sequential(
            nn.Linear(48, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, classes)
        )

    def train(self, mode: bool = True) -> _Probe:
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _by_class(data: tuple[Tensor, Tensor], low: bool) -> tuple[Tensor, Tensor]:
    keep = data[1] < 5 if low else data[1] >= 5
    return data[0][keep], data[1][keep] - (0 if low else 5)


@program
def frozen_backbone() -> Training:
    """Head on a frozen BN body in eval mode.

    The body was trained on digits 0–4, the head learns 5–9 by Adam, batch 32, to 94
    %.
    """
    train, test = digits()
    model = _Probe(_pretrained(5, _by_class(train, True)), 5)
    optimizer = optim.Adam(model.head.parameters(), 2e-3)
    return supervised(
        model, _by_class(train, False), _by_class(test, False), optimizer, size=32,
        steps=300, goal=0.9,
    )  # fmt: skip


class _FrozenBatchNorm2d(nn.Module):
    """Batch norm as constants, four buffers, as detection models have it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.register_buffer("weight", norm.weight.detach().clone())
        self.register_buffer("bias", norm.bias.detach().clone())
        self.register_buffer("running_mean", norm.running_mean.clone())
        self.register_buffer("running_var", norm.running_var.clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


@program
def frozen_norm_fine_tuning() -> Training:
    """Fine-tuning with the norms made constants (FrozenBatchNorm2d).

    Batch 8, SGD with a lower rate for the pretrained body, 97 %.
    """
    train, test = digits()
    body = _pretrained(5, _by_class(train, True))
    for i in range(3):
        each = body[i]
        assert isinstance(each, nn.Sequential)
        norm = each[1]
        assert isinstance(norm, nn.BatchNorm2d)
        each[1] = _FrozenBatchNorm2d(norm)
    model = nn.Sequential(body, nn.Linear(48, 5))
    optimizer = optim.SGD(
        [
            {"params": body.parameters(), "lr": 0.01},
            {"params": model[1].parameters(), "lr": 0.05},
        ],
        momentum=0.9,
        weight_decay=1e-4,
    )
    return supervised(
        model, _by_class(train, False), _by_class(test, False), optimizer, size=8,
        steps=350, goal=0.95,
    )  # fmt: skip
