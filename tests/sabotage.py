"""Planted faults: broken kernels and layers that the suite must catch.

Each `Fault` breaks one thing the way a tired author would (ddof 1 for 0, the last
column dropped, the momentum swapped) and names the test that has to fail for it.
`tests/test_sabotage.py` runs `pytest --sabotage NAME TEST` for every fault and is
green only when that test is red. A fault that survives is a hole in the suite.

To add one, write a function that patches normkit through a `pytest.MonkeyPatch`, and
register it with `@fault(caught_by="tests/…::test_…")`; the registry's key is the
function's name. Import normkit inside the function, not at the top.
"""

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Fault:
    """One planted fault and the test that catches it."""

    plant: Callable[[pytest.MonkeyPatch], None]
    caught_by: str


FAULTS: dict[str, Fault] = {}


def fault(
    *, caught_by: str
) -> Callable[
    [Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]
]:
    """Register the decorated function as a fault that `caught_by` must catch."""

    def register(
        plant: Callable[[pytest.MonkeyPatch], None],
    ) -> Callable[[pytest.MonkeyPatch], None]:
        FAULTS[plant.__name__] = Fault(plant, caught_by)
        return plant

    return register


# --- kernels and functions -------------------------------------------------------


def _without_native_calls(patch: pytest.MonkeyPatch) -> None:
    """Run layers as passes, and the moving average in Python."""
    from normkit.functional import ema, engine

    patch.setattr(engine, "call_for", lambda *_: None)
    patch.setattr(ema, "CpuBackend", type(None))


def _reference():
    from normkit.kernels.reference import ReferenceBackend

    return ReferenceBackend


