"""Threads about batch norms folded where they must not be, or wrongly."""

import pytest
import torch
from torch import Tensor, nn

import normkit


def ready(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for t in (m.weight, m.bias, m.running_mean, m.running_var):
                    t.copy_(torch.rand(t.shape) + 0.5)
    return model.eval()


def test_pytorch_104593_a_convolution_that_is_used_twice_is_not_folded_into() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(self.conv(y)) + y

    model, x = ready(Shared()), torch.randn(2, 3, 4, 4)
    folded, _ = normkit.fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_pytorch_180995_transposed_convolution_with_groups(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 8, 3, stride=2, groups=groups)
    model, x = ready(nn.Sequential(layer, nn.BatchNorm2d(8))), torch.randn(2, 4, 5, 5)
    folded, _ = normkit.fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_linear_layer_whose_channels_are_not_the_last_is_told_apart() -> None:
    """(N, L, C) through BatchNorm1d normalizes L, whatever the sizes happen to be."""
    model = ready(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    x = torch.randn(2, 6, 5)
    folded, _ = normkit.fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
