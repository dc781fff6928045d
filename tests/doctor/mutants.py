"""Faults that tests/doctor must catch; see `sabotage`."""

import pytest

from sabotage import fault, wrap


@fault(
    caught_by="tests/doctor/test_checks.py::"
    "test_d01_holds_the_variance_to_its_thresholds"
)
def d01_does_not_compare_the_variance(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def distance(real, norm):
        found = real(norm)
        return found and replace(found, var=0.0)

    wrap(patch, "normkit.doctor.checks.population.distance", distance)


@fault(
    caught_by="tests/doctor/test_checks.py::"
    "test_d01_few_samples_are_not_judged_however_far_off"
)
def d01_judges_whatever_it_gets(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import distance

    patch.setattr(distance, "MAX_NOISE", 1e9)


@fault(caught_by="tests/doctor/test_checks.py::test_d22_compares_last_and_first")
def d22_compares_first_and_last_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import signals

    real = signals.below
    patch.setattr(signals, "below", lambda value, **k: real(1 / (value or 1e-9), **k))


@fault(
    caught_by="tests/doctor/test_watch.py::test_no_activation_outlives_its_step",
)
def a_probe_keeps_its_outputs(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes.layer_probe import LayerProbe

    real, kept = LayerProbe.add_output, []

    def add_output(self, y, overall, unit_dim):
        kept.append(y)
        real(self, y, overall, unit_dim)

    patch.setattr(LayerProbe, "add_output", add_output)


@fault(caught_by="tests/doctor/test_watch.py::test_no_hook_is_left_after_an_exception")
def hooks_are_left_behind(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes.probes import Probes

    patch.setattr(Probes, "detach", lambda self: self._handles.clear())


@fault(
    caught_by="tests/doctor/test_watch.py::"
    "test_a_watched_run_is_bitwise_the_run_without"
)
def a_probe_draws_a_random_number(patch: pytest.MonkeyPatch) -> None:
    import torch

    def values(real, x, unit_dim, unit):
        torch.rand(1)
        return real(x, unit_dim, unit)

    wrap(patch, "normkit.doctor.probes.layer_probe.unit_values", values)


@fault(
    caught_by="tests/doctor/test_diagnose.py::"
    "test_a_diagnosis_leaves_everything_bit_for_bit"
)
def buffers_are_restored_when_autograd_counted_a_change(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.modeling.snapshot import Snapshot

    # Batch norm's kernel writes its buffers without counting: nothing is put back.
    patch.setattr(Snapshot, "restore_values", lambda self, **_: None)


@fault(
    caught_by="tests/doctor/test_watch.py::"
    "test_an_observed_step_has_its_own_gradient_and_update"
)
def every_update_is_taken_for_that_of_the_observed_step(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.doctor.probes.updates import Updates

    waits = property(lambda self: bool(self.numbers), lambda *_: None)
    patch.setattr(Updates, "_awaits_update", waits, raising=False)


@fault(
    caught_by="tests/doctor/test_repairs.py::"
    "test_d13_calls_of_a_shared_norm_are_no_batches"
)
def d13_takes_the_calls_of_a_shared_norm_for_batches(
    patch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    from normkit.doctor.examination import examine

    class Merged(tuple):
        def __getitem__(self, index):
            first, *others = list(self)
            for other in others:
                first = first.merge(other)
            return first

    def renamed(norm, **changes):
        if "calls" in changes:
            changes["calls"] = Merged(changes["calls"])
        return replace(norm, **changes)

    patch.setattr(examine, "replace", renamed)


@fault(
    caught_by="tests/doctor/test_trial_training.py::"
    "test_a_loop_that_fails_leaves_the_model_as_it_was"
)
def a_watched_loop_leaves_its_weights(patch: pytest.MonkeyPatch) -> None:
    import contextlib

    from normkit.doctor.fixes import trial_training

    patch.setattr(trial_training, "_restored", lambda *_: contextlib.nullcontext())


@fault(
    caught_by="tests/doctor/test_planted_more.py::"
    "test_d13_sorted_batches_are_named_and_shuffled_ones_are_not"
)
def d13_forgets_the_spread_within_batches(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batches

    patch.setattr(batches, "mixing", lambda stream: 1.0)


@fault(
    caught_by="tests/doctor/test_planted_more.py::"
    "test_d28_one_batch_that_is_not_finite_is_the_first_cause"
)
def inputs_that_are_not_finite_called_stale_statistics(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.doctor.checks import distance, population

    for module in (distance, population):
        patch.setattr(module, "has_finite_inputs", lambda norm: True)


@fault(
    caught_by="tests/doctor/test_confirm.py::"
    "test_a_warning_whose_fix_does_not_help_stays_a_warning"
)
def every_fix_is_said_to_help(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from normkit.doctor.fixes import confirm

    real = confirm._compared
    patch.setattr(
        confirm, "_compared", lambda *a, **k: replace(real(*a, **k), helps=True)
    )


@fault(
    caught_by="tests/doctor/test_confirm.py::"
    "test_dropout_is_off_in_the_statistics_that_its_repair_writes"
)
def the_repair_of_dropout_keeps_dropout_on(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.fixes import repairs

    patch.setitem(repairs.REPAIRS, "D11", repairs.as_in_training)


@fault(
    caught_by="tests/doctor/test_gap.py::"
    "test_another_domain_with_the_same_padding_is_no_padding"
)
def padding_is_always_taken_for_another(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination.populations import Populations

    patch.setattr(Populations, "is_padded_like", lambda self, another: False)


@fault(
    caught_by="tests/doctor/test_gap.py::"
    "test_stale_statistics_are_not_taken_for_padding"
)
def anything_far_off_is_taken_for_padding(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import populations

    patch.setattr(populations, "_resembles", lambda *_: True)


@fault(
    caught_by="tests/doctor/test_transformers.py::"
    "test_the_logits_of_attention_are_those_it_computes"
)
def the_logits_of_attention_are_not_divided(patch: pytest.MonkeyPatch) -> None:
    def product(real, query, key, mask, is_causal, scale):
        return real(query, key, mask, is_causal, 1.0)

    wrap(patch, "normkit.doctor.probes.attention._of_product", product)


@fault(
    caught_by="tests/doctor/test_transformers.py::"
    "test_the_logits_of_attention_are_those_it_computes"
)
def masked_keys_count_as_keys(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import attention

    patch.setattr(attention, "_masked", attention.Logits)


@fault(
    caught_by="tests/doctor/test_transformers.py::"
    "test_the_functions_are_put_back_also_after_an_error"
)
def attention_stays_replaced(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import attention, blocks

    # The test's own patch takes the functions back after it.
    for owner, name in ((attention.F, "scaled_dot_product_attention"),):
        patch.setattr(owner, name, getattr(owner, name))
    patch.setattr(attention, "_originals", [])
    patch.setattr(attention, "_listeners", [])
    patch.setattr(blocks, "stop_listening", lambda listener: None)


@fault(
    caught_by="tests/doctor/test_transformers.py::"
    "test_small_branches_do_not_make_gradients_vanish"
)
def d24_judges_branches_by_themselves(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import gradients

    patch.setattr(gradients, "streams", lambda blocks: [])


@fault(
    caught_by="tests/doctor/test_transformers.py::"
    "test_d35_holds_the_second_half_to_its_thresholds"
)
def d35_takes_any_stack_for_a_residual_stream(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def streams(real, blocks):
        return [[replace(block, end="sum") for block in row] for row in real(blocks)]

    wrap(patch, "normkit.doctor.checks.transformers.streams", streams)


@fault(
    caught_by="tests/doctor/test_planted_more.py::test_d09_validation_in_training_mode"
)
def d09_takes_the_input_of_a_critic_for_a_validation(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.doctor.probes.loop import Loop

    patch.setattr(Loop, "add_any_update", lambda self: None)


@fault(
    caught_by="tests/doctor/test_checks.py::"
    "test_d20_asks_whether_the_network_has_learned_with_the_rest"
)
def d20_does_not_ask_what_was_learned(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "has_learned", lambda statistics: False)


@fault(
    caught_by="tests/doctor/test_known_causes.py::"
    "test_d27_weighs_each_update_by_the_steps_it_stands_for"
)
def d27_takes_the_first_20_steps_for_the_training(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import steps

    patch.setattr(steps, "steps_of", lambda weight: [1.0] * len(weight.update_ratio))


@fault(
    caught_by="tests/doctor/test_transformers.py::"
    "test_d39_a_large_loss_of_one_batch_does_not_stay_up"
)
def d39_takes_the_noise_of_small_losses_for_a_level(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import spikes

    patch.setattr(spikes, "_lasts", lambda values, at, first: len(values) >= at + 5)


@fault(
    caught_by="tests/doctor/test_transformers.py::"
    "test_d39_names_the_layer_that_moved_first"
)
def d39_looks_at_the_step_of_the_spike_alone(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    def first(real, statistics, step):
        loop = statistics.training
        only = replace(loop, steps=[s if s == step else step + 1 for s in loop.steps])
        return real(replace(statistics, training=only), step)

    wrap(patch, "normkit.doctor.checks.spikes._first_moved", first)


@fault(
    caught_by="tests/doctor/test_confirm.py::"
    "test_a_repair_that_harms_batches_outside_the_diagnosis_is_declined"
)
def repairs_are_confirmed_on_the_batches_of_the_diagnosis(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.doctor.fixes import confirm

    patch.setattr(confirm, "MIN_HELD_OUT", 1 << 30)


_OVER_RANKS = "tests/doctor/test_over_ranks.py::"


@fault(caught_by=_OVER_RANKS + "test_a_watch_over_ranks_names_the_rank")
def a_watch_reads_its_own_rank(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        "normkit.doctor.watch.merged_over",
        lambda _, examine, group, merge: examine(),
    )


@fault(caught_by=_OVER_RANKS + "test_a_loop_over_ranks_is_watched_on_all")
def each_rank_keeps_what_training_adds(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        "normkit.doctor.diagnosis.merged_over",
        lambda _, examine, group, merge: examine(),
    )


@fault(caught_by=_OVER_RANKS + "test_a_fix_that_helps_on_one_rank_is_told_on_all")
def the_first_rank_confirms_for_all(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        "normkit.doctor.diagnosis.merge_confirmations",
        lambda _, by_rank: by_rank[0],
    )


@fault(
    caught_by="tests/doctor/test_before_training.py::"
    "test_d25_leaves_to_batch_norm_what_batch_norm_does"
)
def d25_counts_what_batch_norm_does(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import gradients

    patch.setattr(gradients, "BATCH_NORM_GROWTH", 1.0)


@fault(
    caught_by="tests/doctor/test_before_training.py::"
    "test_d24_tells_the_depth_from_single_places"
)
def d24_takes_every_step_for_a_single_place(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import gradients

    patch.setattr(gradients, "JUMP", 1.0)
    patch.setattr(gradients, "MAX_JUMPS", 100)


@fault(
    caught_by="tests/doctor/test_before_training.py::"
    "test_d18_compares_a_channel_with_the_others"
)
def d18_compares_channels_with_eps_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    patch.setattr(saturation, "FAINT", 1e9)


@fault(
    caught_by="tests/doctor/test_before_training.py::"
    "test_d04_asks_whether_something_reads_the_statistics"
)
def d04_judges_a_setting_by_itself(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import averages

    patch.setattr(averages, "_too_early", lambda statistics, norm: "")


@fault(
    caught_by="tests/doctor/test_pairing.py::"
    "test_a_loss_that_brings_both_to_one_shape_is_no_fault"
)
def two_shapes_are_a_fault_by_themselves(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import targets

    patch.setattr(targets, "SAME", 1e9)


@fault(
    caught_by="tests/doctor/test_pairing.py::test_a_softmax_over_the_samples_is_told"
)
def a_negative_dimension_of_a_softmax_is_read_as_it_is_stored(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.doctor.examination import answers

    real = answers.softmax_dim

    def stored(y):
        return None if getattr(y.grad_fn, "_saved_dim", 0) > 9 else real(y)

    patch.setattr(answers, "softmax_dim", stored)


@fault(
    caught_by="tests/doctor/test_pairing.py::"
    "test_layers_that_the_model_does_not_own_are_told"
)
def hidden_layers_count_whether_used_or_not(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.examination import unregistered

    def every_parameter(y):
        import gc

        import torch

        return [o for o in gc.get_objects() if isinstance(o, torch.nn.Parameter)]

    patch.setattr(unregistered, "leaves_of", every_parameter)


@fault(
    caught_by="tests/doctor/test_causes.py::"
    "test_what_the_data_does_to_the_signals_comes_behind_the_data"
)
def findings_are_sorted_by_severity_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor import finding

    patch.setattr(finding, "ORIGINS", frozenset())


@fault(
    caught_by="tests/doctor/test_not_finite.py::"
    "test_while_training_the_first_step_decides_and_not_the_first_layer"
)
def the_first_layer_with_a_nan_is_named_whatever_the_step(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.doctor.checks import not_finite

    patch.setattr(not_finite, "min", lambda made, key: made[0], raising=False)


@fault(
    caught_by="tests/doctor/test_before_training.py::"
    "test_a_branch_in_its_first_steps_is_no_trend_over_the_depth"
)
def a_branch_that_starts_small_counts_as_a_trend(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import signals

    patch.setattr(signals, "_unscaled", lambda layer, scales: layer.output_rms)


@fault(
    caught_by="tests/doctor/test_known_causes.py::"
    "test_d21_compares_with_the_start_and_asks_what_was_learned"
)
def dead_units_are_judged_by_their_share_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import saturation

    def judged(statistics, layer, dead):
        limits = {"warning": saturation.DEAD_WARNING, "error": saturation.DEAD_ERROR}
        severity, threshold = saturation.above(dead, **limits)
        return dead, severity, threshold

    patch.setattr(saturation, "_judged_dead", judged)


@fault(
    caught_by="tests/doctor/test_known_causes.py::"
    "test_steps_that_shrink_as_a_training_arrives_are_no_fault"
)
def a_training_that_has_arrived_stands_still(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import gradients, weights

    patch.setattr(weights, "largest_step", lambda ratios: ratios[-1])
    patch.setattr(gradients, "largest_step", lambda ratios: ratios[-1])


@fault(
    caught_by="tests/doctor/test_known_causes.py::"
    "test_a_batch_has_no_more_independent_values_than_values"
)
def independent_values_have_no_bound(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import batch_size

    patch.setattr(batch_size, "min", lambda found, _: found, raising=False)


@fault(
    caught_by="tests/demo/test_page.py::"
    "test_places_have_names_on_the_axis_and_under_the_pointer"
)
def points_of_a_chart_have_no_names(patch: pytest.MonkeyPatch) -> None:
    from normkit.report import drawing

    patch.setattr(drawing, "_titles", lambda chart: {})


@fault(
    caught_by="tests/doctor/test_leaves_others_alone.py::"
    "test_a_critic_in_the_loss_keeps_its_statistics_and_gets_no_gradients"
)
def modules_beside_the_model_are_not_put_back(patch: pytest.MonkeyPatch) -> None:
    from normkit.modeling.other_modules import OtherModules

    def call(self, module, args):
        self.own_ran = True

    patch.setattr(OtherModules, "__call__", call)


@fault(
    caught_by="tests/doctor/test_leaves_others_alone.py::"
    "test_a_penalty_on_the_weights_leaves_the_gradients_that_were_there"
)
def a_backward_adds_to_the_gradients_of_others(patch: pytest.MonkeyPatch) -> None:
    def backward_into(real, model, loss):
        loss.backward()

    where = "normkit.doctor.examination.working_copy.backward_into"
    wrap(patch, where, backward_into)


@fault(
    caught_by="tests/doctor/test_leaves_others_alone.py::"
    "test_a_model_that_cannot_be_copied_keeps_its_plain_attributes"
)
def plain_attributes_are_not_put_back(patch: pytest.MonkeyPatch) -> None:
    from normkit.modeling import snapshot

    patch.setattr(snapshot, "_KEPT", ())


@fault(caught_by="tests/doctor/test_uncleared.py::test_cleared_gradients_are_none")
def a_gradient_of_zeros_is_taken_for_one_that_was_kept(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.doctor.probes.uncleared import Uncleared

    def arrive(self, _):
        self._was_cleared |= self._has_stepped and self._weight.grad is None
        self._was_added_to = True

    patch.setattr(Uncleared, "_arrive", arrive)


@fault(
    caught_by="tests/doctor/test_other_scale.py::"
    "test_a_slow_average_over_raw_inputs_is_not_taken_for_another_scale"
)
def later_norms_are_not_asked_whether_they_are_right(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import distance

    def clear(real, norm):
        return distance.Distance(0.0, 0.0, 0.0)

    wrap(patch, "normkit.doctor.checks.other_scale.distance", clear)


@fault(
    caught_by="tests/doctor/test_watch_ends.py::"
    "test_findings_are_those_of_the_end_of_the_block"
)
def a_watch_reads_the_model_after_its_block(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.watch import Watch

    patch.setattr(Watch, "statistics", lambda self: self._recorder.statistics())


@fault(
    caught_by="tests/doctor/test_transformers.py::"
    "test_d39_leaps_at_one_distance_are_the_loops_own"
)
def d39_takes_any_leaps_for_those_of_the_loop(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import spikes

    patch.setattr(spikes, "EVEN", 1.0)
