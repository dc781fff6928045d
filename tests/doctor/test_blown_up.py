"""D27 of weights that steps have made far too large, beside what only looks so."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from doctor.models import batches
from doctor.test_quiet import ALL
from normkit.doctor import Finding, Statistics, checks, diagnose, watch
from normkit.doctor.measurements import (
    LayerStatistics,
    TrainingStatistics,
    WeightStatistics,
)


def plain() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU()),
            *(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)),
        )


def findings(rate: float) -> tuple[list[Finding], list[Finding]]:
    """Train on a loss that is summed; return what a diagnosis and a watch find."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    made = batches()
    with watch(model, optimizer) as seen:
        for step in range(100):
            x, y = made[step % len(made)]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, reduction="sum").backward()
            optimizer.step()
    found = diagnose(model, batches()[:16], F.cross_entropy)
    return found.findings, seen.findings()


def blown_up(found: list[Finding]) -> list[str]:
    told = [f for f in found if f.id == "D27" and "times as large as" in f.evidence]
    return [f.severity for f in told]


def test_steps_that_were_too_large_are_the_cause_of_what_they_left() -> None:
    for found in findings(0.02):
        assert blown_up(found) == ["warning"]
        alarms = [f for f in found if f.is_alarm]
        assert alarms[0].id == "D27"
        left = [f for f in alarms if f.id in ("D21", "D24")]
        assert left
        assert {f.follows for f in left} == {"D27"}
    for found in findings(2e-4):
        assert blown_up(found) == []


def diverged(rate: float, *, is_logged: bool) -> list[Finding]:
    """Train by SGD on squared errors, perhaps until they are not finite."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    made = batches()
    with watch(model, optimizer, every=1) as seen:
        for step in range(60):
            x, _ = made[step % len(made)]
            optimizer.zero_grad()
            loss = (model(x) - x[:, 20:30]).square().mean(0).sum()
            loss.backward()
            optimizer.step()
            if is_logged:
                seen.log(loss=loss.item())
    return [f for f in seen.findings() if f.is_alarm]


@pytest.mark.parametrize("is_logged", [True, False])
def test_a_loss_that_rises_until_it_is_not_finite_is_of_the_steps(
    *, is_logged: bool
) -> None:
    found = diverged(0.3, is_logged=is_logged)
    assert [(f.id, f.severity) for f in found][:2] == [
        ("D27", "error"),
        ("D34", "error"),
    ]
    assert "then was not finite" in found[0].evidence
    assert {f.follows for f in found[1:]} == {"D27"}
    assert not diverged(0.01, is_logged=is_logged)


def test_a_density_that_falls_below_zero_has_not_risen() -> None:
    start = [0.1, 0.1, 0.0, -0.1, 0.1]
    for later, expected in (([-3.0, -5.0, -7.0], False), ([3.0, 5.0, 7.0], True)):
        losses = tuple(enumerate([*start, *later, math.nan]))
        loop = TrainingStatistics(losses=losses)
        seen = replace(of(USUAL), while_training=True, training=loop)
        found = checks.run(seen, ["D27"])
        assert any(f.severity == "error" for f in found) is expected


def of(*weights: WeightStatistics) -> Statistics:
    last = LayerStatistics("last", "Linear", "weight", is_output=True)
    layers = [
        LayerStatistics(f"fc{i}", "Linear", "weight", weight=weight)
        for i, weight in enumerate(weights)
    ]
    return Statistics((*layers, replace(last, weight=LARGE)))


# Of 64 inputs and 64 outputs: ‖w‖ is 8 for entries of variance 1/64.
LARGE = WeightStatistics(8 * 33.0, usual_norm=8, size=4096)
USUAL = replace(LARGE, norm=8.0)
# As a watch sees it.
GROWN = WeightStatistics(8 * 13.0, usual_norm=8, size=4096, norm_at_start=8.0)


@pytest.mark.parametrize(
    ("statistics", "expected"),
    [
        (of(LARGE, LARGE), ["warning", "warning"]),
        (of(LARGE, USUAL), ["warning"]),
        (of(LARGE, USUAL, USUAL), []),
        # Drawn by Xavier's rule with a gain of 16, of which no watch knows.
        (of(replace(LARGE, norm=8 * 16.0, size=1024)), []),
        # What has learned with them can go on.
        (replace(of(LARGE), evaluation=ALL), ["info"]),
        # Drawn from a standard normal, for 1,024 inputs: 32 times as large.
        (of(replace(LARGE, norm=8 * 32.0, size=65_536)), []),
        (of(GROWN), ["warning"]),
        (of(replace(GROWN, size=65_536)), ["warning"]),
        (of(replace(GROWN, norm=8 * 9.0)), []),
        # Drawn so large: no step has changed that.
        (of(replace(GROWN, norm_at_start=8 * 13.0)), []),
        (of(replace(LARGE, norm=math.nan)), []),
    ],
)
def test_weights_are_held_against_a_start(
    statistics: Statistics, expected: list[str]
) -> None:
    assert blown_up(checks.run(statistics, ["D27"])) == expected


def convolutions() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU()),
            nn.Linear(64, 10),
        )


def first_steps(
    rate: float, *, shuffled: bool = False, every: int | None = None
) -> list[Finding]:
    """Train by Adam, perhaps on targets of other samples; return what a watch says."""
    model = convolutions()
    optimizer = torch.optim.Adam(model.parameters(), rate)
    made = batches()
    draw = torch.Generator().manual_seed(0)
    with watch(model, optimizer, every=every) as seen:
        for step in range(120):
            x, y = made[step % len(made)]
            if shuffled:
                y = y[torch.randperm(len(y), generator=draw)]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return [f for f in seen.findings() if "it was replaced" in f.evidence]


def test_first_steps_that_replace_the_weights_are_the_cause() -> None:
    found = first_steps(0.1)
    assert [(f.id, f.severity) for f in found] == [("D27", "warning")]
    assert found[0].details["is_origin"]
    assert "steps in a row" in found[0].evidence
    (seldom,) = first_steps(0.1, every=6)
    assert "the first step" in seldom.evidence
    assert not first_steps(3e-3)
    assert not first_steps(3e-3, every=6)
    # Nothing to learn, by steps that are none too large.
    assert not first_steps(3e-3, shuffled=True)


def test_large_first_steps_of_a_network_that_learns_are_no_fault() -> None:
    assert not first_steps(0.01)
