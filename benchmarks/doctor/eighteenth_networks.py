"""Networks of the eighteenth set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "FCN",
    "VAE",
    "ActivityNet",
    "BeatNet",
    "ExposureNet",
    "GraphNet",
    "Hourglass",
    "MaskedGraphNet",
    "NormLSTM",
    "PointNet",
    "ResNet",
    "TabNet",
]


def conv(inputs: int, width: int, stride: int = 1, **norm: Any) -> nn.Sequential:
    """Return convolution, batch norm and rectifier."""
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width, **norm),
        nn.ReLU(inplace=True),
    )


class Hourglass(nn.Module):
    """Goes down and up again, with a way around."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv(1, width)
        self.around = conv(width, width)
        self.down = conv(width, 2 * width, 2)
        self.inner = conv(2 * width, 2 * width)
        self.up = conv(2 * width, width)
        self.heat = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return heat maps of two joints."""
        x = self.stem(x)
        low = self.up(self.inner(self.down(x)))
        return self.heat(self.around(x) + F.interpolate(low, scale_factor=2.0))


class FCN(nn.Module):
    """Scores at a quarter of the size, scaled up, and a skip."""

    def __init__(self, width: int = 16, kinds: int = 3) -> None:
        super().__init__()
        wide = 2 * width
        self.conv1 = nn.Sequential(conv(3, width), conv(width, width))
        self.conv2 = nn.Sequential(conv(width, wide, 2), conv(wide, wide))
        self.conv3 = nn.Sequential(conv(wide, wide, 2), conv(wide, wide))
        self.score2 = nn.Conv2d(wide, kinds, 1)
        self.score3 = nn.Conv2d(wide, kinds, 1)
        self.score1 = nn.Conv2d(width, kinds, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, kinds, height, width)."""
        a = self.conv1(x)
        b = self.conv2(a)
        h = F.interpolate(self.score3(self.conv3(b)), scale_factor=2.0)
        h = F.interpolate(h + self.score2(b), scale_factor=2.0)
        return h + self.score1(a)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next block."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, blocks, and a linear layer."""

    def __init__(self, kinds: int = 6, width: int = 16, blocks: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        inputs = width
        for outputs, stride in [(width, 1), (2 * width, 2), (2 * width, 2)]:
            for index in range(blocks):
                layers.append(BasicBlock(inputs, outputs, 1 if index else stride))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(2 * width, kinds)

    def features(self, x: Tensor) -> Tensor:
        """Return a vector for each image."""
        return self.layers(F.relu(self.bn1(self.conv1(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds."""
        return self.fc(self.features(x))


class GatedLayer(nn.Module):
    """Linear layer, batch norm and gated linear unit."""

    def __init__(self, inputs: int, width: int, momentum: float) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, 2 * width, bias=False)
        self.bn = nn.BatchNorm1d(2 * width, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the next layer."""
        return F.glu(self.bn(self.fc(x)))


class TabNet(nn.Module):
    """Decides in steps, each of which attends to some of the columns."""

    def __init__(self, momentum: float = 0.1, width: int = 24, steps: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(12, momentum=momentum)
        self.shared = GatedLayer(12, width, momentum)
        self.own = nn.ModuleList(
            GatedLayer(width, width, momentum) for _ in range(steps)
        )
        self.attention = nn.ModuleList(nn.Linear(width, 12) for _ in range(steps))
        self.head = nn.Linear(width, 3)

    def forward(self, category: Tensor, figures: Tensor) -> Tensor:
        """Return the scores of three kinds of claims."""
        x = self.norm(torch.cat([self.embedding(category), figures], 1))
        h = self.shared(x)
        decision = torch.zeros_like(h)
        for own, attention in zip(self.own, self.attention, strict=True):
            chosen = x * (1 + attention(h).softmax(1))
            hidden = self.shared(chosen)
            h = (own(hidden) + hidden) * 0.5**0.5
            decision = decision + F.relu(h)
        return self.head(decision)


class PointNet(nn.Module):
    """Layers shared by all points, the maximum, and layers for the cloud."""

    def __init__(self, width: int = 32, kinds: int = 5) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv1d(3, width, 1),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Conv1d(width, 4 * width, 1),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(),
        )
        self.fc1 = nn.Linear(4 * width, 2 * width)
        self.bn1 = nn.BatchNorm1d(2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.bn2 = nn.BatchNorm1d(width)
        self.fc3 = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds of (N, 3, points)."""
        x = self.mlp(x).amax(2)
        x = F.relu(self.bn1(self.fc1(x)))
        x = F.relu(self.bn2(self.fc2(x)))
        return self.fc3(x)


class GraphNet(nn.Module):
    """Graph convolutions over padded graphs, each with a batch norm, and the mean."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        pairs = [(8, width), (width, width), (width, width)]
        self.own = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.near = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for _, b in pairs)
        self.head = nn.Linear(width, 1)

    def normalized(self, norm: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
        """Give all atoms to a batch norm."""
        return norm(h.flatten(0, 1)).view_as(h)

    def readout(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return a vector for each graph."""
        return h.mean(1)

    def forward(self, x: Tensor, bonds: Tensor, mask: Tensor) -> Tensor:
        """Return a property of each graph (N,)."""
        for own, near, norm in zip(self.own, self.near, self.norms, strict=True):
            h = own(x) + near(bonds @ x)
            x = F.relu(self.normalized(norm, h, mask))
        return self.head(self.readout(x, mask)).squeeze(1)


class MaskedGraphNet(GraphNet):
    """The same network, which leaves out atoms that are not there."""

    def normalized(self, norm: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
        """Give the atoms that are there to a batch norm."""
        there = mask.bool()
        out = torch.zeros_like(h)
        out[there] = norm(h[there])
        return out

    def readout(self, h: Tensor, mask: Tensor) -> Tensor:
        """Return a vector for each graph."""
        return (h * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)


class BeatNet(nn.Module):
    """Residual convolutions over time."""

    def __init__(self, width: int = 16, kinds: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(1, width, 7, 2, 3), nn.BatchNorm1d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, 5, padding=2),
                nn.BatchNorm1d(width),
                nn.ReLU(),
                nn.Conv1d(width, width, 5, padding=2),
                nn.BatchNorm1d(width),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the kinds of beats."""
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.head(x.amax(2))


class ActivityNet(nn.Module):
    """Convolutions over six channels of a watch, and a GRU."""

    def __init__(self, width: int = 24, kinds: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, width, 5, padding=2)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, 5, 2, 2)
        self.bn2 = nn.BatchNorm1d(width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, kinds)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the activities."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        h, _ = self.gru(x.mT)
        return self.out(h[:, -1])


class ExposureNet(nn.Module):
    """Convolutions with a norm after each, the mean, and one number."""

    def __init__(self, norm: type[nn.Module], width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in [(3, width, 1), (width, 32, 2), (32, 32, 2)]:
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride, 1),
                norm(outputs),
                nn.LeakyReLU(0.2),
            ]
        self.model = nn.Sequential(*layers)
        self.fc = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return how to correct each photograph."""
        return self.fc(self.model(x).mean((2, 3)))


class NormLSTM(nn.Module):
    """An LSTM whose inputs and states go through batch norms at each step.

    With `steps` each step has norms of its own, else all share the same.
    """

    def __init__(self, inputs: int, width: int = 32, steps: int = 1) -> None:
        super().__init__()
        self.width, self.steps = width, steps
        self.ih = nn.Linear(inputs, 4 * width, bias=False)
        self.hh = nn.Linear(width, 4 * width, bias=False)
        self.bias = nn.Parameter(torch.zeros(4 * width))
        self.bn_ih = nn.ModuleList(nn.BatchNorm1d(4 * width) for _ in range(steps))
        self.bn_hh = nn.ModuleList(nn.BatchNorm1d(4 * width) for _ in range(steps))
        self.bn_c = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(steps))
        for norm in [*self.bn_ih, *self.bn_hh, *self.bn_c]:
            nn.init.constant_(norm.weight, 0.3)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of digits, read row by row."""
        h = x.new_zeros(len(x), self.width)
        c = h
        for time in range(x.shape[1]):
            own = min(time, self.steps - 1)
            gates = self.bn_ih[own](self.ih(x[:, time])) + self.bias
            gates = gates + self.bn_hh[own](self.hh(h))
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(self.bn_c[own](c))
        return self.fc(h)


class VAE(nn.Module):
    """A variational autoencoder of digits."""

    def __init__(self, width: int = 128, code: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, width)
        self.fc21 = nn.Linear(width, code)
        self.fc22 = nn.Linear(width, code)
        self.fc3 = nn.Linear(code, width)
        self.fc4 = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image again, and the mean and log variance of its code."""
        h = F.relu(self.fc1(x))
        mu, logvar = self.fc21(h), self.fc22(h)
        z = mu
        if self.training:
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar
