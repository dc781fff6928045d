"""Healthy programs more, of another author who had not read how it judges.

Each is right by the practice of its field and learns: `python still_runs.py` trains
them all without the doctor and prints each score beside its goal. The runs are those
of calm_runs.py.
"""

from __future__ import annotations

import still_models  # noqa: F401 - enters its programs in PROGRAMS
import still_others  # noqa: F401
import still_sequences  # noqa: F401
import still_tables  # noqa: F401
import still_vision  # noqa: F401
from healthy_runs import Set, early_and_late
from still_base import PROGRAMS

__all__ = ["STILL"]

STILL = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by a fourth hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (2, 134),
)

if __name__ == "__main__":
    STILL.main()
