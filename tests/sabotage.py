"""Planted faults: broken kernels and layers that the suite must catch.

Each `Fault` breaks one thing the way a tired author would (ddof 1 for 0, the last
column dropped, the momentum swapped) and names the test that has to fail for it.
`tests/test_sabotage.py` runs `pytest --sabotage NAME TEST` for every fault and is
green only when that test is red. A fault that survives is a hole in the suite.

Faults stand in `mutants.py` and `*_mutants.py` beside the tests that catch them. To
add one, write a function that patches normkit through a `pytest.MonkeyPatch`, mostly by
`wrap`, and register it with `@fault(caught_by="tests/…::test_…")`; the registry's key
is the function's name. Import normkit inside the function, not at the top.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

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


def wrap(patch: pytest.MonkeyPatch, target: str, change: Callable[..., Any]) -> None:
    """Replace a function or method by `change(honest, *args, **kwargs)`.

    Args:
        patch: Undoes it.
        target: Dotted name, as it is looked up where it is called.
        change: Takes the honest function first.
    """
    place, _, name = target.rpartition(".")
    owner: Any = pkgutil.resolve_name(place)
    found = owner.__dict__[name]
    honest = getattr(found, "__func__", found)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(honest, *args, **kwargs)

    is_bound = isinstance(found, (staticmethod, classmethod))
    patch.setattr(owner, name, type(found)(changed) if is_bound else changed)


_tests = Path(__file__).parent
for _file in sorted(_tests.glob("**/*mutants.py")):
    import_module(".".join(_file.relative_to(_tests).with_suffix("").parts))
