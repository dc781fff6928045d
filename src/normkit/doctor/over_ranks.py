"""Findings of several ranks, each of which examined its own batches alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch.distributed as dist

from normkit.doctor.finding import SEVERITIES, Finding
from normkit.doctor.fixes.confirm import Confirmation
from normkit.errors import RanksError
from normkit.sync.groups import Group, process_group_of

__all__ = ["merge_confirmations", "merge_readings", "merged_over", "together"]

Found = TypeVar("Found")


def merged_over(
    examine: Callable[[], Found],
    process_group: Group,
    merge: Callable[[Mapping[int, Found]], Found],
) -> Found:
    """Run `examine` on every rank, and merge what they found; see `together`."""
    if process_group is None:
        return examine()
    return merge(together(examine, process_group)[1])


def together(
    examine: Callable[[], Found], process_group: Group
) -> tuple[Found, dict[int, Any]]:
    """Run `examine` on every rank; return this rank's result, and what all found.

    Args:
        examine: Returns a list, or an object with `readings`; runs no collective.
        process_group: The ranks; all must call.

    Returns:
        The result, and the lists or readings of every rank, by rank.

    Raises:
        RanksError: `examine` raised on another rank; with its rank and its error.
    """
    result, failure = None, None
    try:
        result = examine()
    except Exception as error:
        failure = error
    told = (
        None if failure is None else f"{type(failure).__name__}: {failure}",
        getattr(result, "readings", result),
    )
    group = process_group_of(process_group)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, told, group=group)
    found = dict(zip(dist.get_process_group_ranks(group), gathered, strict=True))
    if failure is not None:
        raise failure
    failed = [f"rank {rank}: {error}" for rank, (error, _) in found.items() if error]
    if failed:
        raise RanksError(f"not diagnosed, other ranks failed: {'; '.join(failed)}")
    assert result is not None
    return result, {rank: each for rank, (_, each) in found.items()}


def merge_readings(by_rank: Mapping[int, list[Finding]]) -> list[Finding]:
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


def merge_confirmations(
    by_rank: Mapping[int, list[Confirmation]],
) -> list[Confirmation]:
    """Return one confirmation per check: of a rank where the fix helps, if any."""
    merged: dict[str, Confirmation] = {}
    for confirmations in by_rank.values():
        for each in confirmations:
            known = merged.setdefault(each.id, each)
            if each.helps and not known.helps:
                merged[each.id] = each
    return list(merged.values())
