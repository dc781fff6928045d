"""Small models and data for the tests of calibration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normkit.nn


class ConvNet(nn.Module):
    """Conv, batch norm, ReLU twice, dropout between, and a head."""

    def __init__(self, family: object = nn, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn1 = family.BatchNorm2d(4)  # type: ignore[attr-defined]
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.bn2 = family.BatchNorm2d(6)  # type: ignore[attr-defined]
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.bn1(self.conv1(x)).relu())
        x = self.bn2(self.conv2(x)).relu_()
        return self.head(x.mean((2, 3)))


def scrambled(model: nn.Module) -> nn.Module:
    """Random affine weights (some negative) and wrong running statistics."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                if module.weight is not None:
                    module.weight.normal_()
                    module.bias.normal_()
                if module.running_mean is not None:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
                    module.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    return model


def images(*sizes: int, offset: float = 3.0) -> list[Tensor]:
    return [offset + torch.randn(n, 1, 8, 8) * 2 for n in sizes]


FAMILIES = [nn, normkit.nn]
