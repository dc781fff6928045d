"""Statistics of another domain for a while, and of averaged weights."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from calibrate.models import ConvNet, images, scrambled
from normkit.calibrate import adapted, averaged, calibrate
from normkit.errors import ArgumentError


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().numpy().tobytes() for k, v in model.state_dict().items()}


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def trained(x: Tensor, y: Tensor, momentum: float = 0.1, steps: int = 60) -> nn.Module:
    model = nn.Sequential(
        *(nn.Linear(64, 32), nn.BatchNorm1d(32, momentum=momentum), nn.ReLU()),
        *(nn.Linear(32, 32), nn.BatchNorm1d(32, momentum=momentum), nn.ReLU()),
        nn.Linear(32, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def test_calibration_recovers_a_model_with_stale_statistics() -> None:
    """Momentum 1e-3: after 60 steps the running statistics are still the start."""
    x, y = digits()
    model = trained(x, y, momentum=1e-3)
    report = calibrate(
        model, list(x.split(256)), metric=lambda m: accuracy(m, x, y), mode="exact"
    )
    assert report.metric_before is not None
    assert report.metric_after is not None
    assert report.metric_before < 0.8  # 0.75 measured, 0.98 in train mode
    assert report.metric_after > 0.95
    assert max(layer.d_var for layer in report.layers) > 0.5


def test_a_shifted_domain_is_adapted_to_and_left_again() -> None:
    x, y = digits()
    model = trained(x, y).eval()
    clean = accuracy(model, x, y)
    shifted = 0.5 * x + 1.0
    before = state_bytes(model)
    lost = accuracy(model, shifted, y)
    with adapted(model, list(shifted.split(256))) as report:
        regained = accuracy(model, shifted, y)
        assert report.layers[0].d_mean > 0.5
    assert state_bytes(model) == before
    assert lost < clean - 0.2
    assert regained > clean - 0.02


def test_the_old_domain_comes_back_on_an_exception_inside() -> None:
    model = scrambled(ConvNet())
    before = state_bytes(model)
    with pytest.raises(ZeroDivisionError), adapted(model, images(4, 4)):
        raise ZeroDivisionError
    assert state_bytes(model) == before


def test_an_averaged_module_is_calibrated_as_any_other() -> None:
    x, y = digits()
    model = trained(x, y)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for seed in (1, 2):
        torch.manual_seed(seed)
        average.update_parameters(trained(x, y, steps=5 + seed))
    report = calibrate(average, list(x.split(256)))
    assert [layer.name for layer in report.layers] == ["1", "4"]
    seen = average.module[0](x)  # type: ignore[index]
    bn = average.module[1]  # type: ignore[index]
    torch.testing.assert_close(
        bn.running_mean, seen.mean(0).detach(), rtol=1e-4, atol=1e-5
    )


def test_averaged_weights_get_statistics_of_their_own() -> None:
    x, y = digits()
    model = trained(x, y)
    before = state_bytes(model)
    weights = {n: p.detach() * 0.5 for n, p in model.named_parameters()}
    state, report = averaged(model, weights, list(x.split(256)))
    assert state_bytes(model) == before
    assert len(report.layers) == 2
    fresh = trained(x, y, steps=0)
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh[0].weight, weights["0.weight"])  # type: ignore[index]
    seen = nn.functional.linear(x, weights["0.weight"], weights["0.bias"])
    torch.testing.assert_close(
        state["1.running_mean"], seen.mean(0), rtol=1e-4, atol=1e-5
    )


def test_averaged_weights_leave_the_model_alone_when_the_data_fail() -> None:
    model = scrambled(ConvNet())
    before = state_bytes(model)
    weights = {n: p.detach() + 1 for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError):
        averaged(model, weights, [torch.randn(2, 5, 8, 8)])
    assert state_bytes(model) == before


@pytest.mark.parametrize("name", ["conv9.weight", "conv1.bias"])
def test_averaged_weights_of_another_model_are_refused(name: str) -> None:
    model = ConvNet()
    with pytest.raises(ArgumentError, match=f"'{name}'"):
        averaged(model, {name: torch.zeros(9)}, images(4))
