"""One requirement on a step of the demo, with the measured value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Check", "percent"]


@dataclass(frozen=True)
class Check:
    """One requirement on a step.

    Attributes:
        what: Name of the measured value.
        value: The measured value.
        shown: The value as text.
        required: The requirement as text.
        held: The value meets the requirement.
    """

    what: str
    value: Any
    shown: str
    required: str
    held: bool


def percent(share: float) -> str:
    """Return a share of test images as percent; one digit is exact for 500 images."""
    return f"{100 * share:.1f}%"
