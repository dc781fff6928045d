"""Healthy programs in the style of notebooks, theses and re-implemented papers.

Their author had not read how the doctor judges. Each program is right by the practice
of its field and learns: `python level_runs.py` trains them all without the doctor and
prints each score beside its goal. The runs are those of calm_runs.py.
"""

from __future__ import annotations

import level_models  # noqa: F401 - enters its programs in PROGRAMS
import level_others  # noqa: F401
import level_sequences  # noqa: F401
import level_tables  # noqa: F401
import level_vision  # noqa: F401
from healthy_runs import Set, early_and_late
from level_base import PROGRAMS

__all__ = ["LEVEL"]

LEVEL = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by a ninth hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (2, 105),
)

if __name__ == "__main__":
    LEVEL.main()
