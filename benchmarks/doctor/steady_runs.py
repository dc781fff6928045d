"""Healthy programs in the style of official examples and of known repositories.

Their author had not read how the doctor judges. Each program is right by the practice
of its field and learns: `python steady_runs.py` trains them all without the doctor and
prints each score beside its goal. The runs are those of calm_runs.py.
"""

from __future__ import annotations

import steady_letters  # noqa: F401 - enters its programs in PROGRAMS
import steady_models  # noqa: F401
import steady_sequences  # noqa: F401
import steady_tables  # noqa: F401
import steady_vision  # noqa: F401
from healthy_runs import Set, early_and_late
from steady_base import PROGRAMS

__all__ = ["STEADY"]

STEADY = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by an eighth hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (4, 92),
)

if __name__ == "__main__":
    STEADY.main()
