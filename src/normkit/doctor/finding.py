"""A finding: the result of one check on one layer.

A check that measured and saw no fault reports `clear`, with the measured value. A check
that had too little data reports `not_judged`, with the reason; it never reports clear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

__all__ = [
    "SEVERITIES",
    "Finding",
    "Severity",
    "by_cause",
    "grouped",
    "plain",
    "ranked",
]

Severity = Literal["error", "warning", "info", "clear", "not_judged"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

# Causes before their consequences: of two findings of one severity, the one that
# explains the other comes first.
CAUSES_FIRST = (
    # Causes that no other finding explains,
    *("D28", "D17", "D32", "D31", "D07", "D08", "D09", "D06", "D13", "D12", "D33"),
    *("D19", "D16", "D29", "D26", "D34", "D30", "D15", "D05", "D04", "D03", "D11"),
    *("D38", "D37", "D36", "D35"),
    # their consequences in the statistics and in the signals,
    *("D01", "D18", "D21", "D20", "D22", "D23", "D24", "D25", "D27"),
    # and the symptoms that the user sees.
    *("D02", "D39", "D14", "D10"),
)


# What the data and the steps do to a network shows in its signals, and may be worse
# there than at its origin: a warning of these explains an error of those.
ORIGINS = frozenset(["D13", "D27", "D28"])
SIGNALS = frozenset(["D18", "D20", "D21", "D22", "D23", "D24", "D25"])


# What else a cause makes wrong, in its own layers or in the model as a whole.
_AVERAGES = frozenset(["D01", "D02", "D03"])
CONSEQUENCES: dict[str, frozenset[str]] = {
    **dict.fromkeys(("D04", "D09", "D17", "D31", "D32"), _AVERAGES),
    **dict.fromkeys(("D03", "D05", "D12"), frozenset(["D01", "D02"])),
    "D16": frozenset(["D29"]),
    "D30": frozenset(["D01", "D02", "D05"]),
    "D19": _AVERAGES | {"D16"},
    **dict.fromkeys(("D01", "D11", "D33"), frozenset(["D02"])),
    **dict.fromkeys(("D13", "D27"), SIGNALS),
    "D28": SIGNALS | {"D17"},
}
# A network whose signals or steps stand still learns nothing: D34's symptom.
STANDSTILL = frozenset(["D20", "D21", "D22", "D23", "D24", "D25", "D27"])
# What a value that is not finite makes wrong, in all layers that it reaches.
NOT_FINITE = SIGNALS | {"D02", "D17", "D27", "D29", "D39"}


@dataclass(frozen=True)
class Finding:
    """The result of one check on one layer.

    Attributes:
        id: The check, "D01" to "D39"; its meaning never changes.
        name: Short name of the check, such as "stale_statistics".
        layer: Dotted name of the layer; "" when the finding is about the whole model.
        severity: "error" (results are wrong), "warning" (harm is likely), "info"
            (worth knowing), "clear" (measured, no fault) or "not_judged".
        value: The measured value; nan when nothing could be measured.
        threshold: The threshold it crossed, or for "clear" the first it would cross.
        evidence: One sentence with the numbers, or why it was not judged.
        fix: How to fix it; empty when there is nothing to do.
        details: More numbers by name, plain data. `is_symptom`: what the user sees;
            it ranks behind the causes of its severity. `is_origin`: it explains what
            is wrong in the signals, as the data of D28 do. `is_of_steps`: the layers
            stand still because all steps are too small, which D27 says. `has_passed`:
            values that are not finite came with a batch, and no weight has kept them.
            `has_diverged`: the loss rose until it was not finite. `is_of_inputs`: the
            loader gives the inputs on another scale than training did.
        layers: All layers with the same cause, `layer` first; empty in a result of one
            check on one layer.
        follows: Id of the finding that explains it; empty for a cause, and in a result
            of one check on one layer.
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
    layers: tuple[str, ...] = ()
    follows: str = ""

    @property
    def is_reported(self) -> bool:
        """True for an error, a warning or an info."""
        return self.severity in ("error", "warning", "info")

    @property
    def is_alarm(self) -> bool:
        """True for an error or a warning."""
        return self.severity in ("error", "warning")

    @property
    def where(self) -> str:
        """The layer's name, or "the model", and the number of other layers."""
        others = len(self.layers) - 1
        more = f" and {others} more layer{'s' * (others > 1)}" if others > 0 else ""
        # "2 and 4 more layers" reads as a number of layers.
        name = f"layer {self.layer}" if self.layer.isdigit() else self.layer
        return (name or "the model") + more

    def to_text(self) -> str:
        """Return the finding as one or two lines."""
        head = f"{self.severity:10s} {self.id} {self.name}  {self.where}"
        if self.follows:
            head += f" (follows from {self.follows})"
        if self.severity in ("clear", "not_judged"):
            return f"{head}: {self.evidence}"
        return f"{head}: {self.evidence}\n{'':10s} fix: {self.fix}"

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain data; nan and infinity become strings."""
        return {
            "id": self.id,
            "name": self.name,
            "layer": self.layer,
            "layers": [name for name in self.layers or (self.layer,) if name],
            "severity": self.severity,
            "follows": self.follows,
            "value": plain(self.value),
            "threshold": plain(self.threshold),
            "evidence": self.evidence,
            "fix": self.fix,
            "details": plain(dict(self.details)),
        }


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Return errors, warnings and infos: by severity, causes before consequences.

    A warning of the data or of the steps has the rank of what it does to the signals. A
    warning that explains a gap between the modes stands directly before the gap.
    """
    kept = [finding for finding in findings if finding.is_reported]
    worst = min((_level(f) for f in kept if f.id in SIGNALS), default=len(SEVERITIES))
    gap = min((_level(f) for f in kept if f.id == "D02"), default=len(SEVERITIES))
    are_scaled = any(f.details.get("is_of_inputs", False) for f in kept)
    stale = min((_level(f) for f in kept if f.id == "D01"), default=len(SEVERITIES))

    def rank(finding: Finding) -> tuple[int, float, int]:
        level, order = _level(finding), float(_order(finding))
        own = _order(finding)
        if _is_origin(finding) and worst <= level:
            level, order = worst, min(order, CAUSES_FIRST.index("D01"))
        elif finding.id == "D28" and finding.is_alarm and are_scaled:
            level, order = min(level, stale), CAUSES_FIRST.index("D01") - 0.5
        elif finding.id == "D12" and finding.is_alarm and stale < level:
            # Padding enters the running statistics, in other shares than a batch's.
            level, order = stale, CAUSES_FIRST.index("D01") - 0.5
        elif finding.is_alarm and gap < level and _opens_gap(finding):
            level, order = gap, CAUSES_FIRST.index("D02") - 0.5
        return level, order, own

    return sorted(kept, key=rank)


