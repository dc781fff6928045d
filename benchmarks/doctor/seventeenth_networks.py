"""Networks of the seventeenth set."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "VGG",
    "BearingNet",
    "Critic",
    "DeepLab",
    "DepthNet",
    "Generator",
    "LoadReader",
    "MobileNet",
    "QNetwork",
    "TwoHeads",
    "WordNet",
]


def conv(inputs: int, width: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and rectifier."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, stride, dilation, dilation, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    )


class DeepLab(nn.Module):
    """An encoder, atrous pyramid with a branch for the whole image, and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(1, width), conv(width, width, 2))
        self.branches = nn.ModuleList(conv(width, width, dilation=d) for d in (1, 2, 3))
        self.pooling = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.project = conv(4 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a mask (N, 1, height, width)."""
        size = x.shape[2:]
        x = self.encoder(x)
        whole = self.pooling(x).expand(-1, -1, *x.shape[2:])
        x = torch.cat([*(branch(x) for branch in self.branches), whole], 1)
        x = F.interpolate(self.project(x), size, mode="bilinear", align_corners=False)
        return self.head(x)


class MobileBlock(nn.Module):
    """An inverted residual block with squeeze and excitation."""

    def __init__(self, inputs: int, width: int, stride: int, **norm: float) -> None:
        super().__init__()
        wide = 3 * inputs
        self.is_residual = stride == 1 and inputs == width
        self.expand = nn.Conv2d(inputs, wide, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(wide, **norm)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.bn1 = nn.BatchNorm2d(wide, **norm)
        self.squeeze = nn.Conv2d(wide, 4, 1)
        self.excite = nn.Conv2d(4, wide, 1)
        self.project = nn.Conv2d(wide, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width, **norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next block."""
        h = F.silu(self.bn0(self.expand(x)))
        h = F.silu(self.bn1(self.depthwise(h)))
        gate = F.silu(self.squeeze(h.mean((2, 3), keepdim=True)))
        h = self.bn2(self.project(torch.sigmoid(self.excite(gate)) * h))
        return x + h if self.is_residual else h


class MobileNet(nn.Module):
    """A small EfficientNet."""

    def __init__(self, kinds: int = 6, **norm: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16, **norm)
        self.blocks = nn.Sequential(
            MobileBlock(16, 16, 1, **norm),
            MobileBlock(16, 24, 2, **norm),
            MobileBlock(24, 24, 1, **norm),
        )
        self.fc = nn.Linear(24, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds."""
        x = self.blocks(F.silu(self.bn(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """Convolutions with batch norms, and two linear layers."""

    def __init__(self, outputs: int = 6, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv(3, width),
            conv(width, width),
            nn.MaxPool2d(2),
            conv(width, 2 * width),
            nn.MaxPool2d(2),
            conv(2 * width, 2 * width),
        )
        self.classifier = nn.Linear(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds."""
        return self.classifier(self.features(x).mean((2, 3)))


class TwoHeads(nn.Module):
    """A table behind one trunk, with a head for each of two tasks."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.scaler = nn.BatchNorm1d(5)
        self.embedding = nn.Embedding(8, 4)
        layers: list[nn.Module] = []
        for inputs in (9, width, width):
            layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {"standing": nn.Linear(width, 3), "limit": nn.Linear(width, 1)}
        )

    def forward(self, branch: Tensor, figures: Tensor) -> dict[str, Tensor]:
        """Return what each head says."""
        x = torch.cat([self.embedding(branch), self.scaler(figures)], 1)
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


class QNetwork(nn.Module):
    """Values of four moves."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 2, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(16 * width, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the value of each move."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(F.relu(self.fc(x.flatten(1))))


class BearingNet(nn.Module):
    """Convolutions over time."""

    def __init__(self, width: int = 16, kinds: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in [(1, width), (width, 2 * width), (2 * width, 2 * width)]:
            layers += [
                nn.Conv1d(inputs, outputs, 7, padding=3),
                nn.BatchNorm1d(outputs),
                nn.ReLU(),
                nn.MaxPool1d(2),
            ]
        self.body = nn.Sequential(*layers)
        self.out = nn.Linear(2 * width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the faults."""
        return self.out(self.body(x).mean(2))


class WordNet(nn.Module):
    """Time-delay layers, the maximum over time, and a head."""

    def __init__(self, width: int = 32, words: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm1d(12),
            nn.Conv1d(12, width, 5, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, width, 5, padding=2),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the words in (N, 12, frames)."""
        return self.head(self.layers(x).amax(2))


class LoadReader(nn.Module):
    """A transformer over a series of one variable."""

    def __init__(self, width: int = 24, *, norms_input: bool) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(1) if norms_input else nn.Identity()
        self.project = nn.Conv1d(1, width, 5, padding=2)
        self.places = nn.Parameter(0.1 * torch.randn(1, 36, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of four kinds of days."""
        h = self.project(self.norm_in(x).mT).mT + self.places
        return self.head(self.encoder(h).mean(1))


class DepthNet(nn.Module):
    """A U-Net that gives a depth for each pixel."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down1 = nn.Sequential(conv(3, width), conv(width, width))
        self.down2 = conv(width, 2 * width, 2)
        self.middle = conv(2 * width, 2 * width, 2)
        self.up2 = conv(4 * width, 2 * width)
        self.up1 = conv(3 * width, width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a depth (N, 1, height, width)."""
        a = self.down1(x)
        b = self.down2(a)
        c = self.middle(b)
        b = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        a = self.up1(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1))
        return self.out(a)


class Generator(nn.Module):
    """Makes an image (N, 1, 16, 16) of what is given for it."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(1, width), conv(width, 2 * width, 2))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 1, 3, 1, 1),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return an image in [-1, 1]."""
        return self.decoder(self.encoder(x))


class Critic(nn.Module):
    """Tells real pairs from made ones, patch by patch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )

    def forward(self, given: Tensor, image: Tensor) -> Tensor:
        """Return the logits of patches."""
        return self.layers(torch.cat([given, image], 1))
