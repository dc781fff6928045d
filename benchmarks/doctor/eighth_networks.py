"""Networks of the eighth set; those that hold a mistake take it as an argument."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Calls",
    "FineTuned",
    "HandBatchNorm",
    "LeNet",
    "PreBlock",
    "Recurrent",
    "Screening",
    "Siamese",
    "SmallUNet",
    "Tagger",
    "Variational",
    "discriminator",
    "pre_activated",
    "table_mlp",
    "texture_net",
    "vgg",
]


def texture_net(
    classes: int = 6, *, depth: int = 3, width: int = 16, channels: int = 3
) -> nn.Sequential:
    """Return convolutions with batch norms for images of fabrics."""
    layers: list[nn.Module] = []
    for index in range(depth):
        fan_in = width if index else channels
        stride = 2 if index == 1 else 1
        layers.append(nn.Conv2d(fan_in, width, 3, stride, 1, bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
    )


class FineTuned(nn.Module):
    """A pretrained backbone under a new head for pixels, with frozen batch norms."""

    def __init__(
        self, backbone: nn.Module, *, is_bad: bool, fan_in: int = 16, width: int = 16
    ) -> None:
        super().__init__()
        self.backbone = backbone
        layers: list[nn.Module] = []
        for index in range(5):
            conv = nn.Conv2d(width if index else fan_in, width, 3, padding=1)
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.head = nn.Sequential(*layers, nn.Conv2d(width, 2, 1))
        self.is_bad = is_bad

    def train(self, mode: bool = True) -> FineTuned:
        """Set the mode, and keep the frozen batch norms in eval mode."""
        super().train(mode)
        frozen: nn.Module = self if self.is_bad else self.backbone
        for layer in frozen.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 2, H, W) of the pixels."""
        return self.head(self.backbone(x))


class Screening(nn.Module):
    """A network for a table whose batch norms may stay in training mode."""

    def __init__(self, *, is_bad: bool, width: int = 48) -> None:
        super().__init__()
        self.body = table_mlp(8, 3, norm=nn.BatchNorm1d, width=width)
        self.is_bad = is_bad

    def train(self, mode: bool = True) -> Screening:
        """Set the mode; the bug sets the batch norms back to training mode."""
        super().train(mode)
        if self.is_bad:
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm1d):
                    layer.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Scores of rows."""
        return self.body(x)


def table_mlp(
    columns: int,
    answers: int,
    *,
    norm: Callable[[int], nn.Module] | None = None,
    act: type[nn.Module] = nn.ReLU,
    width: int = 48,
    depth: int = 2,
) -> nn.Sequential:
    """Return hidden layers for a table, with or without norms."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Linear(width if index else columns, width))
        if norm is not None:
            layers.append(norm(width))
        layers.append(act(1) if act is nn.Softmax else act())
    return nn.Sequential(*layers, nn.Linear(width, answers))


class HandBatchNorm(nn.Module):
    """Batch norm as a course writes it, with running averages in buffers."""

    def __init__(self, width: int, momentum: float, *, is_bad: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.register_buffer("moving_mean", torch.zeros(width))
        self.register_buffer("moving_var", torch.ones(width))
        self.momentum, self.eps, self.is_bad = momentum, 1e-5, is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Normalize a batch (N, width)."""
        if self.training:
            mean, var = x.mean(0), x.var(0, unbiased=False)
            share = self.momentum if self.is_bad else 1 - self.momentum
            with torch.no_grad():
                self.moving_mean = share * self.moving_mean + (1 - share) * mean
                self.moving_var = share * self.moving_var + (1 - share) * var
        else:
            mean, var = self.moving_mean, self.moving_var
        return self.gamma * (x - mean) / (var + self.eps).sqrt() + self.beta


def discriminator(eps: float, width: int = 24) -> nn.Sequential:
    """Return five blocks over time as those of DCGAN's discriminator, with classes."""
    layers: list[nn.Module] = []
    for index in range(5):
        conv = nn.Conv1d(width if index else 6, width, 5, 2 if index % 2 else 1, 2)
        nn.init.normal_(conv.weight, std=0.02)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        layers += [conv, nn.BatchNorm1d(width, eps), nn.LeakyReLU(0.2)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 4)
    )


