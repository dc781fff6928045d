"""Whitening: the roots, their derivatives, and the layer around them."""

import math

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
import oracles
from normkit.errors import ArgumentError, ShapeError
from normkit.functional.whitening import inverse_sqrt, newton_inverse_sqrt

METHODS = ("zca", "newton")
each_method = pytest.mark.parametrize("method", METHODS)
SHAPES = [(64, 6), (16, 6, 7), (8, 6, 4, 5)]


def layer_of(channels: int = 6, **kwargs) -> nn.Module:
    layer = normkit.nn.WhiteningBatchNorm(channels, **kwargs)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    return layer


def mixed(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlated channels of different variances, away from 0."""
    x = torch.randn(shape, dtype=torch.float64)
    mix = torch.randn(shape[1], shape[1], dtype=torch.float64)
    return (10 + torch.einsum("nc...,cd->nd...", x, mix)).to(dtype)


def truth(x: Tensor, layer: nn.Module) -> Tensor:
    iterations = layer.iterations if layer.method == "newton" else None
    y = oracles.whitened(x, layer.num_groups, layer.eps, iterations)
    shape = [1, -1] + [1] * (x.dim() - 2)
    return y * layer.weight.double().view(shape) + layer.bias.double().view(shape)


def spd(*sizes: int) -> Tensor:
    root = torch.randn(*sizes, sizes[-1] + 3, dtype=torch.float64)
    return root @ root.mT / sizes[-1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_groups", [1, 2, 6])
@each_method
def test_outputs_and_gradients_are_those_of_the_definition(
    method: str, num_groups: int, shape
) -> None:
    x = mixed(shape).requires_grad_()
    layer = layer_of(num_groups=num_groups, method=method)
    wanted = truth(x, layer)
    y, dy = layer(x), torch.randn(shape)
    assert ((y - wanted).abs() <= 1e-5 * wanted.abs().clamp(min=1)).all()
    inputs = [x, layer.weight, layer.bias]
    found = torch.autograd.grad(y, inputs, dy)
    exact = torch.autograd.grad(wanted, inputs, dy.double())
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4


@each_method
def test_gradcheck_of_first_and_second_order(method: str) -> None:
    layer = layer_of(3, method=method).double()
    x = mixed((7, 3), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, [x], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, [x])


@pytest.mark.parametrize("equal", [False, True])
def test_the_root_has_derivatives_where_eigenvalues_coincide(equal: bool) -> None:
    """Autograd of eigh divides by their differences there and gives NaN."""
    matrix = torch.eye(4, dtype=torch.float64) if equal else spd(4)
    matrix.requires_grad_()

    def root(m: Tensor) -> Tensor:
        return inverse_sqrt(0.5 * (m + m.mT), 1e-3)

    assert torch.autograd.gradcheck(root, [matrix], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(root, [matrix])
    if equal:
        values, vectors = torch.linalg.eigh(matrix)
        naive = (vectors * values.rsqrt()) @ vectors.mT
        (lost,) = torch.autograd.grad(naive, matrix, torch.randn(4, 4).double())
        assert lost.isnan().any()


def test_the_third_derivative_of_the_root_is_that_of_its_power_series() -> None:
    a, u = spd(3), spd(3)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    f = inverse_sqrt(a + t * u, 1e-3)[0, 1]
    for _ in range(3):
        (f,) = torch.autograd.grad(f, t, create_graph=True)
    step = 1e-2

    def second(at: float) -> Tensor:
        g = inverse_sqrt(a + (t + at) * u, 1e-3)[0, 1]
        for _ in range(2):
            (g,) = torch.autograd.grad(g, t, create_graph=True)
        return g

    slope = 8 * (second(step) - second(-step)) - second(2 * step) + second(-2 * step)
    torch.testing.assert_close(f, slope / (12 * step), rtol=1e-4, atol=1e-6)


def test_the_root_runs_under_vmap_and_jacrev() -> None:
    many = spd(5, 3)
    found = torch.vmap(lambda m: inverse_sqrt(m, 1e-3))(many)
    torch.testing.assert_close(found, inverse_sqrt(many, 1e-3))
    whole = torch.func.jacrev(lambda m: inverse_sqrt(m, 1e-3))(many[0])
    other = torch.func.jacfwd(lambda m: inverse_sqrt(m, 1e-3))(many[0])
    torch.testing.assert_close(whole, other)


def test_newton_tends_to_the_exact_root() -> None:
    matrix = spd(5)
    exact = inverse_sqrt(matrix, 1e-3)
    errors = [
        float((newton_inverse_sqrt(matrix, 1e-3, k) - exact).abs().max() / exact.max())
        for k in (1, 4, 40)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_whitened_channels_are_uncorrelated_and_of_variance_1() -> None:
    x = mixed((512, 6))
    y = normkit.nn.WhiteningBatchNorm(6, affine=False)(x).double()
    correlation = y.T @ y / 512
    torch.testing.assert_close(correlation, torch.eye(6).double(), rtol=0, atol=1e-3)


def test_one_channel_a_group_is_batch_norm() -> None:
    x = mixed((16, 6, 7))
    layer = normkit.nn.WhiteningBatchNorm(6, num_groups=6)
    torch.testing.assert_close(
        layer(x), normkit.nn.BatchNorm1d(6)(x), rtol=1e-5, atol=1e-5
    )


@each_method
def test_it_is_finite_below_full_rank_and_for_huge_scales(method: str) -> None:
    for x in (mixed((3, 6)), 1e6 * mixed((64, 6)), torch.ones(8, 6)):
        x.requires_grad_()
        y = layer_of(method=method)(x)
        (dx,) = torch.autograd.grad(y, x, torch.randn(y.shape))
        assert y.isfinite().all()
        assert dx.isfinite().all()


@each_method
def test_eval_uses_the_averages(method: str) -> None:
    layer = layer_of(num_groups=2, method=method, momentum=None)
    batches = [mixed((64, 6)) for _ in range(3)]
    roots = []
    for x in batches:
        layer(x)
        alone = normkit.nn.WhiteningBatchNorm(
            6, num_groups=2, method=method, momentum=1.0
        )
        alone(x)
        roots.append(alone.running_whitening)
    mean = torch.stack([x.mean(0) for x in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    whitening = torch.stack(roots).mean(0)
    torch.testing.assert_close(layer.running_whitening, whitening)
    x = mixed((5, 6))
    parts = [(x - mean)[:, 3 * k : 3 * k + 3] @ whitening[k].T for k in range(2)]
    wanted = torch.cat(parts, 1) * layer.weight + layer.bias
    torch.testing.assert_close(layer.eval()(x), wanted, rtol=1e-4, atol=1e-4)
    assert int(layer.num_batches_tracked) == 3


@each_method
def test_masked_observations_do_not_exist(method: str) -> None:
    x = mixed((16, 6, 7), torch.float64)
    mask = torch.rand(16, 1, 7) > 0.4
    layer = layer_of(method=method).double()
    seen = mask[:, 0]
    wanted = truth(x.transpose(1, 2)[seen], layer)
    y = layer(torch.where(mask, x, math.nan), mask=mask)
    torch.testing.assert_close(y.transpose(1, 2)[seen], wanted)
    assert not y.transpose(1, 2)[~seen].any()
    y = layer.eval()(torch.where(mask, x, math.nan), mask=mask)
    torch.testing.assert_close(y, torch.where(mask, layer(x), torch.zeros_like(x)))


def test_a_mask_that_differs_between_channels_is_refused() -> None:
    with pytest.raises(ArgumentError, match="whole observations"):
        layer_of()(mixed((16, 6, 7)), mask=torch.ones(16, 6, 7).bool())
    with pytest.raises(ArgumentError, match="whole observations"):
        layer_of()(mixed((16, 6, 7)), mask=torch.ones(6, 1).bool())


@each_method
def test_a_poisoned_batch_shows_and_leaves_the_state_alone(method: str) -> None:
    layer, x = layer_of(method=method), mixed((64, 6))
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    x[3, 2] = math.inf
    assert not layer(x).isfinite().all()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_layer_takes_half_inputs(dtype: torch.dtype) -> None:
    x, layer = mixed((64, 6)).to(dtype), layer_of()
    y, wanted = layer(x), truth(x, layer)
    assert y.dtype == dtype
    assert layer.running_whitening.dtype == torch.float32
    assert ((y - wanted).abs() <= torch.finfo(dtype).eps * wanted.abs() + 1e-3).all()


def test_the_state_survives_a_round_trip() -> None:
    layer, other = layer_of(num_groups=3), normkit.nn.WhiteningBatchNorm(6, 3)
    layer(mixed((64, 6)))
    other.load_state_dict(layer.state_dict())
    x = mixed((4, 6))
    assert torch.equal(other.eval()(x), layer.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_groups": 4}, "num_groups to divide"),
        ({"method": "pca"}, "'zca' or 'newton'"),
        ({"iterations": 0}, "at least 1"),
        ({"momentum": -0.1}, r"momentum in \[0, 1\]"),
    ],
)
def test_arguments_that_make_no_sense_are_told(arguments: dict, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        normkit.nn.WhiteningBatchNorm(6, **arguments)


def test_inputs_that_do_not_fit_are_told() -> None:
    with pytest.raises(ShapeError, match=r"\(N, 6, \*\)"):
        layer_of()(torch.randn(4, 5))
    with pytest.raises(ArgumentError, match="more than one value"):
        layer_of()(torch.randn(1, 6))
