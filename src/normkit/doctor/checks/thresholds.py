"""How a value and its thresholds become a severity."""

from __future__ import annotations

import math

from normkit.doctor.finding import Severity

__all__ = ["MIN_SAMPLES", "NOT_ITS_LOOP", "above", "below", "too_few"]

# A variance of n independent values is off by √(2/n), a share by √(1/4n): at 100
# samples that is 14 % and 5 points, below every threshold that is held against one.
MIN_SAMPLES = 100

# Why a check of the training loop judges nothing after a rehearsal.
NOT_ITS_LOOP = (
    "the steps were not those of the program's own loop; watch it, or let the target "
    "give `train`"
)


def above(
    value: float, *, warning: float, error: float = math.inf
) -> tuple[Severity, float]:
    """The severity of a value that should stay low, and the threshold it is held to.

    A NaN is never clear: it crosses the highest threshold there is.

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
    """The severity of a value that should stay high, and the threshold it is held to.

    Example:
        >>> below(0.1, warning=0.2, error=0.02), below(0.01, warning=0.2, error=0.02)
        (('warning', 0.2), ('error', 0.02))
    """
    if error > -math.inf and not value >= error:
        return "error", error
    return ("clear" if value >= warning else "warning"), warning


def too_few(samples: float, least: int = MIN_SAMPLES) -> str:
    """Why so few samples are not judged; empty when they are enough."""
    if samples >= least:
        return ""
    return f"{samples:.0f} samples are too few; give at least {least}"
