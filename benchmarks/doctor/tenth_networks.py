"""Networks of the tenth set; those that hold a mistake take it as an argument."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ActivatedNorm",
    "Autoencoder",
    "Counters",
    "GraphNet",
    "Keypoints",
    "LetterNet",
    "LoanNet",
    "MovementNet",
    "OrderNet",
    "PriceNet",
    "Recogniser",
    "ShortcutNet",
    "SiteNet",
    "Towers",
    "UNet",
    "digit_net",
    "plain_vgg",
    "scene_net",
    "vessel_net",
    "wide_mlp",
    "yield_mlp",
]

Norm = Callable[[int], nn.Module]


def block(fan_in: int, width: int, norm: Norm = nn.BatchNorm2d, stride: int = 1):  # type: ignore[no-untyped-def]
    """Return a convolution of pixels, its norm and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(fan_in, width, 3, stride, 1, bias=False), norm(width), nn.ReLU()
    )


class MovementNet(nn.Module):
    """Convolutions over time, with batch norms that keep statistics or do not."""

    def __init__(self, *, is_tracked: bool, width: int = 24) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(width if index else 3, width, 5, 1 + index % 2, 2)
            for index in range(3)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width, track_running_stats=is_tracked) for _ in range(3)
        )
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of windows (N, 3, L)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.fc(x.mean(2))


class Recogniser(nn.Module):
    """A backbone of convolutions, and a head with a batch norm of its own."""

    def __init__(self, kinds: int = 6, width: int = 16) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            block(3, width), block(width, width, stride=2), block(width, 2 * width)
        )
        self.neck = nn.Sequential(
            nn.Linear(2 * width, 32), nn.BatchNorm1d(32), nn.ReLU()
        )
        self.head = nn.Linear(32, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of figures."""
        return self.head(self.neck(self.backbone(x).amax((2, 3))))


class UNet(nn.Module):
    """A small U-Net, with batch norms of a given momentum."""

    def __init__(self, momentum: float, width: int = 12) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels, momentum=momentum)

        self.inc = block(1, width, norm)
        self.down = block(width, 2 * width, norm, 2)
        self.middle = block(2 * width, 2 * width, norm)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.outc = nn.Sequential(block(2 * width, width, norm), nn.Conv2d(width, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 3, H, W) of pixels."""
        x = self.inc(x)
        h = self.up(self.middle(self.down(x)))
        return self.outc(torch.cat([x, h], 1))


class Shortcut(nn.Module):
    """A residual block, whose last scale starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to its input."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(h)))


class ShortcutNet(nn.Module):
    """A stem and residual blocks; `is_frozen` keeps scales and shifts as they are."""

    def __init__(self, *, is_frozen: bool, width: int = 16, kinds: int = 6) -> None:
        super().__init__()
        self.stem = block(3, width)
        self.stage = nn.Sequential(
            Shortcut(width), nn.MaxPool2d(2), Shortcut(width), Shortcut(width)
        )
        self.fc = nn.Linear(width, kinds)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d) and is_frozen:
                layer.weight.requires_grad_(False)
                layer.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of figures."""
        return self.fc(self.stage(self.stem(x)).mean((2, 3)))


def scene_net(width: int = 16) -> nn.Sequential:
    """Return convolutions for images of any size."""
    return nn.Sequential(
        block(1, width),
        block(width, width),
        nn.MaxPool2d(2),
        block(width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 6),
    )


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm with its activation; `is_bad` gives the activation only."""

    def __init__(self, channels: int, *, is_bad: bool) -> None:
        super().__init__(channels)
        self.activation = nn.LeakyReLU(0.01)
        self.is_bad = is_bad

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name in torch
        """Normalize, then activate."""
        if self.is_bad:
            return self.activation(input)
        return self.activation(super().forward(input))


def plain_vgg(norm: Norm, width: int = 12, depth: int = 9) -> nn.Sequential:
    """Return many convolutions in a row, each with its norm."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Conv2d(width if index else 3, width, 3, 1, 1))
        layers.append(norm(width))
        if index == 3:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 6)
    )


