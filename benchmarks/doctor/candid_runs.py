"""Healthy programs of ordinary projects, half of them textbook trainings.

Their author had not read how the doctor judges. Each program is right by the practice
of its field and learns: `python candid_runs.py` trains them all without the doctor and
prints each score beside its goal. The runs are those of frank_runs.py.
"""

from __future__ import annotations

import candid_models  # noqa: F401 - enters its programs in PROGRAMS
import candid_others  # noqa: F401
import candid_sequences  # noqa: F401
import candid_tables  # noqa: F401
import candid_vision  # noqa: F401
from candid_base import PROGRAMS
from healthy_runs import Set, at_three_times

__all__ = ["CANDID"]

CANDID = Set(
    PROGRAMS,
    at_three_times(PROGRAMS),
    "Healthy programs by a fourteenth hand",
    "diagnoses after 20 % and 50 % of the steps and at the end",
    (10, 96),
)

if __name__ == "__main__":
    CANDID.main()
