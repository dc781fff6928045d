"""Networks of the eleventh set; those that hold a mistake take it as an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "BirdNet",
    "Detector",
    "EngineNet",
    "FirstLetter",
    "FlatNet",
    "GlyphNet",
    "LeNet",
    "LeafNet",
    "LoadNet",
    "NextLetter",
    "PopulationNorm",
    "PulseNet",
    "Replicas",
    "ReviewNet",
    "SegNet",
    "StepNet",
    "StrokeNet",
    "TourNet",
    "mixture_mlp",
    "patient_mlp",
    "room_mlp",
]


class PopulationNorm(nn.Module):
    """Batch norm of images, whose population statistics are set by `estimate`."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.seen: list[tuple[Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the batch, or by the population in eval mode."""
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            if self.seen is not None:
                count = x.numel() // x.shape[1]
                self.seen.append((mean.detach(), var.detach() * count / (count - 1)))
        scale = self.weight / (var + self.eps).sqrt()
        shift = self.bias - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def estimate(self) -> None:
        """Take the averages of what was seen as those of the population."""
        assert self.seen
        means, variances = zip(*self.seen, strict=True)
        self.mean.copy_(torch.stack(means).mean(0))
        self.var.copy_(torch.stack(variances).mean(0))
        self.seen = None


class StrokeNet(nn.Module):
    """Two convolutions and two linear layers, with a norm behind each convolution."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.bn2 = norm(2 * width)
        self.fc1 = nn.Linear(2 * width * 9, 48)
        self.fc2 = nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, 1, 12, 12)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class SeriesNorm(nn.Module):
    """Batch norm of series, written by hand; inference is an affine map."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, is_bad: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1))
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the batch, or by running statistics in eval mode."""
        if self.training:
            mean = x.mean((0, 2), keepdim=True)
            var = x.var((0, 2), keepdim=True, unbiased=False)
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var, 0.1)
            return self.gamma * (x - mean) / (var + 1e-5).sqrt() + self.beta
        below = self.running_var + 1e-5
        a = self.gamma / (below if self.is_bad else below.sqrt())
        return a * x + (self.beta - a * self.running_mean)


class StepNet(nn.Module):
    """Three convolutions over time, with a norm behind each."""

    def __init__(self, *, is_bad: bool, width: int = 20) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, width, 5, padding=2)
        self.bn1 = SeriesNorm(width, is_bad=is_bad)
        self.conv2 = nn.Conv1d(width, width, 5, 2, 2)
        self.bn2 = SeriesNorm(width, is_bad=is_bad)
        self.conv3 = nn.Conv1d(width, width, 5, 2, 2)
        self.bn3 = SeriesNorm(width, is_bad=is_bad)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of windows (N, 3, L)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(x.mean(2))


class Replicas(nn.Module):
    """A network on several devices, each with its part of the batch.

    Each device has batch statistics of its own, and the first has the buffers.
    """

    def __init__(self, network: nn.Module, devices: int = 4) -> None:
        super().__init__()
        self.network = network
        self.devices = devices

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the parts, one behind the other."""
        if not self.training:
            return self.network(x)
        outputs = []
        kept: list[Tensor] = []
        for part in x.chunk(self.devices):
            outputs.append(self.network(part))
            if kept:
                for buffer, value in zip(self.network.buffers(), kept, strict=True):
                    buffer.data.copy_(value)
            else:
                kept = [buffer.clone() for buffer in self.network.buffers()]
        return torch.cat(outputs)


