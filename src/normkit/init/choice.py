"""Choice of the linear maps that `initialize` draws."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from normkit.errors import ArgumentError
from normkit.init.fans import LinearMap

__all__ = ["check_sizes", "chosen_maps", "trained_maps"]


def chosen_maps(
    maps: list[LinearMap], patterns: Sequence[str] | None, left: dict[str, str]
) -> list[LinearMap]:
    """Return the maps whose layer a pattern names; the others go to `left`.

    Raises:
        ArgumentError: A pattern that names none.
    """
    if patterns is None:
        return maps
    for pattern in patterns:
        if not any(fnmatchcase(each.name, pattern) for each in maps):
            names = sorted({each.name for each in maps})
            raise ArgumentError(
                f"layers={pattern!r} matches no linear map; there are {names}"
            )
    chosen = [m for m in maps if any(fnmatchcase(m.name, p) for p in patterns)]
    for each in maps:
        if each not in chosen:
            left[each.name] = "not named in layers="
    return chosen


def trained_maps(maps: list[LinearMap], left: dict[str, str]) -> list[LinearMap]:
    """Return the maps whose weight is trained; the others go to `left`."""
    for each in maps:
        if each.is_frozen:
            left[each.name] = "frozen (requires_grad is False); layers= draws it"
    return [each for each in maps if not each.is_frozen]


def check_sizes(maps: Sequence[LinearMap]) -> None:
    """Refuse weights without elements.

    Raises:
        ArgumentError: A layer that has one.
    """
    for each in maps:
        if not each.weight.numel():
            raise ArgumentError(
                f"layer {each.name!r} has a weight of shape {tuple(each.weight.shape)} "
                "without elements; leave it out by layers="
            )
