"""Healthy programs more, of another author who had not read how the doctor judges.

Each is right by the practice of its field and learns: `python fair_runs.py` trains
them all without the doctor and prints each score beside its goal. The runs are those
of calm_runs.py.
"""

from __future__ import annotations

import fair_models  # noqa: F401 - enters its programs in PROGRAMS
import fair_sequences  # noqa: F401
import fair_tables  # noqa: F401
import fair_vision  # noqa: F401
from fair_base import PROGRAMS
from healthy_runs import Set, early_and_late

__all__ = ["FAIR"]

FAIR = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by a sixth hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (3, 93),
)

if __name__ == "__main__":
    FAIR.main()
