"""Healthy programs on small pictures: convolutions, norms and gates in forward."""

from __future__ import annotations

import torch
from calm_base import Data, gratings, neighbours, update
from plain_base import program
from quiet_base import Subject, Training, digits, split, supervised
from still_base import scaled_digits
from torch import Tensor, nn, optim
from torch.nn import functional as F


class _Excited(nn.Module):
    """Residual block whose channels are weighed by squeeze and excitation."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)
        self.fc1, self.fc2 = nn.Linear(o, o // 4), nn.Linear(o // 4, o)
        self.short = nn.Conv2d(i, o, 1, stride, bias=False)
        self.bn3 = nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3))))))
        return F.relu(self.bn3(self.short(x)) + y * gate[:, :, None, None])


class _ExcitedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.block1, self.block2 = _Excited(16, 24, 2), _Excited(24, 48, 2)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.fc(self.block2(self.block1(x)).mean((2, 3)))


@program
def squeeze_excite() -> Training:
    """SE-ResNet of digits, BN, SGD with Nesterov and cosine, decay 5e-4, batch 48.

    Held out: 99 %.
    """
    train, test = scaled_digits()
    model = _ExcitedNet()
    optimizer = optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    return supervised(
        model, train, test, optimizer, size=48, steps=200, goal=0.95,
        schedule=optim.lr_scheduler.CosineAnnealingLR(optimizer, 200),
    )  # fmt: skip


class _Double(nn.Module):
    """Two convolutions, each with batch norm and ReLU."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(o), nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class _UNet(nn.Module):
    """U-Net of two levels, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = (
            _Double(1, 8),
            _Double(8, 16),
            _Double(16, 32),
        )
        self.raise2, self.up2 = nn.ConvTranspose2d(32, 16, 2, 2), _Double(32, 16)
        self.raise1, self.up1 = nn.ConvTranspose2d(16, 8, 2, 2), _Double(16, 8)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.bottom(F.max_pool2d(b, 2))
        y = self.up2(torch.cat((self.raise2(y), b), 1))
        return self.out(self.up1(torch.cat((self.raise1(y), a), 1)))


def _dice(probability: Tensor, mask: Tensor) -> Tensor:
    both = (probability * mask).sum((1, 2, 3))
    return (2 * both + 1) / (probability.sum((1, 2, 3)) + mask.sum((1, 2, 3)) + 1)


@program
def unet_rings() -> Training:
    """U-Net marks rings but not discs, in noise; BCE and Dice, BN, Adam, batch 16.

    Dice of the held-out masks: 0.94.
    """
    n, side = 700, 24
    grid = torch.arange(float(side))

    def shape() -> Tensor:
        centre, radius = 5 + 14 * torch.rand(n, 2), 3.5 + 1.5 * torch.rand(n, 1, 1)
        away = (grid[:, None] - centre[:, 0, None, None]) ** 2
        away = (away + (grid - centre[:, 1, None, None]) ** 2).sqrt()
        return away / radius

    ring, disc = shape(), shape()
    mask = ((ring < 1) & (ring > 0.55)).float()[:, None]
    x = torch.maximum(mask, 0.9 * (disc < 0.9).float()[:, None])
    x = x + 0.3 * torch.randn(n, 1, side, side)
    x = (x - x[:560].mean()) / x[:560].std()
    train, test = split(x, mask, 560)

    def loss_fn(out: Tensor, mask: Tensor) -> Tensor:
        dice = 1 - _dice(torch.sigmoid(out), mask).mean()
        return F.binary_cross_entropy_with_logits(out, mask) + dice

    def score(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            return float(_dice((net(data[0]) > 0).float(), data[1]).mean())

    model = _UNet()
    return supervised(
        model, train, test, optim.Adam(model.parameters(), 4e-3), size=16, steps=170,
        goal=0.8, loss_fn=loss_fn, score=score,
    )  # fmt: skip


class _Embedder(nn.Module):
    """Two convolutions with batch norm, a linear map to the unit sphere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(24, 48, 3, 2, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(24), nn.BatchNorm2d(48)
        self.fc = nn.Linear(48 * 16, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.normalize(self.fc(x.flatten(1)), dim=1)


@program
def batch_hard_triplets() -> Training:
    """Hardest triplets within 10 classes by 6 digits, soft margin, BN, Adam.

    Five neighbours on the sphere: 99 %.
    """
    (x, y), _ = digits()
    by_class = [(y == c).nonzero()[:, 0] for c in range(10)]
    model = _Embedder()
    optimizer = optim.Adam(model.parameters(), 1e-3)

    def batch() -> Data:
        drawn = torch.cat([of[torch.randperm(len(of))[:6]] for of in by_class])
        return x[drawn], y[drawn]

    def loss_fn(z: Tensor, label: Tensor) -> Tensor:
        away = (2 - 2 * z @ z.T).clamp(min=1e-6).sqrt()
        is_same = label[:, None] == label
        far = away.masked_fill(~is_same, 0).amax(1)
        near = away.masked_fill(is_same, 9).amin(1)
        return F.softplus(5 * (far - near)).mean()

    def step(_: int) -> float:
        model.train()
        image, label = batch()
        return update(optimizer, loss_fn(model(image), label))

    return Training(
        [Subject(model, lambda: [batch() for _ in range(20)], loss_fn, optimizer)],
        step, 150, lambda: neighbours(model), 0.95,
    )  # fmt: skip


class _Heads(nn.Module):
    """A shared body and heads for the digit, its parity and its ink."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 3, 1, 1)
        self.conv2 = nn.Conv2d(20, 40, 3, 1, 1)
        self.gn1, self.gn2 = nn.GroupNorm(4, 20), nn.GroupNorm(8, 40)
        self.fc = nn.Linear(40 * 4, 64)
        self.digit, self.odd = nn.Linear(64, 10), nn.Linear(64, 1)
        self.ink = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.silu(self.gn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.silu(self.gn2(self.conv2(x))), 2)
        x = F.silu(self.fc(x.flatten(1)))
        return self.digit(x), self.odd(x)[:, 0], self.ink(x)[:, 0]


@program
def three_heads() -> Training:
    """Digit, parity and standardized ink of a digit, group norm, AdamW, batch 56.

    Two micro-batches of 28 to a step; mean of two accuracies and R²: 0.97.
    """
    (x, y), (a, b) = scaled_digits()
    ink, other = x.mean((1, 2, 3)), a.mean((1, 2, 3))
    mean, std = ink.mean(), ink.std()
    targets = torch.stack((y.float(), (ink - mean) / std), 1)
    held_out = torch.stack((b.float(), (other - mean) / std), 1)

    def loss_fn(out: tuple[Tensor, Tensor, Tensor], t: Tensor) -> Tensor:
        digit, odd, ink = out
        loss = F.cross_entropy(digit, t[:, 0].long()) + F.mse_loss(ink, t[:, 1])
        return loss + F.binary_cross_entropy_with_logits(odd, t[:, 0] % 2)

    def score(net: nn.Module, data: Data) -> float:
        net.eval()
        with torch.no_grad():
            digit, odd, ink = net(data[0])
        t = data[1]
        right = (digit.argmax(1) == t[:, 0]).float().mean()
        even = ((odd > 0) == (t[:, 0] % 2 == 1)).float().mean()
        kept = 1 - (ink - t[:, 1]).square().mean() / t[:, 1].var()
        return float(right + even + kept) / 3

    model = _Heads()
    return supervised(
        model, (x, targets), (a, held_out),
        optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2), size=28, steps=150,
        accumulate=2, goal=0.93, loss_fn=loss_fn, score=score,
    )  # fmt: skip


class _Example(nn.Module):
    """The MNIST example of PyTorch, for 8 × 8 pixels: no norm, two dropouts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 24, 3, 1, 1), nn.Conv2d(24, 48, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(48 * 9, 96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


@program
def example_of_digits() -> Training:
    """Two convolutions, dropout of 0.25 and 0.5, Adadelta, rate times 0.7 an epoch.

    NLL of log-softmax, batch 64: held out 98 %.
    """
    train, test = scaled_digits()
    model = _Example()
    optimizer = optim.Adadelta(model.parameters(), 1.0)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.7 ** (i // 21))
    return supervised(
        model, train, test, optimizer, size=64, steps=170, goal=0.93,
        loss_fn=F.nll_loss, schedule=schedule,
    )  # fmt: skip


class _Blitz(nn.Module):
    """The first convolutional net of tutorials: two pools, three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 5), nn.Conv2d(12, 24, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2 = nn.Linear(24 * 2 * 2, 60), nn.Linear(60, 32)
        self.fc3 = nn.Linear(32, 6)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@program
def blitz_gratings() -> Training:
    """Six gratings of 16 × 16 pixels, no norm, Kaiming, SGD with momentum, batch 16.

    Held out: 100 %.
    """
    train, test = gratings(2600, 16, 2100)
    model = _Blitz()
    optimizer = optim.SGD(model.parameters(), 0.005, momentum=0.9)
    return supervised(model, train, test, optimizer, size=16, steps=500, goal=0.9)
