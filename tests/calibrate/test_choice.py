"""Which layers are measured, how the model is called, which batches count."""

from __future__ import annotations

import json
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calibrate.models import ConvNet, images, scrambled
from normkit.calibrate import calibrate
from normkit.errors import ArgumentError, CalibrationError

Sample = namedtuple("Sample", ["image", "label"])


def test_a_layer_in_eval_inside_a_training_model_is_frozen() -> None:
    model = scrambled(ConvNet())
    model.bn1.eval()
    before = model.bn1.running_mean.clone()
    report = calibrate(model, images(4, 5))
    assert torch.equal(model.bn1.running_mean, before)
    assert [layer.name for layer in report.layers] == ["bn2"]
    assert report.untouched["bn1"].startswith("frozen")
    assert not model.bn1.training
    assert model.bn2.training


def test_a_frozen_layer_normalizes_by_its_own_statistics_meanwhile() -> None:
    model = scrambled(ConvNet())
    model.bn1.eval()
    data = images(4, 5)
    calibrate(model, data)
    model.eval()
    h = torch.cat([model.conv2(model.bn1(model.conv1(x)).relu()) for x in data])
    torch.testing.assert_close(model.bn2.running_mean, h.mean((0, 2, 3)).detach())


def test_a_whole_model_in_eval_is_not_frozen() -> None:
    model = scrambled(ConvNet()).eval()
    report = calibrate(model, images(4, 5))
    assert len(report.layers) == 2
    assert not model.training


def test_named_layers_are_taken_though_they_are_frozen() -> None:
    model = scrambled(ConvNet())
    model.bn1.eval()
    report = calibrate(model, images(4, 5), layers=["bn1"])
    assert [layer.name for layer in report.layers] == ["bn1"]
    assert report.untouched == {"bn2": "not named in layers="}


def test_layers_without_running_statistics_are_told_apart() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3),
        nn.LayerNorm(3),
    )
    report = calibrate(model, [torch.randn(5, 3)])
    assert report.untouched == {"0": "keeps no running statistics"}
    assert [layer.name for layer in report.layers] == ["1"]


def test_a_model_without_running_statistics_is_refused_with_the_reason() -> None:
    with pytest.raises(ArgumentError, match="no layer with running statistics"):
        calibrate(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), [])


def test_a_layer_that_no_batch_reaches_is_left_alone_and_named() -> None:
    model = scrambled(ConvNet())
    before = model.bn2.running_mean.clone()
    report = calibrate(model, images(4), forward=lambda m, x: m.bn1(m.conv1(x)))
    assert report.untouched == {"bn2": "no batch reached it"}
    assert torch.equal(model.bn2.running_mean, before)


def test_a_forward_that_reaches_no_layer_is_an_error() -> None:
    model = scrambled(ConvNet())
    with pytest.raises(CalibrationError, match="no batch reached any of the 2 layers"):
        calibrate(model, images(4), forward=lambda m, x: m.conv1(x))


def test_a_lazy_layer_that_has_seen_nothing_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="'0' is lazy"):
        calibrate(nn.Sequential(nn.LazyBatchNorm1d()), [torch.randn(4, 2)])


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.bn(a - b)


X, Y = torch.arange(8.0).view(4, 2), torch.ones(4, 2)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (nn.BatchNorm1d(2), X),
        (nn.BatchNorm1d(2), (X, torch.zeros(4))),
        (nn.BatchNorm1d(2), [X]),
        (nn.BatchNorm1d(2), Sample(X, 1)),
        (nn.BatchNorm1d(2), {"input": X}),
        (TwoInputs(), {"a": X + 1, "b": Y}),
        (TwoInputs(), ({"a": X + 1, "b": Y}, "label")),
        (TwoInputs(), ((X + 1, Y), "label")),
    ],
)
def test_batches_are_called_by_the_rule(model: Any, batch: Any) -> None:
    calibrate(model, [batch])
    bn = getattr(model, "bn", model)
    torch.testing.assert_close(bn.running_mean, X.mean(0))


def test_forward_calls_a_model_of_any_signature() -> None:
    model = TwoInputs()
    calibrate(model, [{"x": X, "y": Y}], forward=lambda m, b: m(b["x"], b=b["y"]))
    torch.testing.assert_close(model.bn.running_mean, X.mean(0) - 1)


def test_a_data_loader_of_a_tensor_data_set_works() -> None:
    bn = nn.BatchNorm1d(2)
    data = TensorDataset(torch.randn(20, 2), torch.zeros(20))
    report = calibrate(bn, DataLoader(data, batch_size=6, shuffle=True))
    assert report.layers[0].count == 20
    torch.testing.assert_close(bn.running_mean, data.tensors[0].mean(0))


