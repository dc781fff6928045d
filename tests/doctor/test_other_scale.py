"""A loader that gives the inputs on another scale than training did: D28, D01."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkit
from normkit.doctor.checks.distance import distance
from normkit.doctor.checks.other_scale import of_other_scale, scaled_by

SAMPLES = torch.randn(1280, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def batches(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    targets = (SAMPLES.mean((1, 2, 3)) > 0).long()
    return list(zip(x.split(64), targets.split(64), strict=True))


def trained(x: Tensor, momentum: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for width, units in ((1, 8), (8, 8)):
        norm = nn.BatchNorm2d(units, momentum=momentum)
        parts += [nn.Conv2d(width, units, 3, padding=1), norm, nn.ReLU()]
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(512, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        for x_batch, y in batches(x):
            optimizer.zero_grad()
            F.cross_entropy(model(x_batch), y).backward()
            optimizer.step()
    return model


@pytest.mark.parametrize(
    ("factor", "named", "severity"),
    [(80.0, "D28", "error"), (5.0, "D01", "warning")],
)
def test_the_scale_of_the_loader_is_named_and_nothing_is_repaired(
    factor: float, named: str, severity: str
) -> None:
    model = trained(SAMPLES)
    before = copy.deepcopy(model.state_dict())
    found = normkit.diagnose(model, batches(factor * SAMPLES), F.cross_entropy)
    first = found.findings[0]
    assert (first.id, first.severity) == (named, severity)
    assert first.fix.startswith("give this loader the preprocessing")
    stale = next(f for f in found.findings if f.id == "D01")
    assert "this loader gives the inputs on another scale" in stale.evidence
    assert stale.follows == ("D28" if named == "D28" else "")
    assert (stale.layer, stale.layers) == ("1", ("1",))
    repaired = found.repair()
    assert list(repaired) == []
    assert repaired.declined.keys() >= {"D01", "D02"} & set(found.named)
    assert "another scale" in repaired.declined["D01"]
    state = model.state_dict()
    assert all(torch.equal(before[name], state[name]) for name in before)


def test_a_slow_average_over_raw_inputs_is_not_taken_for_another_scale() -> None:
    model = trained(80 * SAMPLES, momentum=0.002)
    found = normkit.diagnose(model, batches(80 * SAMPLES), F.cross_entropy)
    (_, first), (_, second) = found.statistics.norms
    # The initial values are in all statistics: those of the second norm are off, too.
    assert scaled_by(first) is not None
    assert distance(second).severity != "clear"
    assert of_other_scale(found.statistics) == ("", 1.0)
