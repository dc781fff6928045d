"""Exact statistics: those of all values, however the data were cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit.nn
from calibrate.models import FAMILIES, ConvNet, images, scrambled
from normkit.calibrate import calibrate


def float64_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel, by definition."""
    flat = x.double().transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    return mean, ((flat - mean[:, None]) ** 2).sum(1) / (flat.shape[1] - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_the_statistics_of_all_data_at_once(family: Any) -> None:
    bn = family.BatchNorm2d(3)
    x = torch.randn(66, 3, 4, 5) * 3 - 7
    report = calibrate(bn, list(x.split([64, 2])))
    mean, var = float64_statistics(x)
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bn.running_var.double(), var, rtol=1e-6, atol=1e-6)
    assert report.layers[0].count == 66 * 20
    torch.testing.assert_close(report.layers[0].mean, mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("split", [[1] * 12, [11, 1], [5, 0, 7], [12]])
def test_any_split_of_the_data_gives_the_same(split: list[int]) -> None:
    """Torch's update_bn gives 2.19 for 0.23 on batches of 64 and 2."""
    bn = nn.BatchNorm1d(5)
    x = torch.randn(12, 5) * torch.arange(1, 6) + torch.linspace(-3, 3, 12)[:, None]
    calibrate(bn, list(x.split(split)))
    mean, var = float64_statistics(x)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bn.running_var.double(), var, rtol=1e-6, atol=1e-6)


def test_sorted_data_keep_the_variance_between_batches() -> None:
    """The mean of batch variances of sorted data is 0 for a true 6.05."""
    bn = nn.BatchNorm1d(1)
    calibrate(bn, [torch.full((4, 1), float(v)) for v in range(5)])
    assert bn.running_var is not None
    assert float(bn.running_var) == pytest.approx(40 / 19)


def test_an_offset_of_a_million_standard_deviations_cancels_nothing() -> None:
    """Fvcore's E[x²] − E[x]² gives NaN outputs from mean/std = 3e3 on."""
    bn = nn.BatchNorm1d(2).double()
    x = torch.randn(50, 2, dtype=torch.float64) + 1e6
    calibrate(bn, list(x.split(7)))
    assert bn.running_var is not None
    torch.testing.assert_close(
        bn.running_var, float64_statistics(x)[1], rtol=1e-9, atol=0
    )


def test_offset_in_float32_data_keeps_the_variance() -> None:
    bn = nn.BatchNorm1d(2)
    x = torch.randn(500, 2) + 1e4
    calibrate(bn, list(x.split(70)))
    assert bn.running_var is not None
    exact = float64_statistics(x)[1]
    torch.testing.assert_close(bn.running_var.double(), exact, rtol=2e-6, atol=0)


def test_a_shared_layer_pools_all_its_calls() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.bn(a) + self.bn(b)

    model = Siamese()
    a, b = torch.randn(10, 3), torch.randn(10, 3) * 4 + 5
    report = calibrate(model, [((a[:6], b[:6]), None), ((a[6:], b[6:]), None)])
    mean, var = float64_statistics(torch.cat([a, b]))
    assert model.bn.running_mean is not None
    assert model.bn.running_var is not None
    torch.testing.assert_close(
        model.bn.running_mean.double(), mean, rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(model.bn.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert report.layers[0].count == 20
    assert report.layers[0].batches == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_earlier_layers_normalize_by_their_batch_and_dropout_is_off(
    family: Any,
) -> None:
    model = scrambled(ConvNet(family))
    data = images(5, 9)
    calibrate(model, data)
    # By hand: what train mode without dropout gives, measured in float64.
    inner = []
    for x in data:
        h = model.conv1(x)
        dims = (0, 2, 3)
        mean, var = h.mean(dims, keepdim=True), h.var(dims, correction=0, keepdim=True)
        weight, bias = (
            model.bn1.weight.view(1, -1, 1, 1),
            model.bn1.bias.view(1, -1, 1, 1),
        )
        h = ((h - mean) / (var + model.bn1.eps).sqrt() * weight + bias).relu()
        inner.append(model.conv2(h))
    mean, var = float64_statistics(torch.cat(inner).detach())
    torch.testing.assert_close(
        model.bn2.running_mean.double(), mean, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        model.bn2.running_var.double(), var, rtol=1e-5, atol=1e-5
    )


def test_a_batch_of_one_sample_counts_as_one_value() -> None:
    """Training raises on it; here it is one of eleven."""
    bn = nn.BatchNorm1d(2)
    x = torch.randn(11, 2)
    calibrate(nn.Sequential(bn, nn.BatchNorm1d(2)), list(x.split(10)))
    assert bn.running_mean is not None
    torch.testing.assert_close(bn.running_mean, x.mean(0))


def test_instance_norm_averages_its_instances() -> None:
    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    x = torch.randn(9, 2, 30) + 10 * torch.randn(9, 2, 1)
    report = calibrate(norm, list(x.split([5, 4])))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2)))
    torch.testing.assert_close(norm.running_var, x.var(2).mean(0))
    assert report.layers[0].count == 270


def test_instance_norm_of_one_image_without_a_batch_dimension() -> None:
    norm = normkit.nn.InstanceNorm1d(2, track_running_stats=True)
    x = torch.randn(2, 30)
    calibrate(norm, [x])
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_var, x.var(1))


def test_sync_batch_norm_is_calibrated_on_one_process_without_a_group() -> None:
    model = nn.SyncBatchNorm(3)
    x = torch.randn(20, 3, 4)
    calibrate(model, list(x.split(8)))
    assert model.running_mean is not None
    torch.testing.assert_close(model.running_mean, x.mean((0, 2)))


def test_half_data_have_float32_statistics() -> None:
    x = (torch.randn(4000, 2) + 300).half()
    half = nn.BatchNorm1d(2)
    calibrate(half, list(x.split(1000)))
    assert half.running_mean is not None
    mean = float64_statistics(x)[0]
    torch.testing.assert_close(half.running_mean.double(), mean, rtol=1e-6, atol=0)


def test_the_buffers_stay_the_same_tensors_and_count_the_batches() -> None:
    bn = nn.BatchNorm1d(2)
    before = [bn.running_mean, bn.running_var, bn.num_batches_tracked]
    calibrate(bn, [torch.randn(4, 2), torch.randn(3, 2)])
    after = [bn.running_mean, bn.running_var, bn.num_batches_tracked]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert bn.num_batches_tracked is not None
    assert int(bn.num_batches_tracked) == 2


def test_eval_after_calibration_normalizes_the_data() -> None:
    model = scrambled(ConvNet(nn))
    data = images(30, 34)
    calibrate(model, data)
    model.eval()
    seen: list[Tensor] = []
    handle = model.bn1.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        for x in data:
            model(x)
    handle.remove()
    y = torch.cat(seen)
    torch.testing.assert_close(y.mean((0, 2, 3)), model.bn1.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        y.std((0, 2, 3)), model.bn1.weight.abs(), rtol=1e-3, atol=1e-4
    )
