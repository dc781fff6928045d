"""Healthy programs in styles of many fields, from detection grids to quantile tables.

Their author had not read how the doctor judges. Each program is right by the practice
of its field and learns: `python gentle_runs.py` trains them all without the doctor and
prints each score beside its goal. The runs are those of calm_runs.py.
"""

from __future__ import annotations

import gentle_models  # noqa: F401 - enters its programs in PROGRAMS
import gentle_others  # noqa: F401
import gentle_sequences  # noqa: F401
import gentle_tables  # noqa: F401
import gentle_vision  # noqa: F401
from gentle_base import PROGRAMS
from healthy_runs import Set, early_and_late

__all__ = ["GENTLE"]

GENTLE = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by an eleventh hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (11, 108),
)

if __name__ == "__main__":
    GENTLE.main()
