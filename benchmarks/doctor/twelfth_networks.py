"""Networks of the twelfth set; those that hold a mistake take it as an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Adapted",
    "CloudNet",
    "DeepNet",
    "FrameNet",
    "HeartNet",
    "MarkNet",
    "PlainNet",
    "RecurrentNorm",
    "Restorer",
    "RowNet",
    "ScanNet",
    "SignalNet",
    "TasteNet",
    "TokenNet",
    "curve_mlp",
    "machine_mlp",
]


def _block(fan_in: int, fan_out: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution, a batch norm and a rectifier."""
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(fan_out),
        nn.ReLU(inplace=True),
    )


class MarkNet(nn.Module):
    """Features of convolutions and batch norms, and a linear head."""

    def __init__(self, kinds: int = 8, width: int = 12) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(1, width),
            _block(width, 2 * width, 2),
            _block(2 * width, 2 * width),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(8 * width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, 1, 14, 14)."""
        return self.head(self.features(x))


class PlainNet(nn.Module):
    """Convolutions, pools and two linear layers, as in a first course."""

    def __init__(self, kinds: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.fc1 = nn.Linear(24 * 9, 64)
        self.fc2 = nn.Linear(64, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, 1, 14, 14)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class FrameNet(nn.Module):
    """Two convolutions and a mean; its norms may do without running statistics."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            norm(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, 1),
            norm(16),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of frames (N, 3, 10, 10)."""
        return self.classifier(self.body(x).mean((2, 3)))


class Restorer(nn.Module):
    """A network that restores images, beside frozen features that judge its work."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 1, 3, padding=1),
        )
        self.features = features.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the image that is restored."""
        return self.features(self.net(x))


class ScanNet(nn.Module):
    """Convolutions over volumes, down to one value per channel."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, out in enumerate((width, 2 * width, 4 * width)):
            fan_in = (1, width, 2 * width)[index]
            layers += [nn.Conv3d(fan_in, out, 3, 2, 1), nn.BatchNorm3d(out), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.fc = nn.Linear(4 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of scans (N, 1, 8, 8, 8)."""
        return self.fc(self.encoder(x).flatten(1))


class CloudNet(nn.Module):
    """PointNet: layers of each point, a maximum, and layers of the cloud."""

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 32, 1)
        self.conv2 = nn.Conv1d(32, 64, 1)
        self.fc1 = nn.Linear(64, 48)
        self.fc2 = nn.Linear(48, 48)
        self.fc3 = nn.Linear(48, 3)
        self.bn1, self.bn2 = nn.BatchNorm1d(32), nn.BatchNorm1d(64)
        self.bn3, self.bn4 = nn.BatchNorm1d(48), nn.BatchNorm1d(48)
        for norm in (self.bn1, self.bn2, self.bn3, self.bn4):
            norm.momentum = momentum

    def forward(self, x: Tensor) -> Tensor:
        """Axes of clouds (N, 3, P)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x)).amax(2)
        x = F.relu(self.bn3(self.fc1(x)))
        return self.fc3(F.relu(self.bn4(self.fc2(x))))


class RecurrentNorm(nn.Module):
    """Batch norm of a recurrence: one for all steps, or one for each."""

    def __init__(self, width: int, steps: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(steps))

    def forward(self, x: Tensor, step: int) -> Tensor:
        """Normalize what a step gives."""
        return self.norms[min(step, len(self.norms) - 1)](x)


class RowNet(nn.Module):
    """An LSTM with batch norms of its input, its recurrence and its cell."""

    def __init__(self, *, is_shared: bool, width: int = 48) -> None:
        super().__init__()
        steps = 1 if is_shared else 16
        self.width = width
        self.weight_ih = nn.Linear(4, 4 * width, bias=False)
        self.weight_hh = nn.Linear(width, 4 * width, bias=False)
        self.bias = nn.Parameter(torch.zeros(4 * width))
        self.bn_ih = RecurrentNorm(4 * width, steps)
        self.bn_hh = RecurrentNorm(4 * width, steps)
        self.bn_c = RecurrentNorm(width, steps)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of digits as parts of rows (N, 16, 4)."""
        h = c = x.new_zeros(len(x), self.width)
        for step in range(x.shape[1]):
            gates = self.bn_ih(self.weight_ih(x[:, step]), step)
            gates = gates + self.bn_hh(self.weight_hh(h), step) + self.bias
            i, f, o, g = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.bn_c(c, step).tanh()
        return self.fc(h)


class HeartNet(nn.Module):
    """Convolutions over time and dense layers; dropout is in front of the norms."""

    def __init__(self, dropout: float) -> None:
        super().__init__()

        def block(fan_in: int, fan_out: int) -> list[nn.Module]:
            return [
                nn.Conv1d(fan_in, fan_out, 5, 2, 2),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.BatchNorm1d(fan_out),
            ]

        self.net = nn.Sequential(
            *block(2, 16),
            *block(16, 16),
            *block(16, 16),
            nn.Flatten(),
            nn.Linear(96, 48),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.BatchNorm1d(48),
            nn.Linear(48, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Answers for traces (N, 2, 48)."""
        return self.net(x)


class SignalNet(nn.Module):
    """Convolutions over a signal, and a head with an activation behind it."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 24, 7, padding=3)
        self.conv2 = nn.Conv1d(24, 32, 5, 2, 2)
        self.fc = nn.Linear(32, 10)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Answers for signals (N, 2, T)."""
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).amax(2)
        return self.last(self.fc(x))


class _Block(nn.Module):
    """A block of a transformer, with its norms in front."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend, and transform each token."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TokenNet(nn.Module):
    """Two blocks over tokens, a last norm, and the mean of all places."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of sequences (N, T)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x).mean(1))


class DeepNet(nn.Module):
    """Many linear layers and rectifiers, without norms or skips."""

    def __init__(self, depth: int = 16, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of digits (N, 64)."""
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.out(x)


class Adapter(nn.Module):
    """A frozen linear layer and a product of two small matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add what was adapted to what was there."""
        return self.base(x) + 2 * self.lora_b(self.lora_a(x))


class Adapted(nn.Module):
    """Three linear layers of a network that was trained, each with an adapter."""

    def __init__(self, trained: nn.Sequential) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(Adapter(m) if isinstance(m, nn.Linear) else m for m in trained)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of digits (N, 64)."""
        return self.net(x)


class TasteNet(nn.Module):
    """Vectors of readers and books, and a perceptron over both."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.book = nn.Embedding(60, 8), nn.Embedding(40, 8)
        self.mlp = nn.Sequential(
            nn.Linear(16, 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.ReLU(),
            nn.Linear(64, 1),
        )

    def forward(self, pairs: Tensor) -> Tensor:
        """Answers for pairs of reader and book (N, 2)."""
        return self.mlp(
            torch.cat([self.reader(pairs[:, 0]), self.book(pairs[:, 1])], 1)
        )


def machine_mlp() -> nn.Sequential:
    """Return a perceptron with batch norms for states of machines."""
    return nn.Sequential(
        nn.Linear(10, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Linear(48, 48),
        nn.BatchNorm1d(48),
        nn.ReLU(),
        nn.Linear(48, 6),
    )


def curve_mlp() -> nn.Sequential:
    """Return a perceptron for a curve."""
    return nn.Sequential(
        nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )
