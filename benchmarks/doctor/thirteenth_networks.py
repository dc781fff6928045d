"""Networks of the thirteenth set; those that hold a mistake take it as an argument."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "ClipNet",
    "CosineHead",
    "DeepCrossing",
    "EEGNet",
    "Forecaster",
    "HouseNet",
    "IdNet",
    "PhotoNet",
    "Reader",
    "RecordingNet",
    "ShapeNet",
    "SplitNorm",
    "StreamNet",
    "UNet",
    "VectorNet",
    "deep_mlp",
    "face_net",
    "level_mlp",
    "value_net",
]


class ConvNorm(nn.Module):
    """A convolution, a norm and a rectifier."""

    def __init__(
        self, fan_in: int, fan_out: int, stride: int = 1, norm: Any = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn = norm(fan_out)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images (N, C, H, W)."""
        return F.relu(self.bn(self.conv(x)))


class PhotoNet(nn.Module):
    """A body of convolutions and norms, and a linear head."""

    def __init__(self, kinds: int, colours: int = 1, norm: Any = nn.BatchNorm2d):
        super().__init__()
        self.backbone = nn.Sequential(
            ConvNorm(colours, 16, norm=norm),
            ConvNorm(16, 24, 2, norm),
            ConvNorm(24, 32, norm=norm),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, C, H, W)."""
        return self.head(self.backbone(x))


class SplitNorm(nn.Module):
    """Batch norms of clean and of attacked images; or one for both."""

    def __init__(self, width: int, *, is_shared: bool) -> None:
        super().__init__()
        self.clean = nn.BatchNorm2d(width)
        if not is_shared:
            self.attacked = nn.BatchNorm2d(width)
        self.is_shared, self.is_attack = is_shared, False

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the norm of the images that come."""
        if self.is_attack and not self.is_shared:
            return self.attacked(x)
        return self.clean(x)


class ShapeNet(nn.Module):
    """Convolutions and norms whose scales are fixed, as MXNet has them by default."""

    def __init__(self, kinds: int = 8) -> None:
        super().__init__()
        self.stage1 = ConvNorm(1, 16)
        self.stage2 = ConvNorm(16, 32, 2)
        self.stage3 = ConvNorm(32, 32)
        self.fc = nn.Linear(32, kinds)
        for stage in (self.stage1, self.stage2, self.stage3):
            stage.bn.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, 1, 12, 12)."""
        return self.fc(self.stage3(self.stage2(self.stage1(x))).amax((2, 3)))


class UNet(nn.Module):
    """Two steps down, two steps up, with a skip at each."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.inc = ConvNorm(1, width)
        self.down1 = ConvNorm(width, 2 * width, 2)
        self.down2 = ConvNorm(2 * width, 4 * width, 2)
        self.up1 = ConvNorm(6 * width, 2 * width)
        self.up2 = ConvNorm(3 * width, width)
        self.outc = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of pixels (N, 2, H, W)."""
        a = self.inc(x)
        b = self.down1(a)
        c = F.interpolate(self.down2(b), scale_factor=2)
        d = F.interpolate(self.up1(torch.cat([b, c], 1)), scale_factor=2)
        return self.outc(self.up2(torch.cat([a, d], 1)))


class RecordingNet(nn.Module):
    """Three convolutions over time with batch norms, and a maximum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(4, width, 7, padding=3), nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, 5, padding=2)
        self.bn2 = nn.BatchNorm1d(width)
        self.conv3 = nn.Conv1d(width, width, 5, 2, 2)
        self.bn3 = nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of windows (N, 4, T)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.relu(self.bn3(self.conv3(x))).amax(2))


class EEGNet(nn.Module):
    """Filters over time, filters over places, and a separable convolution."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, (1, 9), padding=(0, 4), bias=False)
        self.batchnorm1 = nn.BatchNorm2d(8, momentum=momentum)
        self.depthwise = nn.Conv2d(8, 16, (6, 1), groups=8, bias=False)
        self.batchnorm2 = nn.BatchNorm2d(16, momentum=momentum)
        self.separable = nn.Sequential(
            nn.Conv2d(16, 16, (1, 5), padding=(0, 2), groups=16, bias=False),
            nn.Conv2d(16, 16, 1, bias=False),
        )
        self.batchnorm3 = nn.BatchNorm2d(16, momentum=momentum)
        self.classify = nn.Linear(16 * 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Answers for trials (N, 1, 6, 40)."""
        x = self.batchnorm1(self.conv1(x))
        x = F.avg_pool2d(F.elu(self.batchnorm2(self.depthwise(x))), (1, 2))
        x = F.avg_pool2d(F.elu(self.batchnorm3(self.separable(x))), (1, 4))
        return self.classify(x.flatten(1))


