"""Weight standardization: what a layer computes with, and what it learns."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import oracles
from normkit.errors import ArgumentError
from normkit.nn import weight_standardization

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6), 0),
    "conv": (lambda: nn.Conv2d(6, 4, 3), (2, 6, 5, 5), 0),
    "grouped": (lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 5), 0),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3), (2, 6, 5, 5), 1),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


@each_layer
def test_the_layer_computes_with_the_standardized_weight(name: str) -> None:
    build, shape, dim = LAYERS[name]
    layer = build()
    free = layer.weight.detach().clone()
    assert weight_standardization(layer, gain=True, scale_by_fan_in=True) is layer
    gain = layer.parametrizations.weight[0].gain
    with torch.no_grad():
        gain.copy_(torch.randn(4))
    dims = tuple(d for d in range(free.dim()) if d != dim)
    fan_in = free.numel() // 4
    wanted = oracles.normalized(free, dims).transpose(0, dim) / fan_in**0.5
    wanted = (wanted * gain.view(-1, *[1] * (free.dim() - 1))).transpose(0, dim)
    torch.testing.assert_close(layer.weight.double(), wanted, rtol=1e-5, atol=1e-6)
    plain = build().double()
    plain.load_state_dict({"weight": wanted.detach(), "bias": layer.bias.double()})
    x = torch.randn(shape)
    torch.testing.assert_close(
        layer(x).double(), plain(x.double()), rtol=1e-5, atol=1e-5
    )


def test_gradients_reach_the_free_weight_and_the_gain() -> None:
    linear = nn.Linear(6, 4, dtype=torch.float64)
    layer = weight_standardization(linear, gain=True, eps=1e-14)
    parameters = [*layer.parametrizations.weight.parameters()]
    assert len(parameters) == 2
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *_: layer(x), parameters)
    (grad, _) = torch.autograd.grad(layer(x).sin().sum(), parameters)
    # Neither a constant nor a factor of a row has any effect.
    free = parameters[0]
    torch.testing.assert_close(grad.sum(1), torch.zeros(4).double(), atol=1e-9, rtol=0)
    along = (grad * (free - free.mean(1, keepdim=True))).sum(1)
    assert (along.abs() < 1e-9).all()


def test_scaled_by_the_fan_in_outputs_have_the_variance_of_inputs() -> None:
    layer = weight_standardization(nn.Linear(400, 300), scale_by_fan_in=True)
    y = layer(torch.randn(500, 400)) - layer.bias
    assert 0.95 < y.var().item() < 1.05


def test_it_can_be_taken_off_leaving_the_standardized_weight() -> None:
    layer, x = weight_standardization(nn.Conv2d(6, 4, 3)), torch.randn(2, 6, 5, 5)
    wanted = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Conv2d
    assert torch.equal(layer(x), wanted)


def test_the_state_survives_a_round_trip_and_a_weight_can_be_assigned() -> None:
    layer, other = (weight_standardization(nn.Linear(6, 4)) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 6)
    assert torch.equal(other(x), layer(x))
    free = torch.randn(4, 6)
    other.weight = free
    assert torch.equal(other.parametrizations.weight.original, free)
    assert other.weight.mean(1).abs().max() < 1e-6


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ArgumentError, match=r"weight is of shape \(3,\)"):
        weight_standardization(nn.BatchNorm1d(3))
    with pytest.raises(ArgumentError, match=r"Linear\.kernel is None"):
        weight_standardization(nn.Linear(3, 3), "kernel")
    with pytest.raises(ArgumentError, match="with 2 groups apart"):
        weight_standardization(nn.ConvTranspose1d(4, 4, 3, groups=2))
