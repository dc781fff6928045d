"""Threads about NaN and Inf that stay."""

import pytest
import torch
from torch import nn

import normkit.nn


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pytorch_88474_nan_in_running_mean_under_mixed_precision(bad: float) -> None:
    """One overflowing step, which the scaler skips, ruins the layer for good."""
    good, poisoned = torch.randn(8, 3), torch.randn(8, 3)
    poisoned[2, 1] = bad
    theirs, ours = nn.BatchNorm1d(3), normkit.nn.BatchNorm1d(3)
    for layer in (theirs, ours):
        for x in (good, poisoned, good):
            layer(x)
    assert not theirs.running_mean.isfinite().all()
    assert ours.running_mean.isfinite().all()
    twice = nn.BatchNorm1d(3)
    twice(good)
    twice(good)
    torch.testing.assert_close(ours.running_mean, twice.running_mean)
    torch.testing.assert_close(ours.running_var, twice.running_var)
    assert int(ours.num_batches_tracked) == 2
    assert int(ours.skipped) == 1


def test_pytorch_115500_the_poison_is_seen_in_the_output() -> None:
    """Hidden it must not be: whoever looks at the loss still finds it."""
    x = torch.randn(8, 3)
    x[2, 1] = float("inf")
    y = normkit.nn.BatchNorm1d(3)(x)
    assert y[:, 1].isnan().any()
    assert y[:, [0, 2]].isfinite().all()


def test_fp16_overflow_of_a_variance_is_no_poison() -> None:
    """Squares past 65504: the statistics of half values are wider than half."""
    x = (1000 * torch.randn(64, 3)).half()
    layer = normkit.nn.BatchNorm1d(3)
    y = layer(x)
    assert y.isfinite().all()
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.float().var(0))
