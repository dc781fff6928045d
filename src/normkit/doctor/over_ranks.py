"""Findings of several ranks, each of which examined its own batches alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from normkit.doctor.finding import SEVERITIES, Finding
from normkit.errors import RanksError
from normkit.sync.groups import Group, process_group_of

__all__ = ["merge_readings", "together"]


def together(examine: Callable[[], Any], process_group: Group) -> tuple[Any, Any]:
    """Run `examine` on every rank; return this rank's result, and the results of all.

    Args:
        examine: Returns an object with `readings`; runs no collective.
        process_group: The ranks; all must call.

    Returns:
        The result, and the readings of every rank, by rank.

    Raises:
        RanksError: `examine` raised on another rank; with its rank and its error.
    """
    group = process_group_of(process_group)
    result, failure = None, None
    try:
        result = examine()
    except Exception as error:
        failure = error
    told = (
        None if failure is None else f"{type(failure).__name__}: {failure}",
        None if result is None else result.readings,
    )
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, told, group=group)
    if failure is not None:
        raise failure
    members = dist.get_process_group_ranks(group)
    failed = [
        f"rank {rank}: {error}"
        for rank, (error, _) in zip(members, found, strict=True)
        if error is not None
    ]
    if failed:
        raise RanksError(f"not diagnosed, other ranks failed: {'; '.join(failed)}")
    return result, {
        rank: readings for rank, (_, readings) in zip(members, found, strict=True)
    }


def merge_readings(by_rank: dict[int, list[Finding]]) -> list[Finding]:
    """Return one reading per check and layer: that of the rank where it is worst.

    Where it is not the same on all ranks, the evidence names the rank that it is of and
    how many others agree; `details["ranks"]` has the ranks with that severity.
    """
    groups: dict[tuple[str, str], list[tuple[int, Finding]]] = {}
    for rank, readings in by_rank.items():
        for reading in readings:
            groups.setdefault((reading.id, reading.layer), []).append((rank, reading))
    merged: list[Finding] = []
    for found in groups.values():
        rank, worst = min(found, key=lambda each: SEVERITIES.index(each[1].severity))
        ranks = [r for r, reading in found if reading.severity == worst.severity]
        if worst.is_reported:
            share = f"{len(ranks)} of {len(by_rank)} ranks"
            worst = replace(
                worst,
                evidence=f"{worst.evidence} (rank {rank}; on {share})",
                details={**worst.details, "ranks": ranks},
            )
        merged.append(worst)
    return sorted(merged, key=lambda reading: reading.id)
