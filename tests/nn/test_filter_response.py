"""Filter response norm, and the threshold after it."""

import math

import pytest
import torch
from torch import nn

import normkit.nn
import oracles
from normkit.errors import ArgumentError, ShapeError

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

SHAPES = [(4, 3, 7), (4, 3, 5, 4), (4, 3, 2, 3, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
learning = pytest.mark.parametrize("learnable_eps", [False, True])


def layer_of(**kwargs) -> nn.Module:
    layer = normkit.nn.FilterResponseNorm(3, eps=0.01, **kwargs)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3))
        layer.bias.copy_(torch.randn(3))
    return layer


@shapes
@learning
def test_outputs_and_gradients_are_those_of_the_definition(
    shape, learnable_eps: bool
) -> None:
    x = (100 + torch.randn(shape)).requires_grad_()
    layer = layer_of(learnable_eps=learnable_eps)
    truth = oracles.filter_response(x, layer.weight, layer.bias, layer.eps)
    y, dy = layer(x), torch.randn(shape)
    assert ((y - truth).abs() <= 2e-6 * truth.abs().clamp(min=1)).all()
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad(y, inputs, dy)
    exact = torch.autograd.grad(truth, inputs, dy.double())
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@learning
def test_gradcheck(learnable_eps: bool) -> None:
    layer = layer_of(learnable_eps=learnable_eps).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), inputs)


@learning
def test_a_sample_does_not_depend_on_its_batch(learnable_eps: bool) -> None:
    x, layer = torch.randn(4, 3, 5, 4), layer_of(learnable_eps=learnable_eps)
    torch.testing.assert_close(layer(x[1:2]), layer(x)[1:2], rtol=0, atol=1e-6)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@learning
def test_masked_positions_do_not_exist(learnable_eps: bool) -> None:
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    layer = layer_of(learnable_eps=learnable_eps).double()
    mask = torch.arange(7) < 5
    y = layer(torch.where(mask, x, math.nan), mask=mask)
    torch.testing.assert_close(y[..., :5], layer(x[..., :5]))
    assert not y[..., 5:].any()


def test_one_position_needs_a_learned_eps() -> None:
    x = torch.randn(4, 3, 1)
    with pytest.raises(ArgumentError, match="learnable_eps=True"):
        layer_of()(x)
    layer = layer_of(learnable_eps=True)
    truth = oracles.filter_response(x, layer.weight, layer.bias, layer.eps)
    torch.testing.assert_close(layer(x).double(), truth, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_told() -> None:
    for shape in ((4, 2, 7), (4, 3)):
        with pytest.raises(ShapeError, match=r"shape \(N, 3, \*\)"):
            layer_of()(torch.randn(shape))


def test_the_state_survives_a_round_trip() -> None:
    layer = layer_of(learnable_eps=True)
    assert set(layer.state_dict()) == {"weight", "bias", "eps"}
    other = normkit.nn.FilterResponseNorm(3, learnable_eps=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, 7)
    assert torch.equal(other(x), layer(x))
    layer.reset_parameters()
    assert layer.eps.item() == pytest.approx(0.01)


def test_a_thresholded_unit_cuts_each_channel_at_its_own_value() -> None:
    unit = normkit.nn.TLU(3)
    x = torch.randn(4, 3, 7)
    assert torch.equal(unit(x), x.relu())
    with torch.no_grad():
        unit.threshold.copy_(torch.tensor([-9.0, 0.5, 9.0]))
    y = unit(x)
    assert torch.equal(y[:, 0], x[:, 0])
    assert torch.equal(y[:, 1], x[:, 1].clamp(min=0.5))
    assert (y[:, 2] == 9).all()
    (grad,) = torch.autograd.grad(y.sum(), unit.threshold)
    assert grad.tolist() == [0, int((x[:, 1] < 0.5).sum()), 28]
    with pytest.raises(ShapeError, match=r"\(N, 3, \*\)"):
        unit(torch.randn(4, 2))