def digit_net(width: int = 16) -> nn.Sequential:
    """Return convolutions for digits of 8 by 8 pixels."""
    return nn.Sequential(
        block(1, width),
        block(width, width),
        nn.MaxPool2d(2),
        block(width, 2 * width),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


def yield_mlp(width: int = 48) -> nn.Sequential:
    """Return three hidden layers with batch norms, for a yield."""
    layers: list[nn.Module] = []
    for fan_in in (9, width, width):
        layers += [nn.Linear(fan_in, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


class SiteNet(nn.Module):
    """An encoder with batch norms and a classifier of plants."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
        )
        self.classifier = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of kinds."""
        return self.classifier(self.encoder(x))


class LoanNet(nn.Module):
    """Columns and embedded codes of a table, hidden layers with batch norms."""

    def __init__(self, width: int = 48, size: int = 4) -> None:
        super().__init__()
        self.embeds = nn.ModuleList(nn.Embedding(10, size) for _ in range(2))
        self.layers = nn.Sequential(
            *(nn.Linear(8 + 2 * size, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Linear(width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of rows (N, 10), whose last two columns are codes."""
        codes = x[:, 8:].long()
        parts = [embed(codes[:, i]) for i, embed in enumerate(self.embeds)]
        return self.layers(torch.cat([x[:, :8], *parts], 1))


class GraphNet(nn.Module):
    """Graph convolutions with batch norms; `is_bad` takes padding for atoms."""

    def __init__(self, *, is_bad: bool, width: int = 32) -> None:
        super().__init__()
        self.own = nn.ModuleList([nn.Linear(6, width), nn.Linear(width, width)])
        self.near = nn.ModuleList([nn.Linear(6, width), nn.Linear(width, width)])
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(2))
        self.out = nn.Linear(width, 3)
        self.is_bad = is_bad

    def forward(self, nodes: Tensor, bonds: Tensor) -> Tensor:
        """Scores of molecules."""
        is_real = (nodes != 0).any(2)
        if self.is_bad:
            is_real = torch.ones_like(is_real)
        h = nodes
        for own, near, norm in zip(self.own, self.near, self.norms, strict=True):
            h = own(h) + bonds @ near(h)
            rows = torch.zeros_like(h)
            rows[is_real] = F.relu(norm(h[is_real]))
            h = rows
        return self.out(h.sum(1) / is_real.sum(1, keepdim=True))


class OrderNet(nn.Module):
    """A deep transformer encoder with its norms behind each sum."""

    def __init__(self, depth: int = 10, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.place = nn.Parameter(0.1 * torch.randn(12, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, words: Tensor) -> Tensor:
        """Scores of sentences (N, 12)."""
        x = self.embed(words) + self.place
        for layer in self.blocks:
            x = layer(x)
        return self.head(x.mean(1))


class Towers(nn.Module):
    """A tower for persons and one for articles; their product is the logit."""

    def __init__(self, bias: float, width: int = 48, size: int = 8) -> None:
        super().__init__()
        self.person, self.article = (
            nn.Sequential(
                *(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
                nn.Linear(width, size),
            )
            for _ in range(2)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.constant_(layer.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 1) of pairs (N, 24)."""
        match = self.person(x[:, :12]) * self.article(x[:, 12:])
        return match.mean(1, keepdim=True)


class PriceNet(nn.Module):
    """An LSTM over days, read at the last one."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, width, batch_first=True)
        self.fc = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Give the next price (N, 1)."""
        return self.fc(self.lstm(x)[0][:, -1])


class Keypoints(nn.Module):
    """Convolutions with group norms, and the coordinates of two points."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for fan_in, stride in ((1, 1), (width, 2), (width, 2)):
            layers.append(nn.Conv2d(fan_in, width, 3, stride, 1))
            layers += [nn.GroupNorm(4, width), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.regressor = nn.Sequential(
            nn.Linear(16 * width, 64), nn.ReLU(), nn.Linear(64, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give both points (N, 4)."""
        return self.regressor(self.features(x))


def vessel_net(width: int = 12) -> nn.Sequential:
    """Return convolutions that keep the size, with one logit for each pixel."""
    return nn.Sequential(
        block(1, width),
        block(width, width),
        block(width, width),
        nn.Conv2d(width, 1, 1),
    )


def wide_mlp(width: int = 128) -> nn.Sequential:
    """Return two wide hidden layers for sixty columns."""
    return nn.Sequential(
        *(nn.Linear(60, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 3),
    )


class LetterNet(nn.Module):
    """Embedded letters, a convolution and the largest value over the text."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.conv = nn.Conv1d(12, width, 2)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of texts (N, L)."""
        h = F.relu(self.conv(self.embed(x).mT))
        return self.fc(h.amax(2))


class Counters(nn.Module):
    """A GRU over counters, read at all steps."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gru = nn.GRU(5, width, batch_first=True)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of failures."""
        return self.fc(self.gru(x)[0].mean(1))


class Autoencoder(nn.Module):
    """An encoder and a decoder of tanh units; `std` draws their weights."""

    def __init__(self, std: float | None) -> None:
        super().__init__()
        sizes = (64, 64, 48, 32, 16, 32, 48, 64, 64)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        self.layers = nn.Sequential(*layers[:-1])
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                if std is None:
                    nn.init.xavier_normal_(layer.weight)
                else:
                    nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Give the rows back."""
        return self.layers(x)