@pytest.mark.parametrize("batches", [torch.randn(4, 2), {"x": 1}, "loader"])
def test_one_batch_in_place_of_many_is_refused(batches: Any) -> None:
    with pytest.raises(ArgumentError, match="wrap a single batch in a list"):
        calibrate(nn.BatchNorm1d(2), batches)


@pytest.mark.parametrize("batches", [3, None])
def test_what_is_not_iterable_is_refused(batches: Any) -> None:
    kind = type(batches).__name__
    with pytest.raises(
        ArgumentError, match=f"got a {kind} for the batches, which must be iterable"
    ):
        calibrate(nn.BatchNorm1d(2), batches)


def test_batches_of_another_dtype_than_the_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
    with pytest.raises(
        ArgumentError, match=r"weights of torch.float64 .* batch of torch.float32"
    ):
        calibrate(model, [torch.randn(8, 4)])


def test_an_empty_tuple_is_no_batch() -> None:
    with pytest.raises(ArgumentError, match="pass forward="):
        calibrate(nn.BatchNorm1d(2), [()])


def test_max_batches_takes_no_more() -> None:
    bn = nn.BatchNorm1d(1)
    report = calibrate(
        bn, [torch.full((2, 1), float(i)) for i in range(9)], max_batches=3
    )
    assert report.batches == 3
    assert bn.running_mean is not None
    assert float(bn.running_mean) == 1.0


def test_batches_that_are_not_finite_are_skipped_whole_and_named() -> None:
    model = scrambled(ConvNet())
    good, bad = images(4, 5), images(4)[0]
    bad[2, 0, 3, 3] = torch.inf
    report = calibrate(model, [good[0], bad, good[1]])
    alone = scrambled(ConvNet())
    alone.load_state_dict(model.state_dict())
    calibrate(alone, good)
    for a, b in zip(model.buffers(), alone.buffers(), strict=True):
        assert torch.equal(a, b)
    assert [(s.index, s.layer, s.channels) for s in report.skipped] == [(1, "bn1", 4)]
    assert "batch 1: not finite at 'bn1', in 4 channels" in report.to_text()
    assert report.batches == 2


def test_only_bad_batches_are_an_error() -> None:
    bad = torch.full((4, 2), torch.nan)
    with pytest.raises(CalibrationError, match="none of the 2 batches was finite"):
        calibrate(nn.BatchNorm1d(2), [bad, bad])


def test_one_value_per_channel_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="saw 1 values in one of its channels"):
        calibrate(nn.BatchNorm1d(2), [torch.randn(1, 2)])