class ClipNet(nn.Module):
    """A norm of the input, two convolutions over time, and a regression."""

    def __init__(self, *, is_each_frame: bool, bands: int = 12) -> None:
        super().__init__()
        self.is_each_frame = is_each_frame
        self.input_norm: nn.Module = nn.BatchNorm1d(bands, affine=False)
        if is_each_frame:
            self.input_norm = nn.LayerNorm(bands, elementwise_affine=False)
        self.conv1, self.bn1 = nn.Conv1d(bands, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.conv2 = nn.Conv1d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32, 2)
        self.is_high: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Distance and pitch of spectra (N, bands, T)."""
        if self.is_each_frame:
            x = self.input_norm(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = self.input_norm(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.conv2(x)).mean(2)
        if self.is_high is None:
            return self.fc(x)
        return torch.cat([self.fc(x), self.is_high(x)], 1)


class StreamNet(nn.Module):
    """Ten convolutions over time, each with a batch norm."""

    def __init__(self, width: int = 24, depth: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(depth):
            stride = 2 if index in (3, 6) else 1
            layers += [
                nn.Conv1d(width if index else 1, width, 5, stride, 2, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            ]
        self.encoder = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of sounds (N, 1, T)."""
        return self.classifier(self.encoder(x).amax(2))


class HouseNet(nn.Module):
    """Vectors of categories beside measures; linear, dropout, norm and rectifier."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(30, 8), nn.Embedding(8, 4)])

        def block(fan_in: int, fan_out: int) -> list[nn.Module]:
            return [
                nn.Linear(fan_in, fan_out),
                nn.Dropout(dropout),
                nn.BatchNorm1d(fan_out),
                nn.ReLU(),
            ]

        self.layers = nn.Sequential(
            *block(18, 96), *block(96, 96), *block(96, 48), nn.Linear(48, 1)
        )

    def forward(self, table: Tensor) -> Tensor:
        """Prices of houses (N, 8)."""
        codes = table[:, :2].long().unbind(1)
        parts = [e(c) for e, c in zip(self.embeds, codes, strict=True)]
        return self.layers(torch.cat([*parts, table[:, 2:]], 1))


def value_net() -> nn.Sequential:
    """Return a network of the values of three actions, with batch norms."""
    return nn.Sequential(
        nn.BatchNorm1d(4),
        nn.Linear(4, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Linear(48, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Linear(48, 3),
    )


def deep_mlp(depth: int = 5, width: int = 96) -> nn.Sequential:
    """Return a perceptron with batch norms for digits."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(width if index else 64, width), nn.BatchNorm1d(width)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def face_net(width: int = 32) -> nn.Sequential:
    """Return a small network that gives a vector for a face."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(3),
        nn.Flatten(),
        nn.Linear(288, width),
    )


class VectorNet(nn.Module):
    """Vectors of faces, of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = face_net()

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of images (N, 1, 12, 12)."""
        return F.normalize(self.body(x), dim=1)


class CosineHead(nn.Module):
    """Cosines between vectors of faces and of people, times a scale."""

    def __init__(self, scale: float, people: int = 20) -> None:
        super().__init__()
        self.body = face_net()
        self.weight = nn.Parameter(torch.randn(people, 32))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, 1, 12, 12)."""
        vectors = F.normalize(self.body(x), dim=1)
        return self.scale * F.linear(vectors, F.normalize(self.weight, dim=1))


class Forecaster(nn.Module):
    """An LSTM over hours; the answer is a second LSTM's, or a linear layer's."""

    def __init__(self, *, is_bounded: bool, width: int = 32) -> None:
        super().__init__()
        self.lstm1 = nn.LSTM(2, width, batch_first=True)
        self.lstm2 = nn.LSTM(width, 1 if is_bounded else width, batch_first=True)
        self.dense = nn.Identity() if is_bounded else nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Give the next hour of days (N, 24, 2)."""
        return self.dense(self.lstm2(self.lstm1(x)[0])[0][:, -1])


class IdNet(nn.Module):
    """A perceptron over a customer and a product, as numbers or as vectors."""

    def __init__(self, *, is_raw: bool, width: int = 8) -> None:
        super().__init__()
        self.is_raw = is_raw
        if not is_raw:
            self.customer = nn.Embedding(80, width)
            self.product = nn.Embedding(60, width)
        self.fc1 = nn.Linear(2 if is_raw else 2 * width, 96)
        self.fc2 = nn.Linear(96, 48)
        self.out = nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Ratings of pairs (N, 2)."""
        if not self.is_raw:
            a, b = x.long().unbind(1)
            x = torch.cat([self.customer(a), self.product(b)], 1)
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Reader(nn.Module):
    """A transformer of two layers with a classifier."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(5, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of sequences (N, T)."""
        x = self.encoder(self.embeddings(tokens))
        return self.classifier(self.norm(x).mean(1))


class CrossingBlock(nn.Module):
    """Two linear layers, to which the input should be added."""

    def __init__(self, width: int, *, has_shortcut: bool) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, width)
        self.layer2 = nn.Linear(width, width)
        self.has_shortcut = has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Transform rows (N, width)."""
        y = self.layer2(F.relu(self.layer1(x)))
        return F.relu(y + x) if self.has_shortcut else F.relu(y)


class DeepCrossing(nn.Module):
    """Residual blocks over rows, and a linear head."""

    def __init__(self, *, has_shortcut: bool, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(64, width)
        self.blocks = nn.Sequential(
            *(CrossingBlock(width, has_shortcut=has_shortcut) for _ in range(depth))
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of rows (N, 64)."""
        return self.head(self.blocks(F.relu(self.stem(x))))


def level_mlp(fan_in: int, kinds: int, width: int = 96) -> nn.Sequential:
    """Return a perceptron of two hidden layers."""
    return nn.Sequential(
        nn.Linear(fan_in, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, kinds),
    )
