"""Layer, RMS and group norm against their definitions."""

import math

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
import oracles
from strategies import FILLS, filled

# What is promised holds on every route.
pytestmark = pytest.mark.usefixtures("route")


def with_random_affine(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    return layer


def layer_norm(x: Tensor, layer: nn.Module) -> Tensor:
    return oracles.layer_norm(
        x, layer.normalized_shape, layer.weight, layer.bias, layer.eps
    )


def rms_norm(x: Tensor, layer: nn.Module) -> Tensor:
    return oracles.rms_norm(x, layer.normalized_shape, layer.weight, layer.eps)


def group_norm(x: Tensor, layer: nn.Module) -> Tensor:
    return oracles.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)


CASES = {
    "layer, last": (lambda: normkit.nn.LayerNorm(12), (5, 7, 12), layer_norm),
    "layer, last two": (lambda: normkit.nn.LayerNorm((7, 12)), (5, 7, 12), layer_norm),
    "layer, all": (lambda: normkit.nn.LayerNorm((7, 12)), (7, 12), layer_norm),
    "layer, no bias": (
        lambda: normkit.nn.LayerNorm(12, bias=False),
        (5, 12),
        layer_norm,
    ),
    "rms, last": (lambda: normkit.nn.RMSNorm(12, eps=1e-5), (5, 7, 12), rms_norm),
    "rms, last two": (
        lambda: normkit.nn.RMSNorm((7, 12), eps=1e-5),
        (5, 7, 12),
        rms_norm,
    ),
    "group, 1-d": (lambda: normkit.nn.GroupNorm(3, 12), (5, 12, 7), group_norm),
    "group, no space": (lambda: normkit.nn.GroupNorm(3, 12), (5, 12), group_norm),
    "group, 2-d": (lambda: normkit.nn.GroupNorm(4, 12), (3, 12, 4, 5), group_norm),
    "group, one": (lambda: normkit.nn.GroupNorm(1, 12), (3, 12, 4), group_norm),
    "group, no bias": (
        lambda: normkit.nn.GroupNorm(4, 12, bias=False),
        (3, 12, 4),
        group_norm,
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


@each_case
@pytest.mark.parametrize("fill", FILLS)
def test_outputs_are_those_of_the_definition(case: str, fill: str) -> None:
    """2e-6 of max(1, |y|): the numerics contract, in float32, for every fill."""
    build, shape, truth = CASES[case]
    layer, x = with_random_affine(build()), filled(shape, fill, 5, torch.float32)
    wanted = truth(x, layer)
    assert ((layer(x) - wanted).abs() <= 2e-6 * wanted.abs().clamp(min=1)).all()


@each_case
@pytest.mark.parametrize("fill", ["normal", "offset", "outlier"])
def test_gradients_are_those_of_the_definition_under_a_random_cotangent(
    case: str, fill: str
) -> None:
    build, shape, truth = CASES[case]
    layer = with_random_affine(build())
    x = filled(shape, fill, 5, torch.float32).requires_grad_()
    y, wanted = layer(x), [x, *layer.parameters()]
    dy = torch.randn(y.shape)
    found = torch.autograd.grad(y, wanted, dy)
    exact = torch.autograd.grad(truth(x, layer), wanted, dy.double())
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_layer_takes_half_inputs(case: str, dtype: torch.dtype) -> None:
    """Half an ulp: everything but the rounding of the output is wider."""
    build, shape, truth = CASES[case]
    layer, x = with_random_affine(build()), (7 + torch.randn(shape)).to(dtype)
    y, wanted = layer(x), truth(x, layer)
    assert y.dtype == dtype
    ulp = torch.finfo(dtype).eps * wanted.abs().clamp(min=2**-10)
    assert ((y - wanted).abs() <= 0.51 * ulp + 1e-7).all()


@each_case
def test_training_and_eval_are_the_same(case: str) -> None:
    build, shape, _ = CASES[case]
    layer, x = with_random_affine(build()), torch.randn(shape)
    assert torch.equal(layer.train()(x), layer.eval()(x))


@each_case
def test_a_sample_does_not_depend_on_its_batch(case: str) -> None:
    build, shape, _ = CASES[case]
    if case == "layer, all":
        pytest.skip("the whole input is one sample")
    layer, x = with_random_affine(build()), torch.randn(shape)
    whole = layer(x)
    for k in range(len(x)):
        alone = layer(x[k : k + 1])
        torch.testing.assert_close(alone, whole[k : k + 1], rtol=0, atol=1e-6)


def test_nan_stays_in_its_sample_and_group() -> None:
    x = torch.randn(3, 12, 4)
    x[1, 5, 2] = math.nan
    lost = normkit.nn.GroupNorm(3, 12)(x).isnan()
    assert lost[1, 4:8].all()
    assert int(lost.sum()) == 16
    lost = normkit.nn.LayerNorm(4)(x).isnan()
    assert lost[1, 5].all()
    assert int(lost.sum()) == 4


def test_group_norm_of_one_group_is_layer_norm_and_of_all_is_instance_norm() -> None:
    x = torch.randn(3, 12, 4, 5)
    layer = normkit.nn.LayerNorm((12, 4, 5), elementwise_affine=False)
    torch.testing.assert_close(normkit.nn.GroupNorm(1, 12, affine=False)(x), layer(x))
    instance = normkit.nn.InstanceNorm2d(12)
    torch.testing.assert_close(
        normkit.nn.GroupNorm(12, 12, affine=False)(x), instance(x)
    )


def test_rms_norm_leaves_the_mean_in() -> None:
    x = 100 + torch.randn(4, 32)
    y = normkit.nn.RMSNorm(32, elementwise_affine=False)(x)
    torch.testing.assert_close(y.square().mean(1), torch.ones(4))
    assert (y.mean(1) > 0.99).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_has_the_default_eps_of_torch(dtype: torch.dtype) -> None:
    x = torch.full((2, 8), 1e-4, dtype=dtype)
    found = normkit.nn.RMSNorm(8, dtype=dtype)(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(wide).eps
    wanted = oracles.rms_norm(x, (8,), None, eps)
    torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=0)
    assert ((found.double() / wanted - 1).abs() < 2 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize(
    "layer",
    [normkit.nn.LayerNorm(7), normkit.nn.RMSNorm(7), normkit.nn.GroupNorm(1, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_masked_positions_do_not_exist(layer: nn.Module) -> None:
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    n = 4
    mask = torch.arange(7) < n
    y = layer.double()(torch.where(mask, x, math.nan), mask=mask)
    assert not y[..., n:].any()
    cut = x[..., :n]
    eps = layer.eps or torch.finfo(torch.float64).eps
    if isinstance(layer, nn.RMSNorm):
        wanted = oracles.rms_norm(cut, (n,), None, eps)
    elif isinstance(layer, nn.LayerNorm):
        wanted = oracles.layer_norm(cut, (n,), None, None, eps)
    else:
        wanted = oracles.group_norm(cut, 1, None, None, eps)
    torch.testing.assert_close(y[..., :n], wanted)


@pytest.mark.parametrize(
    "layer",
    [
        normkit.nn.LayerNorm(7),
        normkit.nn.RMSNorm(7),
        normkit.nn.GroupNorm(1, 3),
        normkit.nn.InstanceNorm1d(3, affine=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_sample_that_is_all_padding_costs_the_others_nothing(
    layer: nn.Module,
) -> None:
    layer = with_random_affine(layer)
    x = torch.randn(4, 3, 7)
    x[2] = math.nan
    mask = torch.tensor([True, True, False, True]).view(4, 1, 1)
    x.requires_grad_()
    y, dy = layer(x, mask=mask), torch.randn(4, 3, 7)
    found = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    kept = [0, 1, 3]
    few = x.detach()[kept].requires_grad_()
    wanted = torch.autograd.grad(layer(few), [few, *layer.parameters()], dy[kept])
    torch.testing.assert_close(found[0][kept], wanted[0])
    torch.testing.assert_close(found[1:], wanted[1:])
    assert not y[2].any()
    assert not found[0][2].any()
