"""Faults that the tests of lost steps and of causes must catch."""

from typing import Any

import pytest

from sabotage import fault, wrap

_STEPS = "tests/doctor/test_lost_steps.py::"
_CAUSES = "tests/doctor/test_causes_at_first_sight.py::"
_NORMS = "tests/doctor/test_causes_in_norms.py::"


@fault(caught_by=_STEPS + "test_a_usual_schedule_is_no_rate_that_has_gone")
def steps_of_a_warm_up_count_as_gone(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes.optimizer import GONE

    def add(real, self, optimizer):
        rate = optimizer.param_groups[0]["lr"]
        self.total += rate
        self.largest = max(self.largest, rate)
        self.gone += rate < GONE

    wrap(patch, "normkit.doctor.probes.optimizer.Rates.add", add)


@fault(
    caught_by=_STEPS
    + "test_a_schedule_of_epochs_that_is_stepped_with_each_batch_is_told"
)
def the_rate_of_a_step_is_that_of_the_first(patch: pytest.MonkeyPatch) -> None:
    def add(real, self, optimizer):
        self.largest = self.largest or optimizer.param_groups[0]["lr"]
        self.total += self.largest

    wrap(patch, "normkit.doctor.probes.optimizer.Rates.add", add)


@fault(caught_by=_STEPS + "test_a_large_eps_with_a_rate_to_match_is_no_fault")
def a_large_eps_is_a_fault_by_itself(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import steps

    patch.setattr(steps, "WAY", 1e9)


@fault(caught_by=_STEPS + "test_an_eps_far_above_the_gradients_is_told")
def eps_is_compared_with_squares(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import optimizer

    patch.setattr(optimizer, "DAMPED", 1e-4)


@fault(caught_by=_STEPS + "test_steps_below_the_last_digit_of_the_weights_are_told")
def half_precision_rounds_nothing(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import updates

    patch.setattr(updates, "HALF", ())


@fault(
    caught_by=_CAUSES
    + "test_an_eps_that_is_the_number_of_channels_comes_before_what_it_does"
)
def a_large_eps_explains_no_signal(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import buffers

    patch.setattr(buffers, "USUAL_EPS", 1e9)


@fault(caught_by=_CAUSES + "test_the_eps_of_a_layer_norm_is_judged_by_its_inputs")
def a_small_signal_is_the_fault_of_a_usual_eps(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import buffers

    patch.setattr(buffers, "USUAL_EPS", 0.0)


@fault(caught_by=_CAUSES + "test_batch_statistics_of_many_positions_are_no_fault")
def positions_do_not_count_beside_samples(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batch_size

    patch.setattr(batch_size, "MIN_EFFECTIVE", 1e9)


@fault(caught_by=_CAUSES + "test_answers_that_depend_on_few_others_are_told")
def batch_norms_without_averages_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batch_size

    patch.setattr(batch_size, "SMALL_WARNING", 0)


@fault(caught_by=_CAUSES + "test_a_norm_that_takes_the_steps_for_the_features_is_told")
def layers_agree_on_any_dimension(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import probes

    patch.setattr(probes, "crossed_dims", lambda *_: None)


@fault(caught_by=_CAUSES + "test_a_mask_that_hides_all_but_padding_is_told_first")
def what_is_read_and_hidden_are_taken_for_each_other(
    patch: pytest.MonkeyPatch,
) -> None:
    def spreads(real, self):
        read, hidden, num_read, num_hidden = real(self)
        return hidden, read, num_hidden, num_read

    wrap(patch, "normkit.doctor.probes.keys.Keys.spreads", spreads)


@fault(caught_by=_CAUSES + "test_a_causal_mask_hides_no_key_from_all_queries")
def a_key_is_hidden_that_one_query_does_not_read(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes.keys import Keys

    def of_product(real, keys, mask):
        return Keys(keys.transpose(1, 2).flatten(2), ~mask.all(-2).all(1))

    wrap(patch, "normkit.doctor.probes.keys.Keys.of_product", of_product)


@fault(
    caught_by=_CAUSES + "test_samples_that_a_loss_leaves_out_on_purpose_are_no_fault"
)
def a_mark_without_a_label_is_a_class(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import dependence

    patch.setattr(dependence, "LIKE_OTHERS", (0.0, 1e9))


@fault(caught_by=_CAUSES + "test_a_class_that_the_loss_ignores_is_told")
def the_mean_loss_of_no_sample_is_a_loss(patch: pytest.MonkeyPatch) -> None:
    def ignored(real, loss_fn, whole, targets):
        found = real(loss_fn, whole, targets)
        return found if len(found) > 1 else ()

    wrap(patch, "normkit.doctor.examination.dependence._ignored", ignored)


@fault(caught_by=_CAUSES + "test_what_explains_a_gap_stands_before_it")
def a_gap_stands_before_what_explains_it(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor import finding

    patch.setattr(finding, "_opens_gap", lambda _: False)


def _always(id_: str):
    from normkit.doctor import Finding

    return lambda statistics: iter([Finding(id_, "", "", "error")])


@fault(
    caught_by=_NORMS
    + "test_a_feature_that_was_rare_of_late_is_no_fault_while_it_costs_nothing"
)
def a_channel_is_judged_where_eval_mode_is_as_good(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import population

    patch.setattr(population, "train_eval_gap", _always("D02"))


@fault(
    caught_by=_NORMS
    + "test_channels_that_die_or_blank_batches_are_no_second_width[sparse]"
)
def a_few_channels_that_come_and_go_are_a_width(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batches

    patch.setattr(batches, "COME_AND_GO", 0.1)


@fault(
    caught_by=_NORMS
    + "test_small_scales_of_both_signs_that_are_meant_are_no_fault[offset]"
)
def scales_are_judged_without_the_outputs(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "VANISH_WARNING", 1e9)


@fault(
    caught_by=_NORMS
    + "test_frozen_norms_of_a_checkpoint_and_those_that_nothing_needs_are_silent"
)
def a_frozen_norm_is_a_fault_by_itself(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import buffers

    patch.setattr(buffers, "activations_vanish", _always("D22"))


@fault(caught_by=_NORMS + "test_layers_that_another_optimizer_holds_are_not_left_out")
def what_one_optimizer_lacks_is_left_out(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import weights

    patch.setattr(weights, "is_left_out", lambda layer: layer.weight.is_left_out)


@fault(
    caught_by="tests/doctor/test_targets.py::"
    "test_scores_that_the_loss_squashes_are_named"
)
def what_the_loss_squashes_is_not_seen(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import answers

    patch.setattr(answers, "squashed_by", lambda *_: "")


@fault(
    caught_by="tests/doctor/test_targets.py::"
    "test_logits_that_the_loss_reads_more_than_once_are_no_fault"
)
def any_softmax_in_a_loss_is_before_its_own(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import answers, graph

    def squashed_by(loss, output):
        names = {graph._name(node) for node in graph._nodes_between(loss, output)}
        return next(iter(names & {"Softmax", "Tanh"}), "")

    patch.setattr(answers, "squashed_by", squashed_by)


_FIRST = "tests/doctor/test_blown_up.py::"


@fault(caught_by=_FIRST + "test_first_steps_that_replace_the_weights_are_the_cause")
def first_steps_of_any_size_are_too_large(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import too_large

    patch.setattr(too_large, "TOO_FAR", 1e-4)


@fault(caught_by=_FIRST + "test_first_steps_that_replace_the_weights_are_the_cause")
def first_steps_are_never_too_large(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import too_large

    patch.setattr(too_large, "TOO_FAR", 1e4)


@fault(
    caught_by=_FIRST + "test_a_loss_that_rises_until_it_is_not_finite_is_of_the_steps"
)
def no_loss_rises(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import too_large

    patch.setattr(too_large, "_rise", lambda _: 1.0)


_ENDS = "tests/doctor/test_ends_and_orders.py::"


@fault(caught_by=_ENDS + "test_targets_beyond_the_states_of_a_last_recurrent_layer")
def states_have_no_bounds(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import targets

    patch.setattr(targets, "GATED", frozenset())


@fault(caught_by=_ENDS + "test_cosines_that_are_scores_are_named_once_they_are_right")
def scores_of_any_size_are_cosines(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import targets

    patch.setattr(targets, "COSINE", 1e9)


@fault(caught_by=_ENDS + "test_vectors_that_are_pulled_to_one_point_are_named")
def one_answer_for_all_is_always_as_good(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import answers

    patch.setattr(answers, "AS_GOOD", 1e9)


@fault(caught_by=_ENDS + "test_of_two_losses_the_targets_of_each_are_its_own")
def what_two_losses_compare_is_not_known(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import answers

    patch.setattr(answers, "compared_values", lambda *_: None)


@fault(
    caught_by=_ENDS
    + "test_numbers_of_customers_are_no_inputs_where_embeddings_read_them"
)
def ids_are_inputs(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import examine

    patch.setattr(examine, "_has_tables", lambda _: False)


@fault(caught_by=_ENDS + "test_scales_that_are_tiny_in_all_norms_are_the_cause")
def scales_are_never_tiny(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "_tiny", lambda _: iter(()))


@fault(caught_by=_ENDS + "test_samples_in_an_order_are_told_while_training")
def no_order_is_one(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import in_order

    patch.setattr(in_order, "ALIKE", 1e9)


@fault(caught_by=_ENDS + "test_signals_of_any_phase_come_in_an_order_of_their_size")
def the_size_of_a_sample_tells_no_order(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes.repeats import Repeats

    patch.setattr(
        Repeats, "_sizes", property(lambda _: [], lambda *_: None), raising=False
    )


@fault(caught_by=_ENDS + "test_samples_in_an_order_are_told_while_training")
def any_order_is_one(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import in_order

    patch.setattr(in_order, "ALIKE", 0.1)
    patch.setattr(in_order, "DRIFTS", -1.0)


@fault(caught_by=_ENDS + "test_weights_that_outgrow_their_training_are_told")
def trained_weights_may_grow(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import too_large

    patch.setattr(too_large, "_outgrown", lambda _: iter(()))


@fault(caught_by=_ENDS + "test_answers_whose_first_dimension_is_time_are_not_one_point")
def what_is_not_changed_is_one_point(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import answers

    patch.setattr(answers, "UNKNOWN", 0.0)


@fault(caught_by=_ENDS + "test_gradients_that_did_not_arrive_for_most_of_a_training")
def the_last_steps_stand_for_a_training(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import gradients

    patch.setattr(gradients, "LONG", 10**6)


@fault(
    caught_by=_NORMS
    + "test_new_norms_behind_a_bias_are_told_where_eval_mode_says_nothing"
)
def a_bias_is_always_that_of_a_fold(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import buffers

    patch.setattr(buffers, "_says_nothing_in_eval", lambda _: False)


_ANSWERS = "tests/doctor/test_answers_and_inputs.py::"


@fault(caught_by=_ANSWERS + "test_answers_that_are_wrong_have_no_other_numbering")
def half_of_the_answers_show_a_numbering(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import renumbered

    patch.setattr(renumbered, "EXPLAINED", 0.1)
    patch.setattr(renumbered, "TIMES", 0.5)


@fault(
    caught_by=_ANSWERS + "test_batches_in_the_order_of_their_classes_show_no_numbering"
)
def a_numbering_is_told_beside_no_loss_of_one_answer(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.doctor.checks import answers

    def numbered(statistics: Any) -> Any:
        if statistics.output.renumbered is not None:
            yield answers._numbered_otherwise(statistics.output.renumbered)

    patch.setattr("normkit.doctor.checks.basics.answers", numbered)


@fault(caught_by=_ANSWERS + "test_one_answer_to_most_samples")
def a_few_equal_answers_are_too_many(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import answers
    from normkit.doctor.examination import answers as measured

    patch.setattr(answers, "MANY_SAME", 0.0)
    patch.setattr(measured, "SAME_ANSWERS", 0.0)


@fault(caught_by=_ANSWERS + "test_a_norm_whose_mean_alone_is_read")
def every_norm_lets_its_gradient_through(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import basics

    patch.setattr(basics, "LET_THROUGH", 0.0)


@fault(caught_by=_ANSWERS + "test_a_cycle_of_batches_that_is_stepped_by_epochs")
def a_cycle_may_change_with_each_step(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import steps

    patch.setattr(steps, "CHANGES", 2.0)
    patch.setattr(steps, "FAR_BELOW", 0.5)


@fault(
    caught_by="tests/doctor/test_checks.py::"
    "test_d01_statistics_fit_where_answers_are_good"
)
def statistics_fit_whatever_the_answers_are(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import population

    patch.setattr(population, "POOR", 1e9)


@fault(caught_by=_ANSWERS + "test_units_that_get_a_bias_alone_are_not_dead_by_training")
def a_bias_alone_leaves_dead_units(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "NOTHING", 0.0)


@fault(caught_by=_ANSWERS + "test_raw_figures_beside_another_input")
def one_input_stands_for_all(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import forward_pass

    patch.setattr(forward_pass, "_is_table", lambda _: False)
