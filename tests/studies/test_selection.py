"""Rates are chosen on validation, and not judged at the edge of their grid."""

import math

from normkit.studies import find, selection
from normkit.studies.study import Trial
from normkit.studies.verdict import SUPPORTED, UNTESTED, at_least

RATES = (0.1, 0.3, 1.0)


def test_the_rate_of_the_best_mean_is_chosen() -> None:
    chosen = selection.pick([[80.0, 95.0, 96.0], [80.0, 95.0, 60.0]], RATES)
    assert (chosen.rate, chosen.at_edge) == (0.3, False)


def test_a_run_that_diverged_loses_to_any_other() -> None:
    scores = [[10.0, 20.0, math.nan], [10.0, 20.0, 99.0]]
    assert selection.pick(scores, RATES).rate == 0.3


def test_a_rate_at_the_edge_of_its_grid_is_not_judged() -> None:
    chosen = selection.pick([[80.0, 90.0, 95.0]], RATES)
    part = at_least("x", [9.0], 5, unless=selection.edges({"plain": chosen}))
    assert part.word == UNTESTED
    assert "best rate 1 of plain is at the edge" in part.wanted
    inside = selection.pick([[80.0, 95.0, 90.0]], RATES)
    reason = selection.edges({"plain": inside})
    assert at_least("x", [9.0], 5, unless=reason).word == SUPPORTED


def test_where_no_rate_works_none_is_at_the_edge() -> None:
    assert not selection.pick([[-math.inf] * 3], RATES).at_edge


def test_validation_and_test_images_are_others_than_those_of_training() -> None:
    images = Trial(0).images()
    rows = [
        {tuple(row) for row in part.flatten(1).tolist()}
        for part in (images.x_train, images.x_val, images.x_test)
    ]
    # Some digits occur twice in the data, bit for bit; none does here.
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_a_study_reports_test_accuracies_at_the_rate_of_the_validation() -> None:
    study = find("S12")
    assert study is find("shapes and definitions")
    s24 = find("S24")
    scores = {arm: [0.0] * 9 for arm in ("none", "ReLU", "better initial weights")}
    scores["batch norm"] = [0.0] * 9
    test = {arm: [float(10 * i) for i in range(9)] for arm in scores}
    scores["ReLU"][3] = 50.0  # the test's best is at 8
    result = {"saturated": dict.fromkeys(scores, 0.5), "test": test}
    (verdict,) = s24.evaluate([{**result, "validation": scores}])
    relu = next(p for p in verdict.parts if p.text.endswith("by ReLU"))
    assert relu.interval.median == test["ReLU"][3] - test["none"][5]
