"""The fused GPU layers against float64, on a device or in Triton's interpreter.

Not collected by name: `test_gpu.py` runs it in a process of its own, on the machine's
GPU or with the plugin `kernels.interpreted`.
"""

import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

import normkit
import oracles
from kernels.cases import channels_last, tolerance
from normkit.errors import KernelError
from normkit.functional import gpu_operators as operators
from normkit.kernels.choose import backend_named
from normkit.kernels.epilogue import ACTIVATIONS
from normkit.kernels.gpu import config, launch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "nchw": ((6, 5, 7, 7), lambda x: x),
    "nchw-aligned": ((2, 4, 8, 8), lambda x: x),
    "channels-last": ((3, 16, 5, 5), channels_last),
    "channels-last-odd": ((4, 11, 3, 5), channels_last),
    "matrix": ((150, 24), lambda x: x),
}


@pytest.fixture(autouse=True)
def gpu_is_chosen():
    with normkit.backend("gpu"):
        yield


def draw(shape, then=lambda x: x, dtype=torch.float32, mean=0.0) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64) + mean
    return then(x.to(dtype)).to(DEVICE)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def activate(name: str, z: Tensor) -> Tensor:
    functions = {"none": lambda z: z, "leaky_relu": lambda z: F.leaky_relu(z, 0.01)}
    return functions.get(name, getattr(F, name, None) or getattr(torch, name, None))(z)


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    torch.testing.assert_close(ours.double(), exact, **tolerance(dtype, terms))


def combinations() -> list:
    """Every layout, dtype, activation and residual; all but a few of them are slow."""
    fast = {
        ("nchw", torch.bfloat16, "relu", True),
        ("nchw-aligned", torch.float32, "silu", False),
        ("channels-last", torch.float32, "relu", True),
        ("channels-last", torch.float16, "relu", False),
        ("channels-last-odd", torch.bfloat16, "silu", True),
        ("matrix", torch.float32, "none", False),
    }
    every = itertools.product(LAYOUTS, DTYPES, ("none", "relu", "silu"), (False, True))
    return [
        pytest.param(*one, marks=[] if one in fast else pytest.mark.slow)
        for one in every
    ]


@pytest.mark.parametrize(
    ("layout", "dtype", "activation", "with_residual"), combinations()
)
def test_batch_norm_and_its_gradients(layout, dtype, activation, with_residual) -> None:
    check_batch_norm(layout, dtype, activation, with_residual)


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"none"}))
def test_every_activation(activation: str) -> None:
    check_batch_norm("channels-last", torch.float32, activation, True)


@pytest.mark.parametrize("layout", ["nchw", "channels-last-odd"])
def test_relu_after_a_sum_keeps_one_bit_per_element(layout: str) -> None:
    shape, then = LAYOUTS[layout]
    x, residual = leaf(draw(shape, then)), leaf(draw(shape, then))
    y = normkit.functional.batch_norm(
        x, None, None, training=True, activation="relu", residual=residual
    )
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]
    beside_x = sum(t.nbytes for t in saved if t.numel() > 64) - x.nbytes
    assert beside_x <= x.numel() / 8 * 1.5  # rows of 49 or 11 end in a part of a byte


def check_batch_norm(layout, dtype, activation, with_residual) -> None:
    shape, then = LAYOUTS[layout]
    x = leaf(draw(shape, then, dtype, mean=3.0))
    residual = leaf(draw(shape, then, dtype)) if with_residual else None
    weight, bias = (leaf(draw(shape[1])) for _ in range(2))
    dy = draw(shape, then, dtype)
    y = normkit.functional.batch_norm(
        *(x, None, None, weight, bias, True),
        activation=activation,
        residual=residual,
    )
    assert y.stride() == x.stride()

    exact = [leaf(t.double()) for t in (x, weight, bias)]
    z = oracles.batch_norm(*exact)
    if residual is not None:
        exact.append(leaf(residual.double()))
        z = z + exact[-1]
    # At a kink the sign of one rounding decides; such gradients are left out.
    at_kink = (z.abs() < 1e-5) & (activation in ("relu", "leaky_relu"))
    dy = dy.masked_fill(at_kink, 0)
    expected = activate(activation, z)
    close(y, expected, dtype, 16)

    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    ours = torch.autograd.grad(y, inputs, dy)
    theirs = torch.autograd.grad(expected, exact, dy.double())
    terms = x.numel() // shape[1]
    close(ours[0], theirs[0], dtype, 16)
    for a, b in zip(ours[1:3], theirs[1:3], strict=True):
        close(a, b, torch.float32, 64 * terms)
    if residual is not None:
        close(ours[3], theirs[3], dtype, 16)