def patient_mlp(width: int = 32) -> nn.Sequential:
    """Return a perceptron with batch norms for eleven columns."""
    return nn.Sequential(
        *(nn.Linear(11, width), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
        nn.Linear(width, 3),
    )


class TourNet(nn.Module):
    """A GRU over stops, the sum of its states, a batch norm and a head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, width, batch_first=True)
        self.bn = nn.BatchNorm1d(width)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, 1)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """Return times of tours (N, L, 3), of which some stops are padding."""
        states, _ = self.rnn(x)
        total = (states * is_real[:, :, None]).sum(1)
        return self.fc2(F.relu(self.fc1(self.bn(total))))


class ReviewNet(nn.Module):
    """A transformer encoder and the mean of its words."""

    def __init__(self, *, is_masked: bool, width: int = 32) -> None:
        super().__init__()
        self.is_masked = is_masked
        self.embedding = nn.Embedding(40, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 1)

    def forward(self, words: Tensor, is_real: Tensor) -> Tensor:
        """Ratings of texts (N, L)."""
        x = self.embedding(words)
        if not self.is_masked:
            return self.fc(self.norm(self.encoder(x)).mean(1))
        x = self.norm(self.encoder(x, src_key_padding_mask=~is_real))
        weight = is_real[:, :, None].float()
        return self.fc((x * weight).sum(1) / weight.sum(1))


class Whitening(nn.Module):
    """Remove correlations of the columns: batch norm with a whole covariance."""

    running_mean: Tensor
    running_cov: Tensor

    def __init__(self, columns: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(columns))
        self.register_buffer("running_cov", torch.eye(columns))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the inverse root of the covariance."""
        mean, cov = self.running_mean, self.running_cov
        if self.training:
            mean, cov = x.mean(0), x.T.cov()
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_cov.lerp_(cov, 0.1)
        values, vectors = torch.linalg.eigh(cov)
        inverse = vectors * (values.clamp_min(0) + self.eps).rsqrt() @ vectors.T
        return (x - mean) @ inverse


class BirdNet(nn.Module):
    """A whitening of the input, and a perceptron."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.whiten = Whitening(24)
        self.fc1 = nn.Linear(24, width)
        self.fc2 = nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of sounds (N, 24)."""
        return self.fc2(F.relu(self.fc1(self.whiten(x))))


class EngineNet(nn.Module):
    """Convolutions over time with norms of a given kind."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 16) -> None:
        super().__init__()
        self.norm0 = norm(2)
        self.conv1 = nn.Conv1d(2, width, 7, 2, 3)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv1d(width, 2 * width, 5, 2, 2)
        self.norm2 = norm(2 * width)
        self.fc = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of windows (N, 2, L)."""
        x = F.relu(self.norm1(self.conv1(self.norm0(x))))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.fc(x.mean(2))


def mixture_mlp(dropout: float, width: int = 64) -> nn.Sequential:
    """Return a perceptron for eight columns; dropout stands before the norms."""
    layers: list[nn.Module] = []
    for index in range(3):
        layers += [nn.Linear(width if index else 8, width), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.BatchNorm1d(width))
    return nn.Sequential(*layers, nn.Linear(width, 1))


class ColumnNorm(nn.Module):
    """Standardize a table by running statistics, of each column or of all together."""

    running_mean: Tensor
    running_std: Tensor

    def __init__(self, columns: int, *, is_bad: bool) -> None:
        super().__init__()
        size = 1 if is_bad else columns
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_std", torch.ones(size))
        self.gamma = nn.Parameter(torch.ones(columns))
        self.beta = nn.Parameter(torch.zeros(columns))
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the batch, or by running statistics in eval mode."""
        mean, std = self.running_mean, self.running_std
        if self.training:
            mean, std = x.mean(0), x.std(0)
            if self.is_bad:
                mean, std = x.mean()[None], x.std()[None]
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.05)
                self.running_std.lerp_(std, 0.05)
        return self.gamma * (x - mean) / (std + 1e-5) + self.beta


class FlatNet(nn.Module):
    """A norm of the columns, and a perceptron."""

    def __init__(self, *, is_bad: bool, width: int = 48) -> None:
        super().__init__()
        self.norm = ColumnNorm(7, is_bad=is_bad)
        self.fc1 = nn.Linear(7, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Prices of flats (N, 7)."""
        x = F.relu(self.fc1(self.norm(x)))
        return self.fc3(F.relu(self.fc2(x)))


class GlyphNet(nn.Module):
    """Four convolutions with batch norms, and a global maximum."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(2 * width)
        self.conv4 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        return self.fc(x.amax((2, 3)))


class SegNet(nn.Module):
    """Convolutions that say of each pixel whether it is of a block."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(width)
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 2, H, W) of pixels."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.out(F.relu(self.bn3(self.conv3(x))))


class LeafNorm(nn.Module):
    """Batch norm of a table, written by hand, with a running average or a sum."""

    moving_mean: Tensor
    moving_var: Tensor

    def __init__(self, columns: int, *, is_bad: bool, momentum: float = 0.9) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(columns))
        self.beta = nn.Parameter(torch.zeros(columns))
        self.register_buffer("moving_mean", torch.zeros(columns))
        self.register_buffer("moving_var", torch.ones(columns))
        self.momentum = momentum
        self.share = 1.0 if is_bad else 1 - momentum

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the batch, or by moving statistics in eval mode."""
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            with torch.no_grad():
                self.moving_mean.mul_(self.momentum).add_(self.share * mean)
                self.moving_var.mul_(self.momentum).add_(self.share * var)
        return self.gamma * (x - mean) / (var + 1e-5).sqrt() + self.beta


class LeafNet(nn.Module):
    """A perceptron with norms written by hand."""

    def __init__(self, *, is_bad: bool, width: int = 40) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, width)
        self.bn1 = LeafNorm(width, is_bad=is_bad)
        self.fc2 = nn.Linear(width, width)
        self.bn2 = LeafNorm(width, is_bad=is_bad)
        self.fc3 = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of leaves (N, 12)."""
        x = torch.tanh(self.bn1(self.fc1(x)))
        x = torch.tanh(self.bn2(self.fc2(x)))
        return self.fc3(x)


