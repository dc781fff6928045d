"""Faults that tests/cli must catch; see `sabotage`."""

import pytest

from sabotage import fault


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
