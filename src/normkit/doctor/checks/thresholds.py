"""Severities from values and thresholds."""

from __future__ import annotations

import math

from normkit.doctor.finding import Severity

__all__ = ["MIN_SAMPLES", "NOT_ITS_LOOP", "above", "below", "too_few"]

# The standard error of a variance of n independent values is √(2/n), of a share
# √(1/4n): 14 % and 5 points at 100 samples, below every threshold used here.
MIN_SAMPLES = 100

# The reason of a check of the training loop after trial training.
NOT_ITS_LOOP = (
    "the steps were not those of the program's own loop; watch it, or let the target "
    "give `train`"
)


def above(
    value: float, *, warning: float, error: float = math.inf
) -> tuple[Severity, float]:
    """Return the severity of a value that should be low, and the threshold applied.

    A NaN is never clear: it crosses the highest threshold.

    Example:
        >>> above(0.3, warning=0.25, error=0.6), above(0.1, warning=0.25, error=0.6)
        (('warning', 0.25), ('clear', 0.25))
    """
    if error < math.inf and not value <= error:
        return "error", error
    return ("clear" if value <= warning else "warning"), warning


def below(
    value: float, *, warning: float, error: float = -math.inf
) -> tuple[Severity, float]:
    """Return the severity of a value that should be high, and the threshold applied.

    Example:
        >>> below(0.1, warning=0.2, error=0.02), below(0.01, warning=0.2, error=0.02)
        (('warning', 0.2), ('error', 0.02))
    """
    if error > -math.inf and not value >= error:
        return "error", error
    return ("clear" if value >= warning else "warning"), warning


def too_few(samples: float, least: int = MIN_SAMPLES) -> str:
    """Return the reason why too few samples are not judged; "" when enough."""
    if samples >= least:
        return ""
    return f"{samples:.0f} samples are too few; give at least {least}"
