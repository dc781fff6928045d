"""Faults that tests/studies must catch; see `sabotage`."""

import pytest

from sabotage import fault, wrap


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
    from normkit.studies.interval import Interval

    def broken(honest, values):
        middle = honest(values).median
        return Interval(middle, middle, middle, len(values))

    wrap(patch, "normkit.studies.verdict.bootstrap", broken)


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
