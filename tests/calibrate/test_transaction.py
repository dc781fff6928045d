"""Whatever goes wrong, the model is bit for bit as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibrate.models import FAMILIES, ConvNet, images, scrambled
from normkit.calibrate import calibrate
from normkit.errors import CalibrationError


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that calibrating could change, by value and identity."""
    return {
        "tensors": {k: (id(v), v.clone()) for k, v in model.state_dict().items()},
        "buffers": {n: id(b) for n, b in model.named_buffers()},
        "training": {n: m.training for n, m in model.named_modules()},
        "momentum": {n: getattr(m, "momentum", 0) for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "keywords": {
            n: len(m._forward_pre_hooks_with_kwargs) for n, m in model.named_modules()
        },
        "tracks": {
            n: getattr(m, "track_running_stats", 0) for n, m in model.named_modules()
        },
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1],
        "grad": torch.is_grad_enabled(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    for key in ("buffers", "training", "momentum", "hooks", "keywords", "tracks"):
        assert after[key] == before[key], key
    for name, (_, tensor) in before["tensors"].items():
        new = after["tensors"][name][1]
        assert new.numpy().tobytes() == tensor.numpy().tobytes(), name
    assert torch.equal(after["torch"], before["torch"])
    assert after["python"] == before["python"]
    assert np.array_equal(after["numpy"], before["numpy"])
    assert after["grad"] == before["grad"]


def failing_loader() -> Iterator[Tensor]:
    yield from images(4, 4)
    raise OSError("the disk is gone")


def interrupted() -> Iterator[Tensor]:
    yield from images(4)
    raise KeyboardInterrupt


def wrong_size() -> Iterator[Tensor]:
    yield from images(4)
    yield torch.randn(4, 2, 8, 8)


def one_nan() -> Iterator[Tensor]:
    bad = images(4)[0]
    bad[2, 0, 3, 3] = torch.nan
    yield from [*images(4), bad]


FAILURES: list[tuple[Callable[[], Iterator[Tensor]], type[BaseException], Any]] = [
    (failing_loader, OSError, {}),
    (interrupted, KeyboardInterrupt, {}),
    (wrong_size, RuntimeError, {}),
    (one_nan, CalibrationError, {"on_nonfinite": "raise"}),
    (lambda: iter(()), CalibrationError, {}),
]


@pytest.mark.parametrize("mode", ["exact", "average", "running"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("loader", "error", "options"), FAILURES)
def test_a_failure_of_data_or_model_changes_nothing(
    loader: Any, error: Any, options: Any, family: Any, mode: str
) -> None:
    model = scrambled(ConvNet(family))
    model.bn1.eval()
    before = state_of(model)
    with pytest.raises(error):
        calibrate(model, loader(), mode=mode, layers=["bn*"], **options)
    assert_unchanged(model, before)


def test_a_failure_late_in_the_eval_order_changes_nothing() -> None:
    model = scrambled(ConvNet())
    data, passes = images(4, 4), [0]

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            passes[0] += 1
            yield data[0]
            if passes[0] == 3:  # the first layer has its new statistics by now
                raise OSError("late")
            yield data[1]

    before = state_of(model)
    with pytest.raises(OSError, match="late"):
        calibrate(model, Loader(), order="eval")
    assert passes[0] == 3
    assert_unchanged(model, before)


def test_an_interrupt_in_the_middle_of_the_writing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from normkit.calibrate import transaction

    model, data = scrambled(ConvNet()), images(4, 4)
    before = state_of(model)
    real, calls = transaction._shaped_as, [0]

    def interrupting(buffer: Tensor, value: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(buffer, value)

    monkeypatch.setattr(transaction, "_shaped_as", interrupting)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, data)
    assert_unchanged(model, before)


def test_a_metric_that_fails_after_the_writing_changes_nothing() -> None:
    model, data = scrambled(ConvNet()), images(4, 4)
    calls = [0]

    def metric(_: nn.Module) -> float:
        calls[0] += 1
        if calls[0] == 2:
            raise ValueError("no labels")
        return 1.0

    before = state_of(model)
    with pytest.raises(ValueError, match="no labels"):
        calibrate(model, data, metric=metric)
    assert_unchanged(model, before)


@pytest.mark.parametrize("order", ["train", "eval"])
def test_success_changes_the_running_statistics_alone(order: str) -> None:
    model = scrambled(ConvNet())
    model.conv2.eval()
    data = images(4, 5)
    before = state_of(model)

    class Drawing:
        def __iter__(self) -> Iterator[Tensor]:
            for x in data:  # as a loader with random augmentation does
                yield x + 0 * torch.randn(1) * random.random() * np.random.rand()

    calibrate(model, Drawing(), order=order)
    after = state_of(model)
    changed = {
        name
        for name, (_, tensor) in before["tensors"].items()
        if not torch.equal(tensor, after["tensors"][name][1])
    }
    names = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{bn}.{name}" for bn in ("bn1", "bn2") for name in names}
    before["tensors"] = after["tensors"]
    assert_unchanged(model, before)


def test_a_buffer_that_forward_changes_is_given_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.bn(x)

    model = Counting()
    calibrate(model, [torch.randn(4, 2)] * 3)
    assert float(model.seen) == 0.0


def test_modules_whose_train_method_does_more_are_not_asked() -> None:
    class Merging(nn.Module):
        """As adapters do that merge their weights on eval()."""

        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(2)
            self.modes: list[bool] = []

        def train(self, mode: bool = True) -> Merging:
            if hasattr(self, "modes"):
                self.modes.append(mode)
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x)

    model = Merging()
    calibrate(model, [torch.randn(4, 2)])
    assert model.modes == []


def test_gradients_in_flight_survive() -> None:
    """A buffer that is put back untouched keeps its version; backward still runs."""
    model = ConvNet(dropout=0.0)
    model.register_buffer("scale", torch.ones(3))
    loss = (model(images(4)[0]) * model.scale).sum()
    with pytest.raises(OSError, match="disk"):
        calibrate(model, failing_loader())
    loss.backward()
    assert model.conv1.weight.grad is not None


def test_undo_gives_the_old_statistics_back_bit_for_bit() -> None:
    model, data = scrambled(ConvNet()), images(4, 5)
    before = state_of(model)
    report = calibrate(model, data)
    report.undo(model)
    assert_unchanged(model, before)
