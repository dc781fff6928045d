"""D27 by facts of the optimizer: rate, eps and dtype, each beside its clean twin."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from doctor.models import batches, build
from doctor.test_little_data import weights
from normkit.doctor import Finding, Statistics, checks, watch
from normkit.doctor.measurements import OptimizerStatistics, TrainingStatistics
from normkit.doctor.probes.optimizer import Rates

NETS = ("mlp", "cnn")
Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Cast(nn.Module):
    """A network in another type, for inputs and scores in float32."""

    def __init__(self, body: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = body.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(self.dtype)).float()


def alarms(
    model: nn.Module,
    make: Make,
    rate: Callable[[int], float] | None = None,
    steps: int = 150,
) -> list[Finding]:
    """Train under `watch`, and return the alarms; `rate(step)` gives the next rate."""
    optimizer = make(model.parameters())
    model.train()
    rounds = (b for epoch in itertools.count() for b in batches(seed=epoch))
    with watch(model, optimizer, every=5) as seen:
        for step, (x, y) in enumerate(itertools.islice(rounds, steps)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if rate is not None:
                optimizer.param_groups[0]["lr"] = rate(step + 1)
    return [f for f in seen.findings() if f.is_alarm]


def sgd(lr: float) -> Make:
    return lambda parameters: torch.optim.SGD(parameters, lr, momentum=0.9)


def adam(lr: float, eps: float = 1e-8) -> Make:
    return lambda parameters: torch.optim.Adam(parameters, lr, eps=eps)


@pytest.mark.parametrize("net", NETS)
def test_a_schedule_of_epochs_that_is_stepped_with_each_batch_is_told(net: str) -> None:
    def decayed(every: int) -> Callable[[int], float]:
        return lambda step: 0.05 * 0.7 ** (step // every)

    (found,) = alarms(build(net), sgd(0.05), decayed(1))
    assert (found.id, found.layer, found.severity) == ("D27", "", "warning")
    assert "as far as 3.33 steps" in found.evidence
    assert not alarms(build(net), sgd(0.05), decayed(28))


def gone(rates: list[float]) -> bool:
    """Return whether D27 says that the rate has gone."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer, seen = torch.optim.SGD([parameter], 1.0), Rates()
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        seen.add(optimizer)
    found = OptimizerStatistics(seen.full_steps, seen.gone)
    loop = TrainingStatistics(updates=len(rates), optimizer=found)
    readings = checks.run(Statistics(training=loop), ["D27"])
    return any(f.is_alarm for f in readings)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (lambda t: 1.0, False),
        (lambda t: 0.5 + 0.5 * math.cos(math.pi * t), False),
        (lambda t: 0.1 ** int(3 * t), False),
        # Warmed up from nothing, for most of the run.
        (lambda t: 1e-6 if t < 0.95 else 1.0, False),
        (lambda t: min(t / 0.04, (0.04 / t) ** 0.5) if t else 0.0, False),
        (lambda t: 0.7 ** (30 * t), False),
        (lambda t: 0.9 ** (1000 * t), True),
        (lambda t: 1.0 if t < 0.05 else 1e-4, True),
        # Half of the way at full rate, and then no more.
        (lambda t: 1.0 if t < 0.4 else 0.0, False),
    ],
)
def test_a_usual_schedule_is_no_rate_that_has_gone(
    rate: Callable[[float], float], expected: bool
) -> None:
    assert gone([rate(step / 1000) for step in range(1000)]) is expected


@pytest.mark.parametrize("net", NETS)
def test_an_eps_far_above_the_gradients_is_told(net: str) -> None:
    (found,) = alarms(build(net), adam(1e-3, eps=1.0))
    assert (found.id, found.layer) == ("D27", "")
    assert "eps=1 of the optimizer" in found.evidence
    assert not alarms(build(net), adam(1e-3))


def test_the_way_of_all_steps_is_not_that_of_the_first() -> None:
    """A watch observes each of the first 20 steps, and then every fiftieth."""
    at = (*range(20), *range(50, 400, 50))
    loop = TrainingStatistics(
        updates=400, optimizer=OptimizerStatistics(400.0, 0, eps=1.0, damped=0.9)
    )

    def is_told(first: float, later: float) -> bool:
        ratios = (first,) * 20 + (later,) * 7
        found = weights(1, update_ratio=ratios, updated_at=at)
        readings = checks.run(replace(found, training=loop), ["D27"])
        return any("eps=1" in f.evidence for f in readings if f.is_alarm)

    # 0.039 of the weight; 400 steps like the mean of the observed ones: 0.3.
    assert is_told(1e-3, 1e-5)
    assert not is_told(1e-3, 1e-3)


@pytest.mark.parametrize("net", NETS)
def test_a_large_eps_with_a_rate_to_match_is_no_fault(net: str) -> None:
    """Adam with an eps of 1 is SGD with momentum, at the same rate."""
    assert not alarms(build(net), adam(0.1, eps=1.0))


@pytest.mark.parametrize("net", NETS)
def test_steps_below_the_last_digit_of_the_weights_are_told(net: str) -> None:
    def cast(dtype: torch.dtype) -> nn.Module:
        return Cast(build(net, normalized=False, depth=2), dtype)

    (found,) = alarms(cast(torch.bfloat16), adam(1e-4))
    assert (found.id, found.layer) == ("D27", "")
    assert "round to nothing" in found.evidence
    assert not alarms(cast(torch.bfloat16), adam(3e-3))
    assert not alarms(cast(torch.float32), adam(1e-4))


class Halves(nn.Module):
    """Two networks, the second on what the first gives, perhaps without its graph."""

    def __init__(self, *, is_cut: bool) -> None:
        super().__init__()
        self.one = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.other, self.is_cut = nn.Linear(8, 3), is_cut

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        return self.other((h > 0).float() + 0 * h if self.is_cut else h)


@pytest.mark.parametrize(
    ("is_cut", "scale", "expected"),
    [
        (False, 1e7, ("D27", "D27")),
        (True, 1.0, ("D24", "")),
    ],
    ids=["clipped before they are unscaled", "no gradient behind one layer"],
)
def test_steps_too_small_in_all_layers_alike_are_no_gradient_that_vanishes(
    is_cut: bool, scale: float, expected: tuple[str, str]
) -> None:
    torch.manual_seed(0)
    model = Halves(is_cut=is_cut)
    parameters = list(model.parameters())
    with watch(model, optimizer := torch.optim.SGD(parameters, 0.05)) as seen:
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                model(torch.randn(16, 8)), torch.randint(3, (16,))
            )
            (loss * scale).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for p in parameters:
                p.grad /= scale
            optimizer.step()
    found = [f for f in seen.findings() if f.is_alarm]
    (still,) = (f for f in found if f.id == "D24" and "layers change by" in f.evidence)
    assert (found[0].id, still.follows) == expected
