"""Faults that tests/modeling must catch; see `sabotage`."""

from typing import Any

import pytest

from sabotage import fault


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


@fault(
    caught_by="tests/modeling/test_graph_norms.py::test_another_reader_of_the_variance_keeps_the_layers_own"
)
def readers_that_see_borrowed_statistics(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "normkit.modeling.graph_norms._aliased", lambda module, node: "nothing"
    )


@fault(
    caught_by="tests/modeling/test_graph_norms.py::test_the_mode_of_a_module_is_that_of_its_call_afterwards"
)
def modes_that_are_lost_with_the_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("normkit.modeling.graph_norms._write_flags", lambda flags, made: None)
