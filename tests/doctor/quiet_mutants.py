"""Faults of a doctor that warns where nothing is wrong, for tests/test_sabotage.py."""

import pytest

from sabotage import fault

_QUIET = "tests/doctor/test_quiet.py::"


@fault(
    caught_by=_QUIET
    + "test_cold_statistics_of_the_first_steps_are_told_and_not_warned_of"
)
def a_training_of_five_steps_is_one(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import start

    patch.setattr(start, "FEW", 2)


@fault(caught_by=_QUIET + "test_d34_needs_a_loss_that_shows_a_gain")
def a_gain_that_cannot_be_seen_is_none(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import progress

    patch.setattr(progress, "_is_none", lambda gain, error: gain <= 2 * error)


@fault(caught_by=_QUIET + "test_d05_counts_independent_values_where_samples_are_eight")
def only_samples_count(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batch_size

    patch.setattr(batch_size, "FEW", 8)


@fault(
    caught_by="tests/doctor/test_known_causes.py::"
    "test_d21_compares_with_the_start_and_asks_what_was_learned"
)
def a_share_of_dead_units_is_a_fault_by_itself(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "has_learned_nothing", lambda _: True)


@fault(
    caught_by=_QUIET + "test_d22_compares_one_place_of_blocks_that_start_with_a_norm"
)
def the_place_in_a_block_is_of_no_account(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import signals

    class NoPlace:
        sub = staticmethod(lambda *_: "")

    patch.setattr(signals, "re", NoPlace)


@fault(
    caught_by="tests/doctor/test_erased.py::"
    "test_a_network_that_sees_the_level_may_not_have_learned_it"
)
def what_explains_a_target_is_always_lost(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import basics

    patch.setattr(basics, "UNMOVED", 1e9)
