"""The rule from intervals to words, and the interval itself."""

import math

import numpy as np
import pytest

from normkit.errors import ArgumentError
from normkit.studies.interval import bootstrap
from normkit.studies.verdict import (
    PARTLY,
    REFUTED,
    SUPPORTED,
    UNSEEN,
    at_least,
    at_most,
    minus,
    over,
    reported,
    verdict,
    within,
)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ([5.0, 6.0, 9.0], SUPPORTED),
        ([2.0, 3.0, 4.0], PARTLY),
        ([2.0, 6.0, 9.0], PARTLY),
        ([0.5, 6.0, 9.0], UNSEEN),
        ([0.2, 0.4, 0.9], REFUTED),
        ([1.0, 1.0, 1.0], UNSEEN),
    ],
)
def test_a_bound_and_no_effect_split_the_line_into_four_words(values, word) -> None:
    assert at_least("x", values, 5, none=1).word == word
    mirrored = at_most("x", [-v for v in values], -5, none=-1)
    assert mirrored.word == word
    assert mirrored.interval.low == -max(values)


def test_without_a_value_for_no_effect_there_is_no_partly() -> None:
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
        ([SUPPORTED, REFUTED], PARTLY),
        ([PARTLY, REFUTED], PARTLY),
        ([UNSEEN, REFUTED], UNSEEN),
        ([UNSEEN, SUPPORTED], PARTLY),
    ],
)
def test_parts_combine_to_one_word(words, word) -> None:
    made = {
        SUPPORTED: at_least("a", [9.0], 5, none=1),
        PARTLY: at_least("a", [3.0], 5, none=1),
        UNSEEN: at_least("a", [1.0], 5, none=1),
        REFUTED: at_least("a", [0.0], 5, none=1),
    }
    said = verdict("C1", *(made[w] for w in words), reported("beside", [0.0]))
    assert said.word == word


def test_the_interval_covers_the_true_median_nineteen_times_in_twenty() -> None:
    draw = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        interval = bootstrap(draw.normal(2.0, 1.0, size=15).tolist())
        hits += interval.low <= 2.0 <= interval.high
    # 95 % nominal; a bootstrap of the median of 15 is a little short of or above it.
    assert 0.90 <= hits / 300 <= 0.995


def test_the_interval_is_ordered_and_repeats() -> None:
    values = [4.0, 1.0, 9.0, 2.0, 3.0]
    interval = bootstrap(values)
    assert 1.0 <= interval.low <= interval.median == 3.0 <= interval.high <= 9.0
    assert interval == bootstrap(values[::-1][::-1])


def test_never_is_a_value_like_any_other() -> None:
    interval = bootstrap([100.0, math.inf, math.inf])
    assert interval.median == math.inf
    assert interval.low == 100.0
    assert "never" in str(interval)


@pytest.mark.parametrize("values", [[], [1.0, math.nan]])
def test_an_interval_of_nothing_is_refused(values) -> None:
    with pytest.raises(ArgumentError, match="one number per seed"):
        bootstrap(values)


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
