"""Faults that tests/transforms must catch; see `sabotage`."""

import pytest

from sabotage import fault


@fault(
    caught_by="tests/transforms/test_state.py"
    "::test_a_poisoned_or_empty_batch_does_not_move_the_state"
)
def a_state_takes_in_any_batch(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import state as room

    honest = room._moved
    patch.setattr(
        room,
        "_moved",
        lambda state, batch, momentum, skips: honest(state, batch, momentum, False),
    )


@fault(
    caught_by="tests/transforms/test_compile.py::"
    "test_a_layer_compiles_whole_and_equals_eager"
)
def a_compiled_backward_reads_statistics_that_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("normkit.nn.batch_renorm.opaque_clone", lambda x: x)
