"""Forty-one healthy programs of an author who had not read how the doctor judges.

Each is right by the practice of its field and learns: `python quiet_runs.py` trains
them all without the doctor and prints each score beside its goal.

A run is one diagnosis or one watch. A program is trained twice from the same seed: for
5 steps, then diagnosed; and to its end, watched from the first step on by one watch and
over its last 30 steps by another, then diagnosed. Where a program trains two models, as
a GAN does, both are examined.
"""

from __future__ import annotations

import quiet_models  # noqa: F401 - enters its programs in PROGRAMS
import quiet_sequences  # noqa: F401
import quiet_tables  # noqa: F401
import quiet_vision  # noqa: F401
from healthy_runs import Runs, Set, built
from quiet_base import PROGRAMS

__all__ = ["QUIET"]

EARLY = 5
LAST = 30


def examined(name: str) -> Runs:
    """Train a program under the doctor; return what each run reported."""
    runs = Runs()
    early = built(PROGRAMS, name)
    for i in range(EARLY):
        early.step(i)
    for subject in early.subjects:
        if not subject.only_at_the_end:
            subject.model.train()
            runs.diagnose("diagnosis at the start", subject)
    late = built(PROGRAMS, name)
    begin = late.steps - LAST
    runs.watch("watch from the start", late, range(begin))
    runs.watch("watch at the end", late, range(begin, late.steps))
    for subject in late.subjects:
        subject.model.train()
        runs.diagnose("diagnosis at the end", subject)
    return runs


# 14 of the 42 runs with an alarm had no other than the running statistics of five
# steps (D01 to D03).
QUIET = Set(
    PROGRAMS,
    examined,
    "Healthy programs by another hand",
    "diagnoses after 5 steps and at the end, watches from the start and at the end",
    (42, 170),
)

if __name__ == "__main__":
    QUIET.main()
