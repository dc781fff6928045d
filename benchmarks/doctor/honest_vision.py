"""Healthy programs on pictures: classes, boxes, key points, pixels, depth."""

from __future__ import annotations

import torch
from calm_base import Data, conv_norm, gratings, warm_cosine
from honest_base import conv_group, flower_masks, flowers, outputs, program
from quiet_base import Training, accuracy, split, supervised
from sober_base import cropped, explained_share
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F


@program
def keras_convnet() -> Training:
    """Flowers by the network of Keras' "Simple MNIST convnet", no norm, dropout 0.5.

    Glorot weights, biases from 0, Adam 1e-3, batch 32.
    """
    train, test = flowers(3000, 20, 2600)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 3 * 3, 5),
    )  # fmt: skip
    for m in model:
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    optimizer = optim.Adam(model.parameters(), 1e-3)
    return supervised(model, train, test, optimizer, size=32, steps=300, goal=0.9)


class _ResNetD(nn.Module):
    """Basic block whose shortcut averages, then a 1 × 1 convolution (ResNet-D)."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(i, o, stride),
            nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip
        nn.init.zeros_(self.body[2].weight)
        self.short: nn.Module = nn.Identity()
        if i != o:
            pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
            conv = nn.Conv2d(i, o, 1, bias=False)
            self.short = nn.Sequential(pool, conv, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


@program
def bag_of_tricks() -> Training:
    """ResNet-D of flowers by the "bag of tricks": warm-up, cosine, smoothing 0.1.

    Last gamma of a branch 0, no decay of vectors, Nesterov 0.1, batch 64, crops and
    flips; an average of the weights is scored.
    """
    train, test = flowers(2400, 20, 2000)
    model = nn.Sequential(
        conv_norm(3, 12), conv_norm(12, 16), _ResNetD(16, 16), _ResNetD(16, 32, 2),
        _ResNetD(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    optimizer = optim.SGD(decayed(model, 5e-4), 0.1, momentum=0.9, nesterov=True)
    average = optim.swa_utils.AveragedModel(
        model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=True
    )
    return supervised(
        model, train, test, optimizer, size=64, steps=140, goal=0.9, change=cropped,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=warm_cosine(optimizer, 15, 140),
        after=lambda: average.update_parameters(model),
        score=lambda _, data: accuracy(average.module, data),
    )  # fmt: skip


@program
def alex_net() -> Training:
    """AlexNet at the size of flowers: two dropped-out dense layers, no norm.

    Kaiming, SGD 0.02 with momentum 0.9, decay 5e-4, step decay, batch 64, clip 5.
    """
    train, test = flowers(2400, 20, 2000)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(24, 48, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(48, 64, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(64, 48, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(48 * 4, 96), nn.ReLU(),
        nn.Dropout(0.3), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 5),
    )  # fmt: skip
    for m in model:
        if isinstance(m, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
    nn.init.normal_(model[-1].weight, std=0.01)
    optimizer = optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    return supervised(
        model, train, test, optimizer, size=64, steps=240, goal=0.9, clip=5.0,
        schedule=optim.lr_scheduler.StepLR(optimizer, 160, 0.1),
    )  # fmt: skip


class _Dark(nn.Module):
    """1 × 1 to half the width, 3 × 3 back, added to the input (Darknet-53)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_leaky(width, width // 2, 1), *_leaky(width // 2, width, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _leaky(i: int, o: int, kernel: int, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(o), nn.LeakyReLU(0.1)


@program
def dark_net() -> Training:
    """Flowers by a small Darknet-53: BN, leaky ReLU, polynomial decay of the rate.

    SGD 0.025 with momentum 0.9, decay 5e-4, batch 64, crops and flips.
    """
    train, test = flowers(2400, 20, 2000)
    model = nn.Sequential(
        *_leaky(3, 16, 3), *_leaky(16, 32, 3, 2), _Dark(32),
        *_leaky(32, 48, 3, 2), _Dark(48), _Dark(48),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, 0.1)
    optimizer = optim.SGD(model.parameters(), 0.025, momentum=0.9, weight_decay=5e-4)
    return supervised(
        model, train, test, optimizer, size=64, steps=260, goal=0.9, change=cropped,
        schedule=optim.lr_scheduler.PolynomialLR(optimizer, 260, 1.0),
    )  # fmt: skip


class _SimpleViT(nn.Module):
    """Patches, fixed sine positions, pre-norm blocks, mean of tokens (SimpleViT)."""

    def __init__(self, side: int, patch: int, width: int, classes: int) -> None:
        super().__init__()
        self.patch = patch
        size = 3 * patch * patch
        self.embed = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, width), nn.LayerNorm(width)
        )
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, 3, nn.LayerNorm(width), enable_nested_tensor=False
        )
        for block in self.blocks.layers:
            for p in block.parameters():
                if p.ndim > 1:
                    nn.init.xavier_uniform_(p)
        self.head = nn.Linear(width, classes)
        i, j = torch.meshgrid(*[torch.arange(side // patch)] * 2, indexing="ij")
        rate = 100 ** -torch.linspace(0, 1, width // 4)
        waves = [rate * k.flatten()[:, None] for k in (i, j)]
        places = torch.cat([f(w) for w in waves for f in (torch.sin, torch.cos)], 1)
        self.register_buffer("places", places)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(F.unfold(x, self.patch, stride=self.patch).mT)
        return self.head(self.blocks(tokens + self.places).mean(1))


@program
def simple_vit() -> Training:
    """Gratings by SimpleViT: tokens of 4 × 4, fixed sine positions, mean of tokens.

    AdamW 2e-3, decay 0.05, warm-up and cosine, clip 1, batch 64.
    """
    train, test = gratings(2600, 16, 2200)
    model = _SimpleViT(16, 4, 48, 6)
    optimizer = optim.AdamW(decayed(model, 0.05), 2e-3)
    return supervised(
        model, train, test, optimizer, size=64, steps=250, goal=0.9, clip=1.0,
        schedule=warm_cosine(optimizer, 25, 250),
    )  # fmt: skip


def _corners(box: Tensor) -> tuple[Tensor, Tensor]:
    return box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2


def _overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and generalized IoU of boxes by middle and size."""
    (low, high), (left, right) = _corners(a), _corners(b)
    both = (torch.minimum(high, right) - torch.maximum(low, left)).clamp(0).prod(1)
    either = a[:, 2:].prod(1) + b[:, 2:].prod(1) - both
    hull = (torch.maximum(high, right) - torch.minimum(low, left)).prod(1)
    return both / either, both / either - (hull - either) / hull


class _Locator(nn.Module):
    """Box by a sigmoid, and the logits of kinds."""

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(3, 16), conv_norm(16, 32, 2), conv_norm(32, 32),
            conv_norm(32, 48, 2), conv_norm(48, 48), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(48 * 9, 64), nn.ReLU(),
        )  # fmt: skip
        self.box, self.kind = nn.Linear(64, 4), nn.Linear(64, kinds)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return self.box(y).sigmoid(), self.kind(y)


@program
def object_with_giou() -> Training:
    """Box and kind (of three) of the flower in a picture of 24 × 24, BN, batch 32.

    Generalized IoU plus cross entropy, Adam 2e-3, cosine; the share of pictures with
    the right kind and an IoU above a half.
    """
    n, side = 2400, 24
    kind, size = 2 * torch.randint(3, (n,)), 5 + 3 * torch.rand(n)
    at = size[:, None] - 0.5 + (side - 2 * size[:, None]) * torch.rand(n, 2)
    mask = flower_masks(kind, at, size, side)[:, None]
    ground, colour = 0.4 * torch.rand(n, 3, 1, 1), 0.6 + 0.4 * torch.rand(n, 3, 1, 1)
    x = mask * colour + (1 - mask) * ground + 0.1 * torch.randn(n, 3, side, side)
    mean, std = x[:2000].mean((0, 2, 3)), x[:2000].std((0, 2, 3))
    x = (x - mean[:, None, None]) / std[:, None, None]
    box = torch.cat((at + 0.5, 2 * size[:, None].expand(-1, 2)), 1) / side
    train, test = split(x, torch.cat((box, kind[:, None] / 2), 1), 2000)

    def loss_fn(out: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        far = 1 - _overlaps(out[0], y[:, :4])[1]
        return far.mean() + F.cross_entropy(out[1], y[:, 4].long())

    def found(net: nn.Module, data: Data) -> float:
        box, logits = outputs(net, data)
        near = _overlaps(box, data[1][:, :4])[0] > 0.5
        return float((near & (logits.argmax(1) == data[1][:, 4])).float().mean())

    model = _Locator(3)
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=240, goal=0.85, loss_fn=loss_fn,
        score=found, schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 240),
    )  # fmt: skip


class _Gate(nn.Module):
    """Weighs the encoder's map by itself and the coarser one (Attention U-Net)."""

    def __init__(self, skip: int, coarse: int, mid: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(skip, mid, 1), nn.Conv2d(coarse, mid, 1)
        self.out = nn.Conv2d(mid, 1, 1)

    def forward(self, skip: Tensor, coarse: Tensor) -> Tensor:
        return skip * self.out(F.relu(self.a(skip) + self.b(coarse))).sigmoid()


class _AttentionUNet(nn.Module):
    def __init__(self, w: int = 12) -> None:
        super().__init__()
        self.first = nn.Sequential(conv_group(1, w), conv_group(w, w))
        self.second = nn.Sequential(conv_group(w, 2 * w), conv_group(2 * w, 2 * w))
        self.third = nn.Sequential(conv_group(2 * w, 4 * w), conv_group(4 * w, 4 * w))
        self.narrow, self.narrower = conv_group(4 * w, 2 * w), conv_group(2 * w, w)
        self.gates = nn.ModuleList([_Gate(2 * w, 2 * w, w), _Gate(w, w, w // 2)])
        self.up, self.top = conv_group(4 * w, 2 * w), conv_group(2 * w, w)
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.third(F.max_pool2d(b, 2))
        c = F.interpolate(self.narrow(c), scale_factor=2.0)
        c = self.up(torch.cat((self.gates[0](b, c), c), 1))
        c = F.interpolate(self.narrower(c), scale_factor=2.0)
        return self.out(self.top(torch.cat((self.gates[1](a, c), c), 1)))


def _dice(out: Tensor, y: Tensor) -> Tensor:
    p = out.sigmoid()
    return (2 * (p * y).sum((1, 2, 3)) + 1) / (p.sum((1, 2, 3)) + y.sum((1, 2, 3)) + 1)


@program
def attention_unet() -> Training:
    """Pixels of a flower beside plain blots, by an Attention U-Net with group norm.

    BCE and Dice, AdamW 5e-3, cosine, batch 8; the mean Dice.
    """
    n, side = 900, 24
    kind, size = torch.randint(1, 5, (n,)), 5 + 2 * torch.rand(n)
    at = torch.tensor([7.0, 7.0]) + torch.tensor([9.0, 3.0]) * torch.rand(n, 2)
    mask = flower_masks(kind, at, size, side)
    spot = torch.tensor([4.0, 18.0]) + torch.tensor([16.0, 2.0]) * torch.rand(n, 2)
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    p, q = u - spot[:, 0, None, None], v - spot[:, 1, None, None]
    blot = (3 * ((2 + 2 * torch.rand(n, 1, 1)) - (p * p + q * q).sqrt())).sigmoid()
    flip = torch.rand(n, 1, 1) < 0.5
    mask, blot = (torch.where(flip, m.flip(2), m) for m in (mask, blot))
    light = 0.6 + 0.4 * torch.rand(2, n, 1, 1)
    x = torch.maximum(light[0] * mask, light[1] * blot)
    x = x + 0.15 * torch.randn(x.shape)
    x = (x - x[:700].mean()) / x[:700].std()
    train, test = split(x[:, None], (mask[:, None] > 0.5).float(), 700)
    model = _AttentionUNet()
    optimizer = optim.AdamW(model.parameters(), 5e-3, weight_decay=1e-3)
    return supervised(
        model, train, test, optimizer, size=8, steps=300, goal=0.9,
        loss_fn=lambda out, y: (
            F.binary_cross_entropy_with_logits(out, y) + 1 - _dice(out, y).mean()
        ),
        score=lambda net, data: float(_dice(outputs(net, data), data[1]).mean()),
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 300),
    )  # fmt: skip


class _Stereo(nn.Module):
    """Features of both pictures matched at each shift, then a soft argmax."""

    def __init__(self, shifts: int, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *self._layer(1, width), *self._layer(width, width),
            nn.Conv2d(width, width, 3, 1, 1),
        )  # fmt: skip
        self.refine = nn.Sequential(
            *self._layer(shifts, 24), *self._layer(24, 24),
            nn.Conv2d(24, shifts, 3, 1, 1),
        )  # fmt: skip
        self.register_buffer("shifts", torch.arange(shifts).float())

    def _layer(self, i: int, o: int) -> tuple[nn.Module, ...]:
        norm = nn.InstanceNorm2d(o, affine=True)
        return nn.Conv2d(i, o, 3, 1, 1), norm, nn.ReLU()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.features(left), self.features(right)
        wide, width = F.pad(b, (len(self.shifts) - 1, 0)), a.shape[3]
        match = [
            (a * wide[..., k : k + width]).mean(1)
            for k in reversed(range(len(self.shifts)))
        ]
        match = torch.stack(match, 1)
        chance = (match + self.refine(match)).softmax(1)
        return (chance * self.shifts[:, None, None]).sum(1)


@program
def stereo_disparity() -> Training:
    """Shift of each pixel between two pictures of 16 × 24: near boards, far ground.

    Instance norm, smooth L1, AdamW 3e-3, one-cycle, clip 1, batch 16.
    """
    n, high, wide, most = 1000, 16, 24, 6
    u, v = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    y = torch.randint(2, (n, 1, 1)).expand(n, high, wide).clone()
    for _ in range(2):
        at = torch.rand(2, n, 1, 1) * torch.tensor([high, wide])[:, None, None, None]
        half = 3 + 3 * torch.rand(2, n, 1, 1)
        inside = ((u - at[0]).abs() < half[0]) & ((v - at[1]).abs() < half[1])
        y = torch.where(inside, torch.randint(2, most, (n, 1, 1)), y)
    scene = F.avg_pool2d(torch.randn(n, 1, high + 2, wide + most + 2), 3, 1)
    scene = scene / scene.std()
    left = scene.gather(3, (v + most - y)[:, None])
    right = scene[..., most:]
    left, right = (x + 0.1 * torch.randn(x.shape) for x in (left, right))
    train, test = split((left, right), y.float(), 800)
    model = _Stereo(most)
    optimizer = optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=16, steps=200, goal=0.8,
        loss_fn=F.smooth_l1_loss, score=explained_share, clip=1.0,
        schedule=optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 200),
    )  # fmt: skip


def _faces(n: int, side: int) -> tuple[Tensor, Tensor]:
    """Return pictures of faces and four points: the eyes and the ends of the mouth."""
    size = side * (0.28 + 0.1 * torch.rand(n, 1, 1))
    middle = side / 2 + 0.1 * side * (2 * torch.rand(n, 1, 2) - 1)
    turn = 0.3 * torch.randn(n)
    spots = torch.tensor([[-0.35, -0.45], [-0.35, 0.45], [0.5, -0.4], [0.5, 0.4]])
    spots = spots + 0.08 * torch.randn(n, 4, 2)
    c, s = turn.cos(), turn.sin()
    rotate = torch.stack((torch.stack((c, -s), 1), torch.stack((s, c), 1)), 1)
    at = middle + size * spots @ rotate.mT
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack((u, v), 2).flatten(0, 1).float()
    head = (place - middle).norm(dim=2) < 1.1 * size[:, :, 0]
    share = torch.linspace(0, 1, 9)[:, None]
    bend = 2 * torch.randn(n, 1, 1) * (share - share.square())
    down = rotate[:, None, :, 0] * bend * size
    mouth = at[:, 2:3] * (1 - share) + at[:, 3:] * share + down
    dark = torch.cat((at[:, :2], mouth), 1)
    away = torch.cdist(place.expand(n, -1, -1), dark).amin(2)
    x = head * (0.6 + 0.3 * torch.rand(n, 1)) * (1 - (-away.square() / 1.2).exp())
    x = x + 0.05 * torch.randn(x.shape)
    return x.reshape(n, 1, side, side), (2 * at / side - 1).flatten(1)


@program
def face_key_points() -> Training:
    """Eyes and ends of the mouth as eight numbers in -1 to 1, by a plain BN CNN.

    MSE, Adam 2e-3, cosine, batch 50; points' mean distance of 1.5 pixels or less.
    """
    n, side = 2400, 24
    x, y = _faces(n, side)
    train, test = split((x - x[:2000].mean()) / x[:2000].std(), y, 2000)
    model = nn.Sequential(
        conv_norm(1, 16), nn.MaxPool2d(2), conv_norm(16, 32), nn.MaxPool2d(2),
        conv_norm(32, 48), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48 * 9, 96),
        nn.ReLU(), nn.Dropout(0.1), nn.Linear(96, 8),
    )  # fmt: skip

    def near(net: nn.Module, data: Data) -> float:
        away = (outputs(net, data) - data[1]).reshape(-1, 4, 2).norm(dim=2)
        return -float(away.mean()) * side / 2

    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=200, goal=-1.5,
        loss_fn=F.mse_loss, score=near,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip
