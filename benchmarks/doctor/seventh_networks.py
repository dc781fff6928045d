"""Networks of the seventh set; those that hold a mistake take it as an argument."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Branches",
    "Coder",
    "Columns",
    "HandNorm",
    "LateBlock",
    "Ranker",
    "Tagger",
    "UNet",
    "conv_stack",
    "deep_relu",
    "dropped_mlp",
    "mobile_net",
    "residual_net",
    "signal_net",
    "small_mlp",
    "tanh_convs",
]


class Ranker(nn.Module):
    """One score of each image of a pair by the same network, and their difference."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(3):
            layers.append(nn.Conv2d(width if index else 1, width, 3, padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Give logits (N,) that the first of each pair is the sharper one."""
        first, second = (self.score(self.encoder(x[:, i : i + 1])) for i in range(2))
        return (first - second)[:, 0]


def dropped_mlp(*, is_before: bool, p: float, width: int = 64) -> nn.Sequential:
    """Return a regression with dropout before each batch norm, or behind the last."""
    layers: list[nn.Module] = []
    for index in range(3):
        layers += [nn.Linear(width if index else 10, width), nn.ReLU()]
        if is_before:
            layers.append(nn.Dropout(p))
        layers.append(nn.BatchNorm1d(width))
    if not is_before:
        layers.append(nn.Dropout(p))
    return nn.Sequential(*layers, nn.Linear(width, 1))


def small_mlp(
    columns: int, classes: int, *first: nn.Module, width: int = 48
) -> nn.Sequential:
    """Return two hidden layers behind the modules `first`."""
    return nn.Sequential(
        *first,
        *(nn.Linear(columns, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, classes),
    )


class LateBlock(nn.Module):
    """A residual block whose last scale starts at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to x."""
        h = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(h))).relu()


def residual_net(width: int = 20, depth: int = 3) -> nn.Sequential:
    """Return a residual network for images of digits whose blocks start as nothing."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False),
        *(nn.BatchNorm2d(width), nn.ReLU()),
        *(LateBlock(width) for _ in range(depth)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
    )


def conv_stack(
    norm: Callable[[int], nn.Module] | None, width: int = 24
) -> nn.Sequential:
    """Return a plain network of six convolutions for images of digits."""
    layers: list[nn.Module] = []
    for index in range(6):
        conv = nn.Conv2d(
            width if index else 1, width, 3, 2 if index in (2, 4) else 1, 1
        )
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        layers.append(conv)
        if norm is not None:
            layers.append(norm(width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width, 10))


class UNet(nn.Module):
    """Two levels down and up again, with batch norms, for images of 16 pixels."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()

        def two(fan_in: int, fan_out: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for fan in (fan_in, fan_out):
                layers.append(nn.Conv2d(fan, fan_out, 3, padding=1, bias=False))
                layers += [nn.BatchNorm2d(fan_out), nn.ReLU()]
            return nn.Sequential(*layers)

        self.top, self.low = two(1, width), two(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.last = two(2 * width, width)
        self.classes = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 2, 16, 16) of the pixels."""
        top = self.top(x)
        low = self.up(self.low(F.max_pool2d(top, 2)))
        return self.classes(self.last(torch.cat([top, low], 1)))


def mobile_net(eps: float, width: int = 24, depth: int = 4) -> nn.Sequential:
    """Return depthwise separable convolutions for images of digits, drawn as in TF."""
    layers: list[nn.Module] = []
    fan_in = 1
    for index in range(depth):
        stride = 2 if index == depth // 2 else 1
        layers.append(nn.Conv2d(fan_in, width, 1, bias=False))
        layers += [nn.BatchNorm2d(width, eps=eps), nn.ReLU6()]
        layers.append(nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False))
        layers += [nn.BatchNorm2d(width, eps=eps), nn.ReLU6()]
        fan_in = width
    model = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)
    )
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
    return model