@fault(caught_by="tests/kernels/test_agree.py::test_moments")
def the_last_column_is_dropped(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().moments

    def broken(self, x, dims, mask=None):
        if mask is None and x.shape[-1] > 1 and x.dim() - 1 in dims:
            x = x[..., :-1]
        return honest(self, x, dims, mask)

    patch.setattr(_reference(), "moments", broken)


@fault(caught_by="tests/kernels/test_agree.py::test_moments")
def the_variance_is_a_difference_of_squares(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels.primitives import vector_dtype
    from normkit.moments import Moments, statistics_dtype

    def broken(self, x, dims, mask=None):
        import torch

        wide = x.to(statistics_dtype(x.dtype))
        count = torch.tensor(x.numel() // max(1, wide.sum(dims).numel()))
        mean = wide.mean(dims, keepdim=True)
        m2 = (wide.square().mean(dims, keepdim=True) - mean.square()) * count
        return Moments(count, mean, m2.clamp(min=0)).to(dtype=vector_dtype(x.device))

    patch.setattr(_reference(), "moments", broken)


@fault(caught_by="tests/functional/test_contract.py")
def the_centre_is_rounded_to_float32(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels import reference

    patch.setattr(reference, "split", lambda center, dtype: (center.to(dtype), None))


@fault(caught_by="tests/kernels/test_agree.py::test_masked_moments")
def a_mask_divides_by_the_padded_length(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().moments

    def broken(self, x, dims, mask=None):
        return honest(self, x if mask is None else x.nan_to_num() * mask, dims)

    patch.setattr(_reference(), "moments", broken)


@fault(caught_by="tests/laws/test_moments.py::test_merge_of_any_split_equals_whole")
def a_merge_forgets_what_lies_between_the_means(patch: pytest.MonkeyPatch) -> None:
    from normkit.moments import Moments

    honest = Moments.merge

    def broken(self, other):
        merged = honest(self, other)
        return Moments(merged.count, merged.mean, self.m2 + other.m2)

    patch.setattr(Moments, "merge", broken)


@fault(
    caught_by="tests/laws/test_moments.py::test_derived_values_follow_their_definitions"
)
def the_population_variance_divides_by_n_minus_1(patch: pytest.MonkeyPatch) -> None:
    from normkit.moments import Moments

    patch.setattr(
        Moments, "var", property(lambda self: self.m2 / (self.count.to(self.m2) - 1))
    )


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_forgets_the_weight(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().apply_grads

    def broken(self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b, c)

    patch.setattr(_reference(), "apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_takes_the_mean_for_a_constant(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().apply_grads

    def broken(self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b, c * 0, weight=weight)

    patch.setattr(_reference(), "apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_takes_the_variance_for_a_constant(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().apply_grads

    def broken(self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b * 0, c, weight=weight)

    patch.setattr(_reference(), "apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_weight_gradient_is_not_standardized(patch: pytest.MonkeyPatch) -> None:
    honest = _reference().reduce_grads

    def broken(self, dy, x, center, dims, *, weight=None, scale=None):
        return honest(self, dy, x, center, dims, weight=weight)

    patch.setattr(_reference(), "reduce_grads", broken)


@fault(
    caught_by="tests/functional/test_gradients.py::test_derivatives_of_every_kind_pass_gradcheck"
)
def a_double_backward_stops_at_the_statistics(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import differentiable

    honest = differentiable.deviations

    def broken(x, dims, mask=None):
        return honest(x.detach(), dims, mask)

    patch.setattr(differentiable, "deviations", broken)


@fault(
    caught_by="tests/functional/test_contract.py::test_a_non_finite_batch_stays_out_of_the_running_statistics"
)
def a_nan_enters_the_running_statistics(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import batch_norms

    honest = batch_norms.Running

    def broken(*args):
        return honest(*args[:5], False)

    patch.setattr(batch_norms, "Running", broken)


@fault(
    caught_by="tests/functional/test_gradients.py::test_masked_gradients_equal_those_of_the_values_alone"
)
def padding_leaks_into_the_gradient(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional.passes import Passes

    honest = Passes._sums_and_dx

    def broken(self, kernels, dy, *rest):
        import torch

        leak = torch.zeros_like(dy).masked_fill(dy == 0, 0.1)
        return honest(self, kernels, dy + leak, *rest)

    patch.setattr(Passes, "_sums_and_dx", broken)


# --- layers ------------------------------------------------------------------------


def _batch_norm_called(
    patch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]
) -> None:
    """Let the layers call batch_norm with arguments that `change` has spoilt."""
    import inspect

    from normkit.nn import batch_norm_layer as room

    honest = room.batch_norm
    signature = inspect.signature(honest)

    def broken(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        change(given.arguments)
        return honest(*given.args, **given.kwargs)

    patch.setattr(room, "batch_norm", broken)


BATCH_NORM = "tests/nn/test_batch_norm.py::"


@fault(caught_by=BATCH_NORM + "test_running_statistics_follow_the_moving_average")
def the_momentum_is_swapped(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import ema

    honest = ema.ema_
    _without_native_calls(patch)
    patch.setattr(
        ema, "ema_", lambda old, new, rate, ok: honest(old, new, 1 - rate, ok)
    )


@fault(caught_by=BATCH_NORM + "test_running_statistics_follow_the_moving_average")
def the_running_variance_is_the_population_one(patch: pytest.MonkeyPatch) -> None:
    from normkit.moments import Moments

    _without_native_calls(patch)
    patch.setattr(Moments, "unbiased_var", Moments.var)


@fault(caught_by=BATCH_NORM + "test_running_statistics_follow_the_moving_average")
def the_fused_move_takes_the_share_of_the_old(patch: pytest.MonkeyPatch) -> None:
    """In the C++ call where there is a library, and in Python elsewhere."""
    from normkit.functional import ema
    from normkit.kernels.cpu.call import NativeCall

    honest, honest_ema = NativeCall.forward, ema.ema_

    def swapped(self: Any, *given: Any) -> Any:
        *tensors, running, keeps = given
        if running is not None and running.rate:
            running = running._replace(rate=1 - running.rate)
        return honest(self, *tensors, running, keeps)

    patch.setattr(NativeCall, "forward", swapped)
    patch.setattr(
        ema, "ema_", lambda old, new, rate, ok: honest_ema(old, new, 1 - rate, ok)
    )


@fault(caught_by=BATCH_NORM + "test_running_statistics_follow_the_moving_average")
def batches_are_not_counted(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["num_batches_tracked"] = None

    _batch_norm_called(patch, change)


@fault(caught_by=BATCH_NORM + "test_eval_uses_the_running_statistics_alone")
def eval_uses_the_statistics_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["training"] = True

    _batch_norm_called(patch, change)


@fault(caught_by=BATCH_NORM + "test_in_eval_a_sample_does_not_depend_on_its_batch")
def eval_moves_the_running_statistics(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import batch_norm_layer as room

    honest = room.batch_norm

    def broken(x, mean, var, *rest, **kwargs):
        y = honest(x, mean, var, *rest, **kwargs)
        if mean is not None:
            mean.mul_(0.99)
        return y

    patch.setattr(room, "batch_norm", broken)


@fault(caught_by=BATCH_NORM + "test_without_momentum_every_batch_has_the_same_share")
def no_momentum_is_taken_for_a_tenth(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["momentum"] = 0.1 if given["momentum"] is None else given["momentum"]

    _batch_norm_called(patch, change)


@fault(caught_by=BATCH_NORM + "test_without_momentum_a_bad_batch_takes_no_share")
def a_batch_that_did_not_enter_is_counted(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import batch_norm_layer as room

    honest = room.batch_norm

    def broken(*args, num_batches_tracked=None, **kwargs):
        before = None if num_batches_tracked is None else num_batches_tracked.clone()
        y = honest(*args, num_batches_tracked=num_batches_tracked, **kwargs)
        if before is not None:
            num_batches_tracked.copy_(before + 1)
        return y

    patch.setattr(room, "batch_norm", broken)


@fault(caught_by=BATCH_NORM + "test_a_non_finite_batch_leaves_the_state_alone")
def the_layers_let_a_nan_in(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["on_nonfinite"] = "update"

    _batch_norm_called(patch, change)


@fault(caught_by=BATCH_NORM + "test_masked_positions_do_not_exist")
def batch_norm_ignores_the_mask(patch: pytest.MonkeyPatch) -> None:
    def change(given: dict[str, Any]) -> None:
        given["mask"] = None

    _batch_norm_called(patch, change)


@fault(
    caught_by="tests/nn/test_per_sample.py::test_outputs_are_those_of_the_definition"
)
def group_norm_forgets_the_weight(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import per_sample as room

    honest = room.group_norm

    def broken(x, groups, weight, bias, eps, **kwargs):
        return honest(x, groups, None, bias, eps, **kwargs)

    patch.setattr(room, "group_norm", broken)


@fault(
    caught_by="tests/nn/test_per_sample.py::test_outputs_are_those_of_the_definition"
)
def groups_take_every_third_channel(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import per_sample as room

    honest = room.group_norm

    def broken(x, groups, *rest, **kwargs):
        mixed = x.unflatten(1, (-1, groups)).transpose(1, 2).flatten(1, 2)
        return honest(mixed, groups, *rest, **kwargs)

    patch.setattr(room, "group_norm", broken)


@fault(
    caught_by="tests/nn/test_per_sample.py::test_outputs_are_those_of_the_definition"
)
def layer_norm_forgets_the_bias(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn import per_sample as room

    honest = room.layer_norm

    def broken(x, shape, weight, bias, eps, **kwargs):
        return honest(x, shape, weight, None, eps, **kwargs)

    patch.setattr(room, "layer_norm", broken)


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
    from normkit.functional import batch_norms
    from normkit.moments import Moments

    honest = batch_norms._update_by_instances

    def broken(running_mean, running_var, instances, *rest):
        first = Moments(instances.count, instances.mean[:1], instances.m2[:1])
        honest(running_mean, running_var, first, *rest)

    patch.setattr(batch_norms, "_update_by_instances", broken)


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


# --- the family: renorm, whitening, recurrence, domains, transforms ---------------


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
    from normkit.nn import whitening as room

    honest = room.covariance

    def broken(x, mask=None):
        measured, centred, sigma = honest(x, mask)
        share = 1 if mask is None else mask.double().mean()
        return measured, centred, sigma * share

    patch.setattr(room, "covariance", broken)


@fault(caught_by="tests/nn/test_per_activation.py")
def per_activation_statistics_are_those_of_the_channel(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.nn import per_activation as room

    honest = room.normalize

    def broken(x, dims, *rest, **options):
        y, measured = honest(x, (0, *range(2, x.dim())), *rest, **options)
        return y, measured

    patch.setattr(room, "normalize", broken)


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
    caught_by="tests/functional/test_deterministic.py"
    "::test_a_sample_does_not_depend_on_its_batch_or_the_threads[layer-large-torch.float32-contiguous]"
)
def sums_take_the_order_that_torch_finds_best(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels import reference
    from normkit.moments import plain_sum

    patch.setattr(reference, "pairwise_sum", plain_sum)


@fault(
    caught_by="tests/test_batches.py::test_it_is_the_ratio_of_an_analysis_of_variance"
)
def mixing_forgets_that_means_vary_too(patch: pytest.MonkeyPatch) -> None:
    from normkit import batches as room

    honest = room._columns
    patch.setattr(room, "_columns", lambda parts: honest(parts) - 0.1)


# --- calibration, ranks and initialization ---------------------------------------


@fault(
    caught_by="tests/calibrate/test_choice.py::"
    "test_sample_weights_count_values_several_times"
)
def sample_weights_are_ignored(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate import passes

    real = passes.fit_mask
    patch.setattr(passes, "fit_mask", lambda *args: real(*args) > 0)


@fault(
    caught_by="tests/calibrate/test_exact.py::test_any_split_of_the_data_gives_the_same"
)
def a_short_batch_counts_as_much_as_a_long_one(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate import run
    from normkit.calibrate.estimators import Average

    patch.setattr(run, "Exact", lambda layer: Average(layer, by_weight=False))


@fault(
    caught_by="tests/calibrate/test_exact.py::"
    "test_sorted_data_keep_the_variance_between_batches"
)
def the_variance_of_batch_means_is_dropped(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate import run
    from normkit.calibrate.estimators import Average

    patch.setattr(run, "Exact", lambda layer: Average(layer, by_weight=True))


@fault(
    caught_by="tests/calibrate/test_transaction.py::"
    "test_a_failure_of_data_or_model_changes_nothing"
)
def calibration_does_not_restore_the_momentum(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate.transaction import Transaction

    real = Transaction.__enter__

    def enter(self: Transaction) -> Transaction:
        for layer in self.layers:
            layer.module.momentum = None
        return real(self)

    patch.setattr(Transaction, "__enter__", enter)


@fault(
    caught_by="tests/calibrate/test_transaction.py::"
    "test_a_failure_of_data_or_model_changes_nothing"
)
def a_failed_calibration_leaves_its_hooks(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate.transaction import Transaction

    real = Transaction.put_back

    def put_back(self: Transaction) -> None:
        self.hooks.clear()
        real(self)

    patch.setattr(Transaction, "put_back", put_back)


@fault(
    caught_by="tests/calibrate/test_exact.py::"
    "test_earlier_layers_normalize_by_their_batch_and_dropout_is_off"
)
def dropout_is_left_on_while_calibrating(patch: pytest.MonkeyPatch) -> None:
    import torch

    from normkit.calibrate import run
    from normkit.calibrate.transaction import Transaction

    real = run.run_pass

    def run_pass(loan: Transaction, *args: object, **options: object) -> object:
        for module in loan.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.training = True
        return real(loan, *args, **options)  # type: ignore[arg-type]

    patch.setattr(run, "run_pass", run_pass)


@fault(
    caught_by="tests/calibrate/test_choice.py::"
    "test_a_layer_in_eval_inside_a_training_model_is_frozen"
)
def frozen_layers_are_calibrated(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate import run

    real = run.find_layers
    patch.setattr(
        run, "find_layers", lambda model, layers: real(model, layers or ["*"])
    )


@fault(
    caught_by="tests/calibrate/test_order.py::"
    "test_eval_order_fits_what_eval_mode_feeds_each_layer"
)
def eval_order_runs_earlier_layers_on_their_batch(patch: pytest.MonkeyPatch) -> None:
    from normkit.calibrate.transaction import Transaction

    patch.setattr(Transaction, "try_out", lambda self, values: None)


@fault(
    caught_by="tests/sync/test_merge_over.py::"
    "test_ranks_of_uneven_size_merge_to_the_moments_of_the_whole"
)
def one_rank_is_ignored(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from normkit import sync

    real = sync._all_reduce

    def all_reduce(x, group):
        return real(x * 0 if dist.get_rank() == 1 else x, group)

    patch.setattr(sync, "_all_reduce", all_reduce)


@fault(
    caught_by="tests/sync/test_merge_over.py::"
    "test_gradients_across_ranks_equal_those_of_the_whole"
)
def the_backward_of_a_merge_stays_on_its_rank(patch: pytest.MonkeyPatch) -> None:
    from normkit import sync

    patch.setattr(
        sync._SumOverRanks, "backward", staticmethod(lambda ctx, dy: (dy, None))
    )


@fault(
    caught_by="tests/init/test_variance_scaling.py::"
    "test_fan_out_is_what_the_gradients_sum"
)
def fan_in_is_taken_for_fan_out(patch: pytest.MonkeyPatch) -> None:
    from normkit.init.fans import Fans

    patch.setattr(Fans, "mean", lambda self, mode: self.fan_in)


@fault(
    caught_by="tests/init/test_variance_scaling.py::test_fan_in_is_what_the_outputs_sum"
)
def transposed_convolutions_get_the_fan_of_their_shape(
    patch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    from normkit.init import fans

    real = fans._maps_of

    def maps_of(name, module):
        if not isinstance(module, fans._TRANSPOSED):
            return real(name, module)
        wrong = fans.Fans.of_tensor(module.weight)
        return [replace(each, fans=wrong) for each in real(name, module)]

    patch.setattr(fans, "_maps_of", maps_of)


@fault(
    caught_by="tests/init/test_variance_scaling.py::"
    "test_kaiming_mode_keeps_signal_or_gradient"
)
def the_gain_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    from normkit.init import run

    patch.setattr(run, "gain_of", lambda activation, slope=0.01: 1.0)


@fault(
    caught_by="tests/init/test_signal_graph.py::"
    "test_lsuv_gives_every_layer_outputs_of_variance_one"
)
def lsuv_forgets_to_fold(patch: pytest.MonkeyPatch) -> None:
    from normkit.init import data_dependent

    patch.setattr(data_dependent, "_fold", lambda each, after: None)


@fault(
    caught_by="tests/doctor/test_checks.py::"
    "test_d01_holds_the_variance_to_its_thresholds"
)
def d01_does_not_compare_the_variance(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from normkit.doctor.checks import population

    real = population.distance

    def distance(norm):
        found = real(norm)
        return found and replace(found, var=0.0)

    patch.setattr(population, "distance", distance)


@fault(
    caught_by="tests/doctor/test_checks.py::"
    "test_d01_few_samples_are_not_judged_however_far_off"
)
def d01_judges_whatever_it_gets(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import population

    patch.setattr(population, "MAX_NOISE", 1e9)


@fault(caught_by="tests/doctor/test_checks.py::test_d22_compares_last_and_first")
def d22_compares_first_and_last_the_wrong_way_round(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.checks import flow

    real = flow.below
    patch.setattr(flow, "below", lambda value, **k: real(1 / (value or 1e-9), **k))


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

    from normkit.doctor.probes import layer_probe

    real = layer_probe.band_of

    def band(x, unit_dim, unit):
        torch.rand(1)
        return real(x, unit_dim, unit)

    patch.setattr(layer_probe, "band_of", band)


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


# --- studies -----------------------------------------------------------------------


@fault(
    caught_by="tests/studies/test_replicas.py::test_replicas_train_as_separate_modules"
)
def replicas_share_their_statistics(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import normalize
    from normkit.studies import replicas

    def broken(x, dims, weight=None, bias=None, eps=1e-5):
        y, _measured = normalize(x, (0, 1) if dims == (1,) else dims, weight, bias, eps)
        _, own = normalize(x, dims, weight, bias, eps)
        return y, own

    patch.setattr(replicas, "normalize", broken)


@fault(
    caught_by="tests/studies/test_replicas.py::test_a_diverging_replica_leaves_the_others_bitwise_as_they_are"
)
def one_diverged_replica_stops_the_averages_of_all(patch: pytest.MonkeyPatch) -> None:
    from normkit.studies import replicas

    honest = replicas.ema_
    patch.setattr(
        replicas,
        "ema_",
        lambda old, new, rate, allowed: honest(old, new, rate, allowed.all()),
    )


@fault(
    caught_by="tests/studies/test_verdict.py::test_a_bound_and_no_effect_split_the_line_into_four_words"
)
def a_verdict_looks_at_the_median_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.studies import verdict
    from normkit.studies.interval import Interval

    honest = verdict.bootstrap

    def broken(values):
        middle = honest(values).median
        return Interval(middle, middle, middle, len(values))

    patch.setattr(verdict, "bootstrap", broken)


@fault(
    caught_by="tests/studies/test_runner.py::test_an_interrupted_run_keeps_the_seeds_that_finished"
)
def an_interrupted_run_starts_from_the_beginning(patch: pytest.MonkeyPatch) -> None:
    from normkit.studies import runner

    patch.setattr(
        runner._Run, "seeds_to_run", lambda self, fresh: list(range(self.count))
    )


@fault(
    caught_by="tests/studies/test_runner.py::test_a_trial_repeats_and_its_streams_differ"
)
def all_seeds_draw_the_same_numbers(patch: pytest.MonkeyPatch) -> None:
    import torch

    from normkit.studies.study import Trial

    patch.setattr(
        Trial,
        "generator",
        lambda self, stream=0: torch.Generator().manual_seed(stream),
    )


@fault(caught_by="tests/demo/test_page.py::test_no_name_of_a_model_becomes_markup")
def page_without_escaping(patch: pytest.MonkeyPatch) -> None:
    import jinja2

    class Careless(jinja2.Environment):
        def __init__(self, **settings: object) -> None:
            super().__init__(**{**settings, "autoescape": False})  # type: ignore[arg-type]

    patch.setattr(jinja2, "Environment", Careless)


@fault(caught_by="tests/demo/test_page.py::test_a_spike_between_many_points_is_drawn")
def chart_thinned_by_every_nth_point(patch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from normkit.report import charts

    patch.setattr(
        charts,
        "_thin",
        lambda most, x, *values: np.arange(0, len(x), max(len(x) // most, 1)),
    )


@fault(
    caught_by="tests/demo/test_demo.py::test_a_check_that_did_not_hold_shows_and_fails_the_run"
)
def demo_held_by_its_first_step_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.demo import DemoResult

    patch.setattr(
        DemoResult,
        "held",
        property(lambda self: all(c.held for c in self.train.checks)),
    )


@fault(caught_by="tests/demo/test_demo.py::test_the_command_fails_where_a_step_does")
def demo_command_that_always_succeeds(patch: pytest.MonkeyPatch) -> None:
    from normkit import cli

    app = cli.app

    def polite(**call: object) -> int:
        code = app(**call)  # type: ignore[arg-type]
        return 0 if code == 1 else code

    patch.setattr(cli, "app", polite)


@fault(
    caught_by="tests/cli/test_target.py::test_a_checkpoint_that_runs_code_is_refused"
)
def checkpoint_whose_code_is_run(patch: pytest.MonkeyPatch) -> None:
    import torch

    load = torch.load
    trusting = {"weights_only": False}
    patch.setattr(torch, "load", lambda path, **how: load(path, **{**how, **trusting}))


@fault(
    caught_by="tests/cli/test_doctor_calibrate_init.py::test_doctor_names_the_cause_and_the_layer_and_fails"
)
def doctor_command_that_always_passes(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor import Diagnosis

    patch.setattr(Diagnosis, "errors", property(lambda self: []))


# --- GPU kernels, in Triton's interpreter ------------------------------------------


def _broken_kernel(name: str, test: str, module: str, honest: str, broken: str) -> None:
    """Register a fault that changes one line of a kernel's source."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        from importlib import import_module, util

        users = [
            import_module(f"normkit.kernels.gpu.{user}")
            for user in (
                *("tile", "partials", "statistics", "sums", "elementwise", "rows"),
                *("launchers.reductions", "launchers.elementwise", "launchers.rows"),
                "layers",
            )
        ]
        original = import_module(f"normkit.kernels.gpu.{module}")
        whole = dict(vars(original))
        source = Path(str(original.__file__)).read_text()
        assert source.count(honest) == 1, f"{honest!r} must name one place of {module}"
        path = Path(tempfile.mkdtemp()) / f"{module}.py"
        path.write_text(source.replace(honest, broken))
        spec = util.spec_from_file_location(f"broken_{module}", path)
        assert spec is not None
        assert spec.loader is not None
        copy = util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        for user in users:
            for key, value in whole.items():
                if callable(value) and vars(user).get(key) is value:
                    patch.setattr(user, key, getattr(copy, key))

    plant.__name__ = name
    run = f"-p kernels.interpreted tests/kernels/gpu_suite.py -k {test}"
    fault(caught_by=run)(plant)


if find_spec("triton") is not None:

    @fault(caught_by="tests/kernels/test_gpu_calls.py -k no_more_than")
    def gpu_reduces_twice(patch: pytest.MonkeyPatch) -> None:
        from normkit.kernels.gpu import launchers

        honest = launchers.statistics
        patch.setattr(
            *(launchers, "statistics"),
            lambda *a, **k: (honest(*a, **k), honest(*a, **k))[1],
        )

    @fault(caught_by="tests/kernels/test_gpu_calls.py -k launches_what")
    def gpu_clears_what_it_writes(patch: pytest.MonkeyPatch) -> None:
        from normkit.kernels.gpu import launchers

        honest = launchers.apply
        patch.setattr(launchers, "apply", lambda *a, **k: honest(*a, **k).zero_())

    @fault(caught_by="tests/kernels/test_gpu_calls.py -k met_before")
    def gpu_forgets_every_call(patch: pytest.MonkeyPatch) -> None:
        from normkit.functional import engine

        patch.setattr(engine, "remember", lambda key, call: None)

    _broken_kernel(
        *("gpu_merge_forgets_a_split", "running_statistics_move"),
        *("partials", "part < splits", "part < splits - 1"),
    )
    _broken_kernel(
        *("gpu_running_variance_is_biased", "running_statistics_move"),
        *("statistics", "/ (count - 1)", "/ count"),
    )
    _broken_kernel(
        *("gpu_never_reads_a_chunk_again", "all_outliers"),
        *("statistics", "while reads < 2:", "while reads < 1:"),
    )
    _broken_kernel(
        *("gpu_lets_a_bad_batch_in", "bad_batch_moves_nothing"),
        *("statistics", "if bad == 0:", "if bad >= 0:"),
    )
    _broken_kernel(
        *("gpu_leaves_its_ticket", "tickets_at_zero"),
        *("partials", "tl.store(ticket_ptr, 0)", "tl.store(ticket_ptr, drawn + 1)"),
    )
    _broken_kernel(
        *("gpu_center_without_its_low_part", "mean_far_from_zero"),
        *("tile", "return (x - hi) - lo", "return x - hi"),
    )
    _broken_kernel(
        *("gpu_bits_ignore_their_order", "test_every_activation[relu]"),
        *("tile", "grouped << place", "grouped << (7 - place)"),
    )
    _broken_kernel(
        *("gpu_rows_forget_the_weight_in_dx", "test_rows_and_their"),
        *(
            "rows",
            "            g = dy * weight.to(tl.float32)\n",
            "            g = dy\n",
        ),
    )
    _broken_kernel(
        *("gpu_rows_forget_the_mean_of_g", "test_rows_and_their"),
        *("rows", "dx = dx - level[:, None]", "dx = dx"),
    )


@fault(
    caught_by="tests/fold/test_pairs.py::"
    "test_a_convolution_takes_the_batch_norm_after_it"
)
def a_grouped_weight_is_read_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.algebra import WeightLayout

    right = WeightLayout.to_goik
    patch.setattr(
        WeightLayout, "to_goik", lambda self, weight: right(self, weight).flip(0)
    )


@fault(
    caught_by="tests/fold/test_pairs.py::"
    "test_a_gemm_takes_the_batch_norm_in_spite_of_alpha_and_beta"
)
def a_fold_forgets_alpha(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.ir.nodes import Linear

    patch.setattr(Linear, "alpha", property(lambda self: 1.0, lambda self, value: None))


@fault(
    caught_by="tests/fold/test_traps.py::"
    "test_batch_norm_over_time_does_not_fold_into_a_linear_map_of_features"
)
def a_fold_takes_any_dimension_for_the_channels(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.ir.nodes import linear

    patch.setattr(linear, "needs_channels_only", lambda *args: None)


@fault(caught_by="tests/fold/test_ways.py::test_a_shift_does_not_pass_zero_padding")
def a_fold_ignores_zero_padding(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.ir.nodes import Linear

    always = property(lambda self: True, lambda self, value: None)
    patch.setattr(Linear, "sees_all_taps", always)


@fault(
    caught_by="tests/fold/test_traps.py::"
    "test_a_conv_whose_output_is_read_by_something_else_stays"
)
def a_fold_overlooks_the_second_reader(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.search import solve

    right = solve.Search.around
    patch.setattr(solve.Search, "around", lambda self, value: right(self, value)[:1])


@fault(caught_by="tests/fold/test_fused_layers.py::test_the_sum_with_a_residual_stays")
def a_fold_forgets_the_fused_activation(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.torch import remains

    patch.setattr(remains.Rest, "_activation", lambda self: None)


@fault(caught_by="tests/fold/test_proof.py::test_a_wrong_fold_is_undone_and_said")
def a_fold_is_believed_without_proof(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.torch import folding

    patch.setattr(folding, "TOLERANCE", float("inf"))


@fault(
    caught_by="tests/fold/test_norm_weights.py::"
    "test_all_experts_of_a_mixture_take_it_with_the_router"
)
def a_fold_edits_one_expert_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.ir.nodes import Experts
    from normkit.fold.ir.nodes.parameters import read

    right = Experts.edits

    def edits(self: Experts, gauges: Any) -> Any:
        found = right(self, gauges)
        for tensor in found.values():
            tensor[1:] = read(self.weight)[1:]
        return found

    patch.setattr(Experts, "edits", edits)


@fault(
    caught_by="tests/fold/test_norm_weights.py::"
    "test_a_layer_norm_upon_a_centered_stream_is_an_rms_norm"
)
def a_stream_is_centered_without_its_tables(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.ir.nodes import Embedding
    from normkit.fold.search import centered

    right = centered._Flood._write

    def write(self: Any, node: Any, value: Any, dim: int) -> None:
        self.members.add(node)
        if not isinstance(node, Embedding):
            right(self, node, value, dim)

    patch.setattr(centered._Flood, "_write", write)


@fault(
    caught_by="tests/fold/test_norm_weights.py::"
    "test_a_padded_convolution_takes_the_weight_and_leaves_the_bias"
)
def what_is_left_of_a_bias_keeps_its_size(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.search import norm_weights

    right = norm_weights._without_shift

    def without_shift(norm: Any, affine: Any) -> Any:
        return right(norm, affine)[0], norm.along(affine.shift)

    patch.setattr(norm_weights, "_without_shift", without_shift)


@fault(caught_by="tests/fold/test_traps.py::test_a_hook_that_reads_keeps_what_it_reads")
def a_tensor_that_a_hook_keeps_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.torch.tensors import TensorTable

    patch.setattr(TensorTable, "pin_if_kept", lambda self, tensor, reason: None)


@fault(
    caught_by="tests/fold/test_onnx.py::test_outputs_keep_their_names_and_their_order"
)
def a_fold_swaps_the_names_of_two_outputs(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.onnx import writing

    right = writing._bypass
    swapped = []

    def broken(graph, own, source):
        right(graph, own, source)
        if graph in swapped:
            return  # Swapped twice would be right.
        swapped.append(graph)
        first, last = graph.outputs[0], graph.outputs[-1]
        name, first.name = first.name, "for_a_moment"
        last.name, first.name = name, last.name

    patch.setattr(writing, "_bypass", broken)


@fault(
    caught_by="tests/fold/test_onnx.py::"
    "test_external_data_may_not_lead_out_of_the_folder"
)
def a_model_file_may_read_any_path(patch: pytest.MonkeyPatch) -> None:
    import os

    from normkit.fold.onnx import files

    def broken(tensor, folder):
        told = {entry.key: entry.value for entry in tensor.external_data}
        file = (folder / told["location"]).resolve()
        return file, os.path.getsize(file)

    patch.setattr(files, "_external", broken)


@fault(
    caught_by="tests/fold/test_onnx.py::test_a_small_file_cannot_ask_for_much_memory"
)
def an_onnx_file_may_take_any_memory(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.onnx import limits

    patch.setattr(limits, "_elements_made", lambda *args: 0)


@fault(
    caught_by="tests/fold/test_ways.py::"
    "test_where_padding_forbids_the_shift_only_a_sum_per_channel_stays"
)
def what_stays_of_a_norm_is_not_divided_by_its_scale(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.search import solve

    right = solve.PARTIAL_WAYS["scale after"]

    def broken(affine):
        before, after, _ = right(affine)
        return before, after, affine.shift

    patch.setitem(solve.PARTIAL_WAYS, "scale after", broken)


@fault(
    caught_by="tests/fold/test_ways.py::"
    "test_a_stream_that_cannot_turn_its_signs_takes_the_shift_alone"
)
def a_lifted_scale_loses_its_sign(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.search import solve

    patch.setitem(solve.WAYS, "lift", solve.WAYS["straddle"])


@fault(
    caught_by="tests/fold/test_onnx.py::"
    "test_an_initializer_that_a_caller_may_set_is_left_alone"
)
def a_default_is_taken_for_a_constant(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.onnx import folding

    patch.setattr(folding, "_FIRST_WITH_DEFAULTS", 99)


@fault(
    caught_by="tests/fold/test_traps.py::"
    "test_max_pooling_lets_positive_scales_through_and_no_other"
)
def a_negative_scale_passes_a_relu(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.ir.gauge import Gauge

    patch.setattr(Gauge, "is_positive", property(lambda self: True))


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
    from normkit.doctor.checks import population

    patch.setattr(population, "_is_finite", lambda norm: True)


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


# --- ranks ------------------------------------------------------------------------

_ONE_PROCESS = (
    "tests/sync/test_sync_batch_norm.py::test_any_number_of_ranks_equals_one_process"
    "[3-whole-torch.float64]"
)


@fault(caught_by=_ONE_PROCESS)
def the_backward_stays_on_its_rank(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import passes

    patch.setattr(passes, "sum_over", lambda sums, group=None: list(sums))


@fault(caught_by=_ONE_PROCESS)
def ranks_average_their_means_whatever_their_counts(patch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from normkit.functional import passes
    from normkit.moments import Moments
    from normkit.sync import merge_over

    def broken(local, group=None):
        merged = merge_over(local, group)
        alike = Moments(local.count * 0 + 1, local.mean, local.m2)
        mean = merge_over(alike, group).mean
        return (
            merged
            if not dist.is_initialized()
            else Moments(merged.count, mean, merged.m2)
        )

    patch.setattr(passes, "merge_over", broken)


@fault(
    caught_by="tests/sync/test_sync_batch_norm.py::"
    "test_groups_are_taken_as_objects_names_and_mesh_dimensions"
)
def every_group_is_the_world(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import passes
    from normkit.sync import merge_over

    patch.setattr(passes, "merge_over", lambda local, group=None: merge_over(local))


# --- options of the batch norm layers ----------------------------------------------


@fault(caught_by="tests/nn/test_options.py::test_tabnet_243_ghosts_take_any_remainder")
def ghosts_leave_a_small_remainder(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import ghost

    shares = ghost._shares

    def broken(samples, ghost_size):
        return (samples // ghost_size + 1, *shares(samples, ghost_size)[1:])

    patch.setattr(ghost, "_shares", broken)


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


# --- a user's model ----------------------------------------------------------------


@fault(
    caught_by="tests/modeling/test_snapshot.py::"
    "test_a_buffer_that_a_forward_replaced_is_the_same_object_again"
)
def only_values_of_buffers_are_put_back(patch: pytest.MonkeyPatch) -> None:
    from normkit.modeling.snapshot import Snapshot

    def restore_values(self: Snapshot, *, but: Any = ()) -> None:
        kept = {id(tensor) for tensor in but}
        for tensor, copy in self.copies:
            if id(tensor) not in kept:
                tensor.copy_(copy)

    patch.setattr(Snapshot, "restore_values", restore_values)


@fault(caught_by="tests/modeling/test_batches_everywhere.py::test_a_verb_takes_a_batch")
def a_tuple_of_inputs_is_one_argument(patch: pytest.MonkeyPatch) -> None:
    from normkit.modeling import batch

    patch.setattr(batch, "arguments_of", lambda inputs: ((inputs,), {}))


@fault(
    caught_by="tests/modeling/test_atomic_file.py::"
    "test_a_device_is_written_to_and_not_replaced"
)
def a_file_is_renamed_over_whatever_is_there(patch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    from normkit.modeling import atomic_file

    # Not over the machine's own: the test must see that it would have been.
    def refuse(self: Path, target: Path) -> None:
        raise OSError(f"renamed over {target}")

    patch.setattr(atomic_file, "_is_special", lambda path: False)
    patch.setattr(Path, "replace", refuse)


# --- conversion ---------------------------------------------------------------------

_CONVERT = "tests/convert/test_convert.py::"


@fault(caught_by=_CONVERT + "test_torch_187298_a_subclass_keeps_its_activation")
def a_conversion_forgets_the_subclass(patch: pytest.MonkeyPatch) -> None:
    from normkit.convert import targets

    patch.setattr(targets, "_combined", lambda custom, target, found: target)


@fault(
    caught_by=_CONVERT
    + "test_what_cannot_be_carried_is_refused_by_name_and_nothing_changes"
)
def a_forward_of_its_own_is_carried_blindly(patch: pytest.MonkeyPatch) -> None:
    from normkit.convert import targets

    patch.setattr(targets, "_reason_against", lambda custom: "")


_DETECT = "tests/convert/test_detect.py::"


@fault(caught_by=_DETECT + "test_a_formula_that_is_not_quite_ours_is_left")
def a_norm_is_known_by_its_outputs_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.convert import detect

    outcome = detect._outcome
    patch.setattr(detect, "_outcome", lambda *given: outcome(*given)[:1])


@fault(
    caught_by=_DETECT
    + "test_a_known_formula_is_exchanged_with_equal_values_and_gradients"
)
def one_more_than_the_weight_is_the_weight(patch: pytest.MonkeyPatch) -> None:
    from normkit.convert import detect

    formulas = detect._FORMULAS
    patch.setitem(formulas, "rms, 1 + weight", formulas["rms"])
    patch.setattr(detect, "_is_equal", lambda *given: True)


@fault(caught_by=_CONVERT + "test_an_error_on_the_way_undoes_all")
def a_failed_conversion_stays_half_done(patch: pytest.MonkeyPatch) -> None:
    from normkit.convert import run

    patch.setattr(run, "swap_back", lambda module, before: None)


@fault(caught_by=_CONVERT + "test_opacus_472_group_norm_matches_batch_norm_on_data")
def a_match_merges_its_batches_without_what_lies_between(
    patch: pytest.MonkeyPatch,
) -> None:
    from normkit.convert import group_norm_fit

    patch.setattr(group_norm_fit, "_merged", lambda a, b: a)


@fault(caught_by=_CONVERT + "test_torch_15298_the_conventions_of_other_systems")
def a_decay_is_taken_for_a_share(patch: pytest.MonkeyPatch) -> None:
    from normkit.convert import conventions

    known = dict(conventions._CONVENTIONS)
    known["keras"] = (False, *known["keras"][1:])
    patch.setattr(conventions, "_CONVENTIONS", known)


# --- less memory, fused forwards, small inputs ---------------------------------------


@fault(
    caught_by="tests/functional/test_memory.py::"
    "test_a_layer_of_its_own_needs_no_block_around_it"
)
def outputs_are_made_again_from_twice_the_input(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional.passes import Passes

    again = Passes.again

    def broken(self: Any, x: Any, *others: Any) -> Any:
        return again(self, x * 2, *others)

    patch.setattr(Passes, "again", broken)


@fault(
    caught_by="tests/functional/test_memory.py::"
    "test_of_a_chain_of_sums_every_second_output_goes_with_the_same_bits"
)
def sums_are_made_again_without_what_was_added(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional.passes import Passes

    again = Passes.again

    def broken(
        self: Any, x: Any, weight: Any, bias: Any, residual: Any, *rest: Any
    ) -> Any:
        return again(self, x, weight, bias, None, *rest)

    patch.setattr(Passes, "again", broken)


@fault(
    caught_by="tests/functional/test_memory.py::"
    "test_of_a_chain_of_sums_every_second_output_goes_with_the_same_bits"
)
def sums_are_made_again_from_sums_made_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("normkit.functional.autograd.is_recomputable_sum", lambda y: False)


@fault(
    caught_by="tests/functional/test_gradients.py::"
    "test_second_derivatives_where_weight_and_residual_are_computed_from_the_input"
)
def a_second_derivative_goes_through_the_residual_twice(
    patch: pytest.MonkeyPatch,
) -> None:
    patch.setattr("normkit.functional.differentiable.aliases", lambda *tensors: tensors)


@fault(
    caught_by="tests/functional/test_memory.py::"
    "test_resnet50_keeps_two_thirds_with_the_same_bits_and_less_with_int8"
)
def a_deferred_output_does_not_know_a_recomputable_one(
    patch: pytest.MonkeyPatch,
) -> None:
    class Nothing:
        pass

    patch.setattr("normkit.nn.deferred.Recomputable", Nothing)


@fault(
    caught_by="tests/functional/test_memory.py::"
    "test_int8_gradients_are_off_by_the_rounding_and_no_more"
)
def bytes_forget_the_size_of_a_step(patch: pytest.MonkeyPatch) -> None:
    import torch

    from normkit.functional import autograd

    to_bytes = autograd.to_bytes

    def broken(*args: Any, **kwargs: Any) -> Any:
        whole, step = to_bytes(*args, **kwargs)
        return whole, torch.ones_like(step)

    patch.setattr(autograd, "to_bytes", broken)


@fault(
    caught_by="tests/convert/test_fused.py::"
    "test_what_cannot_be_fused_is_left_with_the_reason"
)
def a_second_reader_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    from normkit.convert import fused

    outcome = fused._outcome

    def broken(calls: Any, **options: Any) -> Any:
        for call in calls:
            if not isinstance(call, str):
                del call.readers[1:]
        return outcome(calls, **options)

    patch.setattr(fused, "_outcome", broken)


@fault(
    caught_by="tests/convert/test_other_tools.py::"
    "test_a_tool_does_to_a_fused_model_what_it_does_to_the_plain_one"
)
def an_activation_moves_into_the_layer_before_it(patch: pytest.MonkeyPatch) -> None:
    """As convert once did: whatever replaced the layer lost the activation."""
    from torch import nn

    from normkit.convert import run

    fuse = run.fuse

    def broken(model: Any, *args: Any, **kwargs: Any) -> Any:
        report = fuse(model, *args, **kwargs)
        for parent in list(model.modules()):
            children = list(parent.named_children())
            for (_, norm), (name, act) in itertools.pairwise(children):
                if getattr(norm, "defers", False) and isinstance(act, nn.SiLU):
                    norm.activation = "silu"
                    setattr(parent, name, nn.Identity())
        return report

    patch.setattr(run, "fuse", broken)


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
    from normkit.nn.deferral import Deferral

    values = Deferral.values

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.inputs = (self.inputs[0], self.layer.weight, self.layer.bias)
        return values(self, *args, **kwargs)

    patch.setattr(Deferral, "values", broken)


@fault(
    caught_by="tests/functional/test_memory.py::"
    "test_a_recomputable_output_has_its_gradient_everywhere"
)
def a_recomputable_output_is_no_node_of_autograd(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional.memory.recomputable import Recomputable

    def broken(y: Any) -> Any:
        wrapped: Any = y.detach().as_subclass(Recomputable)
        wrapped.plain = y
        return wrapped

    patch.setattr(Recomputable, "of", staticmethod(broken))


@fault(
    caught_by="tests/convert/test_fused.py::"
    "test_calls_and_sums_in_a_forward_are_waited_for",
)
def a_deferred_output_forgets_its_residual(patch: pytest.MonkeyPatch) -> None:
    from normkit.nn.deferral import Deferral

    values = Deferral.values

    def broken(self: Any, residual: Any, *rest: Any) -> Any:
        return values(self, None, *rest)

    patch.setattr(Deferral, "values", broken)


@fault(
    caught_by="tests/transforms/test_compile.py::"
    "test_a_layer_compiles_whole_and_equals_eager"
)
def a_compiled_backward_reads_statistics_that_moved(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("normkit.nn.batch_renorm.opaque_clone", lambda x: x)


@fault(
    caught_by="tests/functional/test_sum_norm.py::"
    "test_values_sum_and_gradients_are_those_of_two_steps"
)
def the_gradient_of_the_sum_is_lost(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import sum_norm

    gradients = sum_norm.gradients
    patch.setattr(sum_norm, "gradients", lambda *given: gradients(*given[:-1]))


@fault(
    caught_by="tests/functional/test_routes.py::"
    "test_gradients_are_right_where_input_and_gradient_differ_in_layout"
)
def torch_is_handed_group_norms_of_any_layout(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import aten, engine

    patch.setattr(
        engine,
        "tried_first",
        lambda operator, kernels, *_: aten.AtenCall(kernels, operator),
    )
