"""Collectives of a calibration: all ranks succeed, or all fail."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from normkit.errors import ArgumentError, CalibrationError
from normkit.sync import sum_over
from normkit.sync.groups import Group

__all__ = ["all_or_none", "chosen_group", "number_of_ranks", "union_of_orders"]


@contextmanager
def all_or_none(group: Group, device: torch.device) -> Iterator[None]:
    """Raise on every rank when the block raises on any: one small collective.

    Raises:
        CalibrationError: Another rank failed, and this one did not.
    """
    try:
        yield
    except BaseException:
        _failures(group, device, has_failed=True)
        raise
    failures = _failures(group, device, has_failed=False)
    if failures:
        raise CalibrationError(
            f"calibration undone: {failures} of {number_of_ranks(group)} ranks failed, "
            "not this one; see their errors"
        )


def _failures(group: Group, device: torch.device, *, has_failed: bool) -> int:
    if group is None:
        return 0
    (sums,) = sum_over([torch.tensor(float(has_failed), device=device)], group)
    return round(float(sums))


def union_of_orders(names: Sequence[str], group: Group) -> list[str]:
    """Return one order of names for all ranks; a rank without data has none."""
    if group is None:
        return list(names)
    found: list[Any] = [None] * number_of_ranks(group)
    dist.all_gather_object(found, list(names), group=_process_group(group))
    return list(dict.fromkeys(name for theirs in found for name in theirs))


def chosen_group(process_group: Group) -> Group:
    """Return the group to merge over; None for this rank alone."""
    if isinstance(process_group, str) and process_group == "local":
        return None
    is_running = dist.is_available() and dist.is_initialized()
    if process_group is None:
        if is_running and dist.get_world_size() > 1:
            raise ArgumentError(
                f"torch.distributed runs on {dist.get_world_size()} ranks: pass "
                "process_group=torch.distributed.group.WORLD to merge their data (all "
                "ranks must call), or process_group='local' to use this rank's alone"
            )
        return None
    if not is_running:
        raise ArgumentError(
            "process_group was given but torch.distributed is not running; drop it, or "
            "call torch.distributed.init_process_group first"
        )
    return process_group


def _process_group(group: Group) -> Any:
    if isinstance(group, tuple):
        mesh, dim = group
        return mesh.get_group(dim)
    return group.get_group() if hasattr(group, "get_group") else group


def number_of_ranks(group: Group) -> int:
    """Return the size of the group; 1 without a group."""
    return 1 if group is None else dist.get_world_size(_process_group(group))
