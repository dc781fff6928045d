"""The rule from intervals to words, and the interval itself."""

import math

import numpy as np
import pytest

from normkit.errors import ArgumentError
from normkit.studies import interval
from normkit.studies import verdict as rules
from normkit.studies.interval import coverage_of, median_interval
from normkit.studies.summary import spelled
from normkit.studies.verdict import (
    MIXED,
    REFUTED,
    SMALLER,
    SUPPORTED,
    UNSEEN,
    UNTESTED,
    at_least,
    at_most,
    minus,
    over,
    reported,
    steps_ratio,
    verdict,
    within,
)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([5.0, 6.0, 9.0], SUPPORTED),
        ([2.0, 3.0, 4.0], SMALLER),
        ([2.0, 6.0, 9.0], SMALLER),
        ([0.5, 6.0, 9.0], UNSEEN),
        ([0.2, 0.4, 0.9], REFUTED),
        ([1.0, 1.0, 1.0], UNSEEN),
    ],
)
def test_a_bound_and_no_effect_split_the_line(values, word) -> None:
    assert at_least("x", values, 5, none=1).word == word
    mirrored = at_most("x", [-v for v in values], -5, none=-1)
    assert mirrored.word == word
    assert mirrored.interval.low == -max(values)


def test_without_a_value_for_no_effect_nothing_is_smaller() -> None:
    assert at_most("error", [1e-7, 2e-7], 1e-6).word == SUPPORTED
    assert at_most("error", [1e-3, 2e-3], 1e-6).word == REFUTED
    assert at_most("error", [1e-7, 2e-3], 1e-6).word == UNSEEN


def test_within_refutes_only_from_outside() -> None:
    assert within("share", [0.63, 0.64], 0.6, 0.7).word == SUPPORTED
    assert within("share", [0.68, 0.69], 0.6, 0.65).word == REFUTED
    assert within("share", [0.64, 0.69], 0.6, 0.65).word == UNSEEN


@pytest.mark.parametrize(
    ("words", "word"),
    [
        ([SUPPORTED, SUPPORTED], SUPPORTED),
        ([REFUTED, REFUTED], REFUTED),
        ([SUPPORTED, SMALLER], SMALLER),
        ([SUPPORTED, REFUTED], MIXED),
        ([SMALLER, REFUTED], MIXED),
        ([UNSEEN, REFUTED], REFUTED),
        ([UNSEEN, SUPPORTED], MIXED),
        ([UNTESTED, SUPPORTED], SUPPORTED),
        ([UNTESTED], UNTESTED),
    ],
)
def test_parts_combine_to_one_word(words, word) -> None:
    made = {
        SUPPORTED: at_least("a", [9.0], 5, none=1),
        SMALLER: at_least("a", [3.0], 5, none=1),
        UNSEEN: at_least("a", [1.0], 5, none=1),
        REFUTED: at_least("a", [0.0], 5, none=1),
        UNTESTED: at_least("a", [0.0], 5, none=1, unless="not judged: why"),
    }
    said = verdict("C1", *(made[w] for w in words), reported("beside", [0.0]))
    assert said.word == word


def test_a_refutation_beside_support_is_never_hidden() -> None:
    for other in (SUPPORTED, SMALLER, UNSEEN):
        assert rules.combine([other, REFUTED]) in (MIXED, REFUTED)


def test_a_mixed_verdict_says_what_holds_and_what_fails() -> None:
    said = verdict(
        "C1",
        at_least("a", [9.0], 5, none=1, about="sigmoid"),
        at_least("b", [0.0], 5, none=1, about="tanh"),
        at_least("c", [1.0], 5, none=1, about="ReLU"),
    )
    assert spelled(said.word, [said]) == (
        "mixed: holds for sigmoid; fails for tanh; not seen for ReLU"
    )
    alone = verdict("C1", at_least("a", [9.0], 5))
    assert spelled(alone.word, [alone]) == SUPPORTED


@pytest.mark.parametrize("count", [5, 10, 15])
def test_an_interval_covers_the_median_as_often_as_it_says(count: int) -> None:
    draw = np.random.default_rng(3)
    hits = 0
    for row in draw.exponential(size=(4000, count)):
        found = median_interval(row.tolist())
        hits += found.low <= math.log(2) <= found.high
    # Of 4000 draws: four standard errors are 1.5 %.
    assert abs(hits / 4000 - found.coverage) < 0.015


def test_ten_seeds_leave_out_one_at_each_end() -> None:
    found = median_interval([float(v) for v in range(10)])
    assert (found.low, found.median, found.high) == (1.0, 4.5, 8.0)
    assert found.coverage == pytest.approx(0.9785, abs=1e-4)
    assert interval.coverage_of(5) == (1, 0.9375)


@pytest.mark.parametrize("count", [2, 5, 9, 10, 11, 20])
def test_mirrored_values_have_the_mirrored_interval(count: int) -> None:
    values = np.random.default_rng(1).normal(size=count).tolist()
    one, other = median_interval(values), median_interval([-v for v in values])
    assert (one.low, one.median, one.high) == (-other.high, -other.median, -other.low)
    # The interval that is judged is the one that is shown.
    bound = (one.low + one.high) / 2
    shown = at_most("x", values, bound)
    assert (shown.interval.low, shown.interval.high) == (one.low, one.high)
    assert coverage_of(count)[0] >= 1


def test_bounds_stay_bounds() -> None:
    never = steps_ratio(math.inf, 50, 200)
    assert never == (4.0, math.inf)
    part = at_least("times faster", [never] * 10, 2, none=1)
    assert part.word == SUPPORTED
    assert str(part.interval) == "≥ 4 [4, ∞, bounds in 10 of 10]"
    # A bound of 4 may be 8 or 5: it supports no 5, and refutes no 3.
    assert at_least("times faster", [never] * 10, 5, none=1).word == SMALLER
    assert at_most("times faster", [never] * 10, 3).word == REFUTED
    assert steps_ratio(math.inf, math.inf, 200) == (0.0, math.inf)
    assert at_least("x", [(0.0, math.inf)] * 10, 2, none=1).word == UNSEEN
    assert steps_ratio(100, 50, 200) == 2.0


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_an_interval_of_nothing_is_refused(values) -> None:
    with pytest.raises(ArgumentError, match="one number per seed"):
        median_interval(values)


def test_a_prediction_says_where_it_is_refuted() -> None:
    assert at_least("x", [1.0], 5, none=1).wanted == "≥ 5 (refuted below 1)"
    assert at_most("x", [1.0], 5, none=9).wanted == "≤ 5 (refuted above 9)"
    assert at_least("x", [1.0], 5).wanted == "≥ 5"
    assert within("x", [1.0], 1, 1).wanted == "= 1"


def test_arms_are_compared_seed_by_seed() -> None:
    assert minus([3.0, 5.0], [1.0, 4.0]) == [2.0, 1.0]
    assert over([3.0, 5.0], [1.0, 4.0]) == [3.0, 1.25]
    with pytest.raises(ValueError, match="shorter"):
        minus([1.0, 2.0], [1.0])
