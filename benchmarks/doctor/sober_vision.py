"""Healthy programs on pictures: classes, middles, pixels, points."""

from __future__ import annotations

import torch
from calm_base import Data, conv_norm, warm_cosine
from quiet_base import Training, split, supervised
from sober_base import cropped, figure_masks, figures, program
from still_base import decayed, scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Shortcut(nn.Module):
    """Basic block whose shortcut takes every second pixel and adds zero channels."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.stride, self.more = stride, o - i

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(short, (0, 0, 0, 0, 0, self.more)))


@program
def parameter_free_shortcuts() -> Training:
    """ResNet of figures as He et al. had it for CIFAR: shortcuts of type A.

    Flips and crops, Kaiming, SGD 0.05 with momentum, decay 1e-4, two drops, batch 64.
    """
    train, test = figures(2000, 16, 1600)
    model = nn.Sequential(
        conv_norm(3, 16), _Shortcut(16, 16, 1), _Shortcut(16, 32, 2),
        _Shortcut(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=64, steps=180, goal=0.9, change=cropped,
        schedule=optim.lr_scheduler.MultiStepLR(optimizer, [80, 130], 0.1),
    )  # fmt: skip


class _Branches(nn.Module):
    """Norms of a 3 × 3, of a 1 × 1 and of the input, added (RepVGG in training)."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.large = nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        )
        self.small = nn.Sequential(
            nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)
        )
        self.same = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        return F.relu(y if self.same is None else y + self.same(x))


