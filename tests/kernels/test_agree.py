"""Every backend agrees with float64 on every primitive and awkward layout."""

import copy
import math

import pytest
import torch
from torch import Tensor

import normkit
import oracles
from kernels.cases import CASES, DTYPES, EMPTY, Case, backends_here, tolerance
from normkit.kernels.choose import backend_named
from normkit.views import keepdim_shape

OFFSETS = [(0.0, 1.0), (1e4, 1.0)]


@pytest.fixture(params=backends_here())
def kernels(request):
    return backend_named(request.param)


def able(kernels, x: Tensor, dims: tuple[int, ...]) -> None:
    reasons = kernels.reasons_against(x, dims)
    if reasons:
        pytest.skip("; ".join(reasons))


def vector(x: Tensor, dims: tuple[int, ...], seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    shape = keepdim_shape(x, dims)
    return torch.randn(shape, generator=g, dtype=torch.float64)


def like(x: Tensor, seed: int) -> Tensor:
    """Random values with the dtype and layout of x."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)
    return torch.empty_like(x).copy_(values)


@pytest.mark.parametrize("offset", OFFSETS, ids=["centred", "offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments(kernels, case: Case, dtype: torch.dtype, offset) -> None:
    x = case.draw(dtype, *offset)
    able(kernels, x, case.dims)
    count, mean, m2 = oracles.statistics(x, case.dims)
    m = kernels.moments(x, case.dims)
    assert m.mean.shape == m.m2.shape == keepdim_shape(x, case.dims)
    assert m.mean.dtype == torch.float64
    assert int(m.count) == int(count.flatten()[0])
    # The centre errs relative to the spread, whatever the offset.
    spread = (m2 / count).sqrt()
    error = (m.mean - mean).abs()
    assert (error <= 3e-7 * spread + 1e-12 * mean.abs()).all(), error.max()
    torch.testing.assert_close(m.m2, m2, rtol=1e-6, atol=1e-9 * float(m2.max()))


@pytest.mark.parametrize("mask_shape", ["full", "broadcast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_moments(kernels, case: Case, dtype: torch.dtype, mask_shape) -> None:
    x = case.draw(dtype, 1e4)
    able(kernels, x, case.dims)
    g = torch.Generator().manual_seed(5)
    shape = x.shape if mask_shape == "full" else (x.shape[0],) + (1,) * (x.dim() - 1)
    mask = (torch.rand(shape, generator=g) > 0.3).expand(x.shape)
    hidden = torch.where(mask, x, torch.full_like(x, math.nan))
    hidden = torch.empty_like(x).copy_(hidden) if case.name != "expanded" else hidden
    m = kernels.moments(hidden, case.dims, mask)
    count, mean, m2 = oracles.statistics(hidden, case.dims, mask)
    assert torch.equal(m.count.expand(count.shape), count.long())
    some = count > 0
    torch.testing.assert_close(m.mean[some], mean[some], rtol=1e-10, atol=1e-6)
    torch.testing.assert_close(m.m2[some], m2[some], rtol=1e-6, atol=1e-6)
    assert (m.mean[~some] == 0).all()
    assert (m.m2[~some] == 0).all()


@pytest.mark.parametrize("offset", OFFSETS, ids=["centred", "offset"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_apply(kernels, case: Case, dtype, weighted: bool, offset) -> None:
    x = case.draw(dtype, *offset)
    able(kernels, x, case.dims)
    center = vector(x, case.dims, 1) + offset[0]
    scale = vector(x, case.dims, 2)
    others = tuple(d for d in range(x.dim()) if d not in case.dims)
    weight = vector(x, others, 3).to(torch.float32) if weighted else None
    shift = vector(x, others if weighted else case.dims, 4).to(torch.float32)
    y = kernels.apply(x, center, scale, shift, weight=weight)
    expected = (x.double() - center) * scale * (1 if weight is None else weight) + shift
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype, 16))
    if x.is_contiguous() or "last" in case.name:
        assert y.stride() == x.stride(), "the layout must be kept"


@pytest.mark.parametrize("offset", OFFSETS, ids=["centred", "offset"])
@pytest.mark.parametrize("extras", ["plain", "weight", "scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reduce_grads(kernels, case: Case, dtype, extras: str, offset) -> None:
    x = case.draw(dtype, *offset)
    able(kernels, x, case.dims)
    dy = like(x, 7)
    center = vector(x, case.dims, 1) + offset[0]
    others = tuple(d for d in range(x.dim()) if d not in case.dims)
    dims, weight, scale = case.dims, None, None
    if extras == "weight":
        weight = vector(x, others, 3).to(torch.float32)
    elif extras == "scale":
        # Gradients of a learned weight along the row: sums over the other dimensions.
        dims, scale = others, vector(x, case.dims, 2)
        if not others:
            pytest.skip("there is one row: nothing to sum over")
    sum_dy, sum_dy_rest = kernels.reduce_grads(
        dy, x, center, dims, weight=weight, scale=scale
    )
    g = dy.double() * (1 if weight is None else weight.double())
    rest = (x.double() - center) * (1 if scale is None else scale)
    terms = math.prod(x.shape[d] for d in dims)
    near = tolerance(torch.float32, 64 * terms)
    torch.testing.assert_close(sum_dy.double(), g.sum(dims, keepdim=True), **near)
    expected = (g * rest).sum(dims, keepdim=True)
    torch.testing.assert_close(sum_dy_rest.double(), expected, **near)


@pytest.mark.parametrize("offset", OFFSETS, ids=["centred", "offset"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_apply_grads(kernels, case: Case, dtype, weighted: bool, offset) -> None:
    x = case.draw(dtype, *offset)
    able(kernels, x, case.dims)
    dy = like(x, 7)
    center = vector(x, case.dims, 1) + offset[0]
    a, b, c = (vector(x, case.dims, seed) for seed in (2, 3, 4))
    others = tuple(d for d in range(x.dim()) if d not in case.dims)
    weight = vector(x, others, 5).to(torch.float32) if weighted else None
    dx = kernels.apply_grads(dy, x, center, a, b, c, weight=weight)
    g = dy.double() * (1 if weight is None else weight)
    expected = a * g + b * (x.double() - center) + c
    assert dx.dtype == x.dtype
    torch.testing.assert_close(dx.double(), expected, **tolerance(dtype, 16))


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_tensors_are_no_special_case(kernels, case: Case) -> None:
    x = case.draw(torch.float32)
    able(kernels, x, case.dims)
    m = kernels.moments(x, case.dims)
    assert m.mean.shape == keepdim_shape(x, case.dims)
    assert (m.mean == 0).all()
    one = torch.ones(keepdim_shape(x, case.dims), dtype=torch.float64)
    assert kernels.apply(x, one, one, one).shape == x.shape
    sums = kernels.reduce_grads(x, x, one, case.dims)
    assert all((s == 0).all() and s.shape == one.shape for s in sums)
    assert kernels.apply_grads(x, x, one, one, one, one).shape == x.shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("nchw", "channels-last", "rows")], ids=str
)
def test_nan_and_inf_stay_in_their_statistic(kernels, case, dtype, bad) -> None:
    x = case.draw(dtype)
    able(kernels, x, case.dims)
    x[(1,) * x.dim()] = bad
    m = kernels.moments(x, case.dims)
    _, mean, _ = oracles.statistics(x, case.dims)
    hit = ~mean.isfinite()
    assert int(hit.sum()) == 1
    torch.testing.assert_close(m.mean[hit], mean[hit], equal_nan=True)
    assert m.m2[hit].isnan().all()
    assert m.mean[~hit].isfinite().all()
    assert m.m2[~hit].isfinite().all()
    zero, one = torch.zeros_like(mean), torch.ones_like(mean)
    y = kernels.apply(x, zero, one, zero)
    torch.testing.assert_close(y, x, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_input_gives_the_same_bits(kernels, case: Case) -> None:
    x = case.draw(torch.float32, 3.0)
    able(kernels, x, case.dims)
    dy = like(x, 1)
    first, second = (kernels.moments(x, case.dims) for _ in range(2))
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.m2, second.m2)
    a = kernels.reduce_grads(dy, x, first.mean, case.dims)
    b = kernels.reduce_grads(dy, x, first.mean, case.dims)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_constant_channel_has_variance_0(kernels) -> None:
    x = torch.full((64, 3, 33, 7), 0.1)
    able(kernels, x, (0, 2, 3))
    assert float((kernels.moments(x, (0, 2, 3)).m2).max()) < 1e-9


def test_one_outlier_does_not_drown_the_others(kernels) -> None:
    x = torch.randn(16, 2, 50, 50)
    x[0, 0, 0, 0] = 1e4
    able(kernels, x, (0, 2, 3))
    _, mean, m2 = oracles.statistics(x, (0, 2, 3))
    m = kernels.moments(x, (0, 2, 3))
    torch.testing.assert_close(m.m2, m2, rtol=1e-6, atol=0)
    torch.testing.assert_close(m.mean, mean, rtol=0, atol=3e-7 * 50)


@pytest.mark.parametrize("laid", ["dense", "sliced", "negated"])
def test_half_outputs_are_rounded_once_whatever_the_layout(laid: str) -> None:
    torch.manual_seed(0)
    wide = torch.randn(8, 6, 10, 20).bfloat16()
    x = wide[..., ::2]
    if laid != "sliced":
        x = x.contiguous()
    if laid == "negated":
        x = torch._neg_view(x)
    residual = torch.randn(x.shape).bfloat16()
    layer = normkit.nn.BatchNorm2d(6, activation="silu").eval()
    torch.nn.init.normal_(layer.running_mean)
    y = layer(x, residual=residual)
    exact = copy.deepcopy(layer).double()(x.double(), residual=residual.double())
    unit = exact.abs().clamp(min=1e-6) * 2**-8
    assert ((y.double() - exact).abs() <= 1.05 * unit).all()
