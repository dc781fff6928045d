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
    caught_by="tests/studies/test_verdict.py::test_a_bound_and_no_effect_split_the_line"
)
def a_verdict_looks_at_the_median_alone(patch: pytest.MonkeyPatch) -> None:
    from normkit.studies.interval import Interval

    def broken(honest, values):
        middle = honest(values).median
        return Interval(middle, middle, middle, len(values), 1.0, middle)

    wrap(patch, "normkit.studies.verdict.median_interval", broken)


@fault(
    caught_by="tests/studies/test_verdict.py::test_an_interval_covers_the_median_as_often_as_it_says"
)
def the_ends_of_an_interval_are_one_rank_too_far_in(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch,
        "normkit.studies.interval.coverage_of",
        lambda honest, count: (honest(count)[0] + 1, honest(count)[1]),
    )


@fault(
    caught_by="tests/studies/test_verdict.py::test_a_refutation_beside_support_is_never_hidden"
)
def a_refuted_part_is_outvoted(patch: pytest.MonkeyPatch) -> None:
    def broken(honest, words):
        kept = [word for word in words if word != "refuted"]
        return honest(kept or words)

    wrap(patch, "normkit.studies.verdict.combine", broken)


@fault(
    caught_by="tests/studies/test_selection.py::test_a_rate_at_the_edge_of_its_grid_is_not_judged"
)
def a_best_rate_at_the_edge_passes(patch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    wrap(
        patch,
        "normkit.studies.selection.pick",
        lambda honest, scores, rates: replace(honest(scores, rates), at_edge=False),
    )


@fault(
    caught_by="tests/studies/test_runner.py::test_the_key_changes_with_a_file_that_the_study_imports"
)
def a_shared_file_does_not_count(patch: pytest.MonkeyPatch) -> None:
    from normkit.studies import record

    patch.setattr(record, "_of_this_package", lambda source: [])


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
