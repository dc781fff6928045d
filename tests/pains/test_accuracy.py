"""Threads about wrong digits: large means, layouts, half precision."""

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
import oracles


def error(y: Tensor, wanted: Tensor) -> float:
    return float(((y.double() - wanted).abs() / wanted.abs().clamp(min=1)).max())


def test_pytorch_51102_layer_norm_does_not_behave_as_documented() -> None:
    """A row far from 0: torch's output is off in the third digit."""
    x = 1e4 + torch.randn(64, 256)
    wanted = oracles.layer_norm(x, (256,))
    assert error(nn.LayerNorm(256)(x).detach(), wanted) > 1e-4
    assert error(normkit.nn.LayerNorm(256)(x).detach(), wanted) < 2e-6


def test_pytorch_40302_the_variance_of_large_values() -> None:
    x = 1e5 + torch.randn(4096, 4)
    wanted = oracles.batch_norm(x)
    assert error(nn.BatchNorm1d(4)(x).detach(), wanted) > 1e-2
    assert error(normkit.nn.BatchNorm1d(4)(x).detach(), wanted) < 2e-6


def test_channels_last_loses_digits_that_contiguous_keeps() -> None:
    x = 1e3 + torch.randn(16, 4, 64, 64)
    x = x.contiguous(memory_format=torch.channels_last)
    wanted = oracles.batch_norm(x)
    assert error(nn.BatchNorm2d(4)(x).detach(), wanted) > 1e-4
    assert error(normkit.nn.BatchNorm2d(4)(x).detach(), wanted) < 2e-6


def test_group_norm_in_channels_last_is_off_by_hundreds() -> None:
    x = 1e4 + torch.randn(8, 16, 48, 48)
    x = x.contiguous(memory_format=torch.channels_last)
    wanted = oracles.group_norm(x, 4)
    assert error(nn.GroupNorm(4, 16)(x).detach(), wanted) > 1
    assert error(normkit.nn.GroupNorm(4, 16)(x).detach(), wanted) < 2e-6


def test_the_running_variance_of_a_constant_is_zero_and_not_negative() -> None:
    """tensorflow#118701: a negative variance, from a difference of squares."""
    layer = normkit.nn.BatchNorm1d(1, momentum=1.0)
    y = layer(torch.full((1000, 1), 4097.3))
    assert layer.running_var.item() == 0
    assert not y.any()


def test_liger_871_compiling_a_layer_does_not_change_its_output() -> None:
    x = 1e4 + torch.randn(16, 64)
    layer = normkit.nn.LayerNorm(64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=2e-6, atol=2e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchtitan_674_buffers_stay_float32_in_a_half_model(dtype) -> None:
    """An average that moves by 1e-3 of itself stands still in bfloat16."""
    theirs = nn.BatchNorm1d(3, momentum=1e-3).to(dtype)
    ours = normkit.nn.BatchNorm1d(3, momentum=1e-3).to(dtype)
    x = (10 + torch.randn(32, 3)).to(dtype)
    for layer in (theirs, ours):
        layer.running_var.fill_(100)
        for _ in range(100):
            layer(x)
    assert ours.weight.dtype == dtype
    assert ours.running_var.dtype == ours.running_mean.dtype == torch.float32
    share = 1 - (1 - 1e-3) ** 100
    wanted = (1 - share) * 100 + share * x.float().var(0)
    torch.testing.assert_close(ours.running_var, wanted, rtol=1e-4, atol=1e-3)
    assert (theirs.running_var.float() - wanted).abs().max() > 0.3


def test_vllm_48391_batch_invariant_rms_norm() -> None:
    x, layer = torch.randn(33, 1001), normkit.nn.RMSNorm(1001).eval()
    with normkit.deterministic():
        whole = layer(x)
        for k in (0, 7, 32):
            assert torch.equal(layer(x[k : k + 1]), whole[k : k + 1])


@pytest.mark.parametrize(("size", "is_exact"), [(5e18, True), (1e19, False)])
def test_the_limit_of_squares_is_where_the_page_says(size, is_exact) -> None:
    """From 1e19 on there is no square in float32; torch ends before that."""
    torch.manual_seed(0)
    x = torch.randn(64, 3) * size
    y = normkit.nn.BatchNorm1d(3)(x)
    exact = normkit.nn.BatchNorm1d(3).double()(x.double())
    assert bool((y - exact).abs().max() < 1e-5) == is_exact
    assert (torch.nn.BatchNorm1d(3)(x) == 0).all()
    if not is_exact:
        assert (y == 0).all()
