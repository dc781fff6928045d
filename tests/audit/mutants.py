"""Faults that tests/audit must catch; see `sabotage`."""

import importlib
from typing import Any

import pytest

from sabotage import fault, wrap


@fault(caught_by="tests/audit/test_verify.py::test_zeros_do_not_pass_for_agreement")
def every_value_agrees(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, "normkit.audit.verify.gap", lambda honest, *args: 0.0)


@fault(
    caught_by="tests/audit/test_verify.py::test_a_difference_on_another_size_alone_is_found"
)
def one_input_is_enough(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, "normkit.audit.verify._more_inputs", lambda honest, inputs: [])


@fault(
    caught_by="tests/audit/test_verify.py::test_the_place_is_on_the_branch_that_differs"
)
def the_region_is_all_that_ran(patch: pytest.MonkeyPatch) -> None:
    def everything(honest: Any, run: Any, differing: Any, good: Any) -> Any:
        return list(range(len(run.steps))), []

    wrap(patch, "normkit.audit.parting._region", everything)


@fault(
    caught_by="tests/audit/test_mistakes_of_tools.py::test_a_linear_before_a_batch_norm_over_steps"
)
def rounding_of_weights_is_a_difference(patch: pytest.MonkeyPatch) -> None:
    # The package's attribute of this name is the function.
    module = importlib.import_module("normkit.audit.verify")
    patch.setattr(module, "_ROUNDINGS", 0)


@fault(
    caught_by="tests/audit/test_verify_onnx.py::test_onnxruntime_31980_a_scale_of_another_size_is_fused_into_a_norm"
)
def the_runtime_is_not_asked(patch: pytest.MonkeyPatch) -> None:
    def nothing(honest: Any, which: str, side: Any, inputs: Any) -> Any:
        return f"onnxruntime on {which}", 0

    wrap(patch, "normkit.audit.verify._runtime_of", nothing)