class LeNet(nn.Module):
    """The first network of courses: convolutions and linear layers with sigmoids."""

    def __init__(self, *, is_normed: bool, kinds: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.fc1 = nn.Linear(24 * 9, 64)
        self.fc2 = nn.Linear(64, 48)
        self.fc3 = nn.Linear(48, kinds)
        if is_normed:
            self.bn1: nn.Module = nn.BatchNorm2d(12)
            self.bn2: nn.Module = nn.BatchNorm2d(24)
            self.bn3: nn.Module = nn.BatchNorm1d(64)
            self.bn4: nn.Module = nn.BatchNorm1d(48)
        self.is_normed = is_normed

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images (N, 1, 12, 12)."""

        def norm(number: int, h: Tensor) -> Tensor:
            return getattr(self, f"bn{number}")(h) if self.is_normed else h

        x = F.avg_pool2d(torch.sigmoid(norm(1, self.conv1(x))), 2)
        x = F.avg_pool2d(torch.sigmoid(norm(2, self.conv2(x))), 2)
        x = torch.sigmoid(norm(3, self.fc1(x.flatten(1))))
        x = torch.sigmoid(norm(4, self.fc2(x)))
        return self.fc3(x)


class PulseNet(nn.Module):
    """Three convolutions over time; all parameters are a constant, or as torch's."""

    def __init__(self, constant: float | None, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, width, 5, padding=2)
        self.conv2 = nn.Conv1d(width, width, 5, 2, 2)
        self.conv3 = nn.Conv1d(width, 2 * width, 5, 2, 2)
        self.fc = nn.Linear(2 * width, 5)
        if constant is not None:
            for module in (self.conv1, self.conv2, self.conv3, self.fc):
                nn.init.constant_(module.weight, constant)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of beats (N, 1, L)."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        return self.fc(x.amax(2))


class NextLetter(nn.Module):
    """Vectors of letters and two hidden layers of tanh, with weights drawn by hand."""

    def __init__(self, *, is_scaled: bool, width: int = 100, size: int = 10) -> None:
        super().__init__()
        fans = [4 * size, width, width]
        gains = [(5 / 3) / fan**0.5 if is_scaled else 1.0 for fan in fans]
        self.C = nn.Parameter(torch.randn(27, size))
        self.W1 = nn.Parameter(torch.randn(fans[0], width) * gains[0])
        self.b1 = nn.Parameter(torch.zeros(width))
        self.W2 = nn.Parameter(torch.randn(fans[1], width) * gains[1])
        self.b2 = nn.Parameter(torch.zeros(width))
        last = 0.1 * gains[2] if is_scaled else 1.0
        self.W3 = nn.Parameter(torch.randn(fans[2], 27) * last)
        self.b3 = nn.Parameter(torch.zeros(27))
        self.tanh1, self.tanh2 = nn.Tanh(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the letter behind four letters (N, 4)."""
        h = self.tanh1(self.C[x].flatten(1) @ self.W1 + self.b1)
        h = self.tanh2(h @ self.W2 + self.b2)
        return h @ self.W3 + self.b3


class LoadNet(nn.Module):
    """Dilated convolutions over time without norms."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, padding=2, dilation=2)
        self.conv3 = nn.Conv1d(width, width, 3, padding=4, dilation=4)
        self.fc1 = nn.Linear(width * 8, 48)
        self.fc2 = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Forecasts (N, 4) from windows (N, 2, 32)."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        return self.fc2(F.relu(self.fc1(x[:, :, -8:].flatten(1))))


class Detector(nn.Module):
    """Convolutions, and two heads: the class and the box of a thing."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.fc1 = nn.Linear(2 * width * 16, 64)
        self.kind = nn.Linear(64, 4)
        self.box = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of four classes and four edges (N, 8)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return torch.cat([self.kind(x), self.box(x)], 1)


class FirstLetter(nn.Module):
    """A GRU cell in a loop of its own, and a head on the last state."""

    def __init__(self, *, is_detached: bool, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 12)
        self.cell = nn.GRUCell(12, width)
        self.fc = nn.Linear(width, 6)
        self.is_detached = is_detached

    def forward(self, x: Tensor) -> Tensor:
        """Scores of letters (N, L)."""
        h = torch.zeros(len(x), self.cell.hidden_size)
        for letters in self.embedding(x).unbind(1):
            h = self.cell(letters, h.detach() if self.is_detached else h)
        return self.fc(h)


def room_mlp(width: int = 48) -> nn.Sequential:
    """Return a perceptron for six columns."""
    return nn.Sequential(
        *(nn.Linear(6, width), nn.ReLU()),
        *(nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 1),
    )