@pytest.mark.parametrize("momentum", [0.3, None], ids=["ema", "cumulative"])
@pytest.mark.parametrize("layout", ["nchw", "channels-last"])
def test_running_statistics_move_inside_the_first_launch(layout, momentum) -> None:
    shape, then = LAYOUTS[layout]
    mean, var = draw(shape[1]), draw(shape[1]).square()
    expected = mean.clone(), var.clone()
    tracked = torch.tensor(0, device=DEVICE)
    for step in range(3):
        x = draw(shape, then, mean=2.0)
        normkit.functional.batch_norm(
            *(x, mean, var, None, None, True, momentum),
            num_batches_tracked=tracked,
        )
        share = 1 / (step + 1) if momentum is None else momentum
        expected = oracles.running_after(*expected, [x], share)
    torch.testing.assert_close(mean.double(), expected[0], rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(var.double(), expected[1], rtol=1e-6, atol=0)
    assert tracked == 3


def test_vectors_with_gaps_are_read_as_they_are() -> None:
    shape, then = LAYOUTS["channels-last"]
    x = draw(shape, then)
    weight, bias, mean, var = (draw((16, 2))[:, 0] for _ in range(4))
    expected = oracles.running_after(mean, var, [x], 0.1)
    y = normkit.functional.batch_norm(x, mean, var, weight, bias, training=True)
    close(y, oracles.batch_norm(x, weight, bias), torch.float32, 16)
    torch.testing.assert_close(mean.double(), expected[0], rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(var.double(), expected[1], rtol=1e-6, atol=3e-7)
    rows = draw((6, 16))
    close(
        normkit.functional.layer_norm(rows, (16,), weight),
        oracles.layer_norm(rows, (16,), weight),
        torch.float32,
        16,
    )
    z = normkit.functional.batch_norm(x, mean, var.abs(), weight, training=False)
    exact = (x.double() - mean.view(1, -1, 1, 1).double()) * weight.view(1, -1, 1, 1)
    exact = exact / (var.abs().view(1, -1, 1, 1).double() + 1e-5).sqrt()
    close(z, exact, torch.float32, 16)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("negated", ["dy", "residual", "weight"])
def test_a_lazy_minus_is_read(negated: str, activation: str) -> None:
    x, residual, dy = (draw((4, 6, 5, 5)) for _ in range(3))
    plain = {"weight": draw(6), "residual": residual, "dy": dy}

    def run(weight, residual, dy) -> tuple[Tensor, ...]:
        leaves = leaf(x), weight.detach().requires_grad_()
        y = normkit.functional.batch_norm(
            *(leaves[0], None, None, leaves[1], None, True),
            activation=activation,
            residual=residual,
        )
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    lazy = plain | {negated: torch._neg_view(-plain[negated])}
    assert lazy[negated].is_neg()
    for found, expected in zip(run(**lazy), run(**plain), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_lazily_negated_input_is_refused() -> None:
    x = torch._neg_view(draw((4, 6, 5, 5)))
    with pytest.raises(KernelError, match="lazily negated"):
        normkit.functional.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_batch_moves_nothing_unless_asked(bad: float) -> None:
    shape, then = LAYOUTS["channels-last"]
    x = draw(shape, then)
    x[1, 3, 2, 2] = bad
    mean, var = draw(shape[1]), draw(shape[1]).square()
    tracked, skipped = (torch.tensor(n, device=DEVICE) for n in (4, 2))
    counters = {"num_batches_tracked": tracked, "num_batches_skipped": skipped}
    before = mean.clone(), var.clone()
    arguments = (None, None, True, 0.1)
    y = normkit.functional.batch_norm(x, mean, var, *arguments, **counters)
    assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert (tracked, skipped) == (4, 3)
    normkit.functional.batch_norm(x[:1], mean, var, *arguments, **counters)
    assert (tracked, skipped) == (5, 3)
    normkit.functional.batch_norm(x, mean, var, *arguments, on_nonfinite="update")
    assert not mean[3].isfinite()
    assert mean[:3].isfinite().all()


@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize("layout", ["nchw", "channels-last"])
def test_a_mean_far_from_zero_costs_no_digits(layout: str, offset: float) -> None:
    shape, then = LAYOUTS[layout]
    x = draw(shape, then, mean=offset)
    y = normkit.functional.batch_norm(x, None, None, training=True)
    exact = oracles.batch_norm(x)
    assert ((y - exact).abs() <= 2e-6 * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(7, 40), (5, 37), (3, 4, 96)], ids=str)
def test_rows_and_their_gradients(shape, centered: bool, dtype) -> None:
    check_rows(shape, centered, dtype)


@pytest.mark.parametrize("centered", [True, False], ids=["layer", "rms"])
def test_rows_too_long_to_keep_are_read_twice(centered: bool) -> None:
    check_rows((2, 8200), centered, torch.bfloat16)


def check_rows(shape, centered: bool, dtype) -> None:
    k = shape[-1]
    x, dy = leaf(draw(shape, dtype=dtype, mean=2.0)), draw(shape, dtype=dtype)
    weight, bias = leaf(draw(k)), leaf(draw(k))
    exact = [leaf(t.double()) for t in (x, weight, bias)]
    if centered:
        y = normkit.functional.layer_norm(x, (k,), weight, bias)
        expected = oracles.layer_norm(exact[0], (k,), exact[1], exact[2])
    else:
        y = normkit.functional.rms_norm(x, (k,), weight, 1e-5)
        expected = oracles.rms_norm(exact[0], (k,), exact[1], 1e-5)
    close(y, expected, dtype, 16)
    count = 3 if centered else 2
    ours = torch.autograd.grad(y, (x, weight, bias)[:count], dy)
    theirs = torch.autograd.grad(expected, exact[:count], dy.double())
    close(ours[0], theirs[0], dtype, 64)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        close(a, b, torch.float32, 64 * x.numel() // k)


@pytest.mark.parametrize("groups", [1, 3, 6], ids=["one", "groups", "instance"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_groups_and_their_gradients(groups: int, dtype) -> None:
    x, dy = leaf(draw((2, 6, 5, 3), dtype=dtype)), draw((2, 6, 5, 3), dtype=dtype)
    weight, bias = leaf(draw(6)), leaf(draw(6))
    y = normkit.functional.group_norm(x, groups, weight, bias)
    exact = [leaf(t.double()) for t in (x, weight, bias)]
    expected = oracles.group_norm(exact[0], groups, exact[1], exact[2])
    close(y, expected, dtype, 16)
    ours = torch.autograd.grad(y, (x, weight, bias), dy)
    theirs = torch.autograd.grad(expected, exact, dy.double())
    close(ours[0], theirs[0], dtype, 64)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        close(a, b, torch.float32, 64 * 30)


def test_a_chunk_whose_samples_are_all_outliers_is_read_again() -> None:
    # The values that the pilots look at, and no others, lie 1e4 away.
    n = 40_000
    tile = config.reduction_tile_for(n, 8, 4)
    programs = config.reduction_programs(torch.device(DEVICE))
    splits = config.reduction_grid(n, 2, 8, "columns", tile, programs).splits
    x, stride = torch.randn(n, 2), splits * tile.rows
    for first in range(0, stride, tile.rows):
        tiles = -(-(n - first) // stride)
        for sample in range(8):
            row = first + tiles * sample // 8 * stride + tile.rows * sample // 8
            x[min(row, n - 1), 0] += 1e4
    x = x.to(DEVICE)
    m = backend_named("gpu").moments(x, (0,))
    _, mean, m2 = oracles.statistics(x, (0,))
    torch.testing.assert_close(m.m2, m2, rtol=1e-6, atol=0)
    spread = float((m2 / n).sqrt().min())
    torch.testing.assert_close(m.mean, mean, rtol=0, atol=3e-7 * spread)


def test_every_launch_leaves_its_tickets_at_zero() -> None:
    shape, then = LAYOUTS["channels-last"]
    x, running = leaf(draw(shape, then)), [draw(shape[1]), draw(shape[1]).square()]
    y = normkit.functional.batch_norm(x, *running, training=True)
    torch.autograd.grad(y, x, draw(shape, then))
    kept = list(launch._tickets.values())
    assert kept
    assert all((t == 0).all() for t in kept)


def test_two_runs_give_the_same_bits() -> None:
    shape, then = LAYOUTS["channels-last"]
    x, dy = leaf(draw(shape, then, mean=3.0)), draw(shape, then)
    weight = leaf(draw(shape[1]))
    runs = []
    for _ in range(2):
        y = normkit.functional.batch_norm(x, None, None, weight, training=True)
        runs.append((y, *torch.autograd.grad(y, (x, weight), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_second_derivative_is_right() -> None:
    x, dy = (draw((4, 3, 2, 2), channels_last) for _ in range(2))

    def penalty(x: Tensor, y: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype), create_graph=True)
        return torch.autograd.grad((dx.square() * dy).sum(), x)[0]

    ours, exact = leaf(x), leaf(x.double())
    y = normkit.functional.batch_norm(ours, None, None, training=True)
    close(
        penalty(ours, y), penalty(exact, oracles.batch_norm(exact)), torch.float32, 99
    )


@pytest.mark.parametrize("name", ["batch_norm", "standardize_rows"])
def test_operators_keep_torchs_rules(name: str) -> None:
    operators._register_once()
    options = (0.1, 1e-5, True, 1, "relu", 0.01)
    x, residual = (leaf(draw((2, 16, 3, 3), channels_last)) for _ in range(2))
    vectors = [leaf(draw(16)) for _ in range(2)]
    counters = [torch.tensor(0, device=DEVICE) for _ in range(2)]
    running = [draw(16), draw(16).square(), *counters]
    arguments = {
        "batch_norm": (x, *vectors, residual, *running, *options),
        "standardize_rows": (
            leaf(draw((6, 16))),
            *(leaf(draw((1, 16))) for _ in range(2)),
            [1],
            1e-5,
            True,
        ),
    }
    operator = getattr(torch.ops.normkit, name).default
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    checked = torch.library.opcheck(operator, arguments[name], test_utils=rules)
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_a_dynamic_shape_compiles_whole() -> None:
    operators._register_once()
    options = (0.1, 1e-5, True, 1, "relu", 0.01)
    x, residual = (leaf(draw((2, 16, 3, 3), channels_last)) for _ in range(2))
    vectors = [leaf(draw(16)) for _ in range(2)]
    counters = [torch.tensor(0, device=DEVICE) for _ in range(2)]
    running = [draw(16), draw(16).square(), *counters]
    torch.library.opcheck(
        torch.ops.normkit.batch_norm.default,
        (x, *vectors, residual, *running, *options),
        test_utils="test_aot_dispatch_dynamic",
    )


def test_a_compiled_layer_is_one_graph_and_agrees() -> None:
    layer = normkit.nn.BatchNorm2d(16, device=DEVICE)
    torch.nn.init.normal_(layer.weight)
    graphs = []

    def backend(module, example_inputs):
        graphs.append(str(module.code))
        return aot_eager(module, example_inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    shape, then = LAYOUTS["channels-last"]
    x, dy = draw(shape, then, mean=3.0), draw(shape, then)
    results = []
    for run in (layer, compiled):
        layer.reset_running_stats()
        inner = leaf(x)
        y = run(inner)
        grads = torch.autograd.grad(y, (inner, layer.weight, layer.bias), dy)
        state = (layer.running_mean.clone(), layer.running_var.clone())
        results.append((y, *grads, *state, layer.num_batches_tracked.clone()))
    assert "normkit.batch_norm" in graphs[0]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_normalizes_halves_in_float32_inside() -> None:
    layer = normkit.nn.BatchNorm2d(16, device=DEVICE)
    shape, then = LAYOUTS["channels-last"]
    x = draw(shape, then, torch.bfloat16, mean=9.0)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, oracles.batch_norm(x), torch.bfloat16, 16)
