"""Instance norm: each sample by itself, and the averages it keeps."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit.nn
import oracles

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")

SHAPES = {1: (4, 3, 7), 2: (4, 3, 5, 4), 3: (4, 3, 2, 3, 4)}
ranks = pytest.mark.parametrize("rank", [1, 2, 3])


def layer_of(rank: int, **kwargs) -> nn.Module:
    layer = getattr(normkit.nn, f"InstanceNorm{rank}d")(3, **kwargs)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return layer


@ranks
def test_outputs_and_gradients_are_those_of_the_definition(rank: int) -> None:
    x = (100 + torch.randn(SHAPES[rank])).requires_grad_()
    layer = layer_of(rank, affine=True)
    wanted = [x, layer.weight, layer.bias]
    y, dy = layer(x), torch.randn(SHAPES[rank])
    truth = oracles.instance_norm(x, layer.weight, layer.bias)
    assert ((y - truth).abs() <= 2e-6 * truth.abs().clamp(min=1)).all()
    found = torch.autograd.grad(y, wanted, dy)
    exact = torch.autograd.grad(truth, wanted, dy.double())
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@ranks
def test_a_sample_does_not_depend_on_its_batch(rank: int) -> None:
    x = torch.randn(SHAPES[rank])
    layer = layer_of(rank, affine=True)
    whole = layer(x)
    for k, sample in enumerate(x):
        torch.testing.assert_close(layer(sample), whole[k], rtol=0, atol=1e-6)


@ranks
def test_one_sample_without_its_batch_dimension_keeps_its_shape(rank: int) -> None:
    sample = torch.randn(SHAPES[rank][1:])
    layer = layer_of(rank)
    y = layer(sample)
    assert y.shape == sample.shape
    torch.testing.assert_close(y, layer(sample[None])[0])


@ranks
def test_running_statistics_average_instances_without_bias(rank: int) -> None:
    x = 2 + torch.randn(SHAPES[rank])
    layer = layer_of(rank, track_running_stats=True, momentum=0.3)
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer(x)
    flat = x.double().flatten(2)
    mean, var = flat.mean((0, 2)), flat.var(2, correction=1).mean(0)
    torch.testing.assert_close(
        layer.running_mean, (0.7 * before[0] + 0.3 * mean).float()
    )
    torch.testing.assert_close(layer.running_var, (0.7 * before[1] + 0.3 * var).float())
    assert int(layer.num_batches_tracked) == 0  # torch's never counts


def test_without_momentum_every_batch_has_the_same_share() -> None:
    """In torch, instance norm takes momentum=None for 0, and never updates."""
    batches = [k + torch.randn(4, 3, 7) for k in range(3)]
    theirs = nn.InstanceNorm1d(3, momentum=None, track_running_stats=True)
    layer = layer_of(1, track_running_stats=True, momentum=None)
    for batch in batches:
        layer(batch)
        theirs(batch)
    assert not theirs.running_mean.any()
    means = torch.stack([b.mean((0, 2)) for b in batches])
    torch.testing.assert_close(layer.running_mean, means.mean(0))
    assert int(layer.num_batches_tracked) == 3


def test_a_non_finite_batch_leaves_the_state_alone() -> None:
    layer = layer_of(1, track_running_stats=True)
    before = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(4, 3, 7)
    x[1, 2, 3] = math.nan
    y = layer(x)
    assert y[1, 2].isnan().all()
    assert int(y.isnan().sum()) == 7
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])


def test_eval_uses_the_running_statistics_when_there_are_some() -> None:
    x = torch.randn(4, 3, 7)
    layer = layer_of(1, track_running_stats=True, affine=True).eval()
    mean, var = layer.running_mean.view(1, 3, 1), layer.running_var.view(1, 3, 1)
    y = (x - mean) / (var + layer.eps).sqrt()
    wanted = y * layer.weight.view(1, 3, 1) + layer.bias.view(1, 3, 1)
    torch.testing.assert_close(layer(x), wanted)
    plain = layer_of(1)
    assert torch.equal(plain.eval()(x), plain.train()(x))


def test_masked_positions_do_not_exist() -> None:
    x = torch.randn(3, 3, 7, dtype=torch.float64)
    lengths = [7, 2, 4]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None, None]
    layer = layer_of(1, affine=True).double()
    y = layer(torch.where(mask, x, math.nan), mask=mask)
    for k, n in enumerate(lengths):
        torch.testing.assert_close(y[k : k + 1, :, :n], layer(x[k : k + 1, :, :n]))
        assert not y[k, :, n:].any()
    one = layer(torch.where(mask, x, math.nan)[1], mask=mask[1])
    torch.testing.assert_close(one, y[1])


def test_a_channels_last_gradient_of_one_sample_is_right() -> None:
    """In torch 2.13 on a CPU it is off by 5, in float64, without a word."""
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 3, 4, 5, dtype=torch.float64)
    dy = dy.contiguous(memory_format=torch.channels_last)
    (found,) = torch.autograd.grad(layer_of(2).double()(x), x, dy)
    (truth,) = torch.autograd.grad(oracles.instance_norm(x), x, dy)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_forward_that_checkpointing_repeats_moves_the_statistics_once(
    momentum: float | None,
) -> None:
    layer = layer_of(2, track_running_stats=True, momentum=momentum)
    once = copy.deepcopy(layer)
    x = torch.randn(SHAPES[2], requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    once(x)
    for name, found in layer.named_buffers():
        torch.testing.assert_close(found, once.get_buffer(name))


def test_a_nan_that_is_the_only_valid_value_of_a_sample_moves_nothing() -> None:
    layer = layer_of(2, track_running_stats=True)
    before = {name: b.clone() for name, b in layer.named_buffers()}
    x = torch.randn(2, layer.num_features, 2, 2)
    mask = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    mask[1] = False
    mask[1, 0, 0, 0] = True
    x[1, :, 0, 0] = math.nan
    layer(x, mask=mask)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    x[1, :, 0, 0], x[1, :, 1, 1] = 5.0, math.nan  # hidden by the mask
    layer(x, mask=mask)
    assert not torch.equal(layer.running_mean, before["running_mean"])
    assert layer.running_mean.isfinite().all()