def _level(finding: Finding) -> int:
    return SEVERITIES.index(finding.severity)


def _is_origin(finding: Finding) -> bool:
    """Return True for a warning that explains signals; steps do where too large."""
    is_named = finding.id in ORIGINS or finding.details.get("is_origin", False)
    if finding.severity != "warning" or not is_named:
        return False
    return finding.id != "D27" or finding.value > finding.threshold


def _opens_gap(finding: Finding) -> bool:
    """Return True for a cause of D02."""
    return "D02" in CONSEQUENCES.get(finding.id, frozenset())


def _order(finding: Finding) -> int:
    """Return the place of a finding among those of its severity."""
    if finding.details.get("has_passed", False):
        return CAUSES_FIRST.index("D32")  # behind the averages that have kept it
    if finding.details.get("has_diverged", False):
        return CAUSES_FIRST.index("D28") - 1  # before the layer that overflowed
    if finding.details.get("is_not_finite", False):
        return CAUSES_FIRST.index("D28")
    if finding.details.get("is_of_steps", False):
        return CAUSES_FIRST.index("D27") + 1
    if finding.id == "D14" and _is_origin(finding):
        return CAUSES_FIRST.index("D19")  # decay that empties the scales
    is_symptom = finding.details.get("is_symptom", False)
    return CAUSES_FIRST.index("D02" if is_symptom else finding.id)


def by_cause(readings: Iterable[Finding]) -> list[Finding]:
    """Return one finding per check and fix, with all its layers, in order of `ranked`.

    Alarms that an alarm before them explains say so in `follows`.
    """
    found: list[Finding] = []
    for finding in grouped(ranked(readings)):
        causes = (cause for cause in found if _explains(cause, finding))
        cause = next(causes, None)
        if cause is not None:
            finding = replace(finding, follows=cause.follows or cause.id)
        found.append(finding)
    return found


def _explains(cause: Finding, finding: Finding) -> bool:
    if not (cause.is_alarm and finding.is_alarm):
        return False
    of_values = ("is_not_finite", "has_diverged")
    if any(cause.details.get(name, False) for name in of_values):
        if finding.details.get("is_not_finite", False):
            return True
        return finding.id in NOT_FINITE or not math.isfinite(finding.value)
    if cause.id == "D28" and finding.details.get("is_of_inputs", False):
        return True
    if finding.details.get("is_symptom", False):
        return cause.id in STANDSTILL or cause.details.get("is_origin", False)
    if cause.details.get("is_origin", False) and finding.id in SIGNALS:
        return True  # a signal that one layer spoils shows in all of them
    if finding.details.get("is_of_steps", False):
        return cause.id == "D27"
    if finding.id not in CONSEQUENCES.get(cause.id, frozenset()):
        return False
    is_of_model = "" in (cause.layer, finding.layer)
    return is_of_model or set(finding.layers) <= set(cause.layers)


def grouped(findings: Iterable[Finding]) -> list[Finding]:
    """Return one finding for all those of one check with the same fix.

    It is the first of them, and its layers are those with an alarm where it is one.
    """
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.id, finding.fix), []).append(finding)
    return [
        replace(
            group[0],
            layers=tuple(f.layer for f in group if f.is_alarm == group[0].is_alarm),
        )
        for group in groups.values()
    ]


def plain(value: Any) -> Any:
    """Return `value` with everything JSON cannot hold made into strings or lists."""
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
