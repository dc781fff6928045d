"""The networks of the demo: a deep sigmoid stack, and a small residual CNN."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

import normkit.nn as nkn
from normkit.init import initialize

__all__ = ["ResidualBlock", "deep_sigmoid_network", "residual_cnn"]

NUM_CLASSES = 10


def deep_sigmoid_network(
    *, is_normalized: bool, seed: int, depth: int = 6, width: int = 100
) -> nn.Sequential:
    """Build `depth` hidden layers of sigmoid units, with or without batch norm.

    Both start from the same Xavier weights; batch norm stands before the sigmoid.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    fan_in = 64
    for i in range(1, depth + 1):
        layers[f"linear{i}"] = nn.utils.skip_init(nn.Linear, fan_in, width)
        if is_normalized:
            layers[f"norm{i}"] = nkn.BatchNorm1d(width)
        layers[f"sigmoid{i}"] = nn.Sigmoid()
        fan_in = width
    layers["output"] = nn.utils.skip_init(nn.Linear, fan_in, NUM_CLASSES)
    network = nn.Sequential(layers)
    source = torch.Generator().manual_seed(seed)
    initialize(network, "xavier", generator=source)
    return network


class ResidualBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)).

    Args:
        channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        momentum: Momentum of the batch norms.
    """

    def __init__(
        self, channels: int, out_channels: int, stride: int, momentum: float
    ) -> None:
        super().__init__()
        self.conv1 = _conv(channels, out_channels, kernel_size=3, stride=stride)
        self.norm1 = nkn.BatchNorm2d(out_channels, momentum=momentum)
        self.conv2 = _conv(out_channels, out_channels, kernel_size=3)
        self.norm2 = nkn.BatchNorm2d(out_channels, momentum=momentum)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(
                _conv(channels, out_channels, kernel_size=1, stride=stride),
                nkn.BatchNorm2d(out_channels, momentum=momentum),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, channels, H, W)` to `(N, out_channels, H/stride, W/stride)`."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def residual_cnn(
    *, seed: int, momentum: float = 0.1, channels: int = 8
) -> nn.Sequential:
    """Build three residual blocks on a stem, each convolution with a batch norm.

    Args:
        seed: Random seed of the Kaiming weights.
        momentum: Weight of a batch in the running statistics of every batch norm.
        channels: Channels of the stem; doubled half way.
    """
    network = nn.Sequential(
        OrderedDict(
            conv=_conv(1, channels, kernel_size=3),
            norm=nkn.BatchNorm2d(channels, momentum=momentum),
            relu=nn.ReLU(),
            block1=ResidualBlock(channels, channels, 1, momentum),
            block2=ResidualBlock(channels, 2 * channels, 2, momentum),
            block3=ResidualBlock(2 * channels, 2 * channels, 1, momentum),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            output=nn.utils.skip_init(nn.Linear, 2 * channels, NUM_CLASSES),
        )
    )
    source = torch.Generator().manual_seed(seed)
    initialize(network, "kaiming", generator=source)
    return network


def _conv(
    channels: int, out_channels: int, *, kernel_size: int, stride: int = 1
) -> nn.Module:
    # skip_init: `initialize` draws all weights, from its own generator, so building a
    # network leaves the global random state alone.
    return nn.utils.skip_init(
        nn.Conv2d,
        channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        bias=False,
    )
