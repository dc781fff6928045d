"""Healthy programs of usual projects, half of them textbook trainings.

Their author had not read how the doctor judges. Each program is right by the practice
of its field and learns: `python honest_runs.py` trains them all without the doctor and
prints each score beside its goal. The runs are those of frank_runs.py.
"""

from __future__ import annotations

import honest_models  # noqa: F401 - enters its programs in PROGRAMS
import honest_others  # noqa: F401
import honest_sequences  # noqa: F401
import honest_tables  # noqa: F401
import honest_vision  # noqa: F401
from healthy_runs import Set, at_three_times
from honest_base import PROGRAMS

__all__ = ["HONEST"]

HONEST = Set(
    PROGRAMS,
    at_three_times(PROGRAMS),
    "Healthy programs by a thirteenth hand",
    "diagnoses after 20 % and 50 % of the steps and at the end",
    (11, 105),
)

if __name__ == "__main__":
    HONEST.main()
