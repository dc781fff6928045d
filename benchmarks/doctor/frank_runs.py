"""Healthy programs of textbooks and of many fields, looked at early, midway and late.

Their author had not read how the doctor judges. Each program is right by the practice
of its field and learns: `python frank_runs.py` trains them all without the doctor and
prints each score beside its goal. A run is a diagnosis: after a fifth of the steps,
after half of them, or after the last.
"""

from __future__ import annotations

import frank_models  # noqa: F401 - enters its programs in PROGRAMS
import frank_others  # noqa: F401
import frank_sequences  # noqa: F401
import frank_tables  # noqa: F401
import frank_vision  # noqa: F401
from frank_base import PROGRAMS
from healthy_runs import Set, at_three_times

__all__ = ["FRANK"]

FRANK = Set(
    PROGRAMS,
    at_three_times(PROGRAMS),
    "Healthy programs by a twelfth hand",
    "diagnoses after 20 % and 50 % of the steps and at the end",
    (9, 108),
)

if __name__ == "__main__":
    FRANK.main()
