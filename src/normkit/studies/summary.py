"""Verdicts of all studies together, claim by claim."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from normkit.studies import verdict as rules
from normkit.studies.before import BEFORE, RENAMED
from normkit.studies.claims import CLAIMS
from normkit.studies.record import Record, is_current
from normkit.studies.registry import all_studies
from normkit.studies.runner import record_path

__all__ = [
    "changed",
    "deciding_numbers",
    "overall",
    "read_records",
    "shared",
    "spelled",
]


def read_records(out: Path) -> dict[str, Record]:
    """Read the records under `out` by study id, and evaluate their verdicts again.

    Records of other code than the present are left out.
    """
    found = {}
    for study in all_studies():
        path = record_path(out, study.id)
        if path.exists() and is_current(path, study):
            record = Record.read(path)
            found[study.id] = replace(
                record, verdicts=tuple(study.evaluate(record.results))
            )
    return found


def overall(claim: str, records: dict[str, Record]) -> tuple[str, list[rules.Verdict]]:
    """Return the overall word for `claim`, and the verdict of each study."""
    said = [v for r in records.values() for v in r.verdicts if v.claim == claim]
    return rules.combine([p.word for v in said for p in v.parts if p.word]), said


def spelled(word: str, said: list[rules.Verdict]) -> str:
    """Return `word`; where parts of the claim differ, with what each word is for."""
    parts = [part for verdict in said for part in verdict.parts if part.word]
    if len({part.word for part in parts}) < 2:
        return word
    phrases = (
        (rules.SUPPORTED, "holds for"),
        (rules.SMALLER, "smaller than stated for"),
        (rules.REFUTED, "fails for"),
        (rules.UNSEEN, "not seen for"),
        (rules.UNTESTED, "not tested for"),
    )
    named = [
        f"{phrase} {', '.join(about)}"
        for kind, phrase in phrases
        if (about := [p.about or p.text for p in parts if p.word == kind])
    ]
    return f"{word}: {'; '.join(named)}"


def changed(records: dict[str, Record]) -> dict[str, tuple[str, str]]:
    """Return the claims of the first edition whose verdict is another: old and new."""
    found = {}
    for claim, old in BEFORE.items():
        word, _ = overall(claim, records)
        if word not in RENAMED[old]:
            found[claim] = (old, word)
    return found


def shared(records: dict[str, Record]) -> dict[str, str]:
    """Return the claims that rest only on numbers of earlier claims, and of which.

    By claim: the earlier one with the first of its numbers.
    """
    owner: dict[tuple[str, str], str] = {}
    found = {}
    for claim in CLAIMS:
        keys = [
            (record.study, part.text)
            for record in records.values()
            for verdict in record.verdicts
            if verdict.claim == claim
            for part in verdict.parts
            if part.word
        ]
        if keys and all(key in owner for key in keys):
            found[claim] = owner[keys[0]]
        for key in keys:
            owner.setdefault(key, claim)
    return found


def deciding_numbers(word: str, said: list[rules.Verdict]) -> str:
    """Return the measured numbers that led to `word`, with what was predicted.

    Args:
        word: The overall word of a claim.
        said: Its verdicts, both as `overall` returns them.
    """
    parts = [part for verdict in said for part in verdict.parts if part.word]
    return "; ".join(map(_held_against, _deciding(word, parts)))


def _deciding(word: str, parts: list[rules.Part]) -> list[rules.Part]:
    """Return the first part with the word; of a mixed verdict, one of each kind."""
    first: dict[str, rules.Part] = {}
    for part in parts:
        first.setdefault(part.word, part)
    return [part for kind, part in first.items() if word in (kind, rules.MIXED)]


def _held_against(part: rules.Part) -> str:
    wanted = part.wanted.partition(" (")[0]
    return f"{part.text}: {part.interval}, {part.word} ({wanted})"
