"""Faults of a doctor that warns where nothing is wrong, for tests/test_sabotage.py."""

import itertools
import math
from typing import Any

import pytest
import torch

from sabotage import fault

_numbers = itertools.count(1)
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


@fault(caught_by=_QUIET + "test_d13_knows_batches_that_were_put_together")
def no_batch_is_put_together(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batches

    patch.setattr(batches, "STRATIFIED", 0.0)


@fault(caught_by=_QUIET + "test_d02_of_recent_statistics_is_no_error")
def any_gap_is_an_error(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import eval_mode

    patch.setattr(eval_mode, "_are_recent", lambda _: False)


@fault(
    caught_by="tests/doctor/test_checks.py::test_d02_at_a_high_momentum_does_not_pass"
)
def a_gap_passes_at_any_momentum(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import eval_mode

    patch.setattr(eval_mode, "MOMENTUM_HIGH", 2.0)


@fault(caught_by=_QUIET + "test_a_watch_that_begins_with_a_trained_network_knows_that")
def each_watch_begins_with_a_new_network(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor import recorder

    patch.setattr(recorder, "was_trained", lambda _: False)


@fault(
    caught_by="tests/doctor/test_blown_up.py::"
    "test_steps_that_were_too_large_are_the_cause_of_what_they_left"
)
def no_weight_is_too_large(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import too_large

    patch.setattr(too_large, "BLOWN_UP", math.inf)
    patch.setattr(too_large, "BLOWN_UNSEEN", math.inf)


@fault(
    caught_by="tests/doctor/test_targets.py::"
    "test_a_fault_of_the_targets_is_named_and_its_twin_is_silent"
)
def weights_of_classes_are_not_read(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import answers

    patch.setattr(answers, "class_weights", lambda *_: ())


_COPIES = "tests/doctor/test_copies.py::"


@fault(caught_by=_COPIES + "test_branches_that_are_copies_of_one_stay_one")
def layers_are_not_held_against_each_other(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import weights

    patch.setattr(weights, "_copies", lambda _: iter(()))


@fault(caught_by=_COPIES + "test_tied_weights_are_one_on_purpose")
def tied_weights_are_copies(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import series

    patch.setattr(series, "id", lambda _: next(_numbers), raising=False)


@fault(
    caught_by="tests/doctor/test_inputs_apart.py::"
    "test_a_number_that_stands_for_missing_values_is_told"
)
def no_value_is_far(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import far_values

    patch.setattr(far_values, "GAP", math.inf)


@fault(
    caught_by="tests/doctor/test_inputs_apart.py::test_a_column_in_another_unit_is_told"
)
def columns_may_lie_apart(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import inputs

    patch.setattr(inputs, "APART", math.inf)


@fault(
    caught_by="tests/doctor/test_left_out.py::"
    "test_scales_that_the_optimizer_was_not_given_are_told"
)
def scales_may_be_left_out(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import left_out

    patch.setattr(left_out.LeftOut, "names", lambda *_: ())


@fault(
    caught_by="tests/doctor/test_left_out.py::"
    "test_scales_that_the_program_moves_itself_are_no_fault"
)
def versions_are_not_read(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import left_out

    patch.setattr(left_out, "version_of", lambda _: 0)


@fault(
    caught_by="tests/doctor/test_left_out.py::test_a_warm_up_that_does_not_end_is_told"
)
def each_warm_up_ends(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import optimizer

    patch.setattr(optimizer, "RISEN", 0.0)


_SETTINGS = "tests/doctor/test_norm_settings.py::"


@fault(
    caught_by=_SETTINGS
    + "test_d04_a_momentum_of_zero_keeps_the_statistics_of_other_data"
)
def a_momentum_of_zero_is_meant(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import averages

    patch.setattr(averages, "_never_updated", lambda *_: iter(()))


@fault(caught_by=_SETTINGS + "test_d19_scales_that_are_all_small_explain_a_gap")
def small_scales_explain_nothing(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "SMALL", 0.0)


@fault(
    caught_by="tests/doctor/test_first_step.py::test_signals_of_the_first_step_are_told"
)
def the_first_step_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import signals

    patch.setattr(signals, "_at_start", lambda *_, **__: iter(()))


_MODES = "tests/doctor/test_modes.py::"


@fault(caught_by=_MODES + "test_a_norm_that_eval_does_not_reach_is_told_first")
def eval_reaches_each_norm(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import working_copy

    run = working_copy.WorkingCopy.run

    def reaching(self: Any, *args: Any, **options: Any) -> Any:
        found = run(self, *args, **options)
        found.left_on = frozenset()
        return found

    patch.setattr(working_copy.WorkingCopy, "run", reaching)


@fault(caught_by=_MODES + "test_d02_a_norm_of_a_class_of_its_own_has_two_modes")
def other_classes_have_one_mode(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import two_modes

    patch.setattr(two_modes, "own_averages", lambda _: {})


@fault(caught_by=_MODES + "test_a_training_that_is_in_eval_mode_throughout_is_told")
def a_training_in_eval_mode_is_none(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import loop

    patch.setattr(
        loop.Loop, "updates_in_eval", property(lambda _: 0, _ignored), raising=False
    )


def _ignored(*_: object) -> None: ...


@fault(caught_by=_SETTINGS + "test_d01_a_frozen_network_is_told_of_other_inputs")
def frozen_norms_fit_any_inputs(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import population

    patch.setattr(population, "_of_other_inputs", lambda _: iter(()))


@fault(
    caught_by="tests/doctor/test_first_step.py::"
    "test_d23_a_recurrence_that_grows_over_the_steps_is_told"
)
def a_recurrence_may_grow(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import signals

    patch.setattr(signals, "_over_steps", lambda _: iter(()))


_STEPS = "tests/doctor/test_no_steps.py::"


@fault(caught_by=_STEPS + "test_an_optimizer_that_makes_no_step_is_told")
def steps_are_always_made(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import steps

    patch.setattr(steps, "_none", lambda _: iter(()))


@fault(caught_by=_STEPS + "test_steps_that_lead_nowhere_are_told")
def any_way_is_far(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import steps

    patch.setattr(steps, "WAY", 0.0)


@fault(caught_by=_STEPS + "test_d14_a_strong_decay_stands_before_what_it_does")
def decay_is_never_a_cause(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import weights

    patch.setattr(weights, "STRONG", math.inf)


@fault(caught_by=_STEPS + "test_d05_tells_of_the_batches_of_a_training")
def batches_of_a_training_are_large(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batch_size

    patch.setattr(batch_size, "_trained_on_few", lambda _: iter(()))


@fault(caught_by=_MODES + "test_a_head_on_a_frozen_network_in_eval_mode_is_no_fault")
def no_network_comes_in_eval_mode(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import examine

    made = examine.Statistics
    patch.setattr(
        examine, "Statistics", lambda *a, **k: made(*a, **{**k, "came_in_eval": False})
    )


_PAIR = (
    "tests/doctor/test_targets.py::"
    "test_a_fault_of_the_targets_is_named_and_its_twin_is_silent"
)


@fault(caught_by=_PAIR)
def no_target_lies_far(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import outliers

    patch.setattr(outliers, "OUTLIERS", math.inf)


@fault(caught_by=_PAIR)
def a_softmax_may_take_any_dimension(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import answers

    patch.setattr(answers, "softmax_dim", lambda _: None)


@fault(caught_by=_PAIR)
def a_loss_may_have_either_sign(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import targets

    patch.setattr(targets, "NEGATED", frozenset())


@fault(
    caught_by="tests/doctor/test_norm_settings.py::"
    "test_d03_a_flag_alone_does_not_keep_eval_mode_from_the_buffers"
)
def all_norms_track(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import norm_statistics

    made = norm_statistics.NormStatistics
    patch.setattr(
        norm_statistics,
        "NormStatistics",
        lambda *a, **k: made(*a, **{**k, "tracks": True}),
    )


_FEW = "tests/doctor/test_few_samples.py::"


@fault(caught_by=_FEW + "test_a_few_batches_of_whole_numbers_are_named")
def any_batch_is_another(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import repeats

    patch.setattr(repeats.Repeats, "batches", property(lambda self: self.calls))


@fault(caught_by=_FEW + "test_the_same_few_samples_in_other_batches_are_named")
def any_sample_is_another(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import repeats

    patch.setattr(repeats.Repeats, "different", property(lambda self: self.samples))


@fault(caught_by=_FEW + "test_inputs_are_told_apart_by_values_and_order")
def the_order_of_values_is_of_no_account(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import repeats

    patch.setattr(repeats, "_weights", lambda n, *_: torch.ones(n).double())


@fault(caught_by=_FEW + "test_the_same_few_samples_in_other_batches_are_named")
def samples_are_told_apart_by_their_batch(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import repeats

    add = repeats.Repeats.add

    def by_batch(self: repeats.Repeats, args: object, kwargs: object) -> None:
        add(self, args, kwargs)
        self._sums[-1] = self._sums[-1] + self._sums[-1].sum()

    patch.setattr(repeats.Repeats, "add", by_batch)


@fault(caught_by=_FEW + "test_what_may_be_meant_is_not_named")
def sets_of_any_size_are_small(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import few_samples

    patch.setattr(few_samples, "MOST", 4096)


@fault(caught_by=_SETTINGS + "test_d19_scales_of_zero_that_stay_are_the_cause")
def scales_of_zero_are_always_a_start(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "_kept_zero", lambda _: iter(()))


@fault(caught_by=_SETTINGS + "test_d07_scales_of_a_new_layer_are_fixed_and_not_frozen")
def any_scale_comes_from_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.layer_statistics import NormStatistics

    patch.setattr(NormStatistics, "is_at_start", property(lambda _: False))


@fault(
    caught_by=_SETTINGS + "test_d12_stands_before_the_statistics_that_padding_spoils"
)
def stale_statistics_come_before_padding(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor import finding

    patch.setitem(finding.CONSEQUENCES, "D12", frozenset(["D02"]))


@fault(caught_by=_QUIET + "test_d13_batches_of_one_class_each_are_not_mixed")
def what_does_not_vary_within_is_unknown(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batches

    def known(channels: Any) -> float:
        value = mixing(channels)
        return value if math.isfinite(value) else math.nan

    mixing = batches.mixing
    patch.setattr(batches, "mixing", known)


@fault(
    caught_by="tests/doctor/test_first_step.py::test_signals_of_the_first_step_are_told"
)
def twenty_steps_should_have_learned(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import signals

    patch.setattr(signals, "MANY", 10)


_NO_FAULT = "tests/doctor/test_what_is_no_fault.py::"


@fault(caught_by=_NO_FAULT + "test_order_costs_nothing_where_the_network_has_learned")
def order_always_costs_something(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batches

    patch.setattr(batches, "costs_nothing", lambda _: False)


@fault(
    caught_by=_NO_FAULT
    + "test_d11_a_dropout_that_leaves_little_is_told_where_little_was_learned"
)
def any_share_may_be_dropped(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batches

    patch.setattr(batches, "MOSTLY", 1.0)


@fault(
    caught_by=_NO_FAULT
    + "test_d18_dead_units_before_a_norm_cost_nothing_where_it_has_learned"
)
def constant_channels_always_cost_something(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "costs_nothing", lambda _: False)


@fault(caught_by=_NO_FAULT + "test_d14_asks_what_the_scales_have_kept")
def scales_keep_nothing(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import weights

    patch.setattr(weights, "KEPT", math.inf)


@fault(caught_by=_NO_FAULT + "test_answers_may_be_masked_by_minus_infinity")
def no_answer_is_masked(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import not_finite

    class Nowhere:
        isfinite = staticmethod(lambda _: False)
        nan, inf = math.nan, math.inf

    patch.setattr(not_finite, "math", Nowhere)


@fault(
    caught_by="tests/doctor/test_copies.py::"
    "test_weights_that_begin_at_one_value_are_told_of_a_watch"
)
def no_weight_begins_at_one_value(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import updates

    patch.setattr(updates, "_is_constant", lambda _: False)


_LOOPS = "tests/doctor/test_loops.py::"


@fault(caught_by=_LOOPS + "test_a_state_that_is_detached_in_the_loop_is_told")
def each_call_gets_a_gradient(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import gradients

    patch.setattr(gradients, "cut_off", lambda _: iter(()))


@fault(caught_by=_LOOPS + "test_a_head_that_is_read_at_the_last_step_carries_no_state")
def any_layer_that_is_read_once_is_cut_off(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.measurements import Statistics

    of_role = Statistics.of_role
    patch.setattr(
        Statistics,
        "of_role",
        lambda self, role: (
            [*self.layers] if role == "recurrent" else of_role(self, role)
        ),
    )


@fault(caught_by=_FEW + "test_images_are_few_where_they_are_not_changed")
def few_images_are_as_they_are(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import few_samples

    patch.setattr(few_samples, "MOST_IMAGES", few_samples.MOST)


@fault(
    caught_by="tests/doctor/test_inputs_apart.py::"
    "test_columns_apart_cost_nothing_where_the_forward_scales_them"
)
def columns_apart_always_cost_something(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import inputs

    patch.setattr(inputs, "has_learned", lambda _: False)


_PADDED = "tests/doctor/test_read_padding.py::"


@fault(caught_by=_PADDED + "test_a_model_that_reads_padding_is_told")
def padding_spares_nothing(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import read_padding

    patch.setattr(read_padding, "SPARED", 0.0)


@fault(caught_by=_PADDED + "test_what_is_cut")
def samples_of_one_length_are_padded(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import trimmed

    ends = trimmed._ends  # pyright: ignore[reportPrivateUsage]

    def uneven(x: Any) -> Any:
        found = ends(x)
        return found and (found[0] + (torch.arange(len(found[0])) == 0), found[1])

    patch.setattr(trimmed, "_ends", uneven)


@fault(caught_by=_QUIET + "test_d13_targets_that_never_vary_have_no_order")
def rounding_is_an_order(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batches

    patch.setattr(batches, "ROUNDED", 0.0)


_ONE_LENGTH = (
    "tests/doctor/test_read_padding.py::"
    "test_some_padding_is_no_fault_of_a_network_that_takes_one_length"
)


@fault(caught_by=_ONE_LENGTH)
def any_model_takes_one_length(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import examine

    patch.setattr(examine, "has_one_length", lambda *_: True)


@fault(caught_by=_ONE_LENGTH)
def any_model_takes_any_length(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import examine

    patch.setattr(examine, "has_one_length", lambda *_: False)


_PASSED = "tests/doctor/test_frozen_and_passed.py::"


@fault(caught_by=_PASSED + "test_frozen_features_that_go_on_counting_are_the_cause")
def whatever_was_never_trained_is_not_frozen(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.measurements import LayerStatistics

    patch.setattr(LayerStatistics, "gets_gradients", True)


@fault(caught_by=_PASSED + "test_features_that_are_compared_may_end_in_a_frozen_norm")
def frozen_layers_are_one_map_with_trained_ones(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.measurements import LayerStatistics

    patch.setattr(LayerStatistics, "gets_gradients", True)


@fault(
    caught_by=_PASSED
    + "test_a_batch_that_is_skipped_behind_the_norms_is_told_by_the_norms"
)
def what_came_with_a_batch_never_passes(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import not_finite

    patch.setattr(not_finite, "_has_passed", lambda *_: False)


@fault(
    caught_by=_PASSED
    + "test_half_of_the_units_are_zero_where_signals_have_become_alike"
)
def units_that_start_at_zero_are_the_fault_of_biases(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "DEAD_WHERE_ALIKE", 0.5)


@fault(
    caught_by=_PASSED
    + "test_inputs_far_from_zero_do_no_harm_to_a_network_that_has_learned"
)
def inputs_far_from_zero_always_do_harm(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import inputs

    patch.setattr(inputs, "has_learned_all", lambda _: False)


_HELD = "tests/doctor/test_left_out.py::"


@fault(caught_by=_HELD + "test_an_optimizer_of_flattened_parameters_holds_them")
def what_is_flattened_does_not_change(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import left_out

    patch.setattr(left_out, "_is_same", lambda *_: True)


@fault(caught_by=_HELD + "test_a_head_that_was_replaced_behind_its_optimizer_is_told")
def who_holds_nothing_holds_what_is_flattened(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import left_out

    patch.setattr(left_out, "_is_same", lambda *_: False)


@fault(
    caught_by="tests/doctor/test_no_steps.py::"
    "test_d14_of_adamw_is_judged_by_rate_times_decay"
)
def a_decay_that_is_decoupled_takes_nothing(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import weights

    patch.setattr(weights, "TAKES_ALL", math.inf)


@fault(
    caught_by="tests/doctor/test_modes.py::"
    "test_norms_that_are_unfrozen_late_were_not_left_in_eval_mode"
)
def what_is_frozen_should_train(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor import recorder

    patch.setattr(recorder, "_is_frozen", lambda _: False)


@fault(caught_by=_FEW + "test_states_of_a_game_and_nodes_of_a_graph_are_few_by_nature")
def states_of_a_game_are_few_data(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import repeats

    repeated = property(lambda self: self.different)
    patch.setattr(repeats.Repeats, "repeated", repeated)


_LEARNS = "tests/doctor/test_learns_all_the_same.py::test_"


@fault(caught_by=_LEARNS + "one_pair_of_linear_layers_costs_a_deep_network_little")
def one_pair_of_linear_layers_is_many(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import basics

    patch.setattr(basics, "MANY_PAIRS", 0.0)


@fault(caught_by=_LEARNS + "counts_that_the_network_is_given_are_no_labels")
def counts_that_are_given_are_labels(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination.targets import Targets

    honest = Targets.add_values
    patch.setattr(Targets, "add_values", lambda s, t, y, _: honest(s, t, y))


@fault(caught_by=_LEARNS + "d21_dead_units_are_no_alarm_where_the_network_is_learning")
def nothing_is_learning(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "is_learning", lambda _: False)


@fault(caught_by=_LEARNS + "d27_what_nothing_reads_need_not_change")
def everything_is_read(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import weights

    patch.setattr(weights, "_unread", lambda _: set())


@fault(caught_by=_LEARNS + "units_whose_number_varies_are_positions")
def units_never_vary_in_number(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes.series import Window

    patch.setattr(
        Window, "has_varied", property(lambda _: False, lambda *_: None), raising=False
    )


@fault(caught_by=_LEARNS + "d05_batches_of_four_are_no_alarm_where_the_network_learns")
def batches_of_four_are_too_few_for_all(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batch_size

    patch.setattr(batch_size, "SMALL_ERROR", 4)


@fault(caught_by=_LEARNS + "d27_gradients_of_an_earlier_training_are_none_of_this_one")
def gradients_that_were_there_before_count(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes.left_out import LeftOut

    patch.setattr(
        LeftOut, "_got_gradient", lambda _, __, p: p.grad is not None and p.grad.any()
    )


@fault(
    caught_by="tests/doctor/test_learns_all_the_same.py::"
    "test_labels_that_the_loss_divides_are_a_distribution"
)
def what_a_loss_makes_of_labels_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import answers

    patch.setattr(answers, "has_distributions", lambda loss, output: False)


@fault(
    caught_by="tests/doctor/test_learns_all_the_same.py::"
    "test_a_dropout_of_a_third_before_a_norm_costs_little"
)
def a_dropout_is_a_fault_whatever_it_costs(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batches

    patch.setattr(batches, "costs_nothing", lambda statistics: False)


@fault(
    caught_by="tests/doctor/test_learns_all_the_same.py::"
    "test_scores_of_a_critic_are_not_those_of_the_model"
)
def a_critic_is_no_one(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import answers

    patch.setattr(answers, "leaves_of", lambda loss: [])


_LEARNS = "tests/doctor/test_learns_all_the_same.py::"


@fault(caught_by=_LEARNS + "test_d28_words_may_be_shares_of_their_row")
def a_mean_of_one_over_the_width_makes_shares(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import forward_pass

    patch.setattr(forward_pass, "_are_shares", lambda rows: True)


@fault(caught_by=_LEARNS + "test_d34_of_targets_a_loss_takes_apart_no_range_is_known")
def targets_of_any_size_are_compared(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from normkit.doctor.examination.answers import Answers

    real = Answers.output
    patch.setattr(
        Answers,
        "output",
        lambda self, loss_fn: replace(real(self, loss_fn), has_their_size=True),
    )


@fault(caught_by=_LEARNS + "test_d01_statistics_that_cost_no_right_answer_are_no_alarm")
def a_larger_loss_is_a_gap_whatever_the_answers(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import population

    patch.setattr(population, "_keeps_metric", lambda statistics: False)


_NO_GRADIENT = "tests/doctor/test_no_gradient.py::"


@fault(
    caught_by=_NO_GRADIENT
    + "test_layers_without_a_gradient_that_no_loss_reads_are_no_fault"
)
def layers_without_a_gradient_are_cut_off(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import working_copy

    patch.setattr(working_copy, "detached", lambda loss, layers: tuple(layers))


@fault(
    caught_by=_NO_GRADIENT
    + "test_a_forward_that_leaves_the_graph_is_named_with_its_layers"
)
def no_change_of_the_loss_is_enough(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import detached

    patch.setattr(detached, "CHANGED", 100.0)


@fault(
    caught_by=_LEARNS + "test_single_samples_that_a_network_serves_are_not_its_training"
)
def single_samples_are_those_of_the_training(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batch_size, population

    for module in (batch_size, population):
        patch.setattr(module, "are_served_singly", lambda _: False)


@fault(caught_by=_LEARNS + "test_d34_one_number_a_sample_may_depend_on_the_others")
def one_number_a_sample_is_no_answer(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import dependence

    patch.setattr(dependence, "num_samples", lambda _: 1)


@fault(caught_by=_LEARNS + "test_d29_a_size_that_halves_the_error_is_erased")
def what_answers_explain_is_never_half(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import erased

    patch.setattr(erased, "HALF", 0.1)


@fault(caught_by=_LEARNS + "test_averages_lag_behind_a_network_that_begins_to_learn")
def averages_never_lag(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import eval_mode, population

    for module in (eval_mode, population):
        patch.setattr(module, "is_lagging", lambda _: False)


@fault(caught_by=_LEARNS + "test_averages_lag_behind_a_network_that_begins_to_learn")
def averages_lag_for_ever(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import eval_mode

    patch.setattr(eval_mode, "YOUNG", 1 << 30)


@fault(caught_by=_LEARNS + "test_averages_lag_behind_a_network_that_begins_to_learn")
def averages_of_few_batches_lag(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import eval_mode

    patch.setattr(eval_mode, "COLD", 1.0)
