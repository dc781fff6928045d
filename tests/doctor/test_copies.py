"""D26 of layers that are copies of one, beside tied weights and equal starts."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.models import batches
from normkit.doctor import Finding, diagnose, watch


class Branches(nn.Module):
    """The sum of four branches on one input."""

    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = [branch(x) for branch in self.branches]
        return self.last(torch.stack(found).mean(0))


def branch() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU())


def alarms(model: nn.Module) -> list[Finding]:
    """Train for 30 steps; return what a diagnosis finds, and a watch."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:25]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    found = diagnose(model, batches()[:8], F.cross_entropy)
    return [f for f in (*found.findings, *seen.findings()) if f.id == "D26"]


def test_branches_that_are_copies_of_one_stay_one() -> None:
    one = branch()
    found = alarms(Branches([copy.deepcopy(one) for _ in range(4)]))
    assert [f.severity for f in found] == ["error", "error"]
    for each in found:
        assert set(each.layers) == {f"branches.{i}.0" for i in (1, 2, 3)}
        assert "branches.0.0" in each.evidence
    assert not alarms(Branches([branch() for _ in range(4)]))


def test_tied_weights_are_one_on_purpose() -> None:
    made = [branch() for _ in range(2)]
    made[1][0].weight = made[0][0].weight  # pyright: ignore[reportIndexIssue]
    assert not alarms(Branches(made))


def test_copies_one_behind_the_other_part() -> None:
    """As in nn.TransformerEncoder: their gradients differ from the first step on."""
    one = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    model = nn.Sequential(one, copy.deepcopy(one), nn.Linear(64, 10))
    found = diagnose(model, batches()[:8], F.cross_entropy).named
    assert "D26" not in found


class Ratings(nn.Module):
    """The product of two vectors, each of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.films = nn.Embedding(10, 4), nn.Embedding(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (self.users(x[:, 0]) * self.films(x[:, 1])).sum(1)


@pytest.mark.parametrize("start", ["constant", "random", "zero and not trained"])
def test_vectors_of_one_number_stay_so(start: str) -> None:
    model = Ratings()
    pairs = torch.randint(10, (64, 2))
    wanted = torch.randn(64)
    for table in (model.users, model.films):
        if start != "random":
            nn.init.constant_(table.weight, 0.3 if start == "constant" else 0.0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20 if start != "zero and not trained" else 0):
        optimizer.zero_grad()
        F.mse_loss(model(pairs), wanted).backward()
        optimizer.step()
    found = diagnose(model, [(pairs, wanted)] * 4, F.mse_loss).findings
    told = [f.layers for f in found if f.id == "D26"]
    assert told == ([("users", "films")] if start == "constant" else [])


@pytest.mark.parametrize(
    ("value", "is_frozen", "expected"),
    [
        (0.05, False, True),
        (0.0, False, False),
        (0.05, True, False),
        (None, False, False),
    ],
)
def test_weights_that_begin_at_one_value_are_told_of_a_watch(
    value: float | None, *, is_frozen: bool, expected: bool
) -> None:
    """Their biases are drawn, so that no two units stay equal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    first = model[0]
    assert isinstance(first, nn.Linear)
    if value is not None:
        nn.init.constant_(first.weight, value)
    first.weight.requires_grad_(not is_frozen)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with watch(model, optimizer) as seen:
        for x, y in batches()[:25]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    told = [f for f in seen.findings() if "one value in all entries" in f.evidence]
    assert [(f.id, f.layer) for f in told] == ([("D26", "0")] if expected else [])
