"""The fused CPU kernels against float64, on every instruction set of this machine."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracles
from kernels.cases import DTYPES, channels_last, tolerance
from normkit.functional.passes import Passes
from normkit.kernels import backend
from normkit.kernels.cpu import CpuBackend
from normkit.kernels.cpu.call import call_for
from normkit.kernels.cpu.loading import library, why_absent
from normkit.kernels.epilogue import ACTIVATIONS, Epilogue
from normkit.kernels.spec import Running, Spec
from normkit.views import keepdim_shape

pytestmark = pytest.mark.skipif(library() is None, reason=why_absent() or "built")

ISAS = library().isas if library() is not None else ()
EPS = 1e-5


@pytest.fixture(params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Iterator[CpuBackend]:
    native = library()
    assert native is not None
    before = native.isa
    native.choose_isa(request.param)
    yield CpuBackend()
    native.choose_isa(before)


@dataclass(frozen=True)
class Norm:
    """A normalization of one layout: shape, reduced dimensions, shape of the weight."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    affine: tuple[int, ...]
    layout: Callable[[Tensor], Tensor] = lambda x: x

    def __str__(self) -> str:
        return self.name

    def draw(self, dtype: torch.dtype, seed: int, mean: float = 0.0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=g, dtype=torch.float64) + mean
        return self.layout(x.to(dtype))

    def vector(self, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(self.affine, generator=g, dtype=torch.float64).to(dtype)


def grouped(x: Tensor) -> Tensor:
    """(N, G, C/G, H, W) as group norm sees a channels_last tensor."""
    return channels_last(x.flatten(1, 2)).unflatten(1, (x.shape[1], x.shape[2]))


NORMS = [
    Norm("batch-nchw", (5, 3, 7, 6), (0, 2, 3), (1, 3, 1, 1)),
    Norm("batch-nchw-long-runs", (3, 2, 40, 41), (0, 2, 3), (1, 2, 1, 1)),
    Norm("batch-nchw-tiles", (3, 71, 5, 5), (0, 2, 3), (1, 71, 1, 1)),
    Norm("batch-nchw-short-runs", (37, 6, 2, 2), (0, 2, 3), (1, 6, 1, 1)),
    Norm("batch-channels-last", (4, 67, 5, 3), (0, 2, 3), (1, 67, 1, 1), channels_last),
    Norm("batch-few-channels", (4, 3, 9, 7), (0, 2, 3), (1, 3, 1, 1), channels_last),
    Norm("batch-wide", (3, 2100), (0,), (1, 2100)),
    Norm("batch-matrix", (300, 16), (0,), (1, 16)),
    Norm("batch-per-activation", (9, 4, 3, 3), (0,), (1, 4, 3, 3)),
    Norm("layer", (7, 3, 53), (2,), (1, 1, 53)),
    Norm("layer-narrow", (41, 5), (1,), (1, 5)),
    Norm("layer-many-rows", (700, 24), (1,), (1, 24)),
    Norm("layer-long", (9, 801), (1,), (1, 801)),
    Norm("layer-two-dims", (6, 4, 9), (1, 2), (1, 4, 9)),
    Norm("group-nchw", (3, 4, 5, 6, 7), (2, 3, 4), (1, 4, 5, 1, 1)),
    Norm("group-nchw-short-runs", (5, 4, 3, 2, 2), (2, 3, 4), (1, 4, 3, 1, 1)),
    Norm("group-matrix", (9, 4, 6), (2,), (1, 4, 6)),
    Norm("group-channels-last", (3, 4, 5, 6, 7), (2, 3, 4), (1, 4, 5, 1, 1), grouped),
    Norm("group-of-all", (3, 1, 8, 5, 5), (2, 3, 4), (1, 1, 8, 1, 1), grouped),
    Norm("instance-nchw", (3, 5, 6, 7), (2, 3), (1, 5, 1, 1)),
    Norm("instance-channels-last", (5, 6, 5, 7), (2, 3), (1, 6, 1, 1), channels_last),
    Norm("instance-ncl", (4, 3, 130), (2,), (1, 3, 1)),
]
OF_MANY_BLOCKS = [
    Norm("batch-nchw", (3, 2, 150, 151), (0, 2, 3), (1, 2, 1, 1)),
    Norm("batch-nchw-of-long-runs", (2, 2, 40_000), (0, 2), (1, 2, 1)),
    Norm("batch-nchw-of-short-runs", (300, 3, 5, 7), (0, 2, 3), (1, 3, 1, 1)),
    Norm("batch-matrix", (5000, 16), (0,), (1, 16)),
    Norm(
        "batch-channels-last", (2, 70, 23, 24), (0, 2, 3), (1, 70, 1, 1), channels_last
    ),
    Norm("layer-many-rows", (1400, 30), (1,), (1, 30)),
    Norm("layer-many-long-rows", (150, 832), (1,), (1, 832)),
    Norm("instance-many", (37, 41, 5, 7), (2, 3), (1, 41, 1, 1)),
    Norm("group-channels-last", (2, 2, 8, 50, 51), (2, 3, 4), (1, 2, 8, 1, 1), grouped),
]
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def test_the_table_of_activations_is_complete() -> None:
    assert tuple(ACTS) == ACTIVATIONS


@dataclass
class Result:
    y: Tensor
    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None


def run(
    kernels: CpuBackend | str,
    norm: Norm,
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    mask: Tensor | None = None,
    centered: bool = True,
    keeps_y: bool = True,
    given: Running | None = None,
) -> Result:
    """Forward and backward as autograd runs them: fused, or as a backend's passes."""
    spec = Spec(
        norm.dims,
        EPS,
        centered,
        given=given is not None,
        activation=epilogue.activation,
        slope=epilogue.slope,
    )
    learned, residual = (weight, bias), epilogue.residual
    laid = None
    if mask is not None:
        laid = torch.empty_like(x, dtype=torch.bool).copy_(mask)
    operands = (x, *learned, residual, laid)
    call: Any = Passes(spec)
    name = kernels if isinstance(kernels, str) else "cpu"
    if not isinstance(kernels, str):
        call = call_for(spec, operands, given)
        assert call is not None
    wanted = (True, *(t is not None for t in (*learned, residual)))
    with backend(name):
        y, kept = call.forward(operands, given, "some")
        gated = y if keeps_y and residual is not None else None
        if epilogue.activation != "relu":
            gated = None
        grads = call.backward(dy, (*operands, gated, kept), wanted)
    assert grads[0] is not None
    return Result(y, *grads)


def oracle(
    norm: Norm,
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    mask: Tensor | None = None,
    centered: bool = True,
) -> Result:
    """The same by torch's autograd in float64."""
    leaves = [
        None if t is None else t.detach().double().requires_grad_()
        for t in (x, weight, bias, epilogue.residual)
    ]
    x64, weight64, bias64, residual64 = leaves
    assert x64 is not None
    if centered:
        z = oracles.normalized(x64, norm.dims, weight64, bias64, EPS, mask)
    else:
        z = oracles.rms_normalized(x64, norm.dims, weight64, EPS)
        z = z if bias64 is None else z + bias64
    if residual64 is not None:
        z = z + residual64
    y = ACTS[epilogue.activation](z)
    if mask is not None:
        y = torch.where(mask, y, 0.0)
    named = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, named, dy.double()))
    return Result(y.detach(), *(None if t is None else next(found) for t in leaves))


