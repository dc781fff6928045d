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


def test_a_fix_that_helps_on_one_rank_is_told_on_all(three_ranks: Ranks) -> None:
    found = three_ranks.run(on_ranks.confirmed)
    confirmations, errors, _ = found[0]
    assert all(other[:2] == (confirmations, errors) for other in found)
    assert any(helps for _, helps, *_ in confirmations)
    assert errors
    # Each rank alone: the data of the others need no fix.
    assert found[0][2] == found[2][2] == []
    assert found[1][2] == errors


def test_a_watch_over_ranks_names_the_rank(three_ranks: Ranks) -> None:
    found = three_ranks.run(on_ranks.watched)
    ((_, where, evidence, ranks),) = [f for f in found[0][0] if f[0] == "D08"]
    assert (where, ranks) == ("the model", [1])
    assert evidence.startswith("7 optimizer steps with the whole model in eval mode")
    assert evidence.endswith("(rank 1; on 1 of 3 ranks)")
    assert all(other[0] == found[0][0] for other in found)
    assert ["D08" in [f[0] for f in alone] for _, alone in found] == [
        *(False, True, False)
    ]


def test_a_loop_over_ranks_is_watched_on_all(three_ranks: Ranks) -> None:
    first, *others = three_ranks.run(on_ranks.own_loop)
    assert all(other == first for other in others)
    assert [f[3] for f in first if f[0] == "D08"] == [[1]]


def test_trial_training_that_fails_on_a_rank_is_an_error_on_all(
    three_ranks: Ranks,
) -> None:
    found = three_ranks.run(on_ranks.trial)
    assert all(told[0] == found[0][0] for told in found)
    told = [error for _, error in found]
    assert told[2] == "OSError: the disk of one rank is gone"
    named = "RanksError: not diagnosed, other ranks failed: rank 2: OSError: the disk"
    assert told[0].startswith(named)
    assert told[1].startswith(named)