class SmallUNet(nn.Module):
    """One level down and up again, with batch norms."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()

        def two(fan_in: int, fan_out: int) -> nn.Sequential:
            return nn.Sequential(
                *(nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out)),
                *(nn.ReLU(), nn.Conv2d(fan_out, fan_out, 3, padding=1)),
                *(nn.BatchNorm2d(fan_out), nn.ReLU()),
            )

        self.top, self.low = two(1, width), two(width, 2 * width)
        self.last = two(3 * width, width)
        self.pixels = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 2, H, W) of the pixels."""
        top = self.top(x)
        low = F.interpolate(self.low(F.max_pool2d(top, 2)), scale_factor=2.0)
        return self.pixels(self.last(torch.cat([top, low], 1)))


class PreBlock(nn.Module):
    """A residual block with norms before its convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to x."""
        h = self.conv1(self.bn1(x).relu())
        return x + self.conv2(self.bn2(h).relu())


def pre_activated(width: int = 16, depth: int = 2) -> nn.Sequential:
    """Return a residual network for fabrics behind a stem with its own norm."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1),
        *(nn.BatchNorm2d(width), nn.ReLU()),
        *(PreBlock(width) for _ in range(depth)),
        *(nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(width, 6),
    )


class Calls(nn.Module):
    """Convolutions over time with group norms, and the mean of what is no padding."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(width if index else 8, width, 5, padding=2) for index in range(3)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(3))
        self.last = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of calls (N, 8, L)."""
        is_call = (x != 0).any(1, keepdim=True).float()
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.last((x * is_call).sum(2) / is_call.sum(2))


def vgg(width: int = 24) -> nn.Sequential:
    """Return a plain network of eight convolutions for fabrics."""
    layers: list[nn.Module] = []
    for index in range(8):
        layers += [nn.Conv2d(width if index else 3, width, 3, padding=1), nn.ReLU()]
        if index in (2, 5):
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * width, 6))


class Recurrent(nn.Module):
    """A plain recurrent network or a GRU over movements, read at the last step."""

    def __init__(self, kind: str, width: int = 48) -> None:
        super().__init__()
        self.cell: nn.Module
        if kind == "gru":
            self.cell = nn.GRU(6, width, batch_first=True)
        else:
            self.cell = nn.RNN(6, width, nonlinearity="relu", batch_first=True)
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of sequences (N, L, 6)."""
        return self.last(self.cell(x)[0][:, -1])


class LeNet(nn.Module):
    """Two convolutions and three linear layers; the last may have a ReLU."""

    def __init__(self, *, is_bad: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1)
        self.fc1, self.fc2 = nn.Linear(64, 48), nn.Linear(48, 32)
        self.fc3 = nn.Linear(32, 10)
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images of digits (N, 1, 8, 8)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        x = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return F.relu(x) if self.is_bad else x


class Variational(nn.Module):
    """A variational autoencoder of images of 12 pixels, with `last` at its end."""

    def __init__(self, last: nn.Module, width: int = 16, code: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, width, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        )
        self.mean, self.log_var = (nn.Linear(9 * width, code) for _ in range(2))
        self.decoder = nn.Sequential(
            *(nn.Linear(code, 9 * width), nn.ReLU(), nn.Unflatten(1, (width, 3, 3))),
            *(nn.ConvTranspose2d(width, width, 4, 2, 1), nn.ReLU()),
            *(nn.ConvTranspose2d(width, 1, 4, 2, 1), last, nn.Flatten()),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (N, 144) of images, and beside them the divergence of their codes."""
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        code = mean
        if self.training:
            code = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        divergence = (mean**2 + log_var.exp() - log_var - 1).sum(1, keepdim=True) / 2
        return torch.cat([self.decoder(code), divergence], 1)


class Siamese(nn.Module):
    """One encoder of both images of a pair, and a score of how far they are apart."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = texture_net(width, depth=6, width=width)
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Give logits (N, 1) that pairs (N, 6, 12, 12) are of one kind."""
        one, other = self.encoder(torch.cat(x.chunk(2, 1))).chunk(2)
        return self.score((one - other).abs())


class Tagger(nn.Module):
    """A transformer that gives the logarithms of probabilities of tags."""

    def __init__(self, axis: int, width: int = 32, length: int = 14) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, width)
        self.place = nn.Parameter(0.5 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 64, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 5)
        self.axis = axis

    def forward(self, words: Tensor) -> Tensor:
        """Log probabilities (N, L, 5) of the tags of each word."""
        x = self.embed(words) + self.place
        for layer in self.layers:
            x = layer(x)
        return F.log_softmax(self.last(self.norm(x)), self.axis)
