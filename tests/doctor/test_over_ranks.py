"""A diagnosis over ranks has the findings of every rank, on every rank."""

from __future__ import annotations

from doctor import diagnosed_on_ranks as on_ranks
from ranks import Ranks


def test_the_worst_rank_of_each_check_is_told_on_all(three_ranks: Ranks) -> None:
    found = three_ranks.run(on_ranks.diagnosed)
    named, readings = found[0][0], found[0][2]
    assert "D01" in named
    assert all(other[0] == named and other[2] == readings for other in found)
    evidence, ranks = next(
        (evidence, ranks) for id_, evidence, ranks in readings if id_ == "D01"
    )
    assert ranks == [1]
    assert evidence.endswith("(rank 1; on 1 of 3 ranks)")
    assert "D01" not in found[0][1]
    assert "D01" in found[1][1]


def test_a_rank_that_fails_ends_the_others_with_its_name(three_ranks: Ranks) -> None:
    *others, culprit = three_ranks.run(on_ranks.with_a_failure)
    assert culprit
    assert "RanksError" not in culprit
    for told in others:
        assert told.startswith("RanksError: not diagnosed, other ranks failed: rank 2:")
