"""The average of batches and the moving average, and what they miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from calibrate.models import FAMILIES, images
from normkit.calibrate import calibrate
from normkit.errors import ArgumentError


@pytest.mark.parametrize("family", FAMILIES)
def test_average_is_that_of_batch_means_and_unbiased_variances(family: Any) -> None:
    bn = family.BatchNorm2d(1)
    data = images(4, 6, 2)
    calibrate(bn, data, mode="average")
    means = torch.stack([x.mean() for x in data])
    variances = torch.stack([x.var() for x in data])  # m/(m − 1) of the population's
    torch.testing.assert_close(bn.running_mean, means.mean().view(1))
    torch.testing.assert_close(bn.running_var, variances.mean().view(1))


def test_average_equals_torchs_cumulative_average() -> None:
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)
    data = [torch.randn(n, 3) * 2 + n for n in (3, 8, 5)]
    calibrate(ours, data, mode="average")
    for x in data:
        theirs(x)
    assert ours.running_mean is not None
    assert ours.running_var is not None
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_average_leaves_out_the_variance_of_a_batch_of_one() -> None:
    bn = nn.BatchNorm1d(1)
    x = torch.tensor([[1.0], [3.0]])
    calibrate(bn, [x, torch.tensor([[5.0]])], mode="average")
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert float(bn.running_mean) == 3.5
    assert float(bn.running_var) == 2.0


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_running_equals_torchs_training_pass(momentum: float | None) -> None:
    ours = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3))
    theirs = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3))
    data = [torch.randn(n, 3) * 2 + n for n in (3, 8, 5)]
    for model in (ours, theirs):
        model(data[0])  # not from the start: from what is there
    calibrate(ours, data, mode="running")
    theirs.train()
    for x in data:
        theirs(x)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_running_updates_once_per_call_of_a_shared_layer() -> None:
    ours, theirs = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    x, y = torch.randn(5, 2), torch.randn(5, 2) + 4
    calibrate(ours, [0], forward=lambda m, _: (m(x), m(y)), mode="running")
    theirs(x)
    theirs(y)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_decay_of_nine_tenths_is_a_momentum_of_one_tenth() -> None:
    bn = nn.BatchNorm1d(1)
    x = torch.tensor([[9.0], [11.0]])
    report = calibrate(bn, [x] * 5, mode="running", momentum=1 - 0.9)
    assert bn.running_mean is not None
    assert float(bn.running_mean) == pytest.approx(10 * (1 - 0.9**5))
    assert bn.momentum == 0.1
    assert report.layers[0].mean_error is None


def test_instance_norm_averages_as_torch_does() -> None:
    ours = nn.InstanceNorm1d(2, track_running_stats=True)
    theirs = nn.InstanceNorm1d(2, track_running_stats=True)
    data = [torch.randn(n, 2, 9) for n in (3, 5)]
    calibrate(ours, data, mode="running")
    for x in data:
        theirs(x)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


def test_standard_errors_cover_the_truth() -> None:
    """Of 400 channels, 68 % lie within one error of the truth and 95 % within two."""
    channels = 400
    bn = nn.BatchNorm1d(channels)
    level = torch.randn(60, 1, channels)  # batches differ: values are not independent
    data = list(2 * level + torch.randn(60, 16, channels))
    layer = calibrate(bn, data).layers[0]
    assert layer.mean_error is not None
    assert layer.var_error is not None
    z_mean = layer.mean.abs() / layer.mean_error
    z_var = (layer.var - 5.0).abs() / layer.var_error
    for z in (z_mean, z_var):
        assert 0.60 < float((z < 1).double().mean()) < 0.76
        assert 0.90 < float((z < 2).double().mean()) < 0.985


def test_standard_errors_of_the_average_cover_its_own_expectation() -> None:
    channels = 400
    bn = nn.BatchNorm1d(channels)
    data = list(torch.randn(60, 1, channels) + torch.randn(60, 16, channels))
    layer = calibrate(bn, data, mode="average").layers[0]
    assert layer.mean_error is not None
    assert layer.var_error is not None
    assert 0.60 < float((layer.mean.abs() < layer.mean_error).double().mean()) < 0.76
    within = ((layer.var - 1.0).abs() < layer.var_error).double().mean()
    assert 0.60 < float(within) < 0.76


def test_streamed_errors_equal_those_of_kept_batches() -> None:
    bn = nn.BatchNorm1d(3)
    data = [torch.randn(n, 3).double() * 2 + 50 for n in (4, 9, 6, 5)]
    layer = calibrate(bn.double(), data).layers[0]
    w = torch.tensor([float(len(x)) for x in data])[:, None].double()
    means = torch.stack([x.mean(0) for x in data])
    total = torch.cat(data).mean(0)
    second = torch.stack([(x - total).square().mean(0) for x in data])
    var = torch.cat(data).var(0, correction=0)
    factor = 4 / 3
    mean_error = (factor * (w * (means - total)).square().sum(0)).sqrt() / w.sum()
    var_error = (factor * (w * (second - var)).square().sum(0)).sqrt() / w.sum()
    assert layer.mean_error is not None
    assert layer.var_error is not None
    torch.testing.assert_close(layer.mean_error, mean_error, rtol=1e-9, atol=0)
    torch.testing.assert_close(layer.var_error, var_error, rtol=1e-9, atol=0)


def test_one_batch_has_no_standard_error() -> None:
    report = calibrate(nn.BatchNorm1d(2), [torch.randn(8, 2)])
    assert report.layers[0].mean_error is not None
    assert report.layers[0].mean_error.isnan().all()
    assert '"standard_error": null' in report.to_json()


def test_keep_blends_the_old_statistics_in() -> None:
    bn = nn.BatchNorm1d(1)
    calibrate(bn, [torch.tensor([[9.0], [11.0]])], keep=0.25)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert float(bn.running_mean) == pytest.approx(0.75 * 10)
    assert float(bn.running_var) == pytest.approx(0.25 * 1 + 0.75 * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "precise"}, "mode='precise' must be one of"),
        ({"order": "random"}, "order='random' must be one of"),
        ({"mode": "running", "order": "eval"}, "use mode='exact'"),
        ({"momentum": 0.1}, "no meaning for mode='exact'"),
        ({"mode": "running", "momentum": 1.5}, r"must lie in \[0, 1\]"),
        ({"keep": -0.1}, r"must lie in \[0, 1\]"),
        ({"max_batches": 0}, "at least 1"),
        ({"tolerance": 0.0}, "must be positive"),
        ({"mode": "running", "tolerance": 0.1}, "no meaning for a running average"),
        ({"on_nonfinite": "ignore"}, "must be one of"),
        ({"layers": ["nothing.*"]}, "match no layer"),
        ({"process_group": object()}, "torch.distributed is not running"),
    ],
)
def test_an_argument_without_meaning_is_refused(
    options: dict[str, Any], message: str
) -> None:
    bn = nn.BatchNorm1d(1)
    with pytest.raises(ArgumentError, match=message):
        calibrate(bn, [torch.randn(4, 1)], **options)
