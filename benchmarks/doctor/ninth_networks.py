"""Networks of the ninth set; those that hold a mistake take it as an argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Actor",
    "BeatNet",
    "CentreNet",
    "DeepSet",
    "FunctionalNet",
    "Memory",
    "Neighbours",
    "ResNet",
    "Segmenter",
    "TableResNet",
    "TextNet",
    "TwoCameras",
    "TwoPlants",
    "encoder1d",
    "group_normed",
    "inception",
    "shape_net",
    "spam_filter",
]


def conv1d(fan_in: int, width: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution over time with its norm."""
    return nn.Sequential(
        nn.Conv1d(fan_in, width, 5, stride, 2, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
    )


def conv2d(fan_in: int, width: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution of images with its norm."""
    return nn.Sequential(
        nn.Conv2d(fan_in, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class TwoPlants(nn.Module):
    """A frozen encoder with the head of the first plant, and that of another one."""

    def __init__(self, encoder: nn.Module, head: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.first = head.requires_grad_(False)
        self.other = nn.Linear(width, 4)
        self.use_first = False

    def forward(self, x: Tensor) -> Tensor:
        """Scores of faults by the head that is in use."""
        h = self.encoder(x)
        return self.first(h) if self.use_first else self.other(h)


def encoder1d(channels: int = 3, width: int = 24) -> nn.Sequential:
    """Return an encoder of vibrations."""
    return nn.Sequential(
        conv1d(channels, width),
        conv1d(width, width, 2),
        conv1d(width, width, 2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    )


class Segmenter(nn.Module):
    """An encoder and a decoder of pixels with batch norms."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [conv2d(1, width), conv2d(width, 2 * width, 2), conv2d(2 * width, 24)]
        )
        self.up = nn.ConvTranspose2d(24, width, 2, 2)
        self.last = nn.Sequential(conv2d(width, width), nn.Conv2d(width, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 2, H, W) of the pixels."""
        for part in self.down:
            x = part(x)
        return self.last(self.up(x))


class BasicBlock(nn.Module):
    """A residual block as that of a ResNet."""

    def __init__(self, fan_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or fan_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(fan_in, width, 1, stride, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to the shortcut."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small ResNet for signs."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = BasicBlock(width, width, 1)
        self.layer2 = BasicBlock(width, 2 * width, 2)
        self.fc = nn.Linear(2 * width, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of signs."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(x.mean((2, 3)))


class TableResNet(nn.Module):
    """Residual blocks for a table, with norms of a given momentum."""

    def __init__(self, momentum: float, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(10, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width, momentum=momentum),
                nn.Linear(width, 2 * width),
                nn.ReLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(depth)
        )
        self.head = nn.Sequential(
            nn.BatchNorm1d(width, momentum=momentum), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give a price (N, 1)."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class FunctionalNorm(nn.Module):
    """Batch norm by its functional form; `is_bad` takes training=True in all modes."""

    def __init__(self, width: int, *, is_bad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a batch (N, width)."""
        kept = (self.running_mean, self.running_var)
        is_training = self.is_bad or self.training
        return F.batch_norm(x, *kept, self.weight, self.bias, is_training, 0.1)


class FunctionalNet(nn.Module):
    """Hidden layers for a table, with batch norms in their functional form."""

    def __init__(self, *, is_bad: bool, width: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(width if index else 10, width) for index in range(depth)
        )
        self.norms = nn.ModuleList(
            FunctionalNorm(width, is_bad=is_bad) for _ in range(depth)
        )
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Give a price (N, 1)."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.relu(norm(linear(x)))
        return self.out(x)


class CentreNet(nn.Module):
    """A detector that gives a map of centres; `prior` sets the biases it may set."""

    def __init__(self, *, is_bad: bool, width: int = 16, prior: float = 0.01) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(conv2d(width if i else 1, width) for i in range(4))
        )
        self.head = nn.Conv2d(width, 1, 1)
        value = -math.log((1 - prior) / prior)
        for layer in self.modules() if is_bad else [self.head]:
            if getattr(layer, "bias", None) is not None:
                nn.init.constant_(layer.bias, value)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Give logits (N, 1, H, W) of centres."""
        return self.head(self.backbone(x))


class BeatNet(nn.Module):
    """Convolutions over time with a dropout and a norm of choice in each block."""

    def __init__(
        self, *, drop: float = 0.0, norm: type[nn.Module] = nn.BatchNorm1d
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(3):
            layers.append(nn.Conv1d(24 if index else 1, 24, 5, 1 + index % 2, 2))
            if drop:
                layers.append(nn.Dropout(drop))
            layers += [norm(24), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of windows (N, 1, L)."""
        return self.classifier(self.features(x).mean(2))


class DeepSet(nn.Module):
    """A network for sets of particles, with batch norms; `is_bad` knows no mask."""

    def __init__(self, *, is_bad: bool, width: int = 32) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(4, width), nn.Linear(width, width)
        self.bn1, self.bn2 = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Scores of jets (N, P, 4)."""
        is_real = (x != 0).any(2)
        if self.is_bad:
            is_real = torch.ones_like(is_real)
        h = F.relu(self.bn1(self.lin1(x[is_real])))
        h = F.relu(self.bn2(self.lin2(h)))
        rows = x.new_zeros(*is_real.shape, h.shape[1])
        rows[is_real] = h
        return self.head(rows.sum(1) / is_real.sum(1, keepdim=True))


class TwoCameras(nn.Module):
    """One encoder of a visible and of a thermal image, with norms of choice."""

    def __init__(self, *, is_bad: bool, width: int = 16) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width if index else 1, width, 3, 1 + index % 2, 1)
            for index in range(3)
        )
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
            for _ in range(1 if is_bad else 2)
        )
        self.last = nn.Linear(2 * width, 9)

    def encode(self, x: Tensor, camera: int) -> Tensor:
        """Give features (N, width) of the images of a camera."""
        norms: nn.ModuleList = self.norms[camera % len(self.norms)]  # type: ignore[assignment]
        for conv, norm in zip(self.convs, norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x.amax((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of pairs of images (N, 2, H, W)."""
        both = [self.encode(x[:, i : i + 1], i) for i in range(2)]
        return self.last(torch.cat(both, 1))


def shape_net(classes: int = 6, width: int = 16) -> nn.Sequential:
    """Return convolutions for signs."""
    return nn.Sequential(
        conv2d(3, width),
        conv2d(width, width),
        nn.MaxPool2d(2),
        conv2d(width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def group_normed(width: int = 16) -> nn.Sequential:
    """Return convolutions with group norms for signs."""
    layers: list[nn.Module] = []
    for index in range(3):
        layers.append(nn.Conv2d(width if index else 3, width, 3, 1 + index % 2, 1))
        layers += [nn.GroupNorm(4, width), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 6)
    )


class Branches(nn.Module):
    """Two convolutions beside each other, as in Inception."""

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.one, self.three = (
            nn.Sequential(
                nn.Conv2d(fan_in, width, k, padding=k // 2), nn.BatchNorm2d(width)
            )
            for k in (1, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Give the features of both."""
        return F.relu(torch.cat([self.one(x), self.three(x)], 1))


def inception(width: int = 8) -> nn.Sequential:
    """Return a small Inception for signs."""
    return nn.Sequential(
        conv2d(3, width),
        Branches(width, width),
        nn.MaxPool2d(2),
        Branches(2 * width, width),
        Branches(2 * width, width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 6),
    )


class Neighbours(nn.Module):
    """A factorization: the product of the vectors of a user and of a film."""

    def __init__(self, *, is_bad: bool, size: int = 12) -> None:
        super().__init__()
        self.user, self.film = nn.Embedding(60, size), nn.Embedding(50, size)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        for table in (self.user, self.film):
            if is_bad:
                nn.init.constant_(table.weight, 0.3)
            else:
                nn.init.normal_(table.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        """Give ratings (N, 1) of users and films (N, 2)."""
        match = (self.user(x[:, 0]) * self.film(x[:, 1])).sum(1, keepdim=True)
        return self.scale * match + self.bias


class Actor(nn.Module):
    """A network of tanh units for torques, drawn by Xavier's rule with `gain`."""

    def __init__(self, gain: float, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width if index else 6, width) for index in range(depth)
        )
        self.torque = nn.Linear(width, 2)
        for layer in self.layers:
            nn.init.xavier_normal_(layer.weight, gain)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Give torques (N, 2)."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.torque(x)


class TextNet(nn.Module):
    """A transformer encoder with a class token."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 64, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, words: Tensor) -> Tensor:
        """Scores of texts (N, L)."""
        x = self.embed(words)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def spam_filter(width: int = 32) -> nn.Sequential:
    """Return two hidden layers for mails, and one logit."""
    return nn.Sequential(
        *(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 1),
    )


class Memory(nn.Module):
    """A recurrent network of tanh units, read at its last step."""

    def __init__(self, *, is_bad: bool, width: int = 32) -> None:
        super().__init__()
        self.rnn = nn.RNN(5, width, batch_first=True)
        hidden: Tensor = self.rnn.weight_hh_l0  # type: ignore[assignment]
        if is_bad:
            nn.init.normal_(hidden, std=0.02)
        else:
            nn.init.orthogonal_(hidden)
        self.read = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of sequences (N, L, 5)."""
        return self.read(self.rnn(x)[0][:, -1])
