"""Faults that tests/init must catch; see `sabotage`."""

import pytest

from sabotage import fault, wrap


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

    def maps_of(real, name, module):
        if not isinstance(module, fans._TRANSPOSED):
            return real(name, module)
        wrong = fans.Fans.of_tensor(module.weight)
        return [replace(each, fans=wrong) for each in real(name, module)]

    wrap(patch, "normkit.init.fans._maps_of", maps_of)


_SCALING = "tests/init/test_variance_scaling.py::test_"


@fault(caught_by=_SCALING + "what_is_frozen_keeps_the_weights_of_its_checkpoint")
def frozen_weights_are_drawn(patch: pytest.MonkeyPatch) -> None:
    from normkit.init import run

    patch.setattr(run, "trained_maps", lambda maps, left: maps)


@fault(caught_by=_SCALING + "a_refused_initialization_changes_nothing")
def options_of_other_schemes_are_passed_over(patch: pytest.MonkeyPatch) -> None:
    from normkit.init import run

    patch.setattr(run, "check_options", lambda *_: None)


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
    caught_by="tests/init/test_signal_graph.py::"
    "test_each_factor_of_a_product_has_the_gradient_of_the_other"
)
def all_factors_have_the_gradient_of_the_first(patch: pytest.MonkeyPatch) -> None:
    def kept(honest, self, *given):
        found = honest(self, *given)
        return found[:1] * len(found)

    wrap(patch, "normkit.init.tracer._Tracer._kept", kept)


@fault(
    caught_by="tests/init/test_predictions.py::"
    "test_a_relu_before_a_choice_of_the_largest_keeps_the_gradient"
)
def gradients_are_followed_by_a_random_one(patch: pytest.MonkeyPatch) -> None:
    import torch

    def kept(honest, self, out, inputs, gradient, mean_square):
        drawn = torch.randn_like(gradient)
        return honest(self, out, inputs, drawn, float(drawn.square().mean()))

    wrap(patch, "normkit.init.tracer._Tracer._kept", kept)


@fault(caught_by="tests/init/test_predictions.py::test_padding_is_no_product")
def padding_is_a_product(patch: pytest.MonkeyPatch) -> None:
    from normkit.init import tracer

    patch.setattr(tracer, "inside", lambda *given: (1.0, 1.0))


@fault(
    caught_by="tests/init/test_predictions.py::"
    "test_gradients_of_many_readers_meet_as_they_do"
)
def gradients_of_readers_are_uncorrelated(patch: pytest.MonkeyPatch) -> None:
    from normkit.init.signal_graph import SignalGraph

    patch.setattr(SignalGraph, "_coherence", lambda self: {})


@fault(
    caught_by="tests/init/test_predictions.py::"
    "test_a_relu_before_a_choice_of_the_largest_keeps_the_gradient"
)
def a_choice_of_the_largest_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    from normkit.init import signal_graph

    patch.setattr(signal_graph, "PICKING", frozenset())


@fault(
    caught_by="tests/init/test_predictions.py::"
    "test_a_sum_of_rectified_values_is_followed_with_its_mean"
)
def inputs_of_activations_have_no_mean(patch: pytest.MonkeyPatch) -> None:
    from normkit.init import tracer

    patch.setattr(tracer, "_mean_per_root", lambda tensor, mean_square: 0.0)


@fault(
    caught_by="tests/init/test_predictions.py::"
    "test_a_norm_that_another_norm_reads_does_not_start_at_zero"
)
def halves_put_side_by_side_end_a_branch(patch: pytest.MonkeyPatch) -> None:
    def ends(honest, self):
        for step in self.steps:  # a concatenation passes on the end of its first half
            if step.name == "cat":
                step.inputs = step.inputs[:1]
        return honest(self)

    wrap(patch, "normkit.init.signal_graph.SignalGraph.branch_ends", ends)
