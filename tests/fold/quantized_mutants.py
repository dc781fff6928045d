"""Faults in integer weights and equalization that tests/fold must catch."""

from dataclasses import replace
from typing import Any

import pytest

from sabotage import fault, wrap


@fault(
    caught_by="tests/fold/test_onnx_quantized.py::"
    "test_channels_with_a_negative_scale_turn_the_sign_of_their_integers"
)
def integers_keep_their_sign(patch: pytest.MonkeyPatch) -> None:
    def mirrored(honest: Any, self: Any) -> Any:
        return self.integers.long()

    wrap(patch, "normkit.fold.ir.nodes.quantized.Quantized.mirrored", mirrored)


@fault(
    caught_by="tests/fold/test_onnx_quantized.py::"
    "test_a_scale_per_output_takes_no_map_of_the_inputs"
)
def a_new_axis_of_scales_replaces_the_old(patch: pytest.MonkeyPatch) -> None:
    def anew(honest: Any, old: Any, new: Any, axis: Any) -> Any:
        return honest(old, new, None)

    wrap(patch, "normkit.fold.ir.nodes.quantized.rescaled", anew)


@fault(
    caught_by="tests/fold/test_onnx_quantized.py::"
    "test_a_shared_integer_weight_gets_scales_of_its_own"
)
def every_reader_of_integers_gets_the_new_scale(patch: pytest.MonkeyPatch) -> None:
    def rescale(honest: Any, graph: Any, node: Any, index: int, *rest: Any) -> None:
        old = node.inputs[index]
        honest(graph, node, index, *rest)
        old.replace_all_uses_with(node.inputs[index])

    wrap(patch, "normkit.fold.onnx.writing.rescale", rescale)


@fault(
    caught_by="tests/fold/test_onnx_quantized.py::"
    "test_nothing_is_moved_past_the_quantizer_of_an_activation"
)
def a_quantizer_of_activations_only_moves_them(patch: pytest.MonkeyPatch) -> None:
    from normkit.fold.ir.nodes import Move
    from normkit.fold.onnx import folding, reading

    patch.setattr(reading, "_is_float", lambda array: True)
    rule = lambda op: Move(op.label, [op.value(0)])  # noqa: E731
    for name in ("QuantizeLinear", "DynamicQuantizeLinear", "DequantizeLinear"):
        patch.setitem(folding._RULES, name, rule)


@fault(
    caught_by="tests/fold/test_equalize.py::"
    "test_the_ranges_become_alike_and_the_function_stays"
)
def the_maps_behind_do_not_take_the_scale_back(patch: pytest.MonkeyPatch) -> None:
    def scaled(honest: Any, *args: Any) -> Any:
        solution = honest(*args)
        first = dict([next(iter(solution.edits.items()))])
        return replace(solution, edits=first)

    wrap(patch, "normkit.fold.search.equalize._scaled", scaled)
