"""Verdicts: from measured intervals to one of four words, by a rule set beforehand.

    supported               the whole interval meets the predicted bound
    partly                  the effect is there, smaller than predicted
    not seen at this scale  the interval cannot tell the effect from none
    refuted                 the whole interval lies on the other side of no effect

A claim with several parts is supported or refuted when all of them are, partly when
some part is, and otherwise not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from normkit.studies.interval import Interval, bootstrap

__all__ = [
    "PARTLY",
    "REFUTED",
    "SUPPORTED",
    "UNSEEN",
    "WORDS",
    "Part",
    "Verdict",
    "at_least",
    "at_most",
    "minus",
    "over",
    "reported",
    "verdict",
    "within",
]

SUPPORTED = "supported"
PARTLY = "partly"
UNSEEN = "not seen at this scale"
REFUTED = "refuted"
WORDS = (SUPPORTED, PARTLY, UNSEEN, REFUTED)


@dataclass(frozen=True)
class Part:
    """One measured quantity and its prediction.

    Attributes:
        text: The quantity, with its unit.
        interval: Its median and interval over the seeds.
        wanted: The prediction, e.g. `"≥ 5 (refuted below 1)"`; empty when the number
            is only reported.
        word: One of the four words; empty when the number is only reported.
    """

    text: str
    interval: Interval
    wanted: str = ""
    word: str = ""


@dataclass(frozen=True)
class Verdict:
    """Verdict of a study about one claim."""

    claim: str
    word: str
    parts: tuple[Part, ...]
    note: str = ""


def at_least(
    text: str, values: Sequence[float], bound: float, *, none: float | None = None
) -> Part:
    """Predict that the quantity is `bound` or more.

    Args:
        text: The quantity.
        values: One number per seed.
        bound: The least value that supports the claim.
        none: The value that means no effect, below `bound`: 0 for a difference, 1 for a
            ratio. Without it there is no "partly": `bound` itself is the border.

    Example:
        >>> at_least("ratio", [6.0, 7.0, 9.0], 5, none=1).word
        'supported'
        >>> at_least("ratio", [2.0, 3.0, 9.0], 5, none=1).word
        'partly'
    """
    interval = bootstrap(values)
    border = bound if none is None else none
    wanted = f"≥ {bound:g}" + ("" if none is None else f" (refuted below {none:g})")
    if interval.low >= bound:
        word = SUPPORTED
    elif interval.high < border:
        word = REFUTED
    elif interval.low > border:
        word = PARTLY
    else:
        word = UNSEEN
    return Part(text, interval, wanted, word)


def at_most(
    text: str, values: Sequence[float], bound: float, *, none: float | None = None
) -> Part:
    """Predict that the quantity is `bound` or less; `at_least` mirrored.

    Example:
        >>> at_most("error", [1e-7, 2e-7], 1e-6).word
        'supported'
        >>> at_most("error", [0.1, 0.2], 1e-6).word
        'refuted'
    """
    mirrored = at_least(
        text, [-v for v in values], -bound, none=None if none is None else -none
    )
    wanted = f"≤ {bound:g}" + ("" if none is None else f" (refuted above {none:g})")
    return Part(text, bootstrap(values), wanted, mirrored.word)


def within(text: str, values: Sequence[float], low: float, high: float) -> Part:
    """Predict that the quantity lies between `low` and `high`."""
    interval = bootstrap(values)
    if low <= interval.low and interval.high <= high:
        word = SUPPORTED
    elif interval.high < low or interval.low > high:
        word = REFUTED
    else:
        word = UNSEEN
    wanted = f"{low:g} … {high:g}" if low < high else f"= {low:g}"
    return Part(text, interval, wanted, word)


def reported(text: str, values: Sequence[float]) -> Part:
    """Report a number with the verdict, outside its rule."""
    return Part(text, bootstrap(values))


def minus(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return the difference of two arms by seed, so that shared noise drops out."""
    return [x - y for x, y in zip(a, b, strict=True)]


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return the ratio of two arms, seed by seed."""
    return [x / y for x, y in zip(a, b, strict=True)]


def verdict(claim: str, *parts: Part, note: str = "") -> Verdict:
    """Combine the parts of `claim`; parts without a word do not count."""
    return Verdict(claim, combine([p.word for p in parts if p.word]), parts, note)


def combine(words: Sequence[str]) -> str:
    """Combine several words: unanimous, or partly when some part holds, or not seen."""
    if len(set(words)) == 1:
        return words[0]
    return PARTLY if {SUPPORTED, PARTLY} & set(words) else UNSEEN
