"""Lightning's plugin converts, and takes back what it converted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normkit

pytest.importorskip("lightning", reason="the plugin derives from Lightning's class")


def test_the_plugin_converts_and_reverts() -> None:
    from normkit.integrations.lightning_sync import NormkitSyncBatchNorm

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    layer = net[1]
    plugin = NormkitSyncBatchNorm(lambda: "a group")
    assert plugin.apply(net) is net
    assert net[1] is layer
    assert type(layer) is normkit.nn.SyncBatchNorm
    assert layer.process_group == "a group"
    layer.process_group = None
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    plugin.revert(net)
    assert type(net[1]) is normkit.nn.BatchNorm2d
