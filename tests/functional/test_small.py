"""Small inputs run on torch's operators only where those are exact."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.errors import ShapeError
from normkit.functional import judging, small
from normkit.kernels import backend
from normkit.kernels.epilogue import ACTIVATIONS

pytestmark = pytest.mark.skipif(
    judging.judging_library() is None,
    reason="no native library, or one without these entries",
)

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
    assert not took_torch(lambda: layer(torch.randn(33, 4, 32, 32)))
    with normkit.less_memory():
        assert not took_torch(lambda: layer(x))
    for name in ("cpu", "reference"):
        with backend(name):
            assert not took_torch(lambda: layer(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ratio", [5.0, 30.0])
@pytest.mark.parametrize("shape", [*SHAPES, (600, 3), (30_000, 3)], ids=str)
def test_a_mended_batch_has_the_gradients_of_float64(
    shape: tuple[int, ...], ratio: float, training: bool
) -> None:
    channels = shape[1]
    vector = (1, channels) + (1,) * (len(shape) - 2)
    dims = [d for d in range(len(shape)) if d != 1]
    x = torch.randn(shape)
    x = (x - x.mean(dims, keepdim=True)) / x.std(dims, correction=0, keepdim=True)
    x += ratio * torch.randn(channels).sign().view(vector)
    learned = [torch.randn(channels) for _ in "wb"]
    given = [t.requires_grad_() for t in (x, *learned)]
    wide = [t.detach().double().requires_grad_() for t in given]
    layouts = [torch.contiguous_format]
    layouts += [torch.channels_last] if len(shape) == 4 else []
    for layout in layouts:
        given[0] = x.detach().contiguous(memory_format=layout).requires_grad_()
        running = [x.detach().mean(dims), x.detach().var(dims)]
        y = normkit.functional.batch_norm(
            *(given[0], running[0], running[1], given[1], given[2]),
            training=training,
        )
        assert y.grad_fn is not None
        assert "BatchNorm" in type(y.grad_fn).__name__
        mean, var = x.detach().double().mean(dims), x.detach().double().var(dims)
        if training:
            torch.testing.assert_close(running[0].double(), mean, rtol=1e-6, atol=0)
            torch.testing.assert_close(running[1].double(), var, rtol=1e-6, atol=0)
        exact = nn.functional.batch_norm(
            *(wide[0], running[0].double(), running[1].double(), wide[1], wide[2]),
            training=training,
        )
        assert error(y, exact) < 2e-6
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, given, dy)
        for ours, truth in zip(
            found, torch.autograd.grad(exact, wide, dy.double()), strict=True
        ):
            assert float((ours - truth).norm() / truth.norm()) < 1e-5


@pytest.mark.parametrize("ratio", [5.0, 30.0])
def test_mended_samples_have_the_gradients_of_float64(ratio: float) -> None:
    x = nn.functional.layer_norm(torch.randn(4, 6, 5, 8), (8,)) + ratio
    layers: list[tuple[Any, Any]] = [
        (normkit.nn.LayerNorm(8), nn.LayerNorm(8)),
        (normkit.nn.LayerNorm([5, 8]), nn.LayerNorm([5, 8])),
        (normkit.nn.GroupNorm(2, 6), nn.GroupNorm(2, 6)),
        (normkit.nn.InstanceNorm2d(6, affine=True), nn.InstanceNorm2d(6, affine=True)),
    ]
    for ours, theirs in layers:
        for parameter in ours.parameters():
            nn.init.normal_(parameter)
        theirs.load_state_dict(ours.state_dict())
        given, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        y, exact = ours(given), theirs.double()(wide)
        assert y.grad_fn is not None
        assert "Native" in type(y.grad_fn).__name__
        assert error(y, exact) < 2e-6
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, [given, *ours.parameters()], dy)
        truths = torch.autograd.grad(exact, [wide, *theirs.parameters()], dy.double())
        for gradient, truth in zip(found, truths, strict=True):
            assert float((gradient - truth).norm() / truth.norm()) < 1e-5


def test_an_older_library_leaves_everything_to_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer: Any
    layer, x = normkit.nn.BatchNorm2d(4), torch.randn(8, 4, 5, 5)
    y = layer(x)
    monkeypatch.setattr(judging, "judging_library", lambda: None)
    assert not took_torch(lambda: layer(x))
    torch.testing.assert_close(layer(x), y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_transforms_of_torch_see_the_same_values(mean: float) -> None:
    layers: list[tuple[Any, tuple[int, ...]]] = [
        (normkit.nn.LayerNorm(6), (4, 6)),
        (normkit.nn.GroupNorm(2, 6), (4, 6, 5)),
        (normkit.nn.RMSNorm(6), (4, 6)),
        (normkit.nn.BatchNorm1d(6, track_running_stats=False), (9, 6)),
    ]
    for layer, shape in layers:
        x, t = mean + torch.randn(3, *shape), torch.randn(3, *shape)
        each = torch.stack([layer(one) for one in x])
        torch.testing.assert_close(torch.vmap(layer)(x), each, rtol=1e-5, atol=1e-5)
        weights = torch.randn(3, *layer.weight.shape)

        def by_weight(w: Tensor, layer: Any = layer, x: Tensor = x) -> Tensor:
            return torch.func.functional_call(layer, {"weight": w}, (x[0],))

        torch.testing.assert_close(
            torch.vmap(by_weight)(weights),
            torch.stack([by_weight(w) for w in weights]),
            rtol=1e-5,
            atol=1e-5,
        )
        moved = torch.func.jvp(layer, (x[0],), (t[0],))[1]
        wide = layer.double()
        exact = torch.func.jvp(wide, (x[0].double(),), (t[0].double(),))[1]
        torch.testing.assert_close(moved, exact.float(), rtol=1e-4, atol=1e-4)


def test_explain_says_whether_torchs_operator_is_tried() -> None:
    layer: Any
    layer, x = normkit.nn.BatchNorm2d(4), torch.randn(8, 4, 5, 5)
    assert normkit.explain(x).against_torch == []
    assert "torch's operator: tried first" in normkit.explain(x).to_text()
    for refused, why in (
        (x.double(), "float64"),
        (nn.Parameter(x), "Parameter"),
        (torch.zeros(33, 4, 32, 32), "135,168 values, more than 131,072"),
        (x[:0], "too few"),
        (x[..., 1:], "contiguous"),
    ):
        reasons = normkit.explain(refused).against_torch
        assert reasons is not None
        assert any(why in reason for reason in reasons)
        assert normkit.explain(refused).to_json()["against_torch"] == reasons
        assert why in normkit.explain(refused).to_text()
        if refused.numel():
            assert not took_torch(functools.partial(layer, refused))
    with backend("cpu"):
        assert normkit.explain(x).against_torch == ["backend 'cpu' is asked for"]
    with normkit.less_memory():
        (reason,) = normkit.explain(x).against_torch or [""]
        assert "kept" in reason


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
