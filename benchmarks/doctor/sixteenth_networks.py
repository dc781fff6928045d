"""Networks of the sixteenth set."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BeatNet",
    "DomainNet",
    "FruitNet",
    "GraphNet",
    "Own",
    "PatientNet",
    "ResNet",
    "ScanNet",
    "SoundNet",
    "WardNet",
    "customer_net",
]


def conv(inputs: int, width: int, stride: int = 1, **norm: float) -> nn.Sequential:
    """Return convolution, batch norm and rectifier."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width, **norm),
        nn.ReLU(inplace=True),
    )


class FruitNet(nn.Module):
    """A small VGG."""

    def __init__(self, kinds: int = 6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 16), conv(16, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, kinds)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds."""
        return self.classifier(self.features(x))


class PatientNet(nn.Module):
    """An image and a record, joined before the last layers."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(
            conv(3, 16), conv(16, 32, 2), conv(32, 32, 2), nn.AdaptiveMaxPool2d(1)
        )
        self.record = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)
        )
        self.head = nn.Sequential(
            nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 6)
        )

    def forward(self, image: Tensor, record: Tensor) -> Tensor:
        """Return the scores of six findings."""
        seen = self.vision(image).flatten(1)
        return self.head(torch.cat([seen, self.record(record)], 1))


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next block reads."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet of three or more blocks."""

    def __init__(self, kinds: int = 6, widths: tuple[int, ...] = (16, 24, 32)) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        pairs = itertools.pairwise((16, *widths))
        self.layers = nn.Sequential(
            *(BasicBlock(a, b, 1 if a == b else 2) for a, b in pairs)
        )
        self.fc = nn.Linear(widths[-1], kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds."""
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class ScanNet(nn.Module):
    """Convolutions in three dimensions."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b, stride in [(1, 1, 1), (1, 2, 2), (2, 2, 2)]:
            inputs = width * a if layers else 1
            layers += [
                nn.Conv3d(inputs, width * b, 3, stride, 1),
                norm(width * b),
                nn.ReLU(),
            ]
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool3d(1), nn.Flatten())
        self.classifier = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of four shapes."""
        return self.classifier(self.features(x))


class SoundNet(nn.Module):
    """Convolutions over spectra (N, 1, 16, 32), and a head."""

    def __init__(self, words: int = 6) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.BatchNorm2d(1),
            conv(1, 16),
            conv(16, 32, 2),
            conv(32, 32, 2),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(32, words)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the words."""
        return self.head(self.backbone(x))


class BeatNet(nn.Module):
    """A U-Net over time."""

    def __init__(self, **norm: float) -> None:
        super().__init__()
        self.norm = norm
        self.down1 = self._double(1, 12)
        self.down2 = self._double(12, 24)
        self.middle = self._double(24, 24)
        self.up2 = self._double(48, 24)
        self.up1 = self._double(36, 12)
        self.mask = nn.Conv1d(12, 1, 1)

    def _double(self, inputs: int, width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for a in (inputs, width):
            layers += [
                nn.Conv1d(a, width, 5, padding=2),
                nn.BatchNorm1d(width, **self.norm),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a mask (N, 1, time)."""
        a = self.down1(x)
        b = self.down2(F.max_pool1d(a, 2))
        c = self.middle(F.max_pool1d(b, 2))
        b = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        a = self.up1(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1))
        return self.mask(a)


class Own(nn.Module):
    """Subtracts the mean of a batch, and divides by its deviation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rows, normalised."""
        x = (x - x.mean(0)) / (x.std(0) + 1e-5)
        return self.gamma * x + self.beta


def customer_net(norm: type[nn.Module], width: int = 48) -> nn.Sequential:
    """Return a perceptron that begins with a norm."""
    return nn.Sequential(
        norm(8),
        nn.Linear(8, width),
        norm(width),
        nn.ReLU(),
        nn.Linear(width, width),
        norm(width),
        nn.ReLU(),
        nn.Linear(width, 3),
    )


class WardNet(nn.Module):
    """A batch norm as scaler, and a GRU that answers by its last state."""

    def __init__(self, width: int = 32, *, is_masked: bool) -> None:
        super().__init__()
        self.is_masked = is_masked
        self.scaler = nn.BatchNorm1d(3)
        self.gru = nn.GRU(3, width, batch_first=True)
        self.norm = nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of stays (N, hours, 3), with zeros behind the end."""
        real = x[..., 0] > 0
        if self.is_masked:
            h = torch.zeros_like(x)
            h[real] = self.scaler(x[real])
        else:
            h = self.scaler(x.mT).mT
        states, _ = self.gru(h)
        last = states[torch.arange(len(x)), real.sum(1) - 1]
        return self.fc(F.relu(self.norm(last)))


class DomainNet(nn.Module):
    """Features that two domains share, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, 16), conv(16, 32, 2), conv(32, 32, 2), nn.AdaptiveMaxPool2d(1)
        )
        self.classifier = nn.Linear(32, 6)

    def embed(self, x: Tensor) -> Tensor:
        """Return the features of images."""
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds."""
        return self.classifier(self.embed(x))


class GraphNet(nn.Module):
    """Three layers of a graph isomorphism network."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 * inputs, width),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            )
            for inputs in (5, width)
        )
        self.out = nn.Linear(width, 3)

    def forward(self, atoms: Tensor, bonds: Tensor) -> Tensor:
        """Return the scores of the kinds."""
        h = atoms
        for layer in self.layers:
            both = torch.cat([h, bonds @ h], 2)
            h = layer(both.flatten(0, 1)).unflatten(0, h.shape[:2])
        return self.out(h.sum(1))
