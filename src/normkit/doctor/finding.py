"""What a check says about one layer: a reading, and what follows from it.

A check that looked and saw nothing says `clear`, with the value it measured. A check
that had too little to look at says `not_judged`, with the reason; it never says clear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

__all__ = ["SEVERITIES", "Finding", "Severity", "plain"]

Severity = Literal["error", "warning", "info", "clear", "not_judged"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)


@dataclass(frozen=True)
class Finding:
    """The reading of one check on one layer.

    Attributes:
        id: The check, "D01" to "D34"; it never changes its meaning.
        name: The check in a word, such as "stale_statistics".
        layer: Dotted name of the layer; "" when the finding is about the whole model.
        severity: "error" (results are wrong), "warning" (harm is likely), "info"
            (worth knowing), "clear" (looked, nothing found) or "not_judged".
        value: What was measured; nan when nothing could be.
        threshold: The threshold it crossed, or for "clear" the first it would cross.
        evidence: One sentence with the numbers, or why it was not judged.
        fix: What to do about it; empty when there is nothing to do.
        details: More numbers by name, plain data.
    """

    id: str
    name: str
    layer: str
    severity: Severity
    value: float = math.nan
    threshold: float = math.nan
    evidence: str = ""
    fix: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stands(self) -> bool:
        """Whether there is something to report: error, warning or info."""
        return self.severity in ("error", "warning", "info")

    @property
    def is_alarm(self) -> bool:
        """Whether it is an error or a warning."""
        return self.severity in ("error", "warning")

    @property
    def where(self) -> str:
        """The layer's name, or "the model"."""
        return self.layer or "the model"

    def to_text(self) -> str:
        """The finding in one or two lines."""
        head = f"{self.severity:10s} {self.id} {self.name}  {self.where}"
        if self.severity in ("clear", "not_judged"):
            return f"{head}: {self.evidence}"
        return f"{head}: {self.evidence}\n{'':10s} fix: {self.fix}"

    def to_json(self) -> dict[str, Any]:
        """The finding as plain data; numbers that JSON has no word for are strings."""
        return {
            "id": self.id,
            "name": self.name,
            "layer": self.layer,
            "severity": self.severity,
            "value": plain(self.value),
            "threshold": plain(self.threshold),
            "evidence": self.evidence,
            "fix": self.fix,
            "details": plain(dict(self.details)),
        }


def plain(value: Any) -> Any:
    """`value` with everything JSON cannot hold made into strings or lists."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)
