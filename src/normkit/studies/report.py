"""The pages of the studies, made from the records: claims, studies, corrections.

    README.md        every claim with its verdict, and how each was reached
    Sxx.md           one study: question, prediction, rule, numbers, figure
    corrections.md   what the sources state wrongly, with the evidence

All of it is generated. The rules are applied to the stored results, so the pages agree
with the code.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from normkit.errors import ArgumentError
from normkit.studies.claims import CLAIMS, CORRECTIONS, Claim
from normkit.studies.record import Record
from normkit.studies.registry import all_studies
from normkit.studies.runner import draw_record, record_path
from normkit.studies.study import Study
from normkit.studies.verdict import (
    MIXED,
    SUPPORTED,
    UNSEEN,
    WORDS,
    Part,
    Verdict,
    combine,
)

__all__ = ["deciding_numbers", "overall", "read_records", "write_report"]

_NOTICE = "<!-- Written by `normkit study report`; do not edit. -->\n"


def read_records(out: Path) -> dict[str, Record]:
    """Read the records under `out` by study id, and evaluate their verdicts again."""
    found = {}
    for study in all_studies():
        path = record_path(out, study.id)
        if path.exists():
            record = Record.read(path)
            found[study.id] = replace(
                record, verdicts=tuple(study.evaluate(record.results))
            )
    return found


def overall(claim: str, records: dict[str, Record]) -> tuple[str, list[Verdict]]:
    """Return the overall word for `claim`, and the part of each study.

    The word is empty while no study of the claim has run.
    """
    said = [v for r in records.values() for v in r.verdicts if v.claim == claim]
    if not said:
        return "", []
    return combine([v.word for v in said]), said


def write_report(out: Path, *, figures: bool = True) -> list[Path]:
    """Write the pages and figures of the records under `out`.

    Args:
        out: The folder that `run` filled.
        figures: Draw the figures again, too.

    Raises:
        ArgumentError: There is no record.
    """
    records = read_records(out)
    if not records:
        raise ArgumentError(
            f"there are no records under {str(out)!r}; "
            "make some with: normkit study run --all"
        )
    studies = {study.id: study for study in all_studies()}
    pages = {"README.md": _front(records, studies), "corrections.md": _wrong(records)}
    for study_id, record in records.items():
        pages[f"{study_id}.md"] = _page(studies[study_id], record)
        record.write(record_path(out, study_id))
        if figures:
            draw_record(studies[study_id], record, out)
    written = []
    for name, text in pages.items():
        path = out / name
        path.write_text(_NOTICE + text, encoding="utf-8")
        written.append(path)
    return written


def _front(records: dict[str, Record], studies: dict[str, Study]) -> str:
    words = Counter(overall(claim, records)[0] or "not run" for claim in CLAIMS)
    order = [*WORDS, "not run"]
    tally = ", ".join(f"{words[w]} {w}" for w in order if words[w])
    minutes = sum(record.cpu_seconds for record in records.values()) / 60
    lines = [
        "# What is said about batch normalization, tested\n",
        f"{len(CLAIMS)} claims from five introductory articles (A0 to A4), each held "
        f"against a rule written before the run: {tally}.\n",
        "A number is the median over paired seeds with its bootstrap 95 % interval. "
        "*Partly* means that the effect is there and smaller than predicted, or that "
        "some parts of the claim hold; *not seen* that these small networks cannot "
        "tell. What the sources state wrongly: [corrections](corrections.md).\n",
        f"All records: `normkit study run --all --cpu`, {minutes:.0f} minutes of one "
        f"core: {minutes / 2:.0f} minutes on two. One study: `normkit study run S01`."
        "\n",
        "## Claims\n",
        "| | claim | source | verdict | deciding numbers (predicted) | studies |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_claim_row(claim, records) for claim in CLAIMS.values()]
    lines += [
        "\n## Studies\n",
        "| | study | question | seeds | minutes | data |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for study_id, record in records.items():
        study = studies[study_id]
        data = ", ".join(sorted(record.data)) or "none"
        lines.append(
            f"| [{study_id}]({study_id}.md) | {study.title} | {study.question} | "
            f"{len(record.results)} | {record.cpu_seconds / 60:.1f} | {data} |"
        )
    return "\n".join(lines) + "\n"


def _claim_row(claim: Claim, records: dict[str, Record]) -> str:
    word, said = overall(claim.id, records)
    by = [r.study for r in records.values() for v in r.verdicts if v.claim == claim.id]
    links = " ".join(f"[{study}]({study}.md)" for study in by)
    numbers = deciding_numbers(word, said) or claim.note
    return (
        f"| {claim.id} | {claim.text} | {claim.sources} | {_bold(word)} | "
        f"{_cell(numbers)} | {links} |"
    )


def deciding_numbers(word: str, said: list[Verdict]) -> str:
    """Return the measured numbers that led to `word`, with what was predicted.

    Args:
        word: The overall word of a claim.
        said: Its verdicts, both as `overall` returns them.
    """
    parts = [part for verdict in said for part in verdict.parts if part.word]
    return "; ".join(map(_held_against, _deciding(word, parts)))


def _deciding(word: str, parts: list[Part]) -> list[Part]:
    """Return the first part with the word; of a mixed verdict, one of each kind."""
    first: dict[str, Part] = {}
    for part in parts:
        first.setdefault(part.word, part)
    return [part for kind, part in first.items() if word in (kind, MIXED, UNSEEN)]


def _held_against(part: Part) -> str:
    wanted = part.wanted.partition(" (")[0]
    return f"{part.text}: {part.interval}, {part.word} ({wanted})"


def _page(study: Study, record: Record) -> str:
    ran = record.environment
    data = ", ".join(f"{k} (SHA-256 {v[:12]}…)" for k, v in record.data.items())
    lines = [
        f"# {study.id}: {study.title}\n",
        f"{study.question}\n",
        f"**Predicted.** {study.prediction}\n",
        f"**Arms.** {'; '.join(study.arms)}.\n",
        f"**Measured.** {study.metric}\n",
        f"**Rule.** {study.criterion}\n",
        f"![{study.title}](figures/{study.id}.png)\n",
        f"[The figure as SVG](figures/{study.id}.svg), "
        f"[the record](records/{study.id}.json); "
        f"again: `normkit study run {study.id} --{record.scale}`\n",
        "| claim | verdict | measured | median [95 % interval] | predicted | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for said in record.verdicts:
        head = f"{said.claim}. {CLAIMS[said.claim].text}"
        rows = said.parts or (None,)
        for i, part in enumerate(rows):
            start = f"| {head} | {_bold(said.word)} |" if i == 0 else "| | |"
            lines.append(start + _part_cells(part))
    notes = [f"- {v.claim}: {v.note}" for v in record.verdicts if v.note]
    lines += ["", *notes] if notes else []
    lines.append(
        f"\n{len(record.results)} seeds, {record.cpu_seconds:.0f} s of one thread of "
        f"{ran['processor'] if ran['device'] == 'cpu' else ran['device']}; "
        f"normkit {ran['normkit']}, torch {ran['torch']}, Python {ran['python']}. "
        f"Data: {data or 'none, random numbers'}."
    )
    return "\n".join(lines) + "\n"


def _part_cells(part: Part | None) -> str:
    if part is None:
        return " | | | |"
    return (
        f" {_cell(part.text)} | {part.interval} | {part.wanted} | "
        f"{part.word or 'reported'} |"
    )


def _wrong(records: dict[str, Record]) -> str:
    lines = [
        "# Corrections\n",
        "What the articles state and what is so. The evidence is the verdict of the "
        "claim, with the study that measured it.\n",
        "| source | stated | found | evidence |",
        "| --- | --- | --- | --- |",
    ]
    for one in CORRECTIONS:
        words = {overall(claim, records)[0] for claim in one.claims}
        if one.is_measured and words == {SUPPORTED}:
            continue
        evidence = []
        for claim in one.claims:
            word, _ = overall(claim, records)
            by = [
                r.study
                for r in records.values()
                for v in r.verdicts
                if v.claim == claim
            ]
            links = " ".join(f"[{study}]({study}.md)" for study in by)
            evidence.append(f"{claim} {word or 'not run'} {links}".strip())
        lines.append(
            f"| {one.source} | {one.stated} | {one.found} | {'; '.join(evidence)} |"
        )
    return "\n".join(lines) + "\n"


def _bold(word: str) -> str:
    return f"**{word}**" if word else "not run"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