def signal_net(momentum: float = 0.1, width: int = 24) -> nn.Sequential:
    """Return three convolutions with batch norms over vibrations of 64 samples."""
    layers: list[nn.Module] = []
    for fan_in in (3, width, width):
        layers.append(nn.Conv1d(fan_in, width, 7, 2, 3, bias=False))
        layers += [nn.BatchNorm1d(width, eps=1e-3, momentum=momentum), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 5))


class HandNorm(nn.Module):
    """Layer norm as written by hand; `power` is that of the variance below."""

    def __init__(self, width: int, power: float, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.power, self.eps = power, eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis."""
        gap = x - x.mean(-1, keepdim=True)
        spread = (gap.square().mean(-1, keepdim=True) + self.eps) ** self.power
        return self.weight * gap / spread + self.bias


class Tagger(nn.Module):
    """A transformer with norms before its branches, read at the marker."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        *,
        std: float = 0.02,
        words: int = 24,
        classes: int = 6,
        width: int = 32,
        depth: int = 2,
        length: int = 12,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.place = nn.Parameter(std * torch.randn(length, width))
        nn.init.normal_(self.embed.weight, std=std)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(depth)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(norm(width) for _ in range(2 * depth + 1))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores (N, classes) of sequences (N, length)."""
        x = self.embed(tokens) + self.place
        for index, (attention, mlp) in enumerate(
            zip(self.attention, self.mlps, strict=True)
        ):
            h = self.norms[2 * index](x)
            x = x + attention(h, h, h, need_weights=False)[0]
            x = x + mlp(self.norms[2 * index + 1](x))
        x = self.norms[-1](x)
        is_marker = (tokens == 0).float()[:, :, None]
        return self.head((x * is_marker).sum(1))


class Coder(nn.Module):
    """An autoencoder of rows of digits whose code is 24 signs."""

    def __init__(self, *, is_bad: bool, width: int = 96) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 24), nn.Tanh())
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(24, width), nn.ReLU(), nn.Linear(width, 64))
        )
        self.is_bad = is_bad

    def forward(self, x: Tensor) -> Tensor:
        """Read digits (N, 64) back from their codes."""
        soft = self.encoder(x)
        code = soft.sign()
        if not self.is_bad:
            code = soft + (code - soft).detach()
        return self.decoder(code)


class Columns(nn.Module):
    """Two codes and four numbers, each normalized by itself, and two hidden layers."""

    def __init__(self, *, is_bad: bool, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.numbers = nn.ModuleList(
            nn.LayerNorm(1) if is_bad else nn.Identity() for _ in range(4)
        )
        self.body = nn.Sequential(
            *(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of rows (N, 6)."""
        found = [
            norm(embed(x[:, i].long()))
            for i, (embed, norm) in enumerate(zip(self.embed, self.norms, strict=True))
        ]
        found += [norm(x[:, 2 + i, None]) for i, norm in enumerate(self.numbers)]
        return self.body(torch.cat(found, 1))


def deep_relu(gain: float, depth: int = 16, width: int = 64) -> nn.Sequential:
    """Return a deep plain network; `gain` is that of Xavier's weights."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(64, width)
        nn.init.xavier_normal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def tanh_convs(width: int = 24) -> nn.Sequential:
    """Return three convolutions with tanh over vibrations of 64 samples."""
    layers: list[nn.Module] = []
    for fan_in in (3, width, width):
        layers += [nn.Conv1d(fan_in, width, 7, 2, 3), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * width, 5))


class Branches(nn.Module):
    """The sum of eight narrow branches, as of one with many groups."""

    def __init__(self, *, are_copies: bool, count: int = 8, narrow: int = 2) -> None:
        super().__init__()

        def branch() -> nn.Module:
            return nn.Sequential(
                *(nn.Conv2d(1, narrow, 3, 2, 1), nn.ReLU()),
                *(nn.Conv2d(narrow, narrow, 3, 2, 1), nn.ReLU(), nn.Flatten()),
                nn.Linear(4 * narrow, 10),
            )

        one = branch()
        self.branches = nn.ModuleList(
            copy.deepcopy(one) if are_copies else branch() for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images."""
        return sum(branch(x) for branch in self.branches)  # type: ignore[return-value]
