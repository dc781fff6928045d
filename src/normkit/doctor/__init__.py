"""The doctor: find what is wrong with a network's normalization, by name and layer.

`diagnose` examines a model with its weights held still; `watch` measures while it
trains. Both measure with probes that merge Moments, and pass a `Statistics` to the
checks, which are pure functions.
"""

from normkit.doctor.diagnose import diagnose
from normkit.doctor.diagnosis import Diagnosis
from normkit.doctor.explain_gap import GapExplanation, GapPart, explain_gap
from normkit.doctor.finding import Finding, Severity
from normkit.doctor.measurements import Statistics
from normkit.doctor.watch import Watch, watch

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
