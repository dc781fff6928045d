"""Options of `initialize`: which scheme reads which, and the numbers they may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from normkit.errors import ArgumentError

__all__ = ["SCHEMES", "check_numbers", "check_options"]

SCHEMES = ("auto", "constant", "normal", "xavier", "kaiming", "orthogonal", "lsuv")
_WITH_GAIN = ("xavier", "kaiming", "orthogonal", "lsuv")
# The schemes that read an option; those of other options need no reader.
_READERS: dict[str, tuple[str, ...]] = {
    "activation": _WITH_GAIN,
    "gain": _WITH_GAIN,
    "mode": ("kaiming",),
    "std": ("normal",),
    "distribution": ("auto", "xavier", "kaiming"),
    "value": ("constant",),
    "per_channel": ("lsuv",),
}


def check_options(
    scheme: str, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse options that the scheme would pass over.

    Raises:
        ArgumentError: One that differs from its default and belongs to other schemes.
    """
    for name, schemes in _READERS.items():
        if given[name] != defaults[name] and scheme not in schemes:
            raise ArgumentError(
                f"{name}={given[name]!r} says nothing of scheme={scheme!r}; it belongs "
                f"to {' and '.join(map(repr, schemes))}: leave it out, or choose one "
                "of them"
            )


def check_numbers(
    *, std: float, gain: float | None, value: float, bias: float | None
) -> None:
    """Refuse numbers that no weight can have.

    Raises:
        ArgumentError: One that is not finite, or a negative std or gain.
    """
    for name, number in (("std", std), ("gain", gain)):
        if number is not None and not 0 <= number < math.inf:
            raise ArgumentError(f"{name}={number} must be finite and not negative")
    for name, number in (("value", value), ("bias", bias)):
        if number is not None and not math.isfinite(number):
            raise ArgumentError(f"{name}={number} must be finite")
