"""D27 of steps that are not made, or lead nowhere; D14 and D05 of a whole training."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from doctor.models import batches, build
from normkit.doctor import Finding, watch
from normkit.doctor.finding import ranked


def watched(
    model: nn.Module,
    rate: float,
    *,
    makes_steps: bool = True,
    size: int = 64,
    steps: int = 220,
    decay: float = 0.0,
    moved_by: Callable[[], object] | None = None,
) -> list[Finding]:
    """Train, and return the alarms in order."""
    optimizer = torch.optim.SGD(model.parameters(), rate, 0.9, weight_decay=decay)
    made = batches(size)
    with watch(model, optimizer, every=5) as seen:
        for step in range(steps):
            x, y = made[step % len(made)]
            if makes_steps:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if makes_steps:
                optimizer.step()
            if moved_by is not None:
                moved_by()
    return [f for f in seen.findings() if f.is_alarm]


def test_an_optimizer_that_makes_no_step_is_told() -> None:
    (found,) = watched(build("mlp"), 0.05, makes_steps=False, steps=110)
    assert found.id == "D27"
    assert "made no step" in found.evidence
    # Gradients may be accumulated over many calls.
    assert not watched(build("mlp"), 0.05, makes_steps=False, steps=60)
    # Another moves the weights, as a second optimizer or one written by hand.
    model = build("mlp")

    def by_hand() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None

    assert not watched(model, 0.05, makes_steps=False, steps=110, moved_by=by_hand)


@pytest.mark.parametrize(
    ("rate", "steps", "expected"),
    [(1e-5, 220, True), (1e-5, 150, False), (0.05, 220, False)],
)
def test_steps_that_lead_nowhere_are_told(
    rate: float, steps: int, *, expected: bool
) -> None:
    found = watched(build("mlp"), rate, steps=steps)
    told = [f for f in found if "steps together moved" in f.evidence]
    assert bool(told) is expected
    if expected:
        assert told[0].fix == "raise the learning rate"


def test_d14_a_strong_decay_stands_before_what_it_does() -> None:
    found = watched(build("mlp"), 0.1, decay=0.3)
    assert found[0].id == "D14"
    weak = Finding("D14", "decayed_scale", "", "warning")
    eps = Finding("D16", "narrow_precision", "1", "warning")
    assert [f.id for f in ranked([weak, eps])] == ["D16", "D14"]


@pytest.mark.parametrize(("size", "expected"), [(2, True), (4, True), (16, False)])
def test_d05_tells_of_the_batches_of_a_training(size: int, *, expected: bool) -> None:
    found = [f for f in watched(build("mlp"), 0.01, size=size) if f.id == "D05"]
    assert bool(found) is expected
    plain = watched(build("mlp", normalized=False), 0.01, size=size)
    assert "D05" not in [f.id for f in plain]


class OfImages(nn.Module):
    """A model that is given a list of images, as torchvision's detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        return self.norm(self.conv(torch.stack(images))).mean((2, 3))


@pytest.mark.parametrize(("size", "expected"), [(2, True), (8, False)])
def test_d05_counts_the_images_of_a_list(size: int, *, expected: bool) -> None:
    model = OfImages()
    with watch(model) as seen:
        for _ in range(3):
            model([torch.randn(3, 8, 8) for _ in range(size)]).square().sum().backward()
    assert ("D05" in [f.id for f in seen.findings() if f.is_alarm]) is expected


def test_d05_counts_tokens_by_their_sentences() -> None:
    """And nothing where a call has no tensor."""
    model = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.BatchNorm1d(20))
    with watch(model) as seen:
        for _ in range(3):
            model(torch.randint(8, (16, 5))).square().sum().backward()
    assert seen.statistics().training.samples == 16  # pyright: ignore[reportOptionalMemberAccess]
    assert "D05" not in [f.id for f in seen.findings() if f.is_alarm]

    class Drawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, size: int) -> torch.Tensor:
            return self.norm(torch.randn(size, 4))

    with watch(drawn := Drawn()) as seen:
        for _ in range(3):
            drawn(16).square().sum().backward()
    assert "D05" not in [f.id for f in seen.findings() if f.is_alarm]


@pytest.mark.parametrize(("decay", "expected"), [(8.0, True), (0.1, False)])
def test_d14_of_adamw_is_judged_by_rate_times_decay(
    decay: float, *, expected: bool
) -> None:
    model = build("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=decay)
    with watch(model, optimizer) as seen:
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    (found,) = [f for f in seen.findings() if f.id == "D14"]
    assert found.is_alarm is expected
    assert found.details["is_origin"] is expected
