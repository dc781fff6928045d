"""Faults that tests/fold must catch; see `sabotage`."""

from typing import Any

import pytest

from sabotage import fault, wrap


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
    from normkit.fold.search import plan
    from normkit.fold.torch import folding

    patch.setattr(plan, "TOLERANCE", float("inf"))
    patch.setattr(folding, "TOLERANCE", float("inf"))  # of the model's own dtype


@fault(
    caught_by="tests/fold/test_onnx.py::test_outputs_keep_their_names_and_their_order"
)
def a_fold_swaps_the_names_of_two_outputs(patch: pytest.MonkeyPatch) -> None:

    swapped = []

    def broken(right, graph, own, source):
        right(graph, own, source)
        if graph in swapped:
            return  # Swapped twice would be right.
        swapped.append(graph)
        first, last = graph.outputs[0], graph.outputs[-1]
        name, first.name = first.name, "for_a_moment"
        last.name, first.name = name, last.name

    wrap(patch, "normkit.fold.onnx.writing._bypass", broken)


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
    from normkit.fold.onnx import loading

    patch.setattr(loading, "_FIRST_WITH_DEFAULTS", 99)


@fault(
    caught_by="tests/fold/test_traps.py::"
    "test_max_pooling_lets_positive_scales_through_and_no_other"
)
def a_negative_scale_passes_a_relu(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.ir.gauge import Gauge

    patch.setattr(Gauge, "is_positive", property(lambda self: True))


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
    caught_by="tests/fold/test_ways.py::test_a_model_is_folded_inside_inference_mode"
)
def a_fold_stays_in_inference_mode(patch: pytest.MonkeyPatch) -> None:
    import contextlib

    import torch

    real = torch.inference_mode
    patch.setattr(
        torch,
        "inference_mode",
        lambda mode=True: real() if mode else contextlib.nullcontext(),
    )
