"""Healthy programs on images and clips: networks of the last ten years, small."""

from __future__ import annotations

import copy

import torch
from calm_base import Data, conv_norm, endless, gratings, program, update, warm_cosine
from quiet_base import Subject, Training, accuracy, digits, shuffled, split, supervised
from torch import Tensor, nn, optim
from torch.nn import functional as F

import normkit


class _WideBlock(nn.Module):
    """Norm, ReLU, convolution twice, with dropout between (Zagoruyko 2016)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(i), nn.BatchNorm2d(o)
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.drop = nn.Dropout(0.1)
        self.short = nn.Conv2d(i, o, 1, stride, bias=False) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        short = x if self.short is None else self.short(y)
        return short + self.conv2(self.drop(F.relu(self.bn2(self.conv1(y)))))


@program
def wide_resnet() -> Training:
    """Wide ResNet of gratings, pre-activation BN, dropout 0.1, SGD nesterov, steps.

    Batch 128: 99 %.
    """
    train, test = gratings(2600, 12, 2100)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), _WideBlock(8, 24, 1),
        _WideBlock(24, 48, 2), _WideBlock(48, 48, 1), nn.BatchNorm2d(48), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 6),
    )  # fmt: skip
    optimizer = optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return supervised(
        model, train, test, optimizer, size=128, steps=55, goal=0.95,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [30, 45], 0.2),
    )  # fmt: skip


class _Dense(nn.Module):
    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.body(x)), 1)


@program
def dense_net() -> Training:
    """DenseNet-BC of digits, growth 8, two blocks of 3, Adam, batch 50: 98 %."""
    train, test = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        _Dense(16, 8), _Dense(24, 8), _Dense(32, 8),
        nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1, bias=False),
        nn.AvgPool2d(2), _Dense(20, 8), _Dense(28, 8), _Dense(36, 8),
        nn.BatchNorm2d(44), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(44, 10),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(model, train, test, optimizer, size=50, steps=170, goal=0.95)


class _Inverted(nn.Module):
    """Expand, depthwise, squeeze-excite, linear bottleneck (MobileNetV3)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        wide = 3 * i
        self.expand = nn.Sequential(
            nn.Conv2d(i, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide), nn.Hardswish(),
        )  # fmt: skip
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, wide // 4, 1), nn.ReLU(),
            nn.Conv2d(wide // 4, wide, 1), nn.Hardsigmoid(),
        )  # fmt: skip
        self.project = nn.Sequential(
            nn.Conv2d(wide, o, 1, bias=False), nn.BatchNorm2d(o)
        )
        self.is_residual = i == o and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(x)
        y = self.project(y * self.gate(y))
        return x + y if self.is_residual else y


@program
def inverted_residuals() -> Training:
    """MobileNetV3-like net of gratings, SGD cosine with warmup, batch 64.

    After the last step the running statistics are those of 30 batches (momentum=None,
    as torch's update_bn): 98 %.
    """
    train, test = gratings(2600, 12, 2100)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
        _Inverted(16, 16, 1), _Inverted(16, 24, 2), _Inverted(24, 24, 1),
        nn.Conv2d(24, 64, 1, bias=False), nn.BatchNorm2d(64), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 6),
    )  # fmt: skip
    steps = 85
    optimizer = optim.SGD(model.parameters(), 0.15, momentum=0.9, weight_decay=4e-5)
    taken = 0

    def after() -> None:
        nonlocal taken
        taken += 1
        if taken < steps:
            return
        for each in model.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.reset_running_stats()
                each.momentum = None
        with torch.no_grad():
            for x, _ in shuffled(train, 64)[:30]:
                model(x)

    return supervised(
        model, train, test, optimizer, size=64, steps=steps, goal=0.93, after=after,
        schedule=warm_cosine(optimizer, 15, steps),
    )  # fmt: skip


class _NextBlock(nn.Module):
    """ConvNeXt block: depthwise 5 × 5, layer norm, LayerScale, drop path."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, 1, 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.grow, self.shrink = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.shrink(F.gelu(self.grow(y)))
        y = y.permute(0, 3, 1, 2)
        if self.training and self.drop:
            kept = torch.rand(len(x), 1, 1, 1) >= self.drop
            y = y * kept / (1 - self.drop)
        return x + y


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of images `(N, C, H, W)`."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@program
def conv_next() -> Training:
    """ConvNeXt of digits, LayerScale from 1e-6, stochastic depth 0.1, AdamW.

    Label smoothing, warmup and cosine, batch 64: 98 %.
    """
    train, test = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 32, 2, 2), _ChannelNorm(32), _NextBlock(32, 0.0),
        _NextBlock(32, 0.05), _ChannelNorm(32), nn.Conv2d(32, 64, 2, 2),
        _NextBlock(64, 0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.LayerNorm(64), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=0.05)
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.93,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=warm_cosine(optimizer, 25, 200),
    )  # fmt: skip


class _Vision(nn.Module):
    """Vision transformer: 16 patches and a class token, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 48, 2, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 48))
        self.place = nn.Parameter(0.2 * torch.randn(1, 17, 48))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                48, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat((self.token.expand(len(x), -1, -1), y), 1) + self.place
        for layer in self.layers:
            y = layer(y)
        return self.head(self.norm(y[:, 0]))


