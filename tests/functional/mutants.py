"""Faults that tests/functional must catch; see `sabotage`."""

from typing import Any

import pytest

from sabotage import fault, wrap


@fault(caught_by="tests/functional/test_contract.py")
def the_centre_is_rounded_to_float32(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels import reference

    patch.setattr(reference, "split", lambda center, dtype: (center.to(dtype), None))


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_forgets_the_weight(patch: pytest.MonkeyPatch) -> None:
    def broken(honest, self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b, c)

    wrap(patch, "normkit.kernels.reference.ReferenceBackend.apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_takes_the_mean_for_a_constant(patch: pytest.MonkeyPatch) -> None:
    def broken(honest, self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b, c * 0, weight=weight)

    wrap(patch, "normkit.kernels.reference.ReferenceBackend.apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_backward_takes_the_variance_for_a_constant(patch: pytest.MonkeyPatch) -> None:
    def broken(honest, self, dy, x, center, a, b, c, *, weight=None):
        return honest(self, dy, x, center, a, b * 0, c, weight=weight)

    wrap(patch, "normkit.kernels.reference.ReferenceBackend.apply_grads", broken)


@fault(caught_by="tests/functional/test_gradients.py")
def the_weight_gradient_is_not_standardized(patch: pytest.MonkeyPatch) -> None:
    def broken(honest, self, dy, x, center, dims, *, weight=None, scale=None):
        return honest(self, dy, x, center, dims, weight=weight)

    wrap(patch, "normkit.kernels.reference.ReferenceBackend.reduce_grads", broken)


@fault(
    caught_by="tests/functional/test_gradients.py::test_derivatives_of_every_kind_pass_gradcheck"
)
def a_double_backward_stops_at_the_statistics(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, x, dims, mask=None):
        return honest(x.detach(), dims, mask)

    wrap(patch, "normkit.functional.differentiable.deviations", broken)


@fault(
    caught_by="tests/functional/test_contract.py::test_a_non_finite_batch_stays_out_of_the_running_statistics"
)
def a_nan_enters_the_running_statistics(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, *args):
        return honest(*args[:5], False)

    wrap(patch, "normkit.functional.batch_norms.Running", broken)


@fault(
    caught_by="tests/functional/test_gradients.py::test_masked_gradients_equal_those_of_the_values_alone"
)
def padding_leaks_into_the_gradient(patch: pytest.MonkeyPatch) -> None:

    def broken(honest, self, kernels, dy, *rest):
        import torch

        leak = torch.zeros_like(dy).masked_fill(dy == 0, 0.1)
        return honest(self, kernels, dy + leak, *rest)

    wrap(patch, "normkit.functional.passes.Passes._sums_and_dx", broken)


@fault(
    caught_by="tests/functional/test_deterministic.py"
    "::test_a_sample_does_not_depend_on_its_batch_or_the_threads[layer-large-torch.float32-contiguous]"
)
def sums_take_the_order_that_torch_finds_best(patch: pytest.MonkeyPatch) -> None:
    from normkit.kernels import reference
    from normkit.moments import plain_sum

    patch.setattr(reference, "pairwise_sum", plain_sum)


@fault(
    caught_by="tests/functional/test_memory.py::"
    "test_a_layer_of_its_own_needs_no_block_around_it"
)
def outputs_are_made_again_from_twice_the_input(patch: pytest.MonkeyPatch) -> None:

    def broken(again: Any, self: Any, x: Any, *others: Any) -> Any:
        return again(self, x * 2, *others)

    wrap(patch, "normkit.functional.passes.Passes.again", broken)


@fault(
    caught_by="tests/functional/test_memory.py::"
    "test_of_a_chain_of_sums_every_second_output_goes_with_the_same_bits"
)
def sums_are_made_again_without_what_was_added(patch: pytest.MonkeyPatch) -> None:

    def broken(
        again: Any, self: Any, x: Any, weight: Any, bias: Any, residual: Any, *rest: Any
    ) -> Any:
        return again(self, x, weight, bias, None, *rest)

    wrap(patch, "normkit.functional.passes.Passes.again", broken)


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

    def broken(to_bytes, *args: Any, **kwargs: Any) -> Any:
        whole, step = to_bytes(*args, **kwargs)
        return whole, torch.ones_like(step)

    wrap(patch, "normkit.functional.autograd.to_bytes", broken)


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
    caught_by="tests/functional/test_sum_norm.py::"
    "test_values_sum_and_gradients_are_those_of_two_steps"
)
def the_gradient_of_the_sum_is_lost(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import sum_norm

    gradients = sum_norm.gradients
    patch.setattr(sum_norm, "gradients", lambda *given: gradients(*given[:-1]))


@fault(
    caught_by="tests/functional/test_aten.py::test_gradients_of_many_small_statistics_are_exact"
)
def torch_is_handed_many_short_rows(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import aten

    patch.setattr(aten, "MAX_STATISTICS", 10**9)
    patch.setattr(aten, "MIN_VALUES_EACH", 1)


@fault(
    caught_by="tests/functional/test_layout.py::"
    "test_the_strides_of_the_input_can_be_asked_for"
)
def torch_is_handed_inputs_of_any_layout(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import aten, engine

    patch.setattr(
        engine,
        "tried_first",
        lambda operator, kernels, *_: aten.AtenCall(kernels, operator),
    )


_BUFFERS = "tests/functional/test_buffer_dtypes.py::test_"


@fault(caught_by=_BUFFERS + "counters_of_every_dtype_are_right_or_refused_and_left")
def a_remembered_instance_norm_overlooks_its_counter(patch: pytest.MonkeyPatch) -> None:
    def broken(honest: Any, operation: Any, operands: Any, running: Any) -> Any:
        if operation[0] == "instance_norm" and running is not None:
            running = running._replace(batches=None)
        return honest(operation, operands, running)

    wrap(patch, "normkit.functional.batch_norms.signature", broken)


@fault(caught_by=_BUFFERS + "buffers_of_every_dtype_are_right_or_refused_and_left")
def whole_numbers_hold_an_average(patch: pytest.MonkeyPatch) -> None:
    def broken(honest: Any, mean: Any, var: Any, *counters: Any) -> None:
        honest(None, None, *counters)

    wrap(patch, "normkit.functional.batch_norms.check_buffers", broken)


@fault(
    caught_by="tests/transforms/test_layers.py::"
    "test_running_statistics_that_an_output_reads_have_no_gradient_as_in_torch"
)
def a_gradient_of_running_statistics_is_0(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("normkit.functional.batch_norms.check_constants", lambda *given: None)


@fault(caught_by="tests/functional/test_changes_in_place.py")
def a_kept_tensor_is_not_watched(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "normkit.functional.memory.recipes._Held.unpack", lambda self: self.tensor
    )


@fault(caught_by="tests/functional/test_layout.py")
def outputs_lie_as_the_kernels_leave_them(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import engine

    patch.setattr(engine, "is_laid_as_torch", lambda x: True)


@fault(caught_by="tests/functional/test_layout.py")
def a_cached_call_forgets_the_copy(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import engine

    patch.setattr(engine, "Copied", lambda call: call)


@fault(caught_by="tests/functional/test_layout.py")
def images_in_channels_last_are_copied(patch: pytest.MonkeyPatch) -> None:
    from normkit.functional import engine

    patch.setattr(engine, "is_laid_as_torch", lambda x: x.is_contiguous())
