"""Faults in reading activations that are functions, for tests/test_sabotage.py."""

from typing import Any

import pytest
from torch import Tensor

from sabotage import fault

_FILE = "tests/doctor/test_functions.py::"


@fault(caught_by=_FILE + "test_saturation_of_either_form_is_named")
def only_layers_are_activations(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import functions

    patch.setattr(functions, "_READ", {})


@fault(caught_by=_FILE + "test_dead_units_of_either_form_are_counted")
def only_the_first_batch_has_a_graph(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import functions

    leave = functions.Functions.leave

    def forgetting(self: Any, output: Any) -> None:
        leave(self, output)
        self.were_found = False

    patch.setattr(functions.Functions, "leave", forgetting)


@fault(caught_by=_FILE + "test_names_follow_the_layer_before")
def names_are_counted_over_a_whole_forward(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import functions

    patch.setattr(functions, "bisect_right", lambda *_, **__: 1)


@fault(caught_by=_FILE + "test_what_layers_compute_inside_is_theirs")
def layers_compute_nothing_inside(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import functions

    patch.setattr(
        functions,
        "_outermost",
        lambda calls: [c for c in calls if c.probe.role == "weight"],
    )


@fault(caught_by=_FILE + "test_outputs_are_outputs_and_gates_at_the_end_are_neither")
def what_gives_the_output_is_hidden(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import functions

    patch.setattr(functions, "_VIEWED", 1)


@fault(caught_by=_FILE + "test_checkpointed_activations_are_not_computed_again")
def saved_tensors_are_unpacked(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import functions

    def read(node: Any, name: str) -> Tensor:
        return getattr(node, f"_saved_{name}").detach()

    patch.setattr(functions, "_saved", read)


@fault(caught_by=_FILE + "test_a_function_is_measured_as_the_layer")
def inputs_are_those_of_the_result(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import functions

    patch.setattr(functions, "merged", lambda old, new: old)


@fault(caught_by=_FILE + "test_parts_called_one_by_one_are_read_once")
def a_part_has_the_graph_before_it(patch: pytest.MonkeyPatch) -> None:
    from normkit.doctor.probes import functions

    first = functions._activations  # pyright: ignore[reportPrivateUsage]
    patch.setattr(
        functions, "_activations", lambda ends, calls, _: first(ends, calls, 0)
    )
