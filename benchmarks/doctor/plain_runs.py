"""Healthy programs in the style of tutorials and of research code.

Their author had not read how the doctor judges. Activations are functions, cells and
gates are written by hand. Each program is right by the practice of its field and
learns: `python plain_runs.py` trains them all without the doctor and prints each score
beside its goal. The runs are those of calm_runs.py.
"""

from __future__ import annotations

import plain_models  # noqa: F401 - enters its programs in PROGRAMS
import plain_others  # noqa: F401
import plain_sequences  # noqa: F401
import plain_teaching  # noqa: F401
import plain_vision  # noqa: F401
from healthy_runs import Set, early_and_late
from plain_base import PROGRAMS

__all__ = ["PLAIN"]

PLAIN = Set(
    PROGRAMS,
    early_and_late(PROGRAMS),
    "Healthy programs by a seventh hand",
    "diagnoses after 40 % of the steps and at the end, watches of the whole",
    (2, 90),
)

if __name__ == "__main__":
    PLAIN.main()
