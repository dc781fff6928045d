"""Small inputs run on torch's operators only where those are exact."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.errors import ShapeError
from normkit.functional import small
from normkit.kernels import backend
from normkit.kernels.cpu.loading import library
from normkit.kernels.epilogue import ACTIVATIONS

pytestmark = pytest.mark.skipif(library() is None, reason="no native library")

SHAPES = ((8, 32), (64, 5), (500, 7), (8, 16, 8, 8), (2, 3, 50), (3, 2, 2, 4, 5))


def definition(x: Tensor, dims: list[int], weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.double()
    mean = wide.mean(dims, keepdim=True)
    var = (wide - mean).square().mean(dims, keepdim=True)
    return (wide - mean) * (var + 1e-5).rsqrt() * weight.double() + bias.double()


def error(y: Tensor, wanted: Tensor) -> float:
    return float(((y - wanted).abs() / wanted.abs().clamp(min=1)).detach().max())


@pytest.mark.parametrize("ratio", [0.0, 0.9, 3.5, 10.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_keeps_its_promise_at_any_mean(
    shape: tuple[int, ...], ratio: float
) -> None:
    channels, dims = shape[1], [d for d in range(len(shape)) if d != 1]
    vector = (1, channels) + (1,) * (len(shape) - 2)
    x = torch.randn(shape) + ratio * torch.randn(channels).sign().view(vector)
    rank = {2: 1, 3: 1, 4: 2, 5: 3}[len(shape)]
    layer: Any = getattr(normkit.nn, f"BatchNorm{rank}d")(channels)
    nn.init.uniform_(layer.weight, -1, 1)
    nn.init.uniform_(layer.bias, -1, 1)
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if rank == 2 else [x]
    for given in layouts:
        learned = (layer.weight.view(vector), layer.bias.view(vector))
        wanted = definition(given, dims, *learned)
        layer.reset_running_stats()
        y = layer.train()(given)
        assert error(y, wanted) < 2e-6
        assert y.stride() == given.stride()
        mean = given.double().mean(dims)
        var = given.double().var(dims)
        torch.testing.assert_close(
            layer.running_mean.double(), 0.1 * mean, rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(
            layer.running_var.double(), 0.9 + 0.1 * var, rtol=1e-6, atol=1e-7
        )
        assert int(layer.num_batches_tracked) == 1
        layer.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)
        y = layer.eval()(given)
        scale = (layer.running_var.double() + 1e-5).rsqrt().view(vector)
        center = layer.running_mean.double().view(vector)
        exact = (given.double() - center) * scale * learned[0].double() + learned[1]
        assert error(y, exact) < 2e-6


@pytest.mark.parametrize("ratio", [0.0, 3.0, 1e4])
def test_layers_without_a_batch_keep_theirs(ratio: float) -> None:
    x = torch.randn(4, 6, 5, 8) + ratio
    one, zero = torch.ones(()), torch.zeros(())
    y = normkit.nn.LayerNorm(8)(x)
    assert error(y, definition(x, [3], one, zero)) < 2e-6
    y = normkit.nn.GroupNorm(2, 6)(x).view(4, 2, -1)
    assert error(y, definition(x.view(4, 2, -1), [2], one, zero)) < 2e-6
    y = normkit.nn.RMSNorm(8, eps=1e-5)(x)
    scale = (x.double().square().mean(3, keepdim=True) + 1e-5).rsqrt()
    assert error(y, x.double() * scale) < 2e-6


def took_torch(run: Callable[[], Tensor]) -> bool:
    y = run()
    return y.grad_fn is not None and "Standardize" not in type(y.grad_fn).__name__


def test_torchs_operator_runs_exactly_where_it_is_good_enough() -> None:
    layer: Any
    layer, x = normkit.nn.BatchNorm2d(4), torch.randn(8, 4, 5, 5)
    assert took_torch(lambda: layer(x))
    assert not took_torch(lambda: layer(x + 100))
    assert not took_torch(lambda: layer(x.double()))
    assert not took_torch(lambda: layer(x, residual=x))
    assert not took_torch(lambda: layer(x, mask=x > 0))
    assert not took_torch(lambda: layer(torch.randn(32, 4, 32, 32)))
    assert not took_torch(lambda: layer(torch.zeros_like(x)))
    with normkit.less_memory():
        assert not took_torch(lambda: layer(x))
    for name in ("cpu", "reference"):
        with backend(name):
            assert not took_torch(lambda: layer(x))


def test_a_nan_stays_out_and_is_counted() -> None:
    layer: Any
    layer, x = normkit.nn.BatchNorm1d(4), torch.randn(8, 4)
    x[2, 1] = torch.nan
    assert layer(x)[:, 1].isnan().all()
    assert layer.running_mean.eq(0).all()
    assert int(layer.num_batches_tracked) == 0
    assert layer.skipped is not None
    assert int(layer.skipped) == 1


def test_an_average_of_all_batches_and_a_changed_buffer_are_noticed() -> None:
    layer: Any
    layer, batches = normkit.nn.BatchNorm1d(4, momentum=None), torch.randn(3, 8, 4)
    for x in batches:
        layer(x)
    torch.testing.assert_close(layer.running_mean, batches.mean((0, 1)))
    torch.testing.assert_close(layer.running_var, batches.var(1).mean(0))
    x = torch.randn(8, 4, requires_grad=True)
    y = (layer.running_mean * x).sum()
    layer(batches[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_values_and_gradients_are_those_of_our_kernels() -> None:
    layer: Any
    layer, x = normkit.nn.BatchNorm2d(4), torch.randn(8, 4, 5, 5)
    nn.init.normal_(layer.weight)
    dy, found = torch.randn_like(x), []
    for name in (None, "cpu"):
        given = x.clone().requires_grad_()
        if name is None:
            y = layer(given)
        else:
            with backend(name):
                y = layer(given)
        found.append([y, *torch.autograd.grad(y, [given, *layer.parameters()], dy)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows_may_be_changed_in_place(activation: str) -> None:
    layer: Any
    layer, x = normkit.nn.BatchNorm2d(4, activation=activation), torch.randn(8, 4, 5, 5)
    found = []
    for name in (None, "cpu"):
        with contextlib.nullcontext() if name is None else backend(name):
            given = x.clone().requires_grad_()
            y = layer(given)
            y *= 2
            found.append(torch.autograd.grad((y * x).sum(), given)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_wrong_vectors_raise_before_torch_reads_them() -> None:
    x = torch.randn(4, 6)
    with pytest.raises(ShapeError):
        normkit.functional.batch_norm(x, None, None, torch.ones(5), None, True)
    with pytest.raises(ShapeError):
        normkit.functional.batch_norm(x, torch.ones(5), torch.ones(5))
    with pytest.raises(ShapeError):
        normkit.functional.layer_norm(x, (6,), torch.ones(5))
    assert small.batch_norm(x[:1], None, None, None, None, True, 0.1, 1e-5) is None
