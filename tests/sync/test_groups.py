"""Every name of a group is taken, and what names none is refused in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ranks import Ranks
from sync import groups_on_ranks as on_ranks


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def test_meshes_and_their_dimensions_by_number_and_name(three_ranks: Ranks) -> None:
    for found in three_ranks.run(on_ranks.every_name):
        assert found == [""] * 6


def test_what_names_no_group_is_refused(three_ranks: Ranks) -> None:
    for found in three_ranks.run(on_ranks.bad_names):
        assert "knows no process group named 'no such group'" in found[0]
        assert "got 5" in found[1]
        assert "no dimension 'tp', only 0, 'dp'" in found[2]
        assert "no dimension 1, only 0, 'dp'" in found[3]
        assert "process_group takes a ProcessGroup or its name" in found[4]
        assert "process_group takes a ProcessGroup or its name" in found[5]


def test_a_mesh_of_two_groups_asks_for_one(four_ranks: Ranks) -> None:
    for found in four_ranks.run(on_ranks.ambiguous):
        assert "shape (2, 2) names 2 groups of this rank; pass one" in found
        assert "(mesh, 'dp')" in found


def test_a_rank_outside_the_group_is_told_so(three_ranks: Ranks) -> None:
    """It used to normalize alone, silently."""
    inside, *others = three_ranks.run(on_ranks.outside)
    assert inside == ["alone", "alone"]
    for rank, (by_object, by_name) in enumerate(others, 1):
        assert f"rank {rank} is not in the group" in by_object
        assert f"rank {rank} knows no process group" in by_name


def test_one_rank_may_run_and_diagnose_alone(three_ranks: Ranks) -> None:
    """It used to wait for the others until the timeout."""
    named, *others = three_ranks.run(on_ranks.on_one_rank)
    assert "D04" in named
    assert others == [None, None]
