"""Which steps a watch observes, and what it says that it costs."""

import pytest
import torch
from torch import nn

from normkit.doctor import explain_gap, watch
from normkit.doctor.explain_gap import MAX_PASSES
from normkit.doctor.probes import schedule as times
from normkit.doctor.probes.schedule import Schedule
from normkit.errors import ArgumentError


def observed(every: int | None, steps: int) -> list[int]:
    model = nn.Linear(2, 1)
    with watch(model, every=every) as seen:
        for _ in range(steps):
            model(torch.ones(4, 2)).sum().backward()
    return seen.history["steps"]


def test_the_start_is_observed_closely_and_the_rest_now_and_then() -> None:
    assert observed(None, 101) == [*range(20), 50, 100]
    assert observed(7, 20) == [0, 7, 14]


def test_no_step_at_all_is_refused() -> None:
    with pytest.raises(ArgumentError, match="every=0 observes no step"):
        watch(nn.Linear(2, 1), every=0)


def test_the_cost_is_the_time_that_observed_steps_take_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(times.time, "perf_counter", lambda: now[0])
    schedule = Schedule(10)
    for step in range(100):
        is_observed = schedule.is_observed(step)
        schedule.begin(is_observed=is_observed)
        assert step > 1 or schedule.cost is None
        now[0] += 1.6 if is_observed else 1.0
    assert schedule.cost == pytest.approx(0.06)


def test_a_watch_says_what_it_costs() -> None:
    model = nn.Linear(2, 1)
    with watch(model, every=2) as seen:
        for _ in range(9):
            model(torch.ones(4, 2)).sum().backward()
    assert seen.cost is not None
    assert f"added about {seen.cost:.0%} to their time" in seen.to_text()


class Counted(nn.Module):
    """Sixteen batch norms in a row; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]
        layers = [(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(16)]
        self.net = nn.Sequential(*(k for each in layers for k in each), nn.Linear(8, 3))

    def __deepcopy__(self, memo: object) -> "Counted":
        raise TypeError("examined itself, so that its calls are counted")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return self.net(x)


def test_a_gap_of_many_layers_is_explained_in_ten_passes() -> None:
    torch.manual_seed(0)
    model = Counted()
    data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(6)]
    for x, _ in 4 * data:
        model(x)
    with torch.no_grad():
        model.net[7].running_mean += 2
    model.calls[0] = 0
    gap = explain_gap(model, data)
    assert model.calls[0] <= MAX_PASSES * len(data)
    assert "net.7" in [part.name for part in gap.layers]
    assert gap.layers[-1].name.endswith("other layers")
    assert sum(part.value for part in gap.causes) == pytest.approx(gap.gap)


def test_few_layers_are_each_measured_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    data = [(torch.randn(32, 8), torch.randint(3, (32,))) for _ in range(6)]
    model(data[0][0])
    assert [part.name for part in explain_gap(model, data).layers] == ["1"]
