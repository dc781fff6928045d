"""The numerics contract: float32 within 2e-6 of float64, wherever the mean lies."""

import math

import pytest
import torch
from torch import Tensor

import normkit
import normkit.functional as F
import oracles
from kernels.cases import backends_here
from normkit.kernels.choose import backend_named
from normkit.kernels.epilogue import ACTIVATIONS

STDS = [0.0, 1.0, 1e2, 1e4, 1e6]


def relative_error(y: Tensor, y64: Tensor) -> float:
    return float(((y.double() - y64).abs() / y64.abs().clamp(min=1)).max())


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("layout", ["nchw", "channels-last", "matrix", "ncl"])
@pytest.mark.parametrize("mean", STDS)
def test_training_batch_norm_is_within_the_contract(
    mean: float, layout: str, backend: str
) -> None:
    x = torch.randn(8, 3, 64, 66) + mean
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "matrix":
        x = x.movedim(1, -1).reshape(-1, 3)
    elif layout == "ncl":
        x = x.flatten(2)
    dims = tuple(d for d in range(x.dim()) if d != 1)
    if reasons := backend_named(backend).reasons_against(x, dims):
        pytest.skip("; ".join(reasons))
    with normkit.backend(backend):
        y = F.batch_norm(x, None, None, training=True)
    assert relative_error(y, oracles.batch_norm(x)) <= 2e-6


@pytest.mark.parametrize("mean", STDS)
def test_eval_batch_norm_is_within_the_contract(mean: float) -> None:
    x = torch.randn(8, 3, 16, 16) + mean
    running_mean, running_var = x.mean((0, 2, 3)), torch.rand(3) + 0.5
    y = F.batch_norm(x, running_mean, running_var)
    shape = (1, 3, 1, 1)
    inv_std = (running_var.double() + 1e-5) ** -0.5
    y64 = (x.double() - running_mean.double().view(shape)) * inv_std.view(shape)
    assert relative_error(y, y64) <= 2e-6


@pytest.mark.parametrize("mean", STDS)
@pytest.mark.parametrize("name", ["layer", "group", "instance", "rms"])
def test_the_other_norms_are_within_the_contract(name: str, mean: float) -> None:
    x = torch.randn(4, 6, 33, 31) + mean
    y, y64 = {
        "layer": lambda: (F.layer_norm(x, (33, 31)), oracles.layer_norm(x, (33, 31))),
        "group": lambda: (F.group_norm(x, 3), oracles.group_norm(x, 3)),
        "instance": lambda: (F.instance_norm(x), oracles.instance_norm(x)),
        "rms": lambda: (F.rms_norm(x, (31,), eps=1e-5), oracles.rms_norm(x, (31,))),
    }[name]()
    assert relative_error(y, y64) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels-last"])
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_ten_million_values_a_channel_are_within_the_contract(
    mean: float, layout: str
) -> None:
    x = torch.randn(10, 2, 1000, 1000) + mean
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    y = F.batch_norm(x, None, None, training=True)
    assert relative_error(y, oracles.batch_norm(x)) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_keep_their_statistics_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(512, 3) * 2 + 60).to(dtype)
    running_mean, running_var = torch.zeros(3), torch.ones(3)
    y = F.batch_norm(x, running_mean, running_var, training=True, momentum=1.0)
    assert y.dtype == dtype
    assert running_mean.dtype == torch.float32
    ulp = torch.finfo(dtype).eps
    assert relative_error(y, oracles.batch_norm(x)) <= 0.51 * ulp + 1e-6
    torch.testing.assert_close(
        running_mean.double(), x.double().mean(0), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        running_var.double(), x.double().var(0), rtol=1e-5, atol=0
    )


def test_a_nan_reaches_the_outputs_of_its_channel_only() -> None:
    x = torch.randn(8, 3, 4)
    x[2, 1, 3] = math.nan
    y = F.batch_norm(x, None, None, training=True)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_batch_stays_out_of_the_running_statistics(bad: float) -> None:
    x = torch.randn(8, 3, 4)
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    x[2, 1, 3] = bad
    F.batch_norm(x, mean, var, training=True)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    F.batch_norm(x, mean, var, training=True, on_nonfinite="update")
    assert not mean[1].isfinite()


def test_running_statistics_follow_torch() -> None:
    batches = [torch.randn(n, 3, 5) * 2 + 1 for n in (4, 7, 2)]
    mean, var = torch.randn(3), torch.rand(3)
    expected = oracles.running_after(mean, var, batches, 0.3)
    for batch in batches:
        F.batch_norm(batch, mean, var, training=True, momentum=0.3)
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.double(), expected[1], rtol=1e-6, atol=1e-6)