@program
def re_parameterized() -> Training:
    """RepVGG of figures, three norms added in each layer, smoothing 0.1.

    SGD with momentum, no decay of vectors, warm-up and cosine, batch 64.
    """
    train, test = figures(2000, 16, 1600)
    model = nn.Sequential(
        _Branches(3, 16), _Branches(16, 16), _Branches(16, 32, 2), _Branches(32, 32),
        _Branches(32, 48, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip
    optimizer = optim.SGD(decayed(model, 1e-4), 0.1, momentum=0.9)
    return supervised(
        model, train, test, optimizer, size=64, steps=160, goal=0.9, change=cropped,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=warm_cosine(optimizer, 16, 160),
    )  # fmt: skip


class _Added(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@program
def conv_mixer() -> Training:
    """ConvMixer of figures: patches of 2 × 2, GELU then BN, filters of 5 × 5.

    Flips, crops and a square erased in half of them; AdamW with one-cycle, batch 64.
    """
    train, test = figures(2000, 16, 1600)
    width = 40

    def erased(batch: Data) -> Data:
        x, y = cropped(batch)
        corner = torch.randint(13, (len(x), 2, 1))
        rows, cols = ((torch.arange(16) - corner).clamp(-1, 4) % 5 < 4).unbind(1)
        hide = rows[:, None, :, None] & cols[:, None, None]
        some = torch.rand(len(x), 1, 1, 1) < 0.5
        return x.masked_fill(hide & some, 0.0), y

    def normed(conv: nn.Module) -> nn.Sequential:
        return nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(width))

    model = nn.Sequential(
        normed(nn.Conv2d(3, width, 2, 2)),
        *(
            nn.Sequential(
                _Added(normed(nn.Conv2d(width, width, 5, 1, 2, groups=width))),
                normed(nn.Conv2d(width, width, 1)),
            )
            for _ in range(3)
        ),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 0.01, weight_decay=0.01)
    return supervised(
        model, train, test, optimizer, size=64, steps=200, goal=0.85, change=erased,
        clip=1.0,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=201),
    )  # fmt: skip


class _Compact(nn.Module):
    """Convolutional tokens, pre-norm blocks, a learned mean of the tokens (CCT)."""

    def __init__(self, classes: int, width: int = 40) -> None:
        super().__init__()
        self.tokens = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.place = nn.Parameter(0.2 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.weigh = nn.Linear(width, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x).flatten(2).mT + self.place
        for block in self.blocks:
            y = block(y)
        y = self.norm(y)
        return self.head((self.weigh(y).softmax(1) * y).sum(1))


@program
def compact_transformer() -> Training:
    """Compact convolutional transformer of digits, dropout 0.1, smoothing 0.1.

    AdamW, decay 0.03 of matrices, warm-up and cosine, batch 100.
    """
    train, test = scaled_digits()
    model = _Compact(10)
    optimizer = optim.AdamW(decayed(model, 0.03), 3e-3)
    return supervised(
        model, train, test, optimizer, size=100, steps=160, goal=0.92,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=warm_cosine(optimizer, 20, 160),
    )  # fmt: skip


class _Centers(nn.Module):
    """A heat map of middles for each kind, and the sizes there (CenterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(1, 16), conv_norm(16, 32, 2), conv_norm(32, 32), conv_norm(32, 32)
        )
        self.heat = nn.Sequential(
            nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 2, 1)
        )
        self.size = nn.Sequential(
            nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 1, 1)
        )
        nn.init.constant_(self.heat[-1].bias, -2.19)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat((self.heat(y), self.size(y)), 1)


@program
def center_net() -> Training:
    """Two figures a picture as middles on a map of half the scale, with their sizes.

    Focal loss of the heat, L1 of the size, BN, Adam, step decay, batch 32; the F1
    of middles of the right kind, within a cell.
    """
    n, side = 900, 24
    y = torch.zeros(n, 4, side // 2, side // 2)
    x = 0.15 * torch.randn(n, 1, side, side)
    cells = torch.arange(side // 2)
    for k in range(2):
        kind = torch.randint(2, (n,)) * 3
        size = 2.5 + 1.5 * torch.rand(n)
        at = torch.rand(n, 2) * torch.tensor([4.0, 14.0]) + torch.tensor(
            [5.0 + 10 * k, 5.0]
        )
        x[:, 0] += figure_masks(kind, at, size, side) * (
            0.7 + 0.6 * torch.rand(n, 1, 1)
        )
        i, j = (at / 2).round().long().unbind(1)
        away = (cells[:, None] - i[:, None, None]).square()
        away = away + (cells - j[:, None, None]).square()
        heat, each = (-away / 2).exp(), torch.arange(n)
        y[each, kind // 3] = torch.maximum(y[each, kind // 3], heat)
        y[each, 2, i, j], y[each, 3, i, j] = size / 4, 1.0
    train, test = split((x - x[:700].mean()) / x[:700].std(), y, 700)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        p, goal = out[:, :2].sigmoid().clamp(1e-4, 1 - 1e-4), y[:, :2]
        hit = (1 - p).square() * p.log() * (goal == 1)
        miss = (1 - goal) ** 4 * p.square() * (1 - p).log() * (goal < 1)
        apart = (out[:, 2] - y[:, 2]).abs() * y[:, 3]
        return (apart.sum() - hit.sum() - miss.sum()) / y[:, 3].sum()

    def found(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            heat = net.eval()(data[0])[:, :2].sigmoid()
        peak = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > 0.3)
        near = F.max_pool2d(peak.float(), 3, 1, 1) > 0
        real = data[1][:, :2] == 1
        said = F.max_pool2d(real.float(), 3, 1, 1) > 0
        recall = float(near[real].float().mean())
        precision = float(said[peak].float().mean()) if peak.any() else 0.0
        return 2 * recall * precision / max(recall + precision, 1e-9)

    model = _Centers()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=160, goal=0.85, loss_fn=loss_fn,
        score=found, schedule=optim.lr_scheduler.StepLR(optimizer, 110, 0.1),
    )  # fmt: skip


class _Unpooled(nn.Module):
    """Encoder and decoder joined by the places of the maxima (SegNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv_norm(3, 16), conv_norm(16, 16))
        self.down2 = nn.Sequential(conv_norm(16, 32), conv_norm(32, 32))
        self.up2 = nn.Sequential(conv_norm(32, 32), conv_norm(32, 16))
        self.up1 = nn.Sequential(conv_norm(16, 16), nn.Conv2d(16, 4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, first = F.max_pool2d(self.down1(x), 2, return_indices=True)
        x, second = F.max_pool2d(self.down2(x), 2, return_indices=True)
        x = self.up2(F.max_unpool2d(x, second, 2))
        return self.up1(F.max_unpool2d(x, first, 2))


@program
def seg_net() -> Training:
    """Ground, discs, triangles and crosses in colour by SegNet, ground weighed by 0.3.

    BN, SGD 0.05 with momentum 0.9 and cosine, decay 5e-4, batch 16; mean IoU.
    """
    n, side = 560, 24
    y = torch.zeros(n, side, side, dtype=torch.long)
    x = (0.4 * torch.rand(n, 3, 1, 1)).expand(-1, -1, side, side)
    for _ in range(2):
        kind = torch.randint(3, (n,))
        at = 5 + 13 * torch.rand(n, 2)
        mask = figure_masks(
            torch.tensor([0, 2, 3])[kind], at, 4 + 2 * torch.rand(n), side
        )
        y = torch.where(mask, kind[:, None, None] + 1, y)
        x = torch.where(mask[:, None], 0.5 + 0.5 * torch.rand(n, 3, 1, 1), x)
    x = x + 0.05 * torch.randn_like(x)
    mean, std = x[:440].mean((0, 2, 3)), x[:440].std((0, 2, 3))
    train, test = split((x - mean[:, None, None]) / std[:, None, None], y, 440)

    def overlap(net: nn.Module, data: Data) -> float:
        with torch.no_grad():
            told = net.eval()(data[0]).argmax(1)
        both = [((told == k) & (data[1] == k)).sum() for k in range(4)]
        any_ = [((told == k) | (data[1] == k)).sum() for k in range(4)]
        return float(torch.stack(both).div(torch.stack(any_)).mean())

    model = _Unpooled()
    optimizer = optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    return supervised(
        model, train, test, optimizer, size=16, steps=200, goal=0.75, score=overlap,
        loss_fn=nn.CrossEntropyLoss(torch.tensor([0.3, 1.0, 1.0, 1.0])),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


@program
def effective_numbers() -> Training:
    """Long tail of figures, 600 to 100 a class, weighed by the effective number.

    Balanced from the first step (beta 0.99), BN, AdamW, cosine; balanced test.
    """
    (x, y), test = figures(4000, 16, 3600)
    sizes = [600, 380, 240, 160, 100]
    keep = torch.cat([(y == k).nonzero()[:m, 0] for k, m in enumerate(sizes)])
    weight = (1 - 0.99) / (1 - 0.99 ** torch.tensor(sizes))
    weight = weight / weight.sum() * 5
    model = nn.Sequential(
        conv_norm(3, 24), conv_norm(24, 32, 2), conv_norm(32, 32), conv_norm(32, 64, 2),
        conv_norm(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    optimizer = optim.AdamW(model.parameters(), 4e-3, weight_decay=0.02)
    return supervised(
        model, (x[keep], y[keep]), test, optimizer, size=64, steps=180, goal=0.9,
        change=cropped, loss_fn=nn.CrossEntropyLoss(weight),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 180),
    )  # fmt: skip


class _Residual(nn.Module):
    """Two convolutions whose last norm starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(width, width), nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )  # fmt: skip
        nn.init.zeros_(self.body[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


@program
def symmetric_cross_entropy() -> Training:
    """Digits, one label in five wrong, cross entropy both ways (0.3 and 1, log 0 = -4).

    Last norm of a branch starts at 0, SGD with Nesterov, warm-up, cosine, batch 128.
    """
    (x, y), test = scaled_digits()
    wrong = torch.rand(len(y)) < 0.2
    y = torch.where(wrong, (y + torch.randint(1, 10, (len(y),))) % 10, y)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        back = 4 * (1 - out.softmax(1).gather(1, y[:, None])).mean()
        return 0.3 * F.cross_entropy(out, y) + back

    model = nn.Sequential(
        conv_norm(1, 16), _Residual(16), conv_norm(16, 32, 2), _Residual(32),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = optim.SGD(decayed(model, 1e-4), 0.05, momentum=0.9, nesterov=True)
    return supervised(
        model, (x, y), test, optimizer, size=128, steps=160, goal=0.9, loss_fn=loss_fn,
        schedule=warm_cosine(optimizer, 16, 160),
    )  # fmt: skip


class _Edges(nn.Module):
    """Maximum over near points of a map of a point and its difference to them."""

    def __init__(self, i: int, o: int, near: int = 8) -> None:
        super().__init__()
        self.map = nn.Sequential(
            nn.Conv2d(2 * i, o, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)
        )
        self.near = near

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            index = torch.cdist(x.mT, x.mT).topk(self.near, 2, False).indices
        n, _, points = x.shape
        other = x.mT[torch.arange(n)[:, None, None], index].permute(0, 3, 1, 2)
        own = x[..., None].expand(-1, -1, points, self.near)
        return self.map(torch.cat((own, other - own), 1)).amax(3)


class _Dynamic(nn.Module):
    """Two edge convolutions, each on its own graph; maximum and mean (DGCNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.edges1, self.edges2 = _Edges(3, 24), _Edges(24, 40)
        self.head = nn.Sequential(
            nn.Linear(128, 32, bias=False), nn.BatchNorm1d(32), nn.LeakyReLU(0.2),
            nn.Dropout(0.3), nn.Linear(32, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a = self.edges1(x)
        y = torch.cat((a, self.edges2(a)), 1)
        return self.head(torch.cat((y.amax(2), y.mean(2)), 1))


def _clouds(n: int, points: int) -> Data:
    """Return points on spheres, cubes, cylinders and tori, turned about an axis."""
    y = torch.randint(4, (n,))
    sphere = F.normalize(torch.randn(n, points, 3), dim=2)
    cube = 2 * torch.rand(n, points, 3) - 1
    cube = cube / cube.abs().amax(2, keepdim=True)
    angle, tall = 2 * torch.pi * torch.rand(2, n, points, 1)
    round_ = torch.cat((angle.cos(), angle.sin()), 2)
    cylinder = torch.cat((0.6 * round_, tall / torch.pi - 1), 2)
    torus = torch.cat(((1 + 0.4 * tall.cos()) * round_, 0.4 * tall.sin()), 2)
    x = torch.stack((sphere, cube, cylinder, torus))[y, torch.arange(n)]
    way = 2 * torch.pi * torch.rand(n)
    turn = torch.eye(3).repeat(n, 1, 1)
    turn[:, 0, 0] = turn[:, 1, 1] = way.cos()
    turn[:, 0, 1], turn[:, 1, 0] = way.sin(), -way.sin()
    x = (x + 0.02 * torch.randn_like(x)) @ turn
    x = x - x.mean(1, keepdim=True)
    return (x / x.norm(dim=2).amax(1)[:, None, None]).mT.contiguous(), y


@program
def edge_convolutions() -> Training:
    """Surfaces of four kinds from 48 points each, turned, by DGCNN.

    BN, leaky ReLU, dropout 0.3 before the last layer, Adam with cosine,
    smoothing 0.1, batch 32; points scaled and shifted.
    """
    train, test = split(*_clouds(1600, 48), 1300)

    def moved(batch: Data) -> Data:
        x, y = batch
        scale = 0.8 + 0.4 * torch.rand(len(x), 1, 1)
        return x * scale + 0.1 * (2 * torch.rand(len(x), 3, 1) - 1), y

    model = _Dynamic()
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=160, goal=0.85, change=moved,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 160, 1e-5),
    )  # fmt: skip
