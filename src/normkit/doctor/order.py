"""Which finding comes first: the most severe, and causes before consequences."""

from __future__ import annotations

from collections.abc import Iterable

from normkit.doctor.finding import Finding

__all__ = ["ranked"]

# Causes before their consequences: of two findings of one severity, the one that
# explains the other comes first.
CAUSES_FIRST = (
    # What no other finding explains,
    *("D17", "D32", "D31", "D07", "D08", "D09", "D06", "D13", "D12", "D33", "D29"),
    *("D16", "D28", "D26", "D34", "D30", "D15", "D05", "D04", "D03", "D11"),
    # what follows from it in the statistics and in the flow,
    *("D01", "D18", "D21", "D20", "D22", "D23", "D24", "D25", "D27"),
    # and what the user sees.
    *("D02", "D14", "D19", "D10"),
)
_URGENCY = ("error", "warning", "info")


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """What there is to report, the most severe first, causes before consequences."""
    return sorted(
        (finding for finding in findings if finding.stands),
        key=lambda f: (_URGENCY.index(f.severity), CAUSES_FIRST.index(f.id)),
    )
