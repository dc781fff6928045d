"""Faults that tests/convert must catch; see `sabotage`."""

import itertools
from typing import Any

import pytest

from sabotage import fault, wrap

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


@fault(
    caught_by="tests/convert/test_fused.py::"
    "test_what_cannot_be_fused_is_left_with_the_reason"
)
def a_second_reader_is_overlooked(patch: pytest.MonkeyPatch) -> None:

    def broken(outcome: Any, calls: Any, **options: Any) -> Any:
        for call in calls:
            if not isinstance(call, str):
                del call.readers[1:]
        return outcome(calls, **options)

    wrap(patch, "normkit.convert.fused._outcome", broken)


@fault(
    caught_by="tests/convert/test_other_tools.py::"
    "test_a_tool_does_to_a_fused_model_what_it_does_to_the_plain_one"
)
def an_activation_moves_into_the_layer_before_it(patch: pytest.MonkeyPatch) -> None:
    """As convert once did: whatever replaced the layer lost the activation."""
    from torch import nn

    def broken(fuse: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        report = fuse(model, *args, **kwargs)
        for parent in list(model.modules()):
            children = list(parent.named_children())
            for (_, norm), (name, act) in itertools.pairwise(children):
                if getattr(norm, "defers", False) and isinstance(act, nn.SiLU):
                    norm.activation = "silu"
                    setattr(parent, name, nn.Identity())
        return report

    wrap(patch, "normkit.convert.run.fuse", broken)


@fault(
    caught_by="tests/convert/test_fused.py::"
    "test_calls_and_sums_in_a_forward_are_waited_for",
)
def a_deferred_output_forgets_its_residual(patch: pytest.MonkeyPatch) -> None:

    def broken(values: Any, self: Any, residual: Any, *rest: Any) -> Any:
        return values(self, None, *rest)

    wrap(patch, "normkit.nn.deferral.Deferral.values", broken)


@fault(
    caught_by="tests/convert/test_convert.py::"
    "test_a_batch_norm_of_a_class_of_its_own_is_left_and_reported"
)
def batch_norms_of_their_own_are_passed_over(patch: pytest.MonkeyPatch) -> None:
    from normkit.convert import run

    patch.setattr(run, "of_its_own", lambda _: "")
