"""Faults that tests of this folder itself must catch; see `sabotage`."""

import pytest

from sabotage import fault


@fault(
    caught_by="tests/test_batches.py::test_it_is_the_ratio_of_an_analysis_of_variance"
)
def mixing_forgets_that_means_vary_too(patch: pytest.MonkeyPatch) -> None:
    from normkit import batches as room

    honest = room._columns
    patch.setattr(room, "_columns", lambda parts: honest(parts) - 0.1)