def compare(
    got: Result, expected: Result, dtype: torch.dtype, mean: float = 0.0
) -> None:
    # Statistics and their algebra are float32 or better: an error of a few roundings,
    # relative to the largest value, and one rounding to the dtype of the values.
    near = tolerance(dtype, 16)
    for name in ("y", "dx", "dweight", "dbias", "dresidual"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is None:
            continue
        size = float(b.abs().max())
        is_vector = name in ("dweight", "dbias")
        slack = 2e-6 if is_vector else near["atol"]
        if dtype == torch.float64:
            # The centre is one float64 here: half an ulp of the mean is lost in it, in
            # units of a standard deviation that is small where few values share it.
            slack = 1e-13 + 3e-14 * mean
        rtol = 1e-5 if is_vector and dtype != torch.float64 else near["rtol"]
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=rtol,
            atol=slack * max(size, 1.0),
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_forward_and_backward_agree_with_float64(kernels, norm, dtype, mean) -> None:
    if mean and torch.finfo(dtype).bits == 16:
        mean = 8.0  # 1e4 ± 1 is one value in half precision
    x, dy = norm.draw(dtype, 1, mean), norm.draw(dtype, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = norm.vector(3, wide), norm.vector(4, wide)
    epilogue = Epilogue("relu")
    got = run(kernels, norm, x, dy, weight, bias, epilogue)
    assert got.y.stride() == x.stride()
    assert got.y.dtype == got.dx.dtype == dtype
    assert got.dweight is not None
    assert got.dweight.dtype == wide
    expected = oracle(norm, x, dy, weight, bias, epilogue)
    # Where the relu is within an error of closed, either side is right.
    z = oracle(norm, x, dy, weight, bias, Epilogue()).y
    clear = (z.abs() > (0.02 if torch.finfo(dtype).bits == 16 else 1e-5)).to(dy.dtype)
    dy = dy * clear
    got = run(kernels, norm, x, dy, weight, bias, epilogue)
    expected = oracle(norm, x, dy, weight, bias, epilogue)
    compare(got, expected, dtype, mean)


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_every_activation_agrees_with_float64(
    kernels, norm, activation, with_residual
) -> None:
    for dtype in (torch.float32, torch.float64):
        x, dy = norm.draw(dtype, 1), norm.draw(dtype, 2)
        residual = norm.draw(dtype, 5) if with_residual else None
        weight, bias = norm.vector(3, dtype), norm.vector(4, dtype)
        epilogue = Epilogue(activation, 0.2, residual)
        z = oracle(norm, x, dy, weight, bias, Epilogue(residual=residual)).y
        dy = dy * (z.abs() > 1e-5)
        expected = oracle(norm, x, dy, weight, bias, epilogue)
        for keeps_y in (True, False):
            got = run(kernels, norm, x, dy, weight, bias, epilogue, keeps_y=keeps_y)
            compare(got, expected, dtype)


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_what_is_masked_is_never_looked_at(kernels, norm, activation) -> None:
    x, dy = norm.draw(torch.float32, 1, 100.0), norm.draw(torch.float32, 2)
    residual = norm.draw(torch.float32, 5)
    g = torch.Generator().manual_seed(9)
    mask = torch.rand(norm.shape, generator=g) > 0.3
    for k in (0, 1):  # two values for each statistic, for the oracle's sake
        mask[tuple(k if d in norm.dims else slice(None) for d in range(x.dim()))] = True
    weight, bias = norm.vector(3), norm.vector(4)
    expected = oracle(
        norm, x, dy, weight, bias, Epilogue(activation, 0.2, residual), mask
    )
    nan = torch.tensor(math.nan)
    hidden = [torch.empty_like(t).copy_(t.where(mask, nan)) for t in (x, dy, residual)]
    x, dy, residual = hidden
    got = run(
        kernels, norm, x, dy, weight, bias, Epilogue(activation, 0.2, residual), mask
    )
    assert (got.y[~mask] == 0).all()
    assert (got.dx[~mask] == 0).all()
    compare(got, expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", OF_MANY_BLOCKS, ids=str)
def test_values_under_a_mask_are_counted(kernels, norm, dtype) -> None:
    x, dy = norm.draw(dtype, 1, 2.0), norm.draw(dtype, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = norm.vector(3, wide), norm.vector(4, wide)
    g = torch.Generator().manual_seed(9)
    mask = torch.rand(norm.shape, generator=g) > 0.03
    args = (norm, x, dy, weight, bias, Epilogue(), mask)
    compare(run(kernels, *args), oracle(*args), dtype)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_a_statistic_without_any_value_is_left_alone(kernels, norm) -> None:
    x, dy = norm.draw(torch.float32, 1), norm.draw(torch.float32, 2)
    weight, bias = norm.vector(3), norm.vector(4)
    mask = torch.zeros(norm.shape, dtype=torch.bool)
    got = run(kernels, norm, x, dy, weight, bias, Epilogue(), mask)
    for t in (got.y, got.dx, got.dweight, got.dbias):
        assert t is not None
        assert (t == 0).all()


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_root_mean_square_and_no_affine_agree_with_float64(kernels, norm) -> None:
    x, dy = norm.draw(torch.float32, 1, 3.0), norm.draw(torch.float32, 2)
    for weight, bias in ((None, None), (norm.vector(3), None)):
        for centered in (True, False):
            args = (norm, x, dy, weight, bias, Epilogue())
            got = run(kernels, *args, centered=centered)
            compare(got, oracle(*args, centered=centered), torch.float32)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_given_statistics_are_constants(kernels, norm) -> None:
    x, dy = norm.draw(torch.float32, 1, 50.0), norm.draw(torch.float32, 2)
    weight, bias = norm.vector(3), norm.vector(4)
    shape = keepdim_shape(x, norm.dims)
    center = torch.randn(shape, dtype=torch.float64) + 50
    scale = torch.rand(shape, dtype=torch.float64) + 0.5
    residual = norm.draw(torch.float32, 5)
    epilogue = Epilogue("relu", residual=residual)
    y = kernels.apply(x, center, scale, bias, weight=weight, epilogue=epilogue)
    z = (x.double() - center) * scale * weight + bias + residual
    torch.testing.assert_close(y.double(), z.relu(), **tolerance(torch.float32, 16))
    dy = dy * (z.abs() > 1e-4)
    given = Running(center, scale.pow(-2) - EPS)
    got = run(kernels, norm, x, dy, weight, bias, epilogue, keeps_y=False, given=given)
    torch.testing.assert_close(got.y, y, **tolerance(torch.float32, 16))
    dx, dweight, dbias, dresidual = got.dx, got.dweight, got.dbias, got.dresidual
    g = dy.double() * (z > 0)
    near = {"rtol": 1e-5, "atol": 2e-5}
    over = norm.affine
    torch.testing.assert_close(dx.double(), g * scale * weight, **near)
    torch.testing.assert_close(dbias.double(), g.sum_to_size(over), **near)
    x_hat = (x.double() - center) * scale
    torch.testing.assert_close(dweight.double(), (g * x_hat).sum_to_size(over), **near)
    torch.testing.assert_close(dresidual.double(), g)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_fused_agrees_with_the_four_primitives(kernels, norm) -> None:
    x, dy = norm.draw(torch.float32, 1, 5.0), norm.draw(torch.float32, 2)
    weight, bias = norm.vector(3), norm.vector(4)
    epilogue = Epilogue("silu", residual=norm.draw(torch.float32, 5))
    args = (norm, x, dy, weight, bias, epilogue)
    got = run(kernels, *args)
    for plain in ("cpu", "reference"):
        other = run(plain, *args)
        for name in ("y", "dx", "dweight", "dbias", "dresidual"):
            torch.testing.assert_close(
                getattr(got, name), getattr(other, name), rtol=2e-5, atol=2e-5
            )


@pytest.mark.parametrize("is_masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("norm", OF_MANY_BLOCKS, ids=str)
def test_sums_of_several_blocks_agree_with_float64(kernels, norm, is_masked) -> None:
    x, dy = norm.draw(torch.float32, 1, 3.0), norm.draw(torch.float32, 2)
    # The last blocks differ from the first: one that is lost or counted twice shows.
    last = norm.dims[-1]
    ramp = torch.linspace(0, 2, x.shape[last]).view([-1] + [1] * (x.dim() - 1 - last))
    x = norm.layout(x + ramp)
    mask = norm.draw(torch.float32, 9) > -0.5 if is_masked else None
    args = (norm, x, dy, norm.vector(3), norm.vector(4), Epilogue(), mask)
    compare(run(kernels, *args), oracle(*args), torch.float32)


@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_the_number_of_threads_does_not_change_a_bit(kernels, norm) -> None:
    # Enough values for more than one thread.
    times = -(-40_000 // math.prod(norm.shape))
    large = Norm(
        "large",
        (norm.shape[0] * times, *norm.shape[1:]),
        *(norm.dims,),
        norm.affine,
        norm.layout,
    )
    x, dy = large.draw(torch.float32, 1, 2.0), large.draw(torch.float32, 2)
    args = (large, x, dy, norm.vector(3), norm.vector(4), Epilogue("gelu"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        serial = run(kernels, *args)
        for n in (2, 3):
            torch.set_num_threads(n)
            parallel = run(kernels, *args)
            for name in ("y", "dx", "dweight", "dbias"):
                assert torch.equal(getattr(serial, name), getattr(parallel, name)), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_past_the_caches_are_the_same_bits(
    kernels, dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for norm in NORMS:
        x, dy = norm.draw(dtype, 1), norm.draw(dtype, 2)
        args = (norm, x, dy, norm.vector(3), norm.vector(4), Epilogue("relu"))
        cached = run(kernels, *args)
        monkeypatch.setattr("normkit.kernels.cpu.packing._STREAM_BYTES", 0)
        streamed = run(kernels, *args)
        monkeypatch.undo()
        assert torch.equal(cached.y, streamed.y)
        assert torch.equal(cached.dx, streamed.dx)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_inf_reach_their_statistic_and_no_other(
    kernels, activation, bad
) -> None:
    for norm in NORMS:
        x = norm.draw(torch.float32, 1)
        x[(0,) * x.dim()] = bad
        y = run(kernels, norm, x, x, None, None, Epilogue(activation)).y
        expected = ACTS[activation](oracles.normalized(x, norm.dims))
        assert torch.equal(y.isnan(), expected.isnan()), norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_rounded_to_nearest_even_at_every_size(kernels, dtype) -> None:
    """Through the identity map: subnormals, overflow, halves between two values."""
    g = torch.Generator().manual_seed(3)
    powers = torch.randint(-160, 135, (64, 96), generator=g)
    x = torch.randn(64, 96, generator=g, dtype=torch.float64) * 2.0**powers
    x = x.to(dtype)
    zero, one = torch.zeros(64, 1).double(), torch.ones(64, 1).double()
    y = kernels.apply(x, zero, one)
    assert torch.equal(y, x)
    if dtype in (torch.bfloat16, torch.float16):
        third = torch.full((64, 1), 1 / 3, dtype=torch.float64)
        y = kernels.apply(x, zero, third)
        expected = (x.float() * third.float()).to(dtype)
        assert torch.equal(y, expected)


def test_a_pilot_far_from_the_mean_costs_no_digits(kernels) -> None:
    """The places that the pilot is taken from hold something else."""
    for norm in NORMS:
        x = torch.randn(norm.shape, dtype=torch.float64)
        x[..., 0] += 1e5
        x = norm.layout(x.float())
        count, mean, m2 = oracles.statistics(x, norm.dims)
        m = kernels.moments(x, norm.dims)
        torch.testing.assert_close(m.m2, m2, rtol=1e-6, atol=1e-6)
        spread = (m2 / count).sqrt()
        assert ((m.mean - mean).abs() <= 1e-6 * spread + 1e-12 * mean.abs()).all(), norm


@pytest.mark.parametrize(
    ("norm", "every"),
    [
        (Norm("runs", (1, 1, 13 * 32_768), (0, 2), (1, 1, 1)), 32_768),
        (Norm("columns", (96_000, 2), (0,), (1, 2)), 12_000 * 2),
    ],
    ids=str,
)
def test_outliers_where_the_pilot_is_taken_cost_no_digits(kernels, norm, every) -> None:
    """Sums around it would lose n/(number of outliers) times a rounding."""
    x = norm.draw(torch.float32, 1)
    x.view(-1, every)[:, :16] = 1e3
    _, mean, m2 = oracles.statistics(x, norm.dims)
    m = kernels.moments(x, norm.dims)
    torch.testing.assert_close(m.m2, m2, rtol=1e-6, atol=0)
    torch.testing.assert_close(m.mean, mean, rtol=1e-6, atol=1e-6)
