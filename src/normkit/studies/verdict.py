"""Verdicts: from measured intervals to one of six words, by a rule set beforehand.

    supported           the whole interval meets the stated bound
    smaller than stated the effect is there, and the interval does not reach the bound
    mixed               some parts of the claim hold, others do not
    not seen here       the interval cannot tell the effect from none
    refuted             the whole interval lies on the other side of no effect
    not tested          no run can judge it here, or its rate was at the grid's edge

Parts that hold beside parts that are refuted or not seen make a claim mixed, and the
verdict says which. Refuted parts beside unseen ones leave it refuted, for those parts.
The interval that is judged is the one that is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from normkit.studies.interval import Interval, Number, median_interval

__all__ = [
    "MIXED",
    "REFUTED",
    "SMALLER",
    "SUPPORTED",
    "UNSEEN",
    "UNTESTED",
    "WORDS",
    "Part",
    "Verdict",
    "at_least",
    "at_most",
    "combine",
    "minus",
    "over",
    "reported",
    "steps_ratio",
    "verdict",
    "within",
]

SUPPORTED = "supported"
SMALLER = "smaller than stated"
MIXED = "mixed"
UNSEEN = "not seen here"
REFUTED = "refuted"
UNTESTED = "not tested"
WORDS = (SUPPORTED, SMALLER, MIXED, UNSEEN, REFUTED, UNTESTED)


@dataclass(frozen=True)
class Part:
    """One measured quantity and its prediction.

    Attributes:
        text: The quantity, with its unit.
        interval: Its median and interval over the seeds.
        wanted: The prediction, e.g. `"≥ 5 (refuted below 1)"`; empty when the number
            is only reported.
        word: One of the words; empty when the number is only reported.
        about: The part of the claim in a few words: "sigmoid" in "fails for sigmoid".
    """

    text: str
    interval: Interval
    wanted: str = ""
    word: str = ""
    about: str = ""

    def unless(self, reason: str) -> Part:
        """Leave the part unjudged for `reason`; an empty reason keeps its word."""
        if not reason:
            return self
        return replace(self, wanted=f"{self.wanted}; {reason}", word=UNTESTED)


@dataclass(frozen=True)
class Verdict:
    """Verdict of a study about one claim."""

    claim: str
    word: str
    parts: tuple[Part, ...]
    note: str = ""


def at_least(
    text: str,
    values: Sequence[Number],
    bound: float,
    *,
    none: float | None = None,
    about: str = "",
    unless: str = "",
) -> Part:
    """Predict that the quantity is `bound` or more.

    Args:
        text: The quantity.
        values: One number per seed, or the bounds of one.
        bound: The least value that supports the claim.
        none: The value that means no effect, below `bound`: 0 for a difference, 1 for a
            ratio. Without it nothing is "smaller": `bound` itself is the border.
        about: The part of the claim.
        unless: Why the part is not judged; empty where it is.

    Example:
        >>> at_least("ratio", [6.0, 7.0, 9.0], 5, none=1).word
        'supported'
        >>> at_least("ratio", [2.0, 3.0, 9.0], 5, none=1).word
        'smaller than stated'
    """
    interval = median_interval(values)
    border = bound if none is None else none
    wanted = f"≥ {bound:g}" + ("" if none is None else f" (refuted below {none:g})")
    word = _word(interval.low, interval.high, bound, border)
    return Part(text, interval, wanted, word, about).unless(unless)


def at_most(
    text: str,
    values: Sequence[Number],
    bound: float,
    *,
    none: float | None = None,
    about: str = "",
    unless: str = "",
) -> Part:
    """Predict that the quantity is `bound` or less; `at_least` mirrored.

    Example:
        >>> at_most("error", [1e-7, 2e-7], 1e-6).word
        'supported'
        >>> at_most("error", [0.1, 0.2], 1e-6).word
        'refuted'
    """
    interval = median_interval(values)
    border = bound if none is None else none
    wanted = f"≤ {bound:g}" + ("" if none is None else f" (refuted above {none:g})")
    word = _word(-interval.high, -interval.low, -bound, -border)
    return Part(text, interval, wanted, word, about).unless(unless)


def _word(low: float, high: float, bound: float, border: float) -> str:
    if low >= bound:
        return SUPPORTED
    if high < border:
        return REFUTED
    return SMALLER if low > border else UNSEEN


def within(
    text: str, values: Sequence[Number], low: float, high: float, *, about: str = ""
) -> Part:
    """Predict that the quantity lies between `low` and `high`."""
    interval = median_interval(values)
    if low <= interval.low and interval.high <= high:
        word = SUPPORTED
    elif interval.high < low or interval.low > high:
        word = REFUTED
    else:
        word = UNSEEN
    wanted = f"{low:g} … {high:g}" if low < high else f"= {low:g}"
    return Part(text, interval, wanted, word, about)


def reported(text: str, values: Sequence[Number]) -> Part:
    """Report a number with the verdict, outside its rule."""
    return Part(text, median_interval(values))


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return the difference of two arms by seed, so that shared noise drops out."""
    return [x - y for x, y in zip(a, b, strict=True)]


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return the ratio of two arms, seed by seed."""
    return [x / y for x, y in zip(a, b, strict=True)]


def steps_ratio(slow: float, fast: float, end: float) -> Number:
    """Return how many times the steps of `fast` the run `slow` took.

    Args:
        slow: Steps to the target; inf when it was not reached within `end`.
        fast: The same of the other arm.
        end: Length of the run.

    Returns:
        The ratio, or its bounds where an arm did not arrive.

    Example:
        >>> steps_ratio(float("inf"), 50, 200)
        (4.0, inf)
    """
    low = min(slow, end) / fast if fast < float("inf") else 0.0
    high = slow / min(fast, end) if slow < float("inf") else float("inf")
    return low if low == high else (low, high)


def verdict(claim: str, *parts: Part, note: str = "") -> Verdict:
    """Combine the parts of `claim`; parts without a word do not count."""
    return Verdict(claim, combine([p.word for p in parts if p.word]), parts, note)


def combine(words: Sequence[str]) -> str:
    """Combine the words of several parts to that of the claim.

    Example:
        >>> combine(["supported", "refuted"])
        'mixed'
        >>> combine(["refuted", "not seen here"])
        'refuted'
    """
    found = set(words) - {UNTESTED}
    if not found:
        return UNTESTED
    if len(found) == 1:
        return found.pop()
    if found <= {SUPPORTED, SMALLER}:
        return SMALLER
    if found == {REFUTED, UNSEEN}:
        return REFUTED
    return MIXED
