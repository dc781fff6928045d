"""Faults that tests/nn must catch; see `sabotage`."""

from typing import Any

import pytest

from sabotage import fault, wrap


@fault(
    caught_by="tests/nn/test_per_sample.py::test_outputs_are_those_of_the_definition"
)
def group_norm_forgets_the_weight(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, x, groups, weight, bias, eps, **kwargs):
        return honest(x, groups, None, bias, eps, **kwargs)

    wrap(patch, "normkit.nn.per_sample.group_norm", broken)


@fault(
    caught_by="tests/nn/test_per_sample.py::test_outputs_are_those_of_the_definition"
)
def groups_take_every_third_channel(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, x, groups, *rest, **kwargs):
        mixed = x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        return honest(mixed, groups, *rest, **kwargs)

    wrap(patch, "normkit.nn.per_sample.group_norm", broken)


@fault(
    caught_by="tests/nn/test_per_sample.py::test_outputs_are_those_of_the_definition"
)
def layer_norm_forgets_the_bias(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, x, shape, weight, bias, eps, **kwargs):
        return honest(x, shape, weight, None, eps, **kwargs)

    wrap(patch, "normkit.nn.per_sample.layer_norm", broken)


@fault(caught_by="tests/nn/test_per_sample.py::test_rms_norm_leaves_the_mean_in")
def rms_norm_subtracts_the_mean(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import layer_norm
    from normkit.nn import per_sample as room

    def broken(x, shape, weight, eps, **kwargs):
        return layer_norm(x, shape, weight, None, eps or 1e-7, **kwargs)

    patch.setattr(room, "rms_norm", broken)


@fault(
    caught_by="tests/nn/test_instance_norm.py"
    "::test_outputs_and_gradients_are_those_of_the_definition"
)
def instance_statistics_run_over_the_batch(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import batch_norm
    from normkit.nn import instance_norm as room

    def broken(x, mean, var, weight, bias, use_input_stats, momentum, eps, **kwargs):
        return batch_norm(x, None, None, weight, bias, True, 0.0, eps)

    patch.setattr(room, "instance_norm", broken)


@fault(
    caught_by="tests/nn/test_instance_norm.py"
    "::test_running_statistics_average_instances_without_bias"
)
def instance_statistics_are_those_of_the_first_sample(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.moments import Moments

    def broken(honest, running_mean, running_var, instances, *rest):
        first = Moments(instances.count, instances.mean[:1], instances.m2[:1])
        honest(running_mean, running_var, first, *rest)

    wrap(patch, "normkit.functional.batch_norms._update_by_instances", broken)


@fault(
    caught_by="tests/nn/test_lazy.py"
    "::test_one_sample_without_its_batch_dimension_has_its_channels_first"
)
def a_lazy_layer_counts_positions(patch: pytest.MonkeyPatch) -> None:
    from torch.nn.modules.batchnorm import _LazyNormBase

    from normkit.nn import lazy as room

    patch.setattr(
        room._LazyLayer,
        "initialize_parameters",
        lambda self, x, mask=None: _LazyNormBase.initialize_parameters(self, x),
    )


@fault(
    caught_by="tests/nn/test_drop_in.py"
    "::test_a_symbolic_trace_records_one_call_and_runs_nothing"
)
def a_symbolic_trace_looks_into_the_layers(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import batch_norm_layer as room

    patch.setattr(room, "recorded_call", lambda layer, x, mask=None: None)


@fault(
    caught_by="tests/nn/test_batch_renorm.py"
    "::test_outputs_and_gradients_are_those_of_the_definition"
)
def renorm_lets_gradients_through_its_correction(patch: pytest.MonkeyPatch) -> None:
    import torch

    from normkit.moments import deviations
    from normkit.nn import batch_renorm as room

    patch.setattr(
        room,
        "measure",
        lambda x, dims, mask=None: deviations(x, dims, mask).to_moments(torch.float64),
    )


@fault(
    caught_by="tests/nn/test_batch_renorm.py"
    "::test_it_is_batch_norm_until_the_schedule_begins"
)
def renorm_forgets_its_schedule(patch: pytest.MonkeyPatch) -> None:
    import torch

    from normkit.nn.batch_renorm import BatchRenormLayer

    patch.setattr(
        BatchRenormLayer,
        "limits",
        lambda self: (torch.tensor(self.r_max), torch.tensor(self.d_max)),
    )


@fault(caught_by="tests/nn/test_whitening.py::test_gradcheck_of_first_and_second_order")
def whitening_takes_matrices_for_numbers_that_commute(
    patch: pytest.MonkeyPatch,
) -> None:
    import torch

    from normkit.functional import whitening as room

    patch.setattr(
        room, "_lyapunov", lambda root, right: 0.5 * torch.linalg.solve(root, right)
    )


@fault(caught_by="tests/nn/test_whitening.py::test_masked_observations_do_not_exist")
def whitening_divides_by_the_padded_length(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, x, mask=None):
        measured, centred, sigma = honest(x, mask)
        share = 1 if mask is None else mask.double().mean()
        return measured, centred, sigma * share

    wrap(patch, "normkit.nn.whitening.covariance", broken)


@fault(caught_by="tests/nn/test_per_activation.py")
def per_activation_statistics_are_those_of_the_channel(
    patch: pytest.MonkeyPatch,
) -> None:

    def broken(honest, x, dims, *rest, **options):
        y, measured = honest(x, (0, *range(2, x.dim())), *rest, **options)
        return y, measured

    wrap(patch, "normkit.nn.per_activation.normalize", broken)


@fault(
    caught_by="tests/nn/test_recurrent.py::test_eval_uses_the_statistics_of_the_step"
)
def every_step_is_the_first(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn.recurrent import RecurrentBatchNorm

    honest = RecurrentBatchNorm._steps
    patch.setattr(
        RecurrentBatchNorm,
        "_steps",
        lambda self, x, first, mask: honest(self, x, 0, mask),
    )


@fault(
    caught_by="tests/nn/test_recurrent.py"
    "::test_padding_has_no_effect_in_training_and_in_eval"
)
def padding_moves_the_state_of_a_sequence(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import batch_norm_lstm as room

    patch.setattr(room, "_mask", lambda lengths, steps, batch, device: None)


@fault(
    caught_by="tests/nn/test_filter_response.py"
    "::test_outputs_and_gradients_are_those_of_the_definition"
)
def filter_responses_are_centred(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import filter_response as room

    honest = room.normalize
    patch.setattr(
        room,
        "normalize",
        lambda *given, centered, **options: honest(*given, centered=True, **options),
    )


@fault(
    caught_by="tests/nn/test_domain.py"
    "::test_each_domain_has_the_statistics_of_its_batches"
)
def domains_share_their_statistics(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn.domain import DomainBatchNorm

    patch.setattr(DomainBatchNorm, "_copy_of", DomainBatchNorm._at)


@fault(
    caught_by="tests/nn/test_channel_dim.py"
    "::test_nothing_is_permuted_and_the_output_lies_as_the_input"
)
def channels_elsewhere_are_copied_into_place(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import LayerNorm

    honest = LayerNorm._over_last
    patch.setattr(
        LayerNorm,
        "_over_last",
        lambda self, x, mask: honest(self, x.contiguous(), mask),
    )


@fault(caught_by="tests/nn/test_options.py::test_tabnet_243_ghosts_take_any_remainder")
def ghosts_leave_a_small_remainder(patch: pytest.MonkeyPatch) -> None:

    def broken(shares, samples, ghost_size):
        return (samples // ghost_size + 1, *shares(samples, ghost_size)[1:])

    wrap(patch, "normkit.functional.ghost._shares", broken)


@fault(
    caught_by="tests/nn/test_accumulation.py::"
    "test_torch_96136_a_checkpoint_moves_the_statistics_once"
)
def a_recomputation_counts_as_a_batch(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import batch_norm_layer

    patch.setattr(batch_norm_layer, "is_in_backward", lambda: False)


@fault(
    caught_by="tests/nn/test_accumulation.py::"
    "test_the_gradients_of_parts_are_those_of_the_whole"
)
def parts_forget_what_they_owe_to_the_statistics(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import accumulation

    patch.setattr(accumulation._LargeBatch, "statistics_term", 0.0)


@fault(
    caught_by="tests/nn/test_accumulation.py::test_a_non_finite_part_is_left_out_alone"
)
def a_nan_of_one_part_spoils_the_step(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import accumulation

    def broken(self, layer, measured):
        before = self.merged.get(layer)
        self.merged[layer] = measured if before is None else before.merge(measured)

    patch.setattr(accumulation._Merged, "take", broken)


@fault(caught_by="tests/nn/test_frozen.py::test_torch_86590_a_freeze_survives_train")
def train_wakes_a_frozen_layer(patch: pytest.MonkeyPatch) -> None:
    import torch

    from normkit.nn.running_state import RunningStateLayer

    patch.setattr(RunningStateLayer, "train", torch.nn.Module.train)


@fault(
    caught_by="tests/nn/test_deferred.py::"
    "test_values_gradients_and_statistics_are_those_of_the_layer_alone"
)
def a_deferred_output_is_no_node_of_autograd(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("normkit.nn.deferred._connect", lambda *args: None)


@fault(
    caught_by="tests/nn/test_deferred.py::"
    "test_values_gradients_and_statistics_are_those_of_the_layer_alone"
)
def a_deferred_output_misses_what_was_written_into_it(
    patch: pytest.MonkeyPatch,
) -> None:
    patch.setattr("normkit.nn.deferred._adopt", lambda *args: None)


@fault(
    caught_by="tests/nn/test_deferred.py::"
    "test_an_output_that_nothing_reads_counts_its_batch"
)
def an_output_that_nothing_reads_counts_no_batch(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn.deferral import Deferral

    patch.delattr(Deferral, "__del__")


@fault(
    caught_by="tests/nn/test_deferred.py::test_what_it_needs_changed_in_place_raises"
)
def a_deferral_does_not_notice_changes_in_place(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("normkit.nn.deferral.version_of", lambda t: 0)


@fault(caught_by="tests/nn/test_deferred.py::test_the_state_is_that_of_the_call")
def a_deferral_takes_the_weights_of_later(patch: pytest.MonkeyPatch) -> None:

    def broken(values: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        self.inputs = (self.inputs[0], self.layer.weight, self.layer.bias)
        return values(self, *args, **kwargs)

    wrap(patch, "normkit.nn.deferral.Deferral.values", broken)


@fault(
    caught_by="tests/nn/test_onnx_export.py::test_training_is_exported_as_the_layer_computes_it"
)
def training_that_is_exported_as_torchs(patch: pytest.MonkeyPatch) -> None:
    from normkit.torch_state import is_exporting

    patch.setattr(
        "normkit.nn.batch_norm_layer.is_recorded_as_torch",
        lambda layer, x, mask, updates=False: is_exporting(),
    )


@fault(caught_by="tests/nn/test_drop_in.py::test_its_buffers_are_those_of_torchs")
def a_batch_norm_has_a_buffer_more(patch: pytest.MonkeyPatch) -> None:
    import torch

    def broken(honest: Any, self: Any, *args: Any, **options: Any) -> None:
        honest(self, *args, **options)
        skipped = torch.zeros((), dtype=torch.int64)
        self.register_buffer("num_batches_skipped", skipped, persistent=False)

    wrap(patch, "normkit.nn.batch_norm_layer.BatchNormLayer.__init__", broken)


@fault(
    caught_by="tests/test_mistakes.py::"
    "test_the_message_names_the_mistake_and_the_way_out"
)
def a_mask_of_samples_is_taken_for_channels(patch: pytest.MonkeyPatch) -> None:
    def broken(honest: Any, mask: Any, x: Any) -> Any:
        return honest(mask if mask.dim() == x.dim() else mask.expand(x.shape), x)

    wrap(patch, "normkit.functional.autograd.broadcast_mask", broken)


@fault(caught_by="tests/nn/test_frozen.py::test_freezing_parameters_is_asked_for")
def a_freeze_leaves_the_gradients(patch: pytest.MonkeyPatch) -> None:
    def broken(honest: Any, self: Any, *, parameters: bool = False) -> None:
        kept = [p.grad for p in self.parameters(recurse=False)]
        honest(self, parameters=parameters)
        for p, grad in zip(self.parameters(recurse=False), kept, strict=True):
            p.grad = grad

    wrap(patch, "normkit.nn.running_state.RunningStateLayer.freeze", broken)
