"""The doctor: what is wrong with a network's normalization, by name and layer.

`diagnose` looks at a model with its weights held still; `watch` looks while it trains.
Both measure with probes that merge Moments, and hand a `Statistics` to the checks,
which are pure functions.
"""

from normkit.doctor.diagnosis import Diagnosis, diagnose
from normkit.doctor.explain import GapExplanation, GapPart, explain_gap
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.statistics import Statistics
from normkit.doctor.watcher import Watch, watch

__all__ = [
    "Diagnosis",
    "Finding",
    "GapExplanation",
    "GapPart",
    "Severity",
    "Statistics",
    "Watch",
    "diagnose",
    "explain_gap",
    "watch",
]
