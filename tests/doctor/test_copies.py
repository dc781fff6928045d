"""D26 of layers that are copies of one, beside tied weights and equal starts."""

import copy

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