def test_a_masked_running_variance_divides_by_the_valid_count() -> None:
    x = torch.randn(6, 2, 5)
    mask = torch.rand(6, 1, 5) > 0.4
    mean, var = torch.zeros(2), torch.ones(2)
    F.batch_norm(x, mean, var, training=True, momentum=1.0, mask=mask)
    for c in range(2):
        kept = x[:, c][mask[:, 0]]
        torch.testing.assert_close(mean[c], kept.mean())
        torch.testing.assert_close(var[c], kept.var())


def test_a_batch_without_a_valid_value_changes_nothing() -> None:
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    mask = torch.zeros(4, 1, 1, dtype=torch.bool)
    y = F.batch_norm(torch.randn(4, 3, 2), mean, var, training=True, mask=mask)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    assert (y == 0).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_same_input_gives_the_same_bits(training: bool) -> None:
    x, dy = torch.randn(2, 16, 5, 9, 9).unbind()
    stats = torch.randn(5), torch.rand(5)
    seen = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = F.batch_norm(leaf, stats[0].clone(), stats[1].clone(), training=training)
        seen.append((y, *torch.autograd.grad(y, leaf, dy)))
    assert torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])


def test_channels_may_lie_along_another_dimension() -> None:
    x = torch.randn(4, 7, 3)
    w, b = torch.randn(3), torch.randn(3)
    y = F.batch_norm(x, None, None, w, b, True, channel_dim=-1)
    expected = F.batch_norm(x.mT, None, None, w, b, True).mT
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format]
)
def test_the_memory_format_is_kept(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format)
    x.requires_grad_()
    y = F.batch_norm(x, None, None, training=True)
    assert y.is_contiguous(memory_format=memory_format)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("valid", [None, (5, 1, 1, 1), (5, 1, 4, 3), (5, 16, 4, 3)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_channels_last_stays_behind_masks_sums_and_activations(
    activation: str, valid: tuple[int, ...] | None, backend: str
) -> None:
    """Torch's masked_fill answers in row-major order, which the next pass would pay."""
    x, residual = (
        torch.randn(5, 16, 4, 3)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    mask = None if valid is None else torch.rand(valid) > 0.3
    running = torch.zeros(16), torch.ones(16)
    for training in (True, False):
        with normkit.backend(backend):
            y = F.batch_norm(
                *(x, *running),
                training=training,
                mask=mask,
                activation=activation,
                residual=residual,
            )
            dx, dresidual = torch.autograd.grad(y, (x, residual), torch.ones_like(y))
        for tensor in (y, dx, dresidual):
            assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: F.batch_norm(torch.ones(2, 3).long(), None, None), NotImplementedError, "int64"),
        (lambda: F.batch_norm(torch.ones(1, 3), None, None, training=True), ValueError, r"\(1, 3\)"),
        (lambda: F.batch_norm(torch.ones(2, 3), None, None, training=True, eps=0.0), ValueError, "eps"),
        (lambda: F.batch_norm(torch.ones(2, 3), None, None, training=True, eps=math.nan), ValueError, "nan"),
        (lambda: F.batch_norm(torch.ones(2, 3), None, None), RuntimeError, "running_mean"),
        (lambda: F.batch_norm(torch.ones(2, 3), torch.ones(3), None), ValueError, "both"),
        (lambda: F.batch_norm(torch.ones(2, 3), torch.ones(4), torch.ones(4)), RuntimeError, "not 4"),
        (lambda: F.batch_norm(torch.ones(2, 3), None, None, torch.ones(2), training=True), RuntimeError, "weight"),
        (lambda: F.batch_norm(torch.ones(2, 3), None, None, training=True, mask=torch.ones(5).bool()), ValueError, "mask"),
        (lambda: F.layer_norm(torch.ones(2, 3), (4,)), RuntimeError, r"\[4\]"),
        (lambda: F.layer_norm(torch.ones(2, 3), ()), RuntimeError, "1-dimensional"),
        (lambda: F.rms_norm(torch.ones(2, 3), (3,), torch.ones(2)), RuntimeError, "weight"),
        (lambda: F.group_norm(torch.ones(2, 3), 2), RuntimeError, "divisible"),
        (lambda: F.group_norm(torch.ones(3), 3), RuntimeError, "dimensions"),
        (lambda: F.instance_norm(torch.ones(2, 3, 1)), ValueError, r"\(2, 3, 1\)"),
        (lambda: F.instance_norm(torch.ones(2, 3, 4), use_input_stats=False), RuntimeError, "running_mean"),
    ],
)  # fmt: skip
def test_bad_input_is_named_with_the_type_that_torch_raises(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()
