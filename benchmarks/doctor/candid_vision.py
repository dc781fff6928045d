"""Healthy programs on pictures: classes, pixels, captions, fine-tuning."""

from __future__ import annotations

import itertools

import torch
from calm_base import Data, conv_norm, warm_cosine
from candid_base import outputs, pets, program, standard, strokes
from quiet_base import Training, shuffled, split, supervised
from sober_base import cropped, figure_masks
from still_base import decayed
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR


class _PreActivation(nn.Module):
    """BN, ReLU, convolution, twice, added to the input (He et al. 2016b)."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.norm, self.after = nn.BatchNorm2d(i), nn.BatchNorm2d(o)
        self.first = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        same = i == o and stride == 1
        self.short = None if same else nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(x))
        short = x if self.short is None else self.short(y)
        return short + self.second(F.relu(self.after(self.first(y))))


@program
def strokes_resnet_v2() -> Training:
    """Five curves by a ResNet with pre-activation; Kaiming, crops and flips.

    SGD 0.05 with Nesterov's momentum, decay 5e-4, cosine, batch 64.
    """
    train, test = strokes(3000, 20, 2500)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False), _PreActivation(16, 16),
        _PreActivation(16, 32, 2), _PreActivation(32, 64, 2), nn.BatchNorm2d(64),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    optimizer = optim.SGD(
        model.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return supervised(
        model, train, test, optimizer, size=64, steps=160, goal=0.9, change=cropped,
        schedule=CosineAnnealingLR(optimizer, 160),
    )  # fmt: skip


@program
def cats_and_dogs() -> Training:
    """Heads with standing or hanging ears by a CNN from scratch, as in many a tutorial.

    Convolution, BN, ReLU, max pool, dropout 0.5, one logit, BCE, flips; Adam 1e-3,
    batch 32.
    """
    (x, y), (a, b) = pets(2000, 24, 1600)

    def flipped(batch: Data) -> Data:
        x, y = batch
        return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x), y

    model = nn.Sequential(
        conv_norm(3, 16), nn.MaxPool2d(2), conv_norm(16, 32), nn.MaxPool2d(2),
        conv_norm(32, 64), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 9, 64),
        nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 1), nn.Flatten(0),
    )  # fmt: skip
    optimizer = optim.Adam(model.parameters(), 1e-3)
    return supervised(
        model, (x, y.float()), (a, b.float()), optimizer, size=32, steps=250, goal=0.93,
        loss_fn=F.binary_cross_entropy_with_logits, change=flipped,
        score=lambda net, data: float(
            ((outputs(net, data) > 0) == (data[1] > 0.5)).float().mean()
        ),
    )  # fmt: skip


class _Attended(nn.Module):
    """Residual block weighed by channel, then by place (Woo et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(width, width), nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )  # fmt: skip
        self.channel = nn.Sequential(
            nn.Linear(width, width // 4), nn.ReLU(), nn.Linear(width // 4, width)
        )
        self.place = nn.Conv2d(2, 1, 5, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        each = self.channel(y.mean((2, 3))) + self.channel(y.amax((2, 3)))
        y = y * each.sigmoid()[:, :, None, None]
        both = torch.cat((y.mean(1, keepdim=True), y.amax(1, keepdim=True)), 1)
        return F.relu(x + y * self.place(both).sigmoid())


@program
def block_attention() -> Training:
    """Curves by a small CBAM-ResNet with BN, smoothing 0.1, AdamW 1e-3.

    Warm-up and cosine, batch 50.
    """
    train, test = strokes(2800, 20, 2400)
    model = nn.Sequential(
        conv_norm(3, 16), conv_norm(16, 32, 2), _Attended(32), conv_norm(32, 48, 2),
        _Attended(48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip
    optimizer = optim.AdamW(decayed(model, 0.01), 1e-3)
    return supervised(
        model, train, test, optimizer, size=50, steps=220, goal=0.9,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1),
        schedule=warm_cosine(optimizer, 20, 220),
    )  # fmt: skip


class _Regular(nn.Module):
    """RegNetX's block: 1 × 1, grouped 3 × 3, 1 × 1, each with BN."""

    def __init__(self, i: int, o: int, stride: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_norm(i, o, 1, 1),
            nn.Conv2d(o, o, 3, stride, 1, groups=groups, bias=False),
            nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, o, 1, bias=False),
            nn.BatchNorm2d(o),
        )  # fmt: skip
        self.short: nn.Module = nn.Identity()
        if i != o or stride > 1:
            conv = nn.Conv2d(i, o, 1, stride, bias=False)
            self.short = nn.Sequential(conv, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.body(x))


@program
def reg_net_one_cycle() -> Training:
    """Curves by a small RegNetX, one-cycle of SGD to 0.2, momentum cycled, batch 100.

    Decay 1e-4, crops and flips.
    """
    train, test = strokes(3000, 20, 2500)
    model = nn.Sequential(
        conv_norm(3, 16), _Regular(16, 24, 2, 3), _Regular(24, 24, 1, 3),
        _Regular(24, 56, 2, 7), _Regular(56, 56, 1, 7), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(56, 5),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), 0.2, momentum=0.9, weight_decay=1e-4)
    return supervised(
        model, train, test, optimizer, size=100, steps=120, goal=0.9, change=cropped,
        schedule=OneCycleLR(optimizer, 0.2, 120),
    )  # fmt: skip


class _PoolBlock(nn.Module):
    """MetaFormer block whose mixer is a mean of 3 × 3; layer scale (Yu et al. 2022)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.mlp = nn.Sequential(
            nn.Conv2d(width, 3 * width, 1), nn.GELU(), nn.Conv2d(3 * width, width, 1)
        )
        self.scales = nn.Parameter(torch.full((2, width, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.scales[0] * (self.pool(y) - y)
        return x + self.scales[1] * self.mlp(self.second(x))


@program
def pool_former() -> Training:
    """Curves by a PoolFormer of two stages: group norm of one group, layer scale.

    AdamW 4e-3, decay 0.05, warm-up and cosine, clip 1, smoothing 0.1, batch 48.
    """
    train, test = strokes(3000, 20, 2500)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, 2, 1), _PoolBlock(24), nn.Conv2d(24, 64, 3, 2, 1),
        _PoolBlock(64), _PoolBlock(64),
        nn.GroupNorm(1, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip
    optimizer = optim.AdamW(decayed(model, 0.05), 4e-3)
    return supervised(
        model, train, test, optimizer, size=48, steps=250, goal=0.75, change=cropped,
        loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1), clip=1.0,
        schedule=warm_cosine(optimizer, 25, 250),
    )  # fmt: skip


@program
def layer_wise_rates() -> Training:
    """Tune a net of curves on 400 heads; lower layers at lower rates, as in ULMFiT.

    BN in train mode, AdamW 3e-4 to 3e-3 by one-cycle, dropout 0.2, flips, batch 32.
    """
    known, _ = strokes(2000, 24, 2000)
    body = nn.Sequential(
        conv_norm(3, 16), nn.MaxPool2d(2), conv_norm(16, 32), nn.MaxPool2d(2),
        conv_norm(32, 64), conv_norm(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    model = nn.Sequential(body, nn.Linear(64, 5))
    before = optim.Adam(model.parameters(), 3e-3)
    for x, y in itertools.chain(*(shuffled(known, 50) for _ in range(3))):
        before.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before.step()
    before.zero_grad()
    model[1] = nn.Sequential(nn.Dropout(0.2), nn.Linear(64, 2))
    train, test = pets(900, 24, 400)
    groups = [[body[0], body[2]], [body[4], body[5]], [model[1]]]
    rates = [3e-4, 1e-3, 3e-3]
    optimizer = optim.AdamW([
        {"params": [p for m in group for p in m.parameters()], "lr": rate}
        for group, rate in zip(groups, rates, strict=True)
    ], weight_decay=0.01)  # fmt: skip
    return supervised(
        model, train, test, optimizer, size=32, steps=120, goal=0.9,
        change=lambda batch: cropped(batch, 1),
        schedule=OneCycleLR(optimizer, rates, 120),
    )  # fmt: skip


class _ResidualUNet(nn.Module):
    """U-Net of residual blocks with BN (Zhang et al. 2018)."""

    def __init__(self, w: int = 12) -> None:
        super().__init__()
        self.stem = conv_norm(3, w)
        self.down = nn.ModuleList((
            _Regular(w, w, 1, 1), _Regular(w, 2 * w, 2, 1), _Regular(2 * w, 4 * w, 2, 1)
        ))  # fmt: skip
        self.up = nn.ModuleList(
            (_Regular(6 * w, 2 * w, 1, 1), _Regular(3 * w, w, 1, 1))
        )
        self.out = nn.Conv2d(w, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down[0](self.stem(x))
        b = self.down[1](a)
        y = F.interpolate(self.down[2](b), scale_factor=2.0, mode="bilinear")
        y = F.interpolate(
            self.up[0](torch.cat((y, b), 1)), scale_factor=2.0, mode="bilinear"
        )
        return self.out(self.up[1](torch.cat((y, a), 1)))[:, 0]


@program
def roads_residual_unet() -> Training:
    """Pixels of winding roads between fields, by a residual U-Net with BN.

    BCE with the roads weighed by 2, Adam 2e-3, cosine, batch 16; IoU.
    """
    n, side = 800, 24
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    roads = torch.zeros(n, side, side, dtype=torch.bool)
    for axis, across in ((u, v), (v, u)):
        at, wave = side * torch.rand(n, 1, 1), 0.2 + 0.2 * torch.rand(n, 1, 1)
        bend = (wave * across + 6.3 * torch.rand(n, 1, 1)).sin()
        roads |= (axis - at - 2.5 * bend - 0.3 * (across - side / 2)).abs() < 1.3
    fields = torch.rand(n, 3, 4, 4).repeat_interleave(6, 2).repeat_interleave(6, 3)
    grey = 0.45 + 0.15 * torch.rand(n, 1, 1, 1)
    x = torch.where(roads[:, None], grey, fields) + 0.05 * torch.randn(n, 3, side, side)
    train, test = split(standard(x, 640), roads.float(), 640)
    weight = torch.tensor(2.0)

    def overlap(net: nn.Module, data: Data) -> float:
        found, true = outputs(net, data) > 0, data[1] > 0.5
        return float((found & true).sum() / (found | true).sum())

    model = _ResidualUNet()
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=16, steps=200, goal=0.8, score=overlap,
        loss_fn=lambda out, y: F.binary_cross_entropy_with_logits(
            out, y, pos_weight=weight
        ),
        schedule=CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Volumes(nn.Module):
    """Residual encoder and decoder with instance norm and leaky ReLU (V-Net)."""

    def __init__(self, w: int = 12) -> None:
        super().__init__()
        self.first, self.second = self._layer(1, w), self._layer(w, w)
        self.down = self._layer(w, 2 * w, 2)
        self.deep = self._layer(2 * w, 2 * w)
        self.up = nn.ConvTranspose2d(2 * w, w, 2, 2)
        self.last, self.out = self._layer(2 * w, w), nn.Conv2d(w, 3, 1)

    def _layer(self, i: int, o: int, stride: int = 1) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(i, o, 3, stride, 1), nn.InstanceNorm2d(o, affine=True),
            nn.LeakyReLU(0.01),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        a = a + self.second(a)
        b = self.down(a)
        y = self.up(b + self.deep(b))
        return self.out(self.last(torch.cat((a, y), 1)))


def _class_dice(out: Tensor, y: Tensor) -> Tensor:
    """Return the soft Dice of organ and lesion over a batch."""
    p, true = out.softmax(1), F.one_hot(y, 3).permute(0, 3, 1, 2)
    both, each = (p * true).sum((0, 2, 3)), (p + true).sum((0, 2, 3))
    return (2 * both[1:] + 1) / (each[1:] + 1)


@program
def organ_and_lesion() -> Training:
    """Pixels of an organ and a lesion in it, by a V-Net with instance norm, batch 4.

    Cross entropy plus Dice, Adam 2e-3, polynomial decay; the mean Dice.
    """
    n, side = 800, 24
    u, v = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    at = side / 2 + 2 * torch.randn(2, n, 1, 1)
    long, wide = 6 + 2 * torch.rand(2, n, 1, 1)
    p, q = (u - at[0]) / long, (v - at[1]) / wide
    organ = p.square() + q.square() < 1
    there = 0.5 * (2 * torch.rand(2, n, 1, 1) - 1)
    near = (p - there[0]).square() + (q - there[1]).square()
    lesion = organ & (near < 0.06 + 0.1 * torch.rand(n, 1, 1))
    y = organ.long() + lesion
    light = torch.tensor([0.2, 0.8, 0.55])[y] + 0.1 * torch.randn(n, 1, 1)
    x = F.avg_pool2d(light[:, None], 3, 1, 1) + 0.06 * torch.randn(n, 1, side, side)
    train, test = split(standard(x, 640), y, 640)

    def dice(net: nn.Module, data: Data) -> float:
        sure = 50.0 * F.one_hot(outputs(net, data).argmax(1), 3).permute(0, 3, 1, 2)
        return float(_class_dice(sure, data[1]).mean())

    model = _Volumes()
    optimizer = optim.Adam(model.parameters(), 2e-3)
    return supervised(
        model, train, test, optimizer, size=4, steps=300, goal=0.8,
        loss_fn=lambda out, y: F.cross_entropy(out, y) + 1 - _class_dice(out, y).mean(),
        score=dice,
        schedule=optim.lr_scheduler.PolynomialLR(optimizer, 300, 0.9),
    )  # fmt: skip


class _Captions(nn.Module):
    """A CNN gives the first state of an LSTM, which tells the next word."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.see = nn.Sequential(
            conv_norm(3, 16), conv_norm(16, 32, 2), conv_norm(32, 48, 2),
            nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.start = nn.Linear(48 * 9, 2 * 64)
        self.embed = nn.Embedding(words, 32)
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(64, words)

    def forward(self, picture: Tensor, words: Tensor) -> Tensor:
        first = self.start(self.see(picture)).tanh()[None]
        state = tuple(s.contiguous() for s in first.chunk(2, 2))
        return self.head(self.drop(self.lstm(self.embed(words), state)[0]))


@program
def captions() -> Training:
    """Size, colour, figure and side of a picture in words, by "Show and Tell".

    BN in the CNN, teacher forcing, Adam 3e-3, clip 5, batch 32; the accuracy of words.
    """
    n, side = 2200, 24
    big, colour, kind, right = (torch.randint(k, (n,)) for k in (2, 3, 5, 2))
    size = 3 + 2.5 * big + 0.5 * torch.rand(n)
    down = 6.5 + (side - 14) * torch.rand(n)
    at = torch.stack((down, 6.5 + 10.5 * right + torch.rand(n) - 0.5), 1)
    mask = figure_masks(kind, at, size, side)[:, None]
    hue = 0.25 * torch.rand(n, 3) + 0.65 * F.one_hot(colour, 3)
    ground = 0.3 * torch.rand(n, 1, 1, 1)
    x = torch.where(mask, hue[:, :, None, None], ground)
    x = standard(x + 0.06 * torch.randn(n, 3, side, side), 1900)
    said = torch.stack((big + 1, colour + 3, kind + 6, right + 11), 1)
    told = F.pad(said[:, :-1], (1, 0))
    train, test = split((x, told), said, 1900)
    model = _Captions(13)
    optimizer = optim.Adam(model.parameters(), 3e-3)
    return supervised(
        model, train, test, optimizer, size=32, steps=300, goal=0.85, clip=5.0,
        loss_fn=lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
        score=lambda net, data: float(
            (outputs(net, data).argmax(2) == data[1]).float().mean()
        ),
    )  # fmt: skip
