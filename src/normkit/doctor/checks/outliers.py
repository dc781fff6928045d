"""Check of targets that lie far from all others: part of D34."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from normkit.doctor.checks.progress import has_learned
from normkit.doctor.checks.thresholds import too_few
from normkit.doctor.finding import Finding
from normkit.doctor.measurements import Statistics

__all__ = ["outliers"]

# Kurtosis of targets above which squared errors follow a few of them. Of one target in
# 50 that is far away it is 48, of an exponential distribution 9, of log-normal prices
# with a spread of 0.8 (in logarithms) 34.
OUTLIERS = 50.0
SQUARED = frozenset(["MseLoss", "Pow"])

_D34 = partial(Finding, "D34", "basics")


def outliers(statistics: Statistics) -> Iterator[Finding]:
    """Check for a few targets far from all others, which squared errors follow.

    No fault of a network that has learned them.
    """
    found, out = statistics.targets, statistics.output
    if found is None or out is None or too_few(statistics.samples):
        return
    if not (SQUARED & out.operations and found.kurtosis > OUTLIERS):
        return
    # A column of zeros and ones is as uneven as it is rare.
    is_share = 0 <= found.low <= found.high <= 1
    if is_share or has_learned(statistics):
        return
    far = max(found.high - found.mean, found.mean - found.low) / found.spread
    yield _D34(
        "",
        "warning",
        found.kurtosis,
        OUTLIERS,
        f"a few targets lie far from the others, up to {far:.3g} standard deviations "
        f"(kurtosis {found.kurtosis:.3g}, of a normal distribution 3), and squared "
        "errors are those of these few",
        "look at the largest targets: they may be in another unit; take their "
        "logarithm, or a loss that grows less, such as nn.HuberLoss",
    )
