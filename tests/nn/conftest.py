"""`route`: a test once on each route. `peers`: what torch's own layer fails, too."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.autograd import forward_ad

import normkit

LISTED = "torch itself fails"


@contextlib.contextmanager
def fixed_order() -> Iterator[None]:
    """Sums of torch operations in an order that no size and no thread changes."""
    with normkit.backend("reference"), normkit.deterministic():
        yield


# The routes of functional/README.md that a plain tensor on one rank can take.
ROUTES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "kernels": contextlib.nullcontext,
    "reference": lambda: normkit.backend("reference"),
    "fixed order": fixed_order,
    "formula": forward_ad.dual_level,
}


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each route of a call: what a layer promises holds on all."""
    with ROUTES[request.param]():
        yield request.param


class Peers:
    """Runs a check on torch first, then on normkit, and collects who fails what.

    A case that torch passes and normkit fails makes the test fail. Cases that torch
    itself fails are listed at the end of the run, with how many normkit passes.
    """

    def __init__(self) -> None:
        self.cases = 0
        self.failures: list[str] = []
        self.excused: dict[str, list[bool]] = {}
        self.is_judged = False

    def compare(
        self, case: str, theirs: Callable[[], object], ours: Callable[[], object]
    ) -> None:
        """Run one case on both."""
        self.cases += 1
        torch_fails, normkit_fails = _failure(theirs), _failure(ours)
        if torch_fails is not None:
            self.excused.setdefault(torch_fails, []).append(normkit_fails is None)
        elif normkit_fails is not None:
            self.failures.append(f"{case}: {normkit_fails}")

    def judge(self) -> None:
        """Fail the test if normkit fails anything that torch passes."""
        self.is_judged = True
        assert self.cases, "the database has no case for this check"
        assert not self.failures, "torch passes, normkit fails:\n" + "\n".join(
            self.failures
        )

    def summary(self) -> list[str]:
        """A line for each way in which torch fails."""
        return [
            f"{len(passed)} of {self.cases} cases, normkit passes {sum(passed)}: {why}"
            for why, passed in self.excused.items()
        ]


def _failure(run: Callable[[], object]) -> str | None:
    try:
        run()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {first[:140]}"
    return None


@pytest.fixture
def peers(record_property: Callable[[str, object], None]) -> Iterator[Peers]:
    comparison = Peers()
    yield comparison
    assert comparison.is_judged, "the test never called peers.judge()"
    for line in comparison.summary():
        record_property(LISTED, line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    listed = {
        f"{report.nodeid.rpartition('::')[2]}: {text}"
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, text in getattr(report, "user_properties", ())
        if name == LISTED
    }
    if listed:
        terminalreporter.section("cases of torch's databases that torch itself fails")
        for line in sorted(listed):
            terminalreporter.line(line)
