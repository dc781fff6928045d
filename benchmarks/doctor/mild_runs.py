"""Healthy programs more, of another author who had not read how the doctor judges.

Each is right by the practice of its field and learns: `python mild_runs.py` trains
them all without the doctor and prints each score beside its goal. The runs are those
of calm_runs.py.
"""

from __future__ import annotations

import mild_models  # noqa: F401 - enters its programs in PROGRAMS
import mild_sequences  # noqa: F401
import mild_tables  # noqa: F401
import mild_vision  # noqa: F401
from healthy_runs import Set, early_and_late
from mild_base import PROGRAMS

__all__ = ["MILD"]

MILD = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by a fifth hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (3, 98),
)

if __name__ == "__main__":
    MILD.main()
