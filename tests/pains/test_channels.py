"""Threads about where channels lie."""

import torch
from torch import nn

import normkit.nn


def test_pytorch_71465_layer_norm_over_the_channels_of_an_image() -> None:
    x = torch.randn(2, 3, 4, 5)
    layer = normkit.nn.LayerNorm(3, channel_dim=1)
    y = layer(x)
    wanted = nn.LayerNorm(3)(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, wanted)
    assert y.stride() == x.stride()


def test_pytorch_76613_batch_norm_of_n_l_c() -> None:
    x = torch.randn(4, 7, 3)
    layer = normkit.nn.BatchNorm1d(3, channel_dim=-1)
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x.mT).mT)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 1)))


def test_per_activation_statistics_without_flattening_by_hand() -> None:
    x = torch.randn(8, 3, 4, 4)
    y = normkit.nn.PerActivationBatchNorm((3, 4, 4))(x)
    torch.testing.assert_close(y, nn.BatchNorm1d(48)(x.flatten(1)).view_as(x))
