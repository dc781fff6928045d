"""A freeze that lasts, and who decays."""

import pytest
import torch
from torch import nn

from normkit.errors import ArgumentError
from normkit.nn import BatchNorm2d, FrozenBatchNorm, InstanceNorm1d, parameter_groups

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")


def test_torch_86590_a_freeze_survives_train() -> None:
    layer = BatchNorm2d(3)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), layer)
    layer(torch.randn(4, 3, 2, 2))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.freeze()
    model.train()
    assert model.training
    assert not layer.training
    model(torch.randn(4, 2, 5, 5))
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    assert "frozen" in repr(layer)
    assert layer.weight.requires_grad
    layer.unfreeze()
    assert layer.training
    layer.freeze()
    model.eval()
    layer.unfreeze()
    assert not layer.training


def test_freezing_parameters_is_asked_for() -> None:
    layer = InstanceNorm1d(3, affine=True, track_running_stats=True)
    layer(torch.randn(4, 3, 5)).square().sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    layer.freeze(parameters=True)
    assert not any(p.requires_grad for p in layer.parameters())
    optimizer.step()  # between backward and step: no last move, no decay
    assert (layer.weight == 1).all()
    layer.unfreeze(parameters=True)
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("rest", [(), (4,), (4, 2), (2, 3, 2), (2, 2, 2, 2)], ids=str)
def test_a_frozen_layer_takes_any_rank(rest: tuple[int, ...]) -> None:
    layer = FrozenBatchNorm(3).train()
    source = BatchNorm2d(3)
    with torch.no_grad():
        for tensor in (*source.parameters(), source.running_mean, source.running_var):
            tensor.uniform_(0.5, 2)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(5, 3, *rest, requires_grad=True)
    shape = (1, 3, *[1] * len(rest))
    mean, var = layer.running_mean.view(shape), layer.running_var.view(shape)
    wanted = (x - mean) / (var + 1e-5).sqrt() * layer.weight.view(shape)
    torch.testing.assert_close(layer(x), wanted + layer.bias.view(shape))
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    torch.testing.assert_close(dx, torch.autograd.grad(wanted, x, dy)[0])


def test_a_frozen_layer_loads_a_state_without_a_counter() -> None:
    state = BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    FrozenBatchNorm(3).load_state_dict(state)
    with pytest.raises(ArgumentError, match="stays frozen"):
        FrozenBatchNorm(3).unfreeze()
    with pytest.raises(ArgumentError, match="at least 2D"):
        FrozenBatchNorm(3)(torch.randn(3))


def test_torch_1402_norms_and_biases_do_not_decay() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.LayerNorm(4), shared, nn.LSTM(4, 4))
    model.append(FrozenBatchNorm(4))
    decayed, spared = parameter_groups(model, weight_decay=0.1, lr=0.5)
    lstm = model[3]
    assert isinstance(lstm, nn.LSTM)
    wanted = [shared.weight, lstm.weight_ih_l0, lstm.weight_hh_l0]
    assert [id(p) for p in decayed["params"]] == [id(p) for p in wanted]
    assert len(spared["params"]) == 5
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    torch.optim.AdamW([decayed, spared])