def test_sample_weights_count_values_several_times() -> None:
    bn, repeated = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    x = images(5)[0]
    weights = torch.tensor([1.0, 0.0, 3.0, 1.0, 2.0])
    calibrate(bn, [(x, weights)], mask=lambda batch: batch[1])
    calibrate(repeated, [x.repeat_interleave(weights.long(), 0)])
    for a, b in zip(bn.buffers(), repeated.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_mask_of_positions_leaves_padding_out() -> None:
    bn = nn.BatchNorm1d(3)
    x = torch.randn(4, 3, 6)
    valid = torch.arange(6) < torch.tensor([6, 2, 3, 1])[:, None]
    x[:, :, 3:] = torch.where(valid[:, None, 3:], x[:, :, 3:], torch.nan)
    report = calibrate(bn, [(x, valid)], mask=lambda batch: batch[1])
    kept = x.transpose(0, 1)[:, valid]
    torch.testing.assert_close(bn.running_mean, kept.mean(1))
    torch.testing.assert_close(bn.running_var, kept.var(1))
    assert report.layers[0].count == 12


def test_a_mask_passed_to_the_layer_is_the_one_that_counts() -> None:
    import normkit.nn

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = normkit.nn.BatchNorm1d(3)

        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            return self.bn(x, mask=valid[:, None])

    model = Masked()
    x = torch.randn(4, 3, 6)
    valid = torch.rand(4, 6) < 0.6
    calibrate(model, [((x, valid), 0)])
    torch.testing.assert_close(
        model.bn.running_mean, x.transpose(0, 1)[:, valid].mean(1)
    )


def test_a_mask_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(CalibrationError, match=r"mask of shape \(3,\) does not fit"):
        calibrate(nn.BatchNorm1d(2), [torch.randn(4, 2)], mask=lambda b: torch.ones(3))


def test_a_mask_that_is_no_tensor_or_no_function_is_refused() -> None:
    data = [torch.randn(4, 2)]
    with pytest.raises(ArgumentError, match="mask is a list, but must be a tensor"):
        calibrate(nn.BatchNorm1d(2), data, mask=lambda b: [1] * 4)  # type: ignore[arg-type,return-value]
    with pytest.raises(ArgumentError, match="mask= is a Tensor; it must be a function"):
        calibrate(nn.BatchNorm1d(2), data, mask=torch.ones(4))  # type: ignore[arg-type]


def test_the_report_measures_the_distance_moved() -> None:
    bn = nn.BatchNorm1d(2, eps=0.5)
    x = torch.tensor([[0.0, 10.0], [2.0, 14.0]])  # means 1, 12; variances 2, 8
    layer = calibrate(bn, [x, x]).layers[0]
    var = torch.tensor([4 / 3, 16 / 3])
    d_mean = (torch.tensor([1.0, 12.0]) / (var + 0.5).sqrt()).mean()
    d_var = (1.5 / (var + 0.5)).log().abs().mean()
    assert layer.d_mean == pytest.approx(float(d_mean))
    assert layer.d_var == pytest.approx(float(d_var))


def test_a_second_calibration_moves_nothing() -> None:
    model = scrambled(ConvNet())
    data = images(4, 5)
    first, second = calibrate(model, data), calibrate(model, data)
    assert max(layer.d_var for layer in first.layers) > 0.1
    for layer in second.layers:
        assert layer.d_mean < 1e-6
        assert layer.d_var < 1e-6


def test_the_report_is_a_table_and_json() -> None:
    model = scrambled(ConvNet())
    model.bn2.eval()
    report = calibrate(model, images(4, 5), metric=lambda m: 0.25)
    text = report.to_text()
    assert "exact statistics of 2 batches, train order" in text
    assert "left alone  bn2: frozen" in text
    assert "metric 0.25 -> 0.25" in text
    content = json.loads(report.to_json())
    assert content["layers"][0]["name"] == "bn1"
    assert content["layers"][0]["values"] == 9 * 36
    assert content["layers"][0]["d_mean"] == pytest.approx(report.layers[0].d_mean)
    assert content["metric_after"] == 0.25


def test_the_metric_sees_the_old_and_the_new_statistics_in_eval_mode() -> None:
    bn = nn.BatchNorm1d(1)

    def metric(model: Any) -> float:
        assert not model.training
        return float(model.running_mean)

    report = calibrate(bn, [torch.tensor([[4.0], [6.0]])], metric=metric)
    assert (report.metric_before, report.metric_after) == (0.0, 5.0)


def test_undo_refuses_another_model() -> None:
    report = calibrate(nn.Sequential(nn.BatchNorm1d(2)), [torch.randn(4, 2)])
    other = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ArgumentError, match=r"no 0.running_mean of shape \(2,\)"):
        report.undo(other)
    assert torch.equal(other[0].running_mean, torch.zeros(3))  # type: ignore[arg-type]


def test_enough_data_stop_the_pass() -> None:
    bn = nn.BatchNorm1d(4)
    data = [torch.randn(32, 4) for _ in range(200)]
    report = calibrate(bn, data, tolerance=0.05)
    assert report.stopped
    assert 8 <= report.batches < 60
    assert report.layers[0].error <= 0.05
    assert "stopped once sure enough" in report.to_text()
    # The errors halve for four times the data: about as many batches as they say.
    assert calibrate(bn, data, tolerance=0.025).batches > 2 * report.batches


def test_sorted_data_do_not_stop_the_pass() -> None:
    bn = nn.BatchNorm1d(1)
    data = [torch.randn(32, 1) + i for i in range(40)]
    assert not calibrate(bn, data, tolerance=0.05).stopped


def test_a_progress_bar_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bn = nn.BatchNorm1d(2)
    calibrate(bn, [torch.randn(4, 2)] * 3, progress=True)
    assert bn.num_batches_tracked is not None
    assert int(bn.num_batches_tracked) == 3
    printed = capsys.readouterr()
    assert "calibrate" in printed.err
    assert not printed.out


def test_a_compiled_model_is_measured_layer_by_layer() -> None:
    model = scrambled(ConvNet())
    data = images(4, 5)
    compiled = torch.compile(model, backend="eager")
    report = calibrate(compiled, data)  # type: ignore[arg-type]
    assert [layer.name for layer in report.layers] == ["bn1", "bn2"]
    in_place = scrambled(ConvNet())
    in_place.load_state_dict(model.state_dict())
    in_place.compile(backend="eager")
    in_place.eval()
    in_place(data[0])  # compiled without hooks, as a model in use is
    calibrate(in_place, data)
    for a, b in zip(model.buffers(), in_place.buffers(), strict=True):
        torch.testing.assert_close(a, b)
