"""Thirty healthy programs more, of an author who had not read how the doctor judges.

Each is right by the practice of its field and learns: `python calm_runs.py` trains
them all without the doctor and prints each score beside its goal.

A run is one diagnosis or one watch. A program is trained twice from the same seed: for
40 % of its steps, then diagnosed; and to its end, watched from the first step to the
last, scored, and then diagnosed. A model is handed over in the mode in which the
program left it: training mode after a step, and after a score most often eval mode.
Where a program trains two models, both are examined.
"""

from __future__ import annotations

import calm_models  # noqa: F401 - enters its programs in PROGRAMS
import calm_sequences  # noqa: F401
import calm_tables  # noqa: F401
import calm_vision  # noqa: F401
from calm_base import PROGRAMS
from healthy_runs import Set, early_and_late

__all__ = ["CALM"]

# 3 of the 9 runs with an alarm, of own_latent and barlow_twins, told of a fault in
# them: `_view` draws one shift for a whole batch, which batch statistics remove and
# running ones cannot. With a shift for each image both are silent; they are left as
# they were at first sight.
CALM = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by a third hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (9, 93),
)

if __name__ == "__main__":
    CALM.main()
