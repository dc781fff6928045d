"""Turns in which threads waited for a processor do not count."""

import time

import pytest

from normkit.bench import timing
from normkit.bench.timing import Timing, Turn, in_turns, undisturbed


def test_turns_with_waiting_are_left_out() -> None:
    calm = [Turn(1.0, wall, 0.0) for wall in (1.0, 2.0, 3.0)]
    waited = [Turn(1.0, 60.0, 1.5)] * 9
    assert sorted(undisturbed(waited + calm)) == calm
    found = Timing.of(waited + calm)
    assert (found.wall, found.wall_median, found.turns) == (1.0, 2.0, 3)
    assert found.waiting == 0.0


def test_without_calm_turns_the_quarter_that_waited_least_counts_and_says_so() -> None:
    turns = [Turn(1.0, float(i), 0.1 * i) for i in range(1, 21)]
    assert undisturbed(turns) == turns[:5]
    assert Timing.of(turns).waiting == pytest.approx(0.3)


def test_a_pause_follows_a_turn_that_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system then runs the process at once; without one it goes on waiting."""
    waited = iter(0.001 * i for i in range(10**6))
    pauses: list[float] = []
    monkeypatch.setattr(timing, "_waited", lambda: next(waited))
    monkeypatch.setattr(timing.time, "sleep", pauses.append)
    found = in_turns({"a": lambda: sum(range(10_000))}, 0.01, avoid_waiting=True)
    assert found["a"].waiting > timing.MAX_WAITING
    assert pauses
    pauses.clear()
    found = in_turns({"a": lambda: sum(range(10_000))}, 0.01)
    assert found["a"].waiting == 0.0
    assert not pauses


def test_a_call_does_not_pay_for_the_contestant_before_it() -> None:
    """As an allocator does that another contestant has left without pages."""
    last: list[str] = []

    def contestant(name: str) -> None:
        if last[-1:] != [name]:
            time.sleep(0.01)
        last[:] = [name]
        time.sleep(0.001)

    calls = {name: lambda name=name: contestant(name) for name in ("a", "b")}
    found = in_turns(calls, 0.1)
    assert all(0.001 <= timing.wall < 0.005 for timing in found.values())
    assert all(timing.wall_median < 0.005 for timing in found.values())


def test_the_system_counts_or_nothing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_grown() -> bool:
        before = timing._waited()
        time.sleep(0.01)
        return timing._waited() >= before >= 0.0

    # A thread that ends meanwhile, of a test before, takes its seconds with it.
    assert any(has_grown() for _ in range(5))
    monkeypatch.setattr(timing, "_TASKS", "/nowhere")
    assert timing._waited() == 0.0
