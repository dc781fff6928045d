"""Two layers with one parameter are not fitted one over the other."""

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError


def test_a_fit_to_group_norm_refuses_tied_layers_and_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    model[2].weight = model[0].weight
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batches = [torch.randn(4, 8, 5, 5)]
    with pytest.raises(ArgumentError, match="layers 0 and 2 share a parameter"):
        normkit.convert(model, to="group", batches=batches)
    assert type(model[0]) is nn.BatchNorm2d
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    assert len(normkit.convert(model, to="group", batches=batches).layers) == 2
