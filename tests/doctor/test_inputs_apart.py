"""D28 of one column, and of one value, where the moments of all do not tell."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.doctor import Finding, diagnose
from normkit.doctor.examination.far_values import FarValues

SCALES = torch.tensor([1.0, 1.0, 2.0, 0.5, 1.0, 1.0])


def table(scales: Tensor = SCALES, *, missing: float = 0.0) -> list[tuple]:
    torch.manual_seed(0)
    made = []
    for _ in range(8):
        x = torch.randn(64, 6)
        y = (x[:, 0] > 0).long()
        x = x * scales
        x[torch.rand(64, 6) < 0.1] = missing
        made.append((x, y))
    return made


def network(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def told(data: list[tuple], first: nn.Module) -> list[Finding]:
    found = diagnose(network(first), data, F.cross_entropy).findings
    return [f for f in found if f.id == "D28" and f.is_alarm]


APART = torch.tensor([1.0, 1.0, 500.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize("first", [nn.Identity, lambda: nn.LayerNorm(6)])
def test_a_column_in_another_unit_is_told(first: type) -> None:
    """A layer norm divides all by the largest, and hides it from the moments."""
    (found,) = told(table(APART), first())
    assert "columns go from 0.467 to 461" in found.evidence
    assert not told(table(), first())


def test_columns_apart_cost_nothing_where_the_forward_scales_them() -> None:
    class Scaling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / x.std(0)

    model, data = network(Scaling()), table(APART)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    severities = []
    for _ in range(2):
        found = diagnose(model, data, F.cross_entropy).findings
        severities.append([f.severity for f in found if f.id == "D28"])
        for x, y in data * 10:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert severities == [["warning"], ["info"]]


def test_a_batch_norm_scales_each_column() -> None:
    assert not told(table(APART), nn.BatchNorm1d(6))


@pytest.mark.parametrize("missing", [-9999.0, 1e6])
def test_a_number_that_stands_for_missing_values_is_told(missing: float) -> None:
    (found,) = told(table(missing=missing), nn.BatchNorm1d(6))
    assert found.value == missing
    assert f"{missing:.6g}" in found.evidence
    # Within the range of the others it tells nothing.
    assert not told(table(missing=-3.0), nn.BatchNorm1d(6))


def far(*batches: list[float]) -> float | None:
    values = FarValues()
    for batch in batches:
        values.add(torch.tensor(batch, dtype=torch.float32))
    found = values.found()
    return None if found is None else found.value


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (([-99, -99, -99, 0, 1],), -99),
        # Over batches, of which not all have it.
        (([-99, 0.5, 1], [0, 1], [-99, -99, 0.2]), -99),
        (([0, 99, 99], [1, 99, 0.5]), 99),
        # Two entries may be by chance.
        (([-99, -99, 0, 1],), None),
        # A gap of four times the range of the others.
        (([-4, -4, -4, 0, 1],), None),
        # Flags, and pixels of which most are 0.
        (([0, 0, 0, 1, 1, 1],), None),
        (([0, 0, 0, 0.2, 1],), None),
        (([math.nan] * 5,), None),
        (([-math.inf] * 3 + [0, 1],), None),
        ((), None),
    ],
)
def test_a_value_is_far_by_its_gap(
    batches: tuple[list[float], ...], expected: float | None
) -> None:
    assert far(*batches) == expected


class Replacing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nan_to_num(0.0)


def test_missing_values_that_the_model_replaces_are_no_fault() -> None:
    data = table(missing=math.nan)
    assert [f.severity for f in told(data, nn.Identity())] == ["error"]
    assert not told(data, Replacing())
    found = diagnose(network(Replacing()), data, F.cross_entropy).findings
    (about,) = [f for f in found if f.id == "D28"]
    assert "which the model replaces" in about.evidence
    assert not diagnose(network(Replacing()), data, F.cross_entropy).named


@pytest.mark.parametrize(("length", "severity"), [(1.0, "info"), (0.1, "warning")])
def test_rows_of_unit_length_are_scaled(length: float, severity: str) -> None:
    """Such as tf-idf: 500 columns, a standard deviation of .04."""
    torch.manual_seed(0)
    rows = torch.rand(256, 500).pow(20)
    data = [(length * x, torch.arange(64) % 2) for x in F.normalize(rows).split(64)]
    model = nn.Sequential(nn.Linear(500, 16), nn.ReLU(), nn.Linear(16, 2))
    found = diagnose(model, data, F.cross_entropy).findings
    assert [f.severity for f in found if f.id == "D28"] == [severity]
