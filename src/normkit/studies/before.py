"""Verdicts of the first edition, before the studies were refereed.

The referee asked for intervals of stated coverage, rates chosen on validation, words
that hide no refutation, zero baselines, and other measurements for some claims. What
changed is computed from these and the present verdicts.
"""

from __future__ import annotations

from normkit.studies.verdict import MIXED, REFUTED, SMALLER, SUPPORTED, UNSEEN

__all__ = ["BEFORE", "RENAMED"]

_WORDS = {
    "supported": "1 2 4 8 9 10 11 13 15 16 20 25 30 33 35 37 38 42 43 45 46 47 49 51 55"
    " 59 61 64",
    "partly": "3 5 7 14 17 18 19 21 22 23 24 26 27 28 29 32 34 39 40 41 44 50 52 53 56"
    " 57 60 62 65",
    "refuted": "6 36 48 54 58 66",
    "not seen at this scale": "12 31 63",
}

BEFORE: dict[str, str] = {
    f"C{number}": word for word, row in _WORDS.items() for number in row.split()
}

# Words that say the same in the new terms.
RENAMED: dict[str, tuple[str, ...]] = {
    "supported": (SUPPORTED,),
    "partly": (MIXED, SMALLER),
    "refuted": (REFUTED,),
    "not seen at this scale": (UNSEEN,),
}
