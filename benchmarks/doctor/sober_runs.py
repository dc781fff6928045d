"""Healthy programs in the style of libraries' examples and of papers' own code.

Their author had not read how the doctor judges. Each program is right by the practice
of its field and learns: `python sober_runs.py` trains them all without the doctor and
prints each score beside its goal. The runs are those of calm_runs.py.
"""

from __future__ import annotations

import sober_models  # noqa: F401 - enters its programs in PROGRAMS
import sober_others  # noqa: F401
import sober_sequences  # noqa: F401
import sober_tables  # noqa: F401
import sober_vision  # noqa: F401
from healthy_runs import Set, early_and_late
from sober_base import PROGRAMS

__all__ = ["SOBER"]

SOBER = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by a tenth hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (7, 111),
)

if __name__ == "__main__":
    SOBER.main()
