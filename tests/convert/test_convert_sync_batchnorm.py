"""The converter that frameworks look for: torch's name and arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError
from normkit.nn import SyncBatchNorm


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(normkit.nn.BatchNorm2d(4, activation="relu", memory="recompute")),
        normkit.nn.FrozenBatchNorm(4),
        nn.GroupNorm(2, 4),
    )


def test_batch_norms_become_synchronized_and_stay_the_same_objects() -> None:
    net, x = model(), torch.randn(5, 3, 8, 8)
    before = [net[1], net[2][0], net[3], net[4]]
    weight = net[1].weight
    y = net(x)
    given = SyncBatchNorm.convert_sync_batchnorm(net, "a group")
    assert given is net
    assert [net[1], net[2][0], net[3], net[4]] == before
    assert [type(layer).__name__ for layer in before] == [
        *("SyncBatchNorm", "SyncBatchNorm", "FrozenBatchNorm", "GroupNorm")
    ]
    assert net[1].weight is weight
    assert net[1].process_group == net[2][0].process_group == "a group"
    assert (net[2][0].activation, net[2][0].memory) == ("relu", "recompute")
    torch.testing.assert_close(net(x), y)
    # The way back is convert's.
    normkit.convert(net, to="normkit")
    assert type(net[1]) is normkit.nn.BatchNorm2d


def test_a_layer_alone_and_a_second_call_are_taken() -> None:
    layer = nn.SyncBatchNorm(4)
    assert type(SyncBatchNorm.convert_sync_batchnorm(layer)) is SyncBatchNorm
    assert SyncBatchNorm.convert_sync_batchnorm(layer).process_group is None


def test_torchs_own_converter_drops_a_subclass_and_ours_says_so() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input).relu()

    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(Activated(3)))
    assert type(theirs[0]) is nn.SyncBatchNorm  # the activation is gone
    net = nn.Sequential(nn.BatchNorm2d(3), Activated(3))
    with pytest.raises(ArgumentError, match=r"'1' \(Activated\) is derived from"):
        SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_a_lazy_layer_has_to_see_an_input_first() -> None:
    with pytest.raises(ArgumentError, match="is lazy and has seen no input yet"):
        SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))
