"""Planted faults: broken kernels and layers that the suite must catch.

Each `Fault` breaks one thing the way a tired author would (ddof 1 for 0, the last
column dropped, the momentum swapped) and names the test that has to fail for it.
`tests/test_sabotage.py` runs `pytest --sabotage NAME TEST` for every fault and is
green only when that test is red. A fault that survives is a hole in the suite.

To add one, write a function that patches normkit through a `pytest.MonkeyPatch`, and
register it with `@fault(caught_by="tests/…::test_…")`; the registry's key is the
function's name. Import normkit inside the function, not at the top.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Fault:
    """One planted fault and the test that catches it."""

    plant: Callable[[pytest.MonkeyPatch], None]
    caught_by: str


FAULTS: dict[str, Fault] = {}


def fault(
    *, caught_by: str
) -> Callable[
    [Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]
]:
    """Register the decorated function as a fault that `caught_by` must catch."""

    def register(
        plant: Callable[[pytest.MonkeyPatch], None],
    ) -> Callable[[pytest.MonkeyPatch], None]:
        FAULTS[plant.__name__] = Fault(plant, caught_by)
        return plant

    return register