@program
def vit_tiny() -> Training:
    """ViT of digits, class token, AdamW, warmup and cosine, clipped.

    Batch 50: 96 %.
    """
    train, test = digits()
    mean, std = train[0].mean(), train[0].std()
    train, test = (((d[0] - mean) / std, d[1]) for d in (train, test))
    model = _Vision()
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    return supervised(
        model, train, test, optimizer, size=50, steps=240, goal=0.92, clip=1.0,
        schedule=warm_cosine(optimizer, 25, 240),
    )  # fmt: skip


class _Painter(nn.Module):
    """Johnson et al. 2016: strided convolutions, residuals, instance norm."""

    def __init__(self) -> None:
        super().__init__()

        def layer(i: int, o: int, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(i, o, 3, stride, 1, padding_mode="reflect")
            return [conv, nn.InstanceNorm2d(o, affine=True), nn.ReLU()]

        self.down = nn.Sequential(*layer(3, 16), *layer(16, 32, 2))
        self.branch = nn.Sequential(*layer(32, 32), *layer(32, 32)[:2])
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), *layer(32, 16),
            nn.Conv2d(16, 3, 3, 1, 1, padding_mode="reflect"),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return self.up(y + self.branch(y))


@program
def style_transfer() -> Training:
    """Fast style transfer, instance norm, Gram matrices of fixed random features.

    Adam, batch 8: the style's loss falls to a fiftieth of that of the images.
    """
    ground, place = torch.rand(300, 3, 1, 1), torch.arange(20.0)
    centre, radius = 4 + 12 * torch.rand(300, 2), 3 + 4 * torch.rand(300)
    away = (place[:, None] - centre[:, 0, None, None]) ** 2
    away = away + (place - centre[:, 1, None, None]) ** 2
    inside = (away < radius[:, None, None] ** 2)[:, None]
    x = torch.where(inside, torch.rand(300, 3, 1, 1), ground)
    x = x + 0.02 * torch.randn(300, 3, 20, 20)
    x = (x - 0.5) / 0.29
    checks = ((torch.arange(20)[:, None] // 2 + torch.arange(20) // 2) % 2).float()
    style = torch.stack((checks * 2 - 1, 1 - checks * 2, 0.5 * checks))[None]
    first, second = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(32, 32, 3, 2, 1)
    for conv in (first, second):
        nn.init.kaiming_normal_(conv.weight).requires_grad_(False)

    def features(image: Tensor) -> list[Tensor]:
        low = F.relu(first(image))
        return [low, F.relu(second(low))]

    def gram(f: Tensor) -> Tensor:
        rows = f.flatten(2)
        return rows @ rows.mT / rows.shape[2] / rows.shape[1]

    with torch.no_grad():
        wanted = [gram(f) for f in features(style)]

    def styled(image: Tensor) -> Tensor:
        pairs = zip(features(image), wanted, strict=True)
        return torch.stack(
            [(gram(f) - w).square().sum((1, 2)).mean() for f, w in pairs]
        ).sum()

    def loss_fn(out: Tensor, content: Tensor) -> Tensor:
        return styled(out) * 10 + F.mse_loss(features(out)[1], features(content)[1])

    def gained(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            return 1 - float(styled(net(data[0])) / styled(data[0]))

    model = _Painter()
    return supervised(
        model, (x[:260], x[:260]), (x[260:], x[260:]),
        optim.Adam(model.parameters(), 2e-3), size=8, steps=150, goal=0.7,
        loss_fn=loss_fn, score=gained,
    )  # fmt: skip


@program
def clips_3d() -> Training:
    """3-d convolutions and BN3d tell four ways of a blob, Adam, batch 32: 99 %."""
    n = 900
    y = torch.randint(4, (n,))
    way = torch.tensor([[0.0, 1], [0, -1], [1, 0], [-1, 0]])[y]
    place = 4.5 + 1.5 * torch.randn(n, 2)
    time = torch.arange(6.0) - 2.5
    centre = place[:, None] + 0.8 * time[:, None] * way[:, None]
    grid = torch.arange(10.0)
    away = (grid[:, None] - centre[..., 0, None, None]) ** 2
    away = away + (grid - centre[..., 1, None, None]) ** 2
    x = (-away / 3).exp() + 0.15 * torch.randn(n, 6, 10, 10)
    x = ((x - x[:700].mean()) / x[:700].std())[:, None]
    train, test = split(x, y, 700)

    def layer(i: int, o: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv3d(i, o, 3, (1, stride, stride), 1, bias=False)
        return [conv, nn.BatchNorm3d(o), nn.ReLU()]

    model = nn.Sequential(
        *layer(1, 8, 1), *layer(8, 16, 2), *layer(16, 32, 2),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(model, train, test, optimizer, size=32, steps=110, goal=0.93)


@program
def balanced_sampling() -> Training:
    """Long-tailed digits (140 to 14 a class) sampled in balance, BN, AdamW.

    Batch 64, augmented by shifts and noise; 92 % where classes are even.
    """
    (x, y), test = digits()
    kept = torch.cat([(y == c).nonzero()[: int(140 * 0.77**c), 0] for c in range(10)])
    x, y = x[kept], y[kept]
    weights = 1 / torch.bincount(y).float()[y]
    model = nn.Sequential(
        conv_norm(1, 24), conv_norm(24, 48, 2), nn.Dropout2d(0.1), conv_norm(48, 48),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)

    def epoch() -> list[Data]:
        drawn = torch.multinomial(weights, 64 * 12, replacement=True).split(64)
        return [(x[d] + 0.08 * torch.randn(64, 1, 8, 8), y[d]) for d in drawn]

    batches = endless(epoch)

    def step(_: int) -> float:
        model.train()
        image, label = next(batches)
        return update(optimizer, F.cross_entropy(model(image), label))

    return Training(
        [Subject(model, epoch, F.cross_entropy, optimizer)],
        step, 200, lambda: accuracy(model, test), 0.88,
    )  # fmt: skip


class _Tuned(nn.Module):
    """A pretrained body whose batch norms stay in eval mode while it is tuned."""

    def __init__(self, body: nn.Sequential, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(48, classes)
        for each in body.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.requires_grad_(False)

    def train(self, mode: bool = True) -> _Tuned:
        super().train(mode)
        for each in self.body.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@program
def norms_in_eval() -> Training:
    """Fine-tuning with each batch norm in eval mode, from four gratings to six.

    SGD, batch 16, body at a tenth of the head's rate: 98 %.
    """
    train, test = gratings(2600, 12, 2100)
    body = nn.Sequential(
        conv_norm(3, 24), conv_norm(24, 32, 2), conv_norm(32, 48, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    known = train[1] < 4
    before = nn.Sequential(body, nn.Linear(48, 4))
    adam = optim.Adam(before.parameters(), 3e-3)
    for _ in range(3):
        for x, y in shuffled((train[0][known], train[1][known]), 64):
            update(adam, F.cross_entropy(before(x), y))
    model = _Tuned(body, 6)
    optimizer = optim.SGD(
        [
            {"params": [p for p in body.parameters() if p.requires_grad], "lr": 5e-3},
            {"params": model.head.parameters(), "lr": 0.05},
        ],
        momentum=0.9,
    )
    return supervised(model, train, test, optimizer, size=16, steps=260, goal=0.93)


@program
def sharpness_aware() -> Training:
    """SAM (rho 0.05) on a BN net; the second pass leaves running statistics alone.

    SGD, one-cycle, batch 64: 98 %.
    """
    train, test = digits()
    model = nn.Sequential(
        conv_norm(1, 16), conv_norm(16, 32, 2), conv_norm(32, 64, 2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=181)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    batches = endless(lambda: shuffled(train, 64))

    def step(_: int) -> float:
        model.train()
        x, y = next(batches)
        optimizer.zero_grad()
        first = F.cross_entropy(model(x), y)
        first.backward()
        with torch.no_grad():
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            length = torch.stack([g.norm() for g in grads]).norm() + 1e-12
            for p, g in zip(model.parameters(), grads, strict=True):
                p.add_(g, alpha=float(0.05 / length))
        for norm in norms:
            norm.momentum = 0.0
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for norm in norms:
            norm.momentum = 0.1
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.sub_(g, alpha=float(0.05 / length))
        optimizer.step()
        schedule.step()
        return float(first.detach())

    return Training(
        [Subject(model, lambda: shuffled(train, 64), F.cross_entropy, optimizer)],
        step, 180, lambda: accuracy(model, test), 0.95,
    )  # fmt: skip


@program
def shards_without_sync() -> Training:
    """Two ranks of 32 with normkit's BN each on its own; gradients are averaged.

    Rank 0 sends its buffers, as DDP does by default. Adam, exponential decay: 98 %.
    """
    train, test = digits()
    norm = normkit.nn.BatchNorm2d
    model = nn.Sequential(
        nn.Conv2d(1, 24, 3, 1, 1, bias=False), norm(24), nn.LeakyReLU(0.1),
        nn.Conv2d(24, 32, 3, 2, 1, bias=False), norm(32), nn.LeakyReLU(0.1),
        nn.Conv2d(32, 48, 3, 2, 1, bias=False), norm(48), nn.LeakyReLU(0.1),
        nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    other = copy.deepcopy(model)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.985)
    batches = endless(lambda: shuffled(train, 64))

    def step(_: int) -> float:
        x, y = next(batches)
        other.load_state_dict(model.state_dict())
        total = 0.0
        for rank, net in enumerate((model, other)):
            net.train()
            net.zero_grad()
            part = slice(32 * rank, 32 * rank + 32)
            loss = F.cross_entropy(net(x[part]), y[part])
            loss.backward()
            total += float(loss.detach()) / 2
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            p.grad.add_(q.grad).div_(2)
        optimizer.step()
        schedule.step()
        return total

    return Training(
        [Subject(model, lambda: shuffled(train, 32), F.cross_entropy, optimizer)],
        step, 180, lambda: accuracy(model, test), 0.95,
    )  # fmt: skip
