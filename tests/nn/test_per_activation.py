"""Per-activation batch norm: every position has statistics of its own."""

import math

import pytest
import torch
from torch import nn

import normkit.nn
import oracles
from normkit.errors import ArgumentError, ShapeError

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

SHAPES = [(3,), (3, 4), (3, 4, 5), (3, 2, 3, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def layer_of(shape: tuple[int, ...], **kwargs) -> nn.Module:
    layer = normkit.nn.PerActivationBatchNorm(shape, **kwargs)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    return layer


@shapes
def test_outputs_and_gradients_are_those_of_the_definition(shape) -> None:
    x = (1e3 + torch.randn(7, *shape)).requires_grad_()
    layer = layer_of(shape)
    truth = oracles.normalized(x, (0,), layer.weight[None], layer.bias[None])
    y, dy = layer(x), torch.randn(7, *shape)
    assert ((y - truth).abs() <= 2e-6 * truth.abs().clamp(min=1)).all()
    inputs = [x, layer.weight, layer.bias]
    found = torch.autograd.grad(y, inputs, dy)
    exact = torch.autograd.grad(truth, inputs, dy.double())
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def test_gradcheck() -> None:
    layer = layer_of((2, 3)).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, layer.weight, layer.bias]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), inputs)


@shapes
def test_it_is_batch_norm_of_the_flattened_sample(shape) -> None:
    x = 5 + torch.randn(7, *shape)
    layer, flat = layer_of(shape), nn.BatchNorm1d(math.prod(shape))
    state = {k: v.flatten() if v.dim() else v for k, v in layer.state_dict().items()}
    flat.load_state_dict(state)
    for training in (True, True, False):
        y = layer.train(training)(x)
        wanted = flat.train(training)(x.flatten(1)).view_as(x)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_mean.flatten(), flat.running_mean)
    torch.testing.assert_close(layer.running_var.flatten(), flat.running_var)
    assert int(layer.num_batches_tracked) == 2


def test_channels_last_goes_in_and_comes_out() -> None:
    x = torch.randn(7, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    layer = layer_of((3, 4, 5))
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(x.contiguous()), rtol=1e-6, atol=1e-6)


def test_masked_values_do_not_exist() -> None:
    x = torch.randn(7, 3, 4, dtype=torch.float64)
    mask = torch.rand(7, 1, 4) > 0.4
    mask[:2] = True
    layer = layer_of((3, 4)).double()
    y = layer(torch.where(mask, x, math.nan), mask=mask)
    for position in range(4):
        seen = mask[:, 0, position]
        alone = oracles.normalized(
            *(x[seen, :, position], (0,)),
            *(layer.weight[None, :, position], layer.bias[None, :, position]),
        )
        torch.testing.assert_close(y[seen, :, position], alone)
        assert not y[~seen, :, position].any()
    y = layer.eval()(torch.where(mask, x, math.nan), mask=mask)
    wanted = torch.where(mask, layer(x), torch.zeros_like(x))
    torch.testing.assert_close(y, wanted)


def test_a_poisoned_batch_leaves_the_state_alone() -> None:
    x, layer = torch.randn(7, 3, 4), layer_of((3, 4))
    x[1, 2, 3] = math.nan
    assert int(layer(x).isnan().sum()) == 7
    assert not layer.running_mean.any()
    assert int(layer.num_batches_tracked) == 0


def test_without_running_statistics_eval_uses_the_batch() -> None:
    x, layer = torch.randn(7, 3), layer_of((3,), track_running_stats=False)
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))
    assert not [*layer.buffers()]


def test_what_does_not_fit_is_told() -> None:
    layer = layer_of((3, 4))
    with pytest.raises(ShapeError, match=r"\(N, 3, 4\), got \(7, 4, 3\)"):
        layer(torch.randn(7, 4, 3))
    with pytest.raises(ArgumentError, match="more than one sample"):
        layer(torch.randn(1, 3, 4))
    layer.eval()(torch.randn(1, 3, 4))


def test_the_state_survives_a_round_trip() -> None:
    layer, other = layer_of((3, 4)), normkit.nn.PerActivationBatchNorm((3, 4))
    layer(torch.randn(7, 3, 4))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3, 4)
    assert torch.equal(other.eval()(x), layer.eval()(x))
