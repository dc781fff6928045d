"""Ghosts, small batches, estimators, casts: options of the batch norm layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import oracles
from normkit.errors import ArgumentError, ShapeError
from normkit.functional.ghost import ghost_sizes
from normkit.nn import BatchNorm1d, BatchNorm2d

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")


@pytest.mark.parametrize("samples", [1, 3, 4, 7, 8, 11, 12, 13, 40])
def test_tabnet_243_ghosts_take_any_remainder(samples: int) -> None:
    sizes = ghost_sizes(samples, 4)
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(4, samples)
    layer = BatchNorm2d(3, ghost_size=4).double()
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(samples, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    truth = torch.cat(
        [oracles.batch_norm(g, layer.weight, layer.bias) for g in x.split(sizes)]
    )
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(x)
    inputs = [x, layer.weight, layer.bias]
    for ours, wanted in zip(
        torch.autograd.grad(y, inputs, dy),
        torch.autograd.grad(truth, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
    whole = BatchNorm2d(3).double()
    whole(x)
    torch.testing.assert_close(layer.running_mean, whole.running_mean)
    torch.testing.assert_close(layer.running_var, whole.running_var)


def test_ghosts_of_channels_last_sequences_follow_the_channel_dimension() -> None:
    x = torch.randn(9, 5, 3)
    last, first = BatchNorm1d(3, ghost_size=4, channel_dim=-1), BatchNorm1d(3)
    first.ghost_size = 4
    torch.testing.assert_close(last(x), first(x.mT).mT)


@pytest.mark.parametrize("policy", ["running", "renorm", "skip"])
def test_torch_7716_a_batch_of_one_follows_the_policy(policy: str) -> None:
    layer = BatchNorm1d(3, on_small_batch=policy)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.normal_()
        layer.running_var.uniform_(0.5, 2)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(1, 3, requires_grad=True)
    for cls in (nn.BatchNorm1d, BatchNorm1d):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            cls(3)(x)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    twin = nn.BatchNorm1d(3).eval()
    twin.load_state_dict(before)
    z = x.detach().clone().requires_grad_()
    evaluated = twin(z)
    evaluated.backward(dy)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)
    moved = 0.9 * before["running_mean"] + 0.1 * x.detach()[0]
    wanted_mean = moved if policy == "renorm" else before["running_mean"]
    torch.testing.assert_close(layer.running_mean, wanted_mean)
    assert torch.equal(layer.running_var, before["running_var"])
    if policy == "skip":
        torch.testing.assert_close(y[0], layer.bias)
    else:
        torch.testing.assert_close(y, evaluated)
        torch.testing.assert_close(layer.weight.grad, twin.weight.grad)
    wanted_dx = z.grad if policy == "running" else torch.zeros_like(x)
    # A rounding of dy, 6e-8, times 1/√eps = 316.
    torch.testing.assert_close(x.grad, wanted_dx, rtol=1e-5, atol=1e-4)


def test_a_policy_leaves_larger_batches_alone_and_judges_masked_channels() -> None:
    x = torch.randn(5, 2, 3)
    layer, plain = BatchNorm1d(2, on_small_batch="running"), BatchNorm1d(2)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    mask = torch.ones(5, 2, 3, dtype=torch.bool)
    mask[:, 1] = False
    mask[0, 1, 0] = True  # one value of channel 1
    layer, plain = BatchNorm1d(2, on_small_batch="running"), BatchNorm1d(2)
    y = layer(x, mask=mask)
    torch.testing.assert_close(y[:, 0], plain(x, mask=mask)[:, 0])
    wanted = torch.where(mask[:, 1], x[:, 1] / (1 + 1e-5) ** 0.5, 0.0)
    torch.testing.assert_close(y[:, 1], wanted)
    assert layer.running_mean[1] == 0


def test_torch_62399_the_estimator_is_a_choice() -> None:
    x = torch.randn(6, 2, 5).double()
    layer = BatchNorm1d(2, estimator="biased", momentum=1.0).double()
    layer(x)
    torch.testing.assert_close(layer.running_var, x.var((0, 2), correction=0))
    twin = BatchNorm1d(2, momentum=1.0).double()
    twin(x)
    torch.testing.assert_close(twin.running_var, x.var((0, 2)))


def test_a_debiased_average_forgets_where_it_started() -> None:
    batches = [10 + torch.randn(8, 2).double() for _ in range(5)]
    layer, theirs = BatchNorm1d(2, debias=True).double(), nn.BatchNorm1d(2).double()
    for batch in batches:
        layer(batch)
        theirs(batch)
    assert theirs.running_mean.max() < 5
    shares = torch.tensor([0.9**k for k in range(5)][::-1]).double()
    shares = (shares / shares.sum())[:, None]
    means, variances = (
        torch.stack(s)
        for s in zip(*((b.mean(0), b.var(0)) for b in batches), strict=True)
    )
    torch.testing.assert_close(layer.running_mean, (shares * means).sum(0))
    torch.testing.assert_close(layer.running_var, (shares * variances).sum(0))


def test_the_first_debiased_variance_of_a_constant_is_not_negative() -> None:
    """0.1/(1 − 0.9) is more than 1, and −2e-16 is no variance."""
    for momentum in (0.1, 0.05, 0.3, 0.7, 0.9):
        layer = BatchNorm1d(2, debias=True, momentum=momentum).double()
        layer(torch.full((4, 2), 3.0).double())
        assert bool((layer.running_var >= 0).all()), momentum
        assert float(layer.running_var.max()) < 1e-14
        torch.testing.assert_close(layer.running_mean, torch.full((2,), 3.0).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_leaves_the_running_statistics_in_float32(dtype: torch.dtype) -> None:
    layer = BatchNorm2d(3)
    layer(torch.randn(4, 3, 2, 2))
    mean = layer.running_mean.clone()
    layer.to(dtype)
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.running_mean, mean)
    assert layer(torch.randn(4, 3, 2, 2).to(dtype)).dtype == dtype
    assert BatchNorm2d(3, dtype=dtype).running_var.dtype == dtype
    assert layer.double().running_var.dtype == torch.float64


def test_unknown_options_are_named() -> None:
    with pytest.raises(ArgumentError, match="estimator='mle'"):
        BatchNorm1d(3, estimator="mle")
    with pytest.raises(ArgumentError, match="'running', 'renorm', 'skip'"):
        BatchNorm1d(3, on_small_batch="drop")
    with pytest.raises(ArgumentError, match="at least 1 sample, got 0"):
        BatchNorm1d(3, ghost_size=0)
    with pytest.raises(ArgumentError, match="finite negative_slope, got nan"):
        BatchNorm1d(3, activation="leaky_relu", negative_slope=float("nan"))


@pytest.mark.parametrize("options", [{}, {"ghost_size": 2}, {"debias": True}])
def test_shapes_are_refused_alike_with_and_without_options(options) -> None:
    x = torch.randn(4, 3)
    layer = BatchNorm1d(3, **options)
    with pytest.raises(ShapeError, match=r"residual of shape \(1, 3\)"):
        layer(x, residual=x[:1])
    with pytest.raises(ShapeError, match="no dimension 7"):
        BatchNorm1d(3, channel_dim=7, **options)(x)


def test_options_are_shown_and_survive_a_copy() -> None:
    layer = BatchNorm2d(3, ghost_size=4, estimator="biased", debias=True)
    twin = copy.deepcopy(layer)
    assert repr(twin) == repr(layer)
    assert "ghost_size=4, estimator='biased', debias=True" in repr(layer)
    assert "ghost" not in repr(BatchNorm2d(3))


@pytest.mark.parametrize("route", ["kernels"], indirect=True)
def test_ghosts_compile_for_batches_of_several_sizes() -> None:
    """The second size of a batch makes its size a symbol."""
    layer, eager = (BatchNorm2d(6, ghost_size=2) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for samples in (4, 6, 7, 9):
        x = torch.randn(samples, 6, 3, 3)
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(layer.running_var, eager.running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", ["running", "renorm"])
def test_halves_are_rounded_once_under_a_policy_and_an_activation(
    policy: str, dtype: torch.dtype
) -> None:
    options = {"on_small_batch": policy, "activation": "gelu"}
    for samples in (1, 4):
        layer = BatchNorm1d(500, **options)
        exact = copy.deepcopy(layer).double()
        x, residual = torch.randn(2, samples, 500).to(dtype)
        y = layer(x, residual=residual)
        wanted = exact(x.double(), residual=residual.double())
        assert y.dtype == dtype
        allowed = 0.51 * torch.finfo(dtype).eps * wanted.abs() + 1e-6
        assert ((y.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", ["running", "renorm"])
def test_one_half_is_rounded_once_under_a_policy(
    policy: str, dtype: torch.dtype
) -> None:
    """The shift, its product with the weight and the sum are three chances to round."""
    layer = BatchNorm1d(500, on_small_batch=policy)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    exact = copy.deepcopy(layer).double()
    x = torch.randn(1, 500).to(dtype)
    wanted = exact(x.double())
    allowed = 0.51 * torch.finfo(dtype).eps * wanted.abs() + 1e-6
    assert ((layer(x).double() - wanted).abs() <= allowed).all()
