"""D22 and D23 of the first step, where training has made the signals right since."""

import pytest
import torch
from torch import nn

from doctor.models import batches
from normkit.doctor import watch


def deep(gain: float, *, depth: int = 20) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(64, 48), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(48, 48), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(48, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
            nn.init.zeros_(layer.bias)
    return model


@pytest.mark.parametrize(
    ("gain", "steps", "expected"),
    [(1.0, 100, "D22"), (1.0, 20, ""), (2**0.5, 100, ""), (2.2, 100, "D23")],
)
def test_signals_of_the_first_step_are_told(
    gain: float, steps: int, expected: str
) -> None:
    """The steps behind it have signals that keep their size, as after training."""
    model, right = deep(gain), deep(2**0.5)
    x, y = batches()[0]
    with watch(model) as seen:
        for step in range(steps):
            if step == 1:
                model.load_state_dict(right.state_dict())
            nn.functional.cross_entropy(model(x), y).backward()
    found = [f for f in seen.findings() if f.is_alarm]
    told = [f.id for f in found if "in the first step" in f.evidence]
    assert told == ([expected] if expected else [])


def test_what_was_trained_before_has_no_first_step() -> None:
    model = deep(1.0)
    for _ in range(100):  # steps that were made before
        for parameter in model.parameters():
            parameter.data.mul_(1.0)
            with torch.no_grad():
                parameter.add_(0.0)
    x, y = batches()[0]
    with watch(model) as seen:
        for _ in range(100):
            nn.functional.cross_entropy(model(x), y).backward()
    assert not [f for f in seen.findings() if "in the first step" in f.evidence]


@pytest.mark.parametrize(("gain", "expected"), [(0.4, True), (0.1, False)])
def test_d23_a_recurrence_that_grows_over_the_steps_is_told(
    gain: float, *, expected: bool
) -> None:
    torch.manual_seed(0)
    cell = nn.RNN(8, 32, nonlinearity="relu", batch_first=True)
    nn.init.normal_(cell.weight_hh_l0, std=gain)
    with watch(cell) as seen:
        for _ in range(6):
            cell(torch.randn(16, 40, 8))[0][:, -1].square().mean().backward()
    told = [f for f in seen.findings() if f.id == "D23" and f.is_alarm]
    assert bool(told) is expected
    if expected:
        assert "grow with each step" in told[0].evidence
