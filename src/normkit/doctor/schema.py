"""The form of `Diagnosis.to_json()`, as a JSON Schema (draft 2020-12)."""

from __future__ import annotations

from typing import Any

__all__ = ["DIAGNOSIS"]

# JSON has no word for them.
_NUMBER = {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]}
_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}


def _record(**properties: Any) -> dict[str, Any]:
    """Return the schema of an object with exactly these keys."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_FINDING = _record(
    id={"type": "string", "pattern": "^D[0-9][0-9]$"},
    name=_TEXT,
    layer=_TEXT,
    layers=_list(_TEXT),
    severity={"enum": ["error", "warning", "info", "clear", "not_judged"]},
    follows=_TEXT,
    value=_NUMBER,
    threshold=_NUMBER,
    evidence=_TEXT,
    fix=_TEXT,
    details={"type": "object"},
)
_CONFIRMATION = _record(
    id=_TEXT,
    measure={"enum": ["metric", "loss", "alarms"]},
    before=_NUMBER,
    after=_NUMBER,
    error=_NUMBER,
    helps={"type": "boolean"},
    harms={"type": "boolean"},
    improves={"type": "boolean"},
)
_PART = _record(name=_TEXT, value=_NUMBER, error=_NUMBER)
_GAP = _record(
    gap=_NUMBER,
    batch=_NUMBER,
    running=_NUMBER,
    causes=_list(_PART),
    layers=_list(_PART),
    interaction=_NUMBER,
    batches=_COUNT,
    rank={"anyOf": [{"type": "null"}, _COUNT]},
    absent={"type": "object"},
)

DIAGNOSIS: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "normkit.diagnosis/1",
    **_record(
        schema={"enum": ["normkit.diagnosis/1"]},
        summary=_TEXT,
        named=_list(_TEXT),
        samples=_COUNT,
        batches=_COUNT,
        findings=_list(_FINDING),
        not_judged=_list(_FINDING),
        clear=_list(_FINDING),
        confirmations=_list(_CONFIRMATION),
        gap={"anyOf": [{"type": "null"}, _GAP]},
    ),
}
