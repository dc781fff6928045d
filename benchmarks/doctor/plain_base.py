"""Common parts of the healthy programs of plain_runs.py: register."""

from __future__ import annotations

from collections.abc import Callable

from quiet_base import Training

__all__ = ["PROGRAMS", "program"]

PROGRAMS: dict[str, Callable[[], Training]] = {}


def program(build: Callable[[], Training]) -> Callable[[], Training]:
    """Enter a program under its name; its docstring says what it trains."""
    PROGRAMS[build.__name__] = build
    return build
